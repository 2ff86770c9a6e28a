"""feature_maps.py: each map is its paper's equation, folds exactly where it can, and can be fit to softmax."""

import pytest
import torch
from helpers_feature_maps import HEADS, SIZE, WIDTH, every_map, random_inputs, random_map
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from recur_gpt2.errors import InputError
from recur_gpt2.ops.feature_maps import FEATURE_MAPS, make_feature_map

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def t2r(feature_map, head, x):
    return torch.relu(feature_map.weight[head].T @ x + feature_map.bias[head])


def hedgehog(feature_map, head, x):
    y = feature_map.weight[head].T @ x + feature_map.bias[head]
    exponentials = torch.cat((torch.exp(y), torch.exp(-y)))
    return (exponentials / exponentials.sum()).clamp_min(1e-6)


def elu(feature_map, head, x):
    return torch.stack([each + 1 if each > 0 else torch.exp(each) for each in x])


def rfa(feature_map, head, x):
    angles = [
        (feature_map.sigma[head] * direction) @ x / x.norm() for direction in feature_map.directions[head].unbind(dim=1)
    ]
    sines, cosines = [a.sin() for a in angles], [a.cos() for a in angles]
    return torch.stack(sines + cosines) / len(angles) ** 0.5


BY_DEFINITION = {"t2r": t2r, "hedgehog": hedgehog, "elu": elu, "rfa": rfa}


@every_map
def test_a_map_is_its_equation_for_each_head(name):
    feature_map, x = random_map(name), random_inputs(2, HEADS, 5, WIDTH)
    features = feature_map(x)
    assert features.shape == (2, HEADS, 5, feature_map.out_features)
    for row in range(2):
        for head in range(HEADS):
            for token in range(5):
                expected = BY_DEFINITION[name](feature_map, head, x[row, head, token])
                assert_close(features[row, head, token], expected, **EXACT)


@every_map
def test_any_dimensions_may_lead(name):
    feature_map, x = random_map(name), random_inputs(2, 4, HEADS, 5, WIDTH)
    assert_close(feature_map(x)[1, 2], feature_map(x[1, 2]), **EXACT)


@every_map
def test_queries_are_scaled_before_the_map_and_keys_are_not(name):
    feature_map = random_map(name)
    query, key = random_inputs(2, HEADS, 5, WIDTH), random_inputs(2, HEADS, 5, WIDTH, seed=1)
    scale = WIDTH**-0.5 if name == "t2r" else 1.0
    features = feature_map.features(query, key)
    assert_close(features[0], feature_map(scale * query), **EXACT)
    assert_close(features[1], feature_map(key), **EXACT)


def test_the_number_of_features_is_what_was_asked_for():
    for size in (2, 32, 64):
        for name in ("t2r", "rfa", "hedgehog"):
            assert make_feature_map(name, HEADS, WIDTH, size).out_features == size
        assert make_feature_map("elu", HEADS, WIDTH, size).out_features == WIDTH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_map
def test_features_keep_the_type_and_stay_near_the_true_ones(name, dtype):
    feature_map, x = random_map(name, dtype=dtype), random_inputs(2, HEADS, 50, WIDTH, dtype=dtype)
    features = feature_map(x)
    exact = feature_map.double()(x.double())
    assert features.dtype == dtype
    assert (features.double() - exact).norm() < 4 * torch.finfo(dtype).eps * exact.norm()


@every_map
def test_under_autocast_16_bit_inputs_give_16_bit_features(name):
    feature_map, x = random_map(name, dtype=torch.float32), random_inputs(2, HEADS, 5, WIDTH, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        features = feature_map(x)
    assert features.dtype == torch.bfloat16
    assert_close(features, feature_map(x.float()).to(torch.bfloat16), rtol=3e-2, atol=3e-2)


@every_map
def test_gradients_agree_with_finite_differences(name):
    feature_map, x = random_map(name), random_inputs(1, HEADS, 2, WIDTH).requires_grad_()
    parameters = list(feature_map.parameters())

    def function(x, *parameters):
        named = dict(zip(dict(feature_map.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(feature_map, named, x)

    assert torch.autograd.gradcheck(function, (x, *parameters))


@every_map
def test_large_inputs_and_zeros_give_finite_features_and_gradients(name):
    feature_map = make_feature_map(name, HEADS, WIDTH, SIZE)
    for size in (0.0, 1e4):
        x = (size * random_inputs(1, HEADS, 4, WIDTH, dtype=torch.float32)).requires_grad_()
        features = feature_map(x)
        features.sum().backward()
        assert features.isfinite().all()
        assert x.grad.isfinite().all()


def test_only_rfa_has_negative_features():
    x = random_inputs(2, HEADS, 50, WIDTH)
    negative = {name for name in FEATURE_MAPS if (random_map(name)(x) < 0).any()}
    assert negative == {"rfa"}


# ---- each map's own promises -----------------------------------------------------------------------------------------


def test_elu_is_positive_in_16_bit_where_adding_one_to_elu_is_not():
    x = torch.full((1, HEADS, 1, WIDTH), -9.0, dtype=torch.bfloat16)
    assert (nn.functional.elu(x) + 1 == 0).all()
    assert_close(make_feature_map("elu", HEADS, WIDTH, WIDTH)(x), x.exp())


def test_rfa_is_on_average_the_gaussian_kernel_of_directions():
    feature_map = random_map("rfa", size=20000)
    query, key = random_inputs(HEADS, 4, WIDTH), random_inputs(HEADS, 4, WIDTH, seed=1)
    products = feature_map(query) @ feature_map(key).mT
    query, key = (each / each.norm(dim=-1, keepdim=True) for each in (query, key))
    distance = (feature_map.sigma[:, None, None] * (query[:, :, None] - key[:, None])).square().sum(dim=-1)
    assert_close(products, torch.exp(-distance / 2), rtol=0, atol=0.04)
    assert_close(feature_map(7 * query), feature_map(query), **EXACT)


def test_rfa_directions_are_a_function_of_the_seed_and_are_saved():
    first = make_feature_map("rfa", HEADS, WIDTH, SIZE, seed=1)
    torch.manual_seed(5)
    second, other = (make_feature_map("rfa", HEADS, WIDTH, SIZE, seed=seed) for seed in (1, 2))
    assert torch.equal(first.directions, second.directions)
    assert not torch.equal(first.directions, other.directions)
    other.load_state_dict(first.state_dict())
    x = random_inputs(1, HEADS, 3, WIDTH, dtype=torch.float32)
    assert torch.equal(other(x), first(x))
    assert "directions" not in dict(first.named_parameters())


def test_rfa_denominators_stay_off_the_floor_as_made():
    """The least favourable case: every key points away from every query."""
    feature_map = make_feature_map("rfa", HEADS, 64, 32)
    query = random_inputs(1, HEADS, 200, 64, dtype=torch.float32)
    assert (feature_map(query) * feature_map(-query)).sum(dim=-1).min() > 10 * feature_map.floor


def test_hedgehog_starts_as_the_identity():
    x = random_inputs(2, HEADS, 5, WIDTH, dtype=torch.float32)
    features = make_feature_map("hedgehog", HEADS, WIDTH, 2 * WIDTH)(x)
    assert_close(features, torch.cat((x, -x), dim=-1).softmax(dim=-1))
    fewer = make_feature_map("hedgehog", HEADS, WIDTH, 4)(x)
    assert_close(fewer, torch.cat((x[..., :2], -x[..., :2]), dim=-1).softmax(dim=-1))


def test_hedgehog_denominators_stay_off_the_floor():
    feature_map, x = make_feature_map("hedgehog", HEADS, WIDTH, 2 * WIDTH), torch.zeros(1, HEADS, 1, WIDTH)
    x[..., 0] = 100.0
    assert (feature_map(x) * feature_map(-x)).sum(dim=-1).min() >= feature_map.floor


def test_t2r_starts_without_bias_and_without_dead_features():
    feature_map = make_feature_map("t2r", HEADS, WIDTH, 32)
    active = (feature_map(random_inputs(1, HEADS, 500, WIDTH, dtype=torch.float32)) > 0).float().mean(dim=(0, 2))
    assert (feature_map.bias == 0).all()
    assert ((active > 0.3) & (active < 0.7)).all()


# ---- folding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t2r", "hedgehog"])
def test_a_folded_projection_gives_the_same_features(name):
    feature_map, model_width = random_map(name), HEADS * WIDTH
    hidden, projection = random_inputs(2, 5, model_width), Conv1D(model_width, model_width).double()
    nn.init.normal_(projection.bias)
    x = projection(hidden).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
    for expected, scale in ((feature_map(x), 1.0), (feature_map(0.3 * x), 0.3)):
        weight, bias = feature_map.fold(projection.weight, projection.bias, scale=scale)
        folded = (hidden @ weight + bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        assert weight.shape == (model_width, HEADS * feature_map.weight.shape[2])
        assert_close(feature_map.activate(folded), expected, **EXACT)


def test_folding_rounds_once():
    feature_map = random_map("t2r", dtype=torch.float32)
    weight, bias = random_inputs(16, HEADS * WIDTH, dtype=torch.float32), random_inputs(HEADS * WIDTH).float()
    exact = random_map("t2r").double()
    exact.load_state_dict(feature_map.state_dict())
    for actual, expected in zip(
        feature_map.fold(weight, bias), exact.fold(weight.double(), bias.double()), strict=True
    ):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected.float())


# ---- making ----------------------------------------------------------------------------------------------------------


@every_map
def test_a_map_is_a_function_of_its_arguments_alone(name):
    torch.manual_seed(1)
    first = make_feature_map(name, HEADS, WIDTH, SIZE).state_dict()
    torch.manual_seed(2)
    second = make_feature_map(name, HEADS, WIDTH, SIZE).state_dict()
    assert all(torch.equal(first[each], second[each]) for each in first)


@every_map
def test_a_map_can_be_made_without_memory_and_filled_later(name):
    """As transformers' from_pretrained makes models."""
    with torch.device("meta"):
        feature_map = make_feature_map(name, HEADS, WIDTH, SIZE)
    made = make_feature_map(name, HEADS, WIDTH, SIZE)
    feature_map.load_state_dict(made.state_dict(), assign=True)
    x = random_inputs(1, HEADS, 3, WIDTH, dtype=torch.float32)
    assert torch.equal(feature_map(x), made(x))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("relu", 32, "feature_map='relu' is not known; use one of t2r, elu, rfa, hedgehog"),
        ("t2r", 0, "feature_size=0 must be at least 1"),
        ("rfa", 7, "feature_size=7 is odd"),
        ("hedgehog", 7, "feature_size=7 is odd"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_way_out(name, size, message):
    with pytest.raises(InputError, match=message):
        make_feature_map(name, HEADS, WIDTH, size)
