"""feature_map_fitting.py measures what the attention operators really weigh, and brings it nearer to softmax."""

import pytest
import torch
from helpers_feature_maps import HEADS, SIZE, WIDTH, every_map, random_inputs, random_map
from torch import nn
from torch.nn.functional import pad
from torch.testing import assert_close

from recur_gpt2.models.feature_map_fitting import fit_gate, fit_to_softmax, softmax_divergence
from recur_gpt2.ops.feature_maps import make_feature_map
from recur_gpt2.ops.hybrid import MixingGate, hybrid_attention
from recur_gpt2.ops.linear import linear_attention

NEAR = 5


def random_gate():
    gate = MixingGate(HEADS, WIDTH, NEAR).double()
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    return gate


def weights(feature_map, query, key):
    """The linear attention's weights: what it makes of one-hot values."""
    identity = torch.eye(query.shape[2], dtype=query.dtype).expand(*query.shape[:2], -1, -1)
    return linear_attention(*feature_map.features(query, key), identity, floor=feature_map.floor)[0]


def softmax_weights(query, key):
    future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    return (query @ key.mT * WIDTH**-0.5).masked_fill(future, -torch.inf).softmax(dim=-1)


@every_map
def test_the_divergence_is_that_of_the_attentions_weights_and_counts_negative_ones(name):
    feature_map = random_map(name)
    if name == "rfa":
        nn.init.constant_(feature_map.sigma, 3.0)
    query, key = random_inputs(2, HEADS, 7, WIDTH), random_inputs(2, HEADS, 7, WIDTH, seed=1)
    wanted = softmax_weights(query, key)
    ours = weights(feature_map, query, key)
    assert bool((ours < 0).any()) == (name == "rfa")
    log_ratio = wanted.clamp_min(1e-30).log() - (ours.clamp_min(0) + 1e-4).log()
    expected = ((wanted * log_ratio).sum(dim=-1) - ours.clamp_max(0).sum(dim=-1)).mean()
    assert_close(softmax_divergence(feature_map, query, key), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["t2r", "rfa", "hedgehog"])
def test_fitting_brings_a_map_nearer_to_softmax(name):
    feature_map = make_feature_map(name, HEADS, WIDTH, 16)
    query, key = (random_inputs(4, HEADS, 24, WIDTH, seed=seed, dtype=torch.float32) for seed in (0, 1))
    query.requires_grad_()
    before = softmax_divergence(feature_map, query, key).item()
    after = fit_to_softmax(feature_map, query, key, steps=60)
    assert after < 0.95 * before
    assert after == pytest.approx(softmax_divergence(feature_map, query, key).item(), rel=1e-4)
    assert query.grad is None


def test_a_map_with_nothing_to_learn_is_measured_only():
    feature_map = make_feature_map("elu", HEADS, WIDTH, SIZE)
    query, key = (random_inputs(2, HEADS, 9, WIDTH, seed=seed, dtype=torch.float32) for seed in (0, 1))
    assert fit_to_softmax(feature_map, query, key) == pytest.approx(softmax_divergence(feature_map, query, key).item())


def test_features_that_are_all_zero_are_the_worst_fit():
    feature_map = make_feature_map("t2r", HEADS, WIDTH, SIZE).double()
    query, key = random_inputs(1, HEADS, 9, WIDTH), random_inputs(1, HEADS, 9, WIDTH, seed=1)
    alive = softmax_divergence(feature_map, query, key)
    nn.init.constant_(feature_map.bias, -1e3)
    assert softmax_divergence(feature_map, query, key) > 2 * alive


# ---- with near places ------------------------------------------------------------------------------------------------


def near_weights(feature_map, gate, query, key):
    """What `hybrid_attention` makes of one-hot values."""
    rows, _, length, _ = query.shape
    scaled = query * WIDTH**-0.5
    identity = torch.eye(length, dtype=query.dtype).expand(rows, HEADS, -1, -1)
    key, identity = (pad(each, (0, 0, NEAR, 0)) for each in (key, identity))
    there = (torch.arange(NEAR + length) >= NEAR).expand(rows, -1)
    phi = feature_map.features(query, key[:, :, :length])
    # Values as wide as keys, some columns at a time: the operator takes no others.
    parts = identity.split(WIDTH, dim=-1)
    outs = [
        hybrid_attention(scaled, key, pad(part, (0, WIDTH - part.shape[-1])), *phi, gate(scaled), mask=there)
        for part in parts
    ]
    return torch.cat(outs, dim=-1)[..., :length]


@pytest.mark.parametrize("name", ["t2r", "hedgehog", "elu"])
def test_the_divergence_with_near_places_is_that_of_what_near_attention_weighs(name):
    feature_map, gate = random_map(name), random_gate()
    query, key = random_inputs(2, HEADS, 12, WIDTH), random_inputs(2, HEADS, 12, WIDTH, seed=1)
    wanted = softmax_weights(query, key)
    ours = near_weights(feature_map, gate, query, key)
    assert_close(ours.sum(dim=-1), torch.ones_like(ours[..., 0]))
    log_ratio = wanted.clamp_min(1e-30).log() - (ours + 1e-4).log()
    actual = softmax_divergence(feature_map, query, key, far_gate=gate)
    assert_close(actual, (wanted * log_ratio).sum(dim=-1).mean(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["t2r", "hedgehog", "elu"])
def test_a_gate_is_fitted_so_that_far_places_weigh_what_they_weigh_in_softmax(name):
    """On average in the logarithm, whatever the query; however far off the map is."""
    feature_map, gate = random_map(name), random_gate()
    query, key = random_inputs(4, HEADS, 40, WIDTH), random_inputs(4, HEADS, 40, WIDTH, seed=1)
    fit_gate(feature_map, gate, query, key)
    far = torch.ones(40, 40, dtype=torch.bool).tril(-NEAR)
    scaled = (query * WIDTH**-0.5)[:, :, NEAR:]
    phi_query, phi_key = feature_map.features(query, key)
    wanted = (scaled @ key.mT).masked_fill(~far[NEAR:], -torch.inf).logsumexp(dim=-1)
    given = ((phi_query @ phi_key.mT) * far).sum(dim=-1)[:, :, NEAR:].clamp_min(feature_map.floor).log()
    residual = wanted - given - gate(scaled)[..., 0]
    assert residual.mean(dim=(0, 2)).abs().max() < 1e-6
    spread = (wanted - given).var(dim=(0, 2))
    assert (residual.var(dim=(0, 2)) <= spread).all()
    covariance = (residual[..., None] * (scaled - scaled.mean(dim=(0, 2), keepdim=True))).mean(dim=(0, 2))
    assert covariance.abs().max() < 0.01


def test_a_gate_without_far_places_stays_as_it_is():
    gate, feature_map = random_gate(), random_map("t2r")
    before = gate.weight.clone()
    fit_gate(feature_map, gate, random_inputs(2, HEADS, NEAR, WIDTH), random_inputs(2, HEADS, NEAR, WIDTH, seed=1))
    assert torch.equal(gate.weight, before)


@pytest.mark.parametrize("name", ["t2r", "rfa", "hedgehog", "elu"])
def test_fitting_with_near_places_begins_at_the_gate_and_goes_on(name):
    feature_map, gate = make_feature_map(name, HEADS, WIDTH, 16), MixingGate(HEADS, WIDTH, NEAR)
    query, key = (random_inputs(4, HEADS, 24, WIDTH, seed=seed, dtype=torch.float32) for seed in (0, 1))
    fit_gate(feature_map, gate, query, key)
    before = softmax_divergence(feature_map, query, key, far_gate=gate).item()
    after = fit_to_softmax(feature_map, query, key, far_gate=gate, steps=60)
    assert after < before
