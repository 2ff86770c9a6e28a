import pytest
import torch
from torch.testing import assert_close

from recur_gpt2.ops import pointer
from recur_gpt2.ops.pointer import pointer_logits, pointer_shares

ROWS, POSITIONS, SLOTS, WIDTH, VOCABULARY = 2, 5, 9, 3, 11
CEILING = torch.tensor(6.0, dtype=torch.float64)


def random_inputs():
    """Queries, sentinel scores, slots of which some are empty in one row, and targets of which one is not scored."""
    generator = torch.Generator().manual_seed(0)
    shapes = (ROWS, POSITIONS, WIDTH), (ROWS, POSITIONS), (ROWS, SLOTS, WIDTH)
    query, sentinel, keys = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    tokens = torch.randint(VOCABULARY, (ROWS, SLOTS), generator=generator)
    slots = torch.cat((keys, tokens[..., None] + 1.0), dim=-1)
    slots[0, :4] = 0
    targets = torch.randint(VOCABULARY, (ROWS, POSITIONS), generator=generator)
    targets[1, 2] = -100
    return query, sentinel, slots, targets


def reference(query, sentinel, keys, slots):
    """Softmax over the sentinel and the slots that are not empty -> shares (R, n, 1 + S)."""
    scores = torch.cat((sentinel[..., None], query @ keys.mT), dim=-1)
    empty = torch.nn.functional.pad(slots[..., -1] == 0, (1, 0))
    return scores.masked_fill(empty[:, None], -torch.inf).softmax(dim=-1)


@pytest.mark.parametrize("scores", [1, 2 * SLOTS, 10**6], ids=["one position", "two positions", "all positions"])
def test_shares_and_their_gradients_are_those_of_a_softmax(monkeypatch, scores):
    monkeypatch.setattr(pointer, "CPU_SCORES", scores)
    query, sentinel, slots, targets = random_inputs()
    keys, tokens = slots[..., :-1].clone(), slots[..., -1:]
    inputs = [each.requires_grad_() for each in (query, sentinel, keys)]
    log_model, copied = pointer_shares(query, sentinel, torch.cat((keys, tokens), dim=-1), targets, CEILING)
    shares = reference(query, sentinel, keys, slots)
    matches = slots[:, None, :, -1] == targets[..., None] + 1
    expected = shares[..., 0].log(), (shares[..., 1:] * matches).sum(dim=-1)
    assert_close((log_model, copied), expected)
    assert copied[1, 2] == 0

    def mixed(log_model, copied):
        return (log_model.sin() + copied.exp()).sum()

    assert_close(torch.autograd.grad(mixed(log_model, copied), inputs), torch.autograd.grad(mixed(*expected), inputs))


def test_logits_are_those_of_the_mixture():
    query, sentinel, slots, _ = random_inputs()
    logits = torch.randn(ROWS, POSITIONS, VOCABULARY, dtype=torch.float64)
    shares = reference(query, sentinel, slots[..., :-1], slots)
    expected = shares[..., :1] * logits.softmax(dim=-1)
    for row in range(ROWS):
        for slot in range(SLOTS):
            if slots[row, slot, -1]:
                expected[row, :, int(slots[row, slot, -1]) - 1] += shares[row, :, 1 + slot]
    found = pointer_logits(logits, query, sentinel, slots, CEILING)
    assert_close(found.softmax(dim=-1), expected)
    assert_close(found.logsumexp(dim=-1), logits.logsumexp(dim=-1))


def test_empty_slots_leave_the_logits_as_they_are():
    query, sentinel, slots, targets = random_inputs()
    logits = torch.randn(ROWS, POSITIONS, VOCABULARY, dtype=torch.float64)
    assert torch.equal(pointer_logits(logits, query, sentinel, 0 * slots, CEILING), logits)
    log_model, copied = pointer_shares(query, sentinel, 0 * slots, targets, CEILING)
    assert not log_model.any()
    assert not copied.any()


def test_scores_far_apart_are_finite():
    """A sentinel or a slot that takes all, in float32."""
    slots = torch.tensor([[[1.0, 3.0], [-1.0, 4.0]]])
    query, ceiling = torch.full((1, 1, 1), 60.0), torch.tensor(60.0)
    for score in (-300.0, 300.0):
        sentinel = torch.full((1, 1), score, requires_grad=True)
        log_model, copied = pointer_shares(query, sentinel, slots, torch.tensor([[2]]), ceiling)
        assert_close(log_model, torch.tensor([[min(0.0, score - 60)]]))
        assert_close(copied, torch.tensor([[float(score < 0)]]))
        (log_model + copied).sum().backward()
        assert sentinel.grad.isfinite().all()
        assert pointer_logits(torch.zeros(1, 1, 5), query, sentinel, slots, ceiling).isfinite().all()
