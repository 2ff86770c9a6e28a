"""packing.py: padding is squeezed out wherever it stands, and every number comes back to its own token."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recur_gpt2.models.packing import Packing

MASKS = st.integers(1, 9).flatmap(
    lambda places: st.lists(st.lists(st.booleans(), min_size=places, max_size=places), min_size=1, max_size=4)
)
quick = settings(max_examples=60, deadline=None)


def make(mask, dtype=torch.int64):
    """A packing of the ids 1, 2, 3, ... and the tokens of each row, in order."""
    mask = torch.tensor(mask)
    ids = 1 + torch.arange(mask.numel()).view(mask.shape)
    return Packing(ids, mask.to(dtype)), ids, [row[keep] for row, keep in zip(ids, mask, strict=True)]


@quick
@given(mask=MASKS, dtype=st.sampled_from([torch.int64, torch.bool, torch.float32]))
def test_each_rows_tokens_come_first_in_their_order(mask, dtype):
    packing, _, tokens = make(mask, dtype)
    assert packing.lengths.tolist() == [len(row) for row in tokens]
    assert packing.lengths.device.type == "cpu"
    for row, expected in enumerate(tokens):
        assert packing.tokens[row, : len(expected)].tolist() == expected.tolist()


def test_no_mask_and_a_full_mask_change_nothing():
    ids = torch.arange(12).view(3, 4)
    for mask in (None, torch.ones(3, 4), torch.ones(3, 4, dtype=torch.bool)):
        packing = Packing(ids, mask)
        assert packing.tokens is ids
        assert packing.pack(ids) is ids
        assert packing.lengths.tolist() == [4, 4, 4]


@quick
@given(mask=MASKS, trailing=st.sampled_from([(), (2,), (2, 3)]))
def test_other_values_are_packed_as_the_ids_are(mask, trailing):
    packing, ids, tokens = make(mask)
    values = ids.view(*ids.shape, *[1] * len(trailing)) * torch.ones(trailing, dtype=torch.int64)
    packed = packing.pack(values)
    for row, expected in enumerate(tokens):
        expected = expected.view(-1, *[1] * len(trailing)).expand(-1, *trailing)
        assert torch.equal(packed[row, : len(expected)], expected)


@quick
@given(mask=MASKS, data=st.data())
def test_taking_gives_a_stretch_of_each_row_and_token_0_beyond_its_end(mask, data):
    packing, ids, tokens = make(mask)
    rows = data.draw(st.lists(st.integers(0, len(mask) - 1), min_size=1, max_size=4))
    starts = [data.draw(st.integers(0, len(tokens[row]))) for row in rows]
    count = data.draw(st.integers(1, 2 * ids.shape[1]))
    taken = packing.take(torch.tensor(rows), torch.tensor(starts), count)
    assert taken.shape == (len(rows), count)
    for got, row, start in zip(taken.tolist(), rows, starts, strict=True):
        expected = tokens[row][start : start + count].tolist()
        assert got == expected + [0] * (count - len(expected))


def pieces_of(packing, data):
    """Random stretches that cover all rows' tokens, as the model would make them, holding each token's own id."""
    done, pieces = torch.zeros_like(packing.lengths), []
    while bool((done < packing.lengths).any()):
        left = (done < packing.lengths).nonzero().squeeze(1).tolist()
        rows = torch.tensor(sorted(data.draw(st.sets(st.sampled_from(left), min_size=1))))
        wanted = torch.tensor([data.draw(st.integers(1, 5)) for _ in rows])
        counts = torch.minimum(wanted, packing.lengths[rows] - done[rows])
        width = int(counts.max()) + data.draw(st.integers(0, 2))
        hidden = packing.take(rows, done[rows], width)[..., None].expand(-1, -1, 2).double()
        inside = (torch.arange(width) < counts[:, None])[..., None]
        pieces.append((rows, done[rows], counts, [torch.where(inside, hidden * layer, torch.nan) for layer in (1, 2)]))
        done[rows] += counts
    return pieces


@quick
@given(mask=MASKS.filter(lambda mask: any(map(any, mask))), data=st.data())
def test_unpacking_puts_every_number_where_its_token_stood_and_zero_at_padding(mask, data):
    packing, ids, _ = make(mask)
    layers = packing.unpack(pieces_of(packing, data))
    expected = (ids * torch.tensor(mask))[..., None].expand(-1, -1, 2).double()
    assert len(layers) == 2
    for factor, values in zip((1, 2), layers, strict=True):
        assert torch.equal(values, factor * expected)


def test_rows_of_equal_length_with_padding_are_unpacked_too():
    """The shortcut for stretches of all rows is not for padded ones."""
    packing, _, _ = make([[False, True, True], [True, False, True]])
    rows, starts = torch.arange(2), torch.zeros(2, dtype=torch.int64)
    both = packing.take(rows, starts, 2)[..., None]
    (values,) = packing.unpack([(rows, starts, torch.tensor([2, 2]), [both])])
    assert values.squeeze(-1).tolist() == [[0, 2, 3], [4, 0, 6]]


def test_gradients_flow_through_packing_and_unpacking():
    packing, ids, _ = make([[False, True, True], [True, False, False]])
    hidden = torch.randn(2, 3, 2, requires_grad=True)
    packed = packing.pack(hidden)
    counts = packing.lengths
    (values,) = packing.unpack([(torch.arange(2), torch.zeros(2, dtype=torch.int64), counts, [packed])])
    (gradient,) = torch.autograd.grad((values * ids[..., None]).sum(), hidden)
    assert torch.equal(gradient, (ids * torch.tensor([[0, 1, 1], [1, 0, 0]]))[..., None].expand(-1, -1, 2).float())
