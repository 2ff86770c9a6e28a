"""batches.py: every token is a target once, in an order that the seed decides and that can be gone on with anywhere."""

from itertools import count, takewhile

import numpy as np
import pytest
import torch
from helpers_training import SmallCorpus
from hypothesis import given, settings
from hypothesis import strategies as st

from recur_gpt2.data.batches import LanePosition, Lanes, TrainingLanes
from recur_gpt2.errors import InputError
from recur_gpt2.utils.tensors import IGNORE_INDEX

lengths_of_documents = st.lists(st.integers(2, 30), min_size=1, max_size=8)
small = st.integers(1, 5)
untimed = settings(deadline=None)


def numbered_documents(lengths):
    """Documents in which no token occurs twice, so that a token says where it stood."""
    tokens = np.arange(1, sum(lengths) + 1)
    return np.split(tokens, np.cumsum(lengths)[:-1])


def all_segments(lanes, windows):
    return list(iter(lambda: lanes.segment(windows), None))


def single_walk(lengths, *, lanes, window, windows):
    documents = numbered_documents(lengths)
    return documents, all_segments(Lanes(iter(documents), lanes=lanes, window=window), windows)


def lane_windows(segments, lane):
    """The windows of one lane, one after another: (inputs, targets, starts, document, window) each."""
    for segment in segments:
        names = "input_ids", "targets", "starts", "document", "window"
        yield from zip(*(getattr(segment, name)[lane] for name in names), strict=True)


def assert_equal_segments(left, right):
    for name in ("input_ids", "targets", "starts", "document", "window"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


def read_tokens(lanes, windows, segments):
    """The documents that a walk has read in full so far, by number."""
    documents = {}
    for _ in range(segments):
        segment = lanes.segment(windows)
        for number in segment.document.unique().tolist():
            here = segment.targets[segment.document == number]
            documents.setdefault(number, []).extend(here[here != IGNORE_INDEX].tolist())
    return documents


# ---- one walk --------------------------------------------------------------------------------------------------------


@untimed
@given(lengths=lengths_of_documents, lanes=small, window=st.integers(2, 9), windows=small)
def test_every_token_but_a_documents_first_is_a_target_exactly_once(lengths, lanes, window, windows):
    documents, segments = single_walk(lengths, lanes=lanes, window=window, windows=windows)
    targets = torch.cat([segment.targets.flatten() for segment in segments])
    wanted = np.concatenate([tokens[1:] for tokens in documents])
    assert sorted(targets[targets != IGNORE_INDEX].tolist()) == sorted(wanted.tolist())
    assert sum(segment.scored for segment in segments) == len(wanted)


@untimed
@given(lengths=lengths_of_documents, lanes=small, window=st.integers(2, 9), windows=small)
def test_a_lane_walks_each_document_from_its_first_window_to_its_last(lengths, lanes, window, windows):
    documents, segments = single_walk(lengths, lanes=lanes, window=window, windows=windows)
    seen = []
    for lane in range(lanes):
        for inputs, targets, _, number, place in lane_windows(segments, lane):
            if number < 0:
                continue
            tokens = documents[number]
            piece = tokens[place * window : (place + 1) * window + 1]
            assert inputs[: len(piece[:window])].tolist() == piece[:window].tolist()
            assert targets[: len(piece) - 1].tolist() == piece[1:].tolist()
            assert (inputs[len(piece) :] == 0).all()
            assert (targets[len(piece) - 1 :] == IGNORE_INDEX).all()
            seen.append((int(number), int(place)))
    windows_of = [range(-(-(length - 1) // window)) for length in lengths]
    assert sorted(seen) == [(number, place) for number, places in enumerate(windows_of) for place in places]
    for lane in range(lanes):
        order = [(int(number), int(place)) for *_, number, place in lane_windows(segments, lane) if number >= 0]
        assert order == sorted(order), "a lane goes forward only"


@untimed
@given(lengths=lengths_of_documents, lanes=small, window=st.integers(2, 9), windows=small)
def test_starts_mark_first_windows_and_idle_ones_and_follow_every_padded_one(lengths, lanes, window, windows):
    _, segments = single_walk(lengths, lanes=lanes, window=window, windows=windows)
    for lane in range(lanes):
        padded, before = True, None
        for _, targets, starts, number, place in lane_windows(segments, lane):
            assert bool(starts) == (number < 0 or place == 0)
            if number < 0:
                assert (targets == IGNORE_INDEX).all()
            if padded:
                assert starts
            if not starts:
                assert (int(number), int(place)) == (before[0], before[1] + 1)
            padded, before = bool((targets == IGNORE_INDEX).any()), (int(number), int(place))


def test_lanes_are_read_one_window_at_a_time_when_iterated():
    documents = numbered_documents([20, 3, 9])
    iterated = list(Lanes(iter(documents), lanes=2, window=4))
    asked = all_segments(Lanes(iter(documents), lanes=2, window=4), 1)
    assert len(iterated) == len(asked)
    for left, right in zip(iterated, asked, strict=True):
        assert_equal_segments(left, right)


def test_a_walk_without_documents_has_no_segment():
    assert Lanes(iter([]), lanes=2, window=4).segment(3) is None


# ---- training walks --------------------------------------------------------------------------------------------------


@untimed
@given(lengths=lengths_of_documents, window=st.integers(2, 9), seed=st.integers(0, 99), streamed=st.booleans())
def test_every_epoch_has_every_token_exactly_once(lengths, window, seed, streamed):
    documents = numbered_documents(lengths)
    lanes = TrainingLanes(SmallCorpus(documents, streamed=streamed), lanes=1, window=window, seed=seed)
    epochs = 2
    found = []
    segments = iter(lambda: lanes.segment(1), None)
    for segment in takewhile(lambda segment: segment.document[0, 0] < epochs * len(lengths), segments):
        found += segment.targets[segment.targets != IGNORE_INDEX].tolist()
    wanted = np.concatenate([tokens[1:] for tokens in documents]).tolist()
    assert sorted(found[: len(wanted)]) == sorted(wanted)
    assert sorted(found[len(wanted) :]) == sorted(wanted)


def test_the_order_is_a_function_of_the_seed():
    corpus = SmallCorpus(numbered_documents([5] * 12))

    def order(seed):
        lanes = TrainingLanes(corpus, lanes=2, window=4, seed=seed)
        return torch.cat([lanes.segment(3).input_ids for _ in range(20)], dim=1)

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))


def test_epochs_differ_in_order():
    lanes = TrainingLanes(SmallCorpus(numbered_documents([5] * 12)), lanes=1, window=4, seed=0)
    first, second = (torch.cat([lanes.segment(1).input_ids for _ in range(12)]) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first.flatten().sort().values, second.flatten().sort().values)


@untimed
@given(
    lengths=st.lists(st.integers(2, 30), min_size=3, max_size=8),
    lanes=st.integers(1, 3),
    window=st.integers(2, 9),
    windows=small,
    read=st.integers(0, 40),
    seed=st.integers(0, 9),
    streamed=st.booleans(),
)
def test_a_walk_resumed_anywhere_goes_on_as_if_it_had_not_stopped(
    lengths, lanes, window, windows, read, seed, streamed
):
    corpus = SmallCorpus(numbered_documents(lengths), streamed=streamed)
    options = {"lanes": lanes, "window": window, "seed": seed}
    walk = TrainingLanes(corpus, **options)
    for _ in range(read):  # up to dozens of epochs
        walk.segment(windows)
    resumed = TrainingLanes(corpus, **options, position=LanePosition(**vars(walk.position())))
    for _ in range(12):
        assert resumed.position() == walk.position()
        assert_equal_segments(resumed.segment(windows), walk.segment(windows))


@untimed
@given(lengths=st.lists(st.integers(2, 12), min_size=3, max_size=7), read=st.integers(0, 15), streamed=st.booleans())
def test_a_share_resumed_anywhere_goes_on_as_if_it_had_not_stopped(lengths, read, streamed):
    corpus = SmallCorpus(numbered_documents(lengths), streamed=streamed)
    for index in range(3):
        options = {"lanes": 1, "window": 4, "seed": 0, "share": (index, 3)}
        walk = TrainingLanes(corpus, **options)
        for _ in range(read):
            walk.segment(2)
        resumed = TrainingLanes(corpus, **options, position=walk.position())
        for _ in range(8):
            assert_equal_segments(resumed.segment(2), walk.segment(2))


@untimed
@given(documents=st.integers(6, 12), processes=st.integers(1, 3), lanes=st.integers(1, 2), streamed=st.booleans())
def test_shares_of_processes_are_disjoint_and_complete(documents, processes, lanes, streamed):
    corpus = SmallCorpus(numbered_documents([5] * documents), streamed=streamed)
    whole = TrainingLanes(corpus, lanes=1, window=4, seed=3)
    together = read_tokens(whole, 1, segments=2 * documents)
    rounds = 2 * documents // (processes * lanes)
    shares = []
    for index in range(processes):
        walk = TrainingLanes(corpus, lanes=lanes, window=4, seed=3, share=(index, processes))
        shares.append(read_tokens(walk, 1, segments=rounds))
    for number in range(rounds * lanes * processes):
        assert shares[number % processes][number // processes] == together[number]


@pytest.mark.parametrize("share", [(0, 1), (1, 2)])
def test_more_lanes_than_documents_are_refused_in_one_clear_sentence(share):
    documents = 4 * share[1]
    corpus = SmallCorpus(numbered_documents([5] * documents))
    TrainingLanes(corpus, lanes=4, window=4, seed=0, share=share)
    with pytest.raises(InputError, match=r"^lanes=5 exceeds the 4 training documents of a process; use --lanes 4 or"):
        TrainingLanes(corpus, lanes=5, window=4, seed=0, share=share)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_corpus_without_documents_is_refused(streamed):
    with pytest.raises(InputError, match=r"no documents to train on|the 0 training documents .*; give more"):
        TrainingLanes(SmallCorpus([], streamed=streamed), lanes=1, window=4, seed=0).segment(1)


def test_documents_are_read_only_when_their_turn_comes():
    asked = count()

    class Watched(SmallCorpus):
        def documents(self, seed=None, epoch=0, skip=0):
            for tokens in super().documents(seed, epoch, skip):
                next(asked)
                yield tokens

    lanes = TrainingLanes(Watched(numbered_documents([9] * 50), streamed=True), lanes=2, window=4, seed=0)
    lanes.segment(2)
    assert next(asked) == 2
