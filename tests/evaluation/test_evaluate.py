"""evaluate.py: each protocol against a plain loop that says what it means, and the numbers made from the losses."""

import gc
import math

import numpy as np
import pytest
import torch
from helpers_training import RECURRENCES, WINDOW, WordTokenizer, gpt2_of, random_documents, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from recur_gpt2.errors import InputError
from recur_gpt2.evaluation.evaluate import Evaluation, evaluate, gap_covered_interval
from recur_gpt2.evaluation.protocols import PROTOCOLS
from recur_gpt2.models.flops import flops_per_token

T, HALF = WINDOW, WINDOW // 2
LENGTHS = (50, 2, 9, 41, 8, 16, 17, 3, 33)  # below, at and beyond whole windows
DOCUMENTS = random_documents(LENGTHS)
WITHOUT_CONTROLS = [name for name, protocol in PROTOCOLS.items() if not protocol.control_of]
kinds = pytest.mark.parametrize("kind", RECURRENCES)


@pytest.fixture(scope="module")
def models():
    return {kind: tiny_model(kind) for kind in RECURRENCES}


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Each evaluation collects garbage before it measures; the modules loaded here need not be walked each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def score(model, documents=DOCUMENTS, protocol="recurrent", **options):
    return evaluate(model, documents, WordTokenizer(), protocol=protocol, **options)


# ---- plain loops -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def window_losses(model, tokens, **state):
    """Losses of a stretch's tokens but the first, by a call of the model as users make it. -> losses, state"""
    out = model(torch.as_tensor(tokens)[None], **state)
    losses = torch.nn.functional.cross_entropy(out.logits[0, :-1], torch.as_tensor(tokens[1:]), reduction="none")
    return losses.numpy(), getattr(out, "state", None)


def plain_disjoint(gpt2, tokens):
    starts = range(0, len(tokens) - 1, T)
    # T inputs predict T targets: the last input's target is the next window's first token.
    return np.concatenate([stride_losses(gpt2, tokens, start) for start in starts])


@torch.no_grad()
def stride_losses(gpt2, tokens, start):
    """Losses of the targets of the window that starts at `start`."""
    inputs, targets = tokens[start : start + T], tokens[start + 1 : start + T + 1]
    logits = gpt2(torch.as_tensor(inputs)[None]).logits[0, : len(targets)]
    return torch.nn.functional.cross_entropy(logits, torch.as_tensor(targets), reduction="none").numpy()


def plain_overlap(gpt2, tokens, stride=HALF):
    """The usual strided loop: windows move on by the stride, and each but the first scores what none before it has."""
    losses = np.full(len(tokens) - 1, np.nan)
    for start in range(0, len(tokens) - 1, stride):
        scored = stride_losses(gpt2, tokens, start)
        skip = 0 if start == 0 else T - stride
        losses[start + skip : start + T] = scored[skip:]
    return losses


def plain_recurrent(model, tokens):
    return window_losses(model, tokens)[0]


def plain_recurrent_overlap(model, tokens):
    losses = plain_recurrent(model, tokens)
    if len(tokens) - 1 <= T:
        return losses
    later = plain_recurrent(model, tokens[HALF:])
    for target in range(T, len(losses)):
        if target % T < HALF:  # little stands before it in this reading's window, much in the later one's
            losses[target] = later[target - HALF]
    return losses


@torch.no_grad()
def plain_shuffled(model, documents, lanes):
    """Lanes side by side, longest documents first. Each window is read twice: with its own document's memory, to make
    the next memory from, and with that of the next lane, to be scored."""
    queue = sorted(range(len(documents)), key=lambda n: -len(documents[n]))
    losses = [np.full(len(tokens) - 1, np.nan) for tokens in documents]
    number, place, memory = [None] * lanes, [0] * lanes, [None] * lanes
    while True:
        for lane in range(lanes):
            done = number[lane] is None or place[lane] * T >= len(documents[number[lane]]) - 1
            if done:
                number[lane], place[lane] = (queue.pop(0) if queue else None), 0
        if all(n is None for n in number):
            return losses
        others = [memory[(lane + 1) % lanes] for lane in range(lanes)]
        for lane, n in enumerate(number):
            if n is None:
                continue
            tokens, start = documents[n], place[lane] * T
            inputs, targets = tokens[start : start + T], torch.as_tensor(tokens[start + 1 : start + T + 1])
            wrong = {} if start == 0 or others[lane] is None else {"state": others[lane]}
            logits = model(torch.as_tensor(inputs)[None], **wrong).logits[0, : len(targets)]
            losses[n][start : start + T] = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            if len(targets) == T:
                memory[lane] = model(torch.as_tensor(tokens[: start + T])[None]).state
            place[lane] += 1


def assert_losses(found, wanted):
    assert len(found) == len(wanted)
    for left, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-4, atol=2e-5)


# ---- protocols -------------------------------------------------------------------------------------------------------


@kinds
def test_disjoint_is_transformers_gpt2_window_by_window(kind, models):
    gpt2 = gpt2_of(models[kind])
    found = score(models[kind], protocol="disjoint")
    assert_losses(found.losses, [plain_disjoint(gpt2, tokens) for tokens in DOCUMENTS])


@kinds
def test_overlap_is_the_usual_strided_loop_with_transformers_gpt2(kind, models):
    gpt2 = gpt2_of(models[kind])
    found = score(models[kind], protocol="overlap")
    assert_losses(found.losses, [plain_overlap(gpt2, tokens) for tokens in DOCUMENTS])


@pytest.mark.parametrize("stride", [1, 3, T - 1, T])
def test_overlapping_windows_may_be_any_stride_apart(stride, models):
    gpt2 = gpt2_of(models["last"])
    found = score(models["last"], protocol="overlap", stride=stride)
    assert_losses(found.losses, [plain_overlap(gpt2, tokens, stride) for tokens in DOCUMENTS])
    for bad in (0, T + 1):
        with pytest.raises(InputError, match=f"stride={bad} must be at"):
            score(models["last"], protocol="overlap", stride=bad)


@kinds
def test_recurrent_is_the_model_reading_each_document_alone(kind, models):
    found = score(models[kind], protocol="recurrent")
    assert_losses(found.losses, [plain_recurrent(models[kind], tokens) for tokens in DOCUMENTS])
    for tokens, losses in zip(DOCUMENTS, found.losses, strict=True):
        ids = torch.as_tensor(tokens)[None]
        assert losses.mean() == pytest.approx(models[kind](ids, labels=ids).loss.item(), rel=1e-4)


@kinds
def test_recurrent_overlap_scores_each_token_in_the_reading_with_more_in_front(kind, models):
    found = score(models[kind], protocol="recurrent+overlap")
    assert_losses(found.losses, [plain_recurrent_overlap(models[kind], tokens) for tokens in DOCUMENTS])


@kinds
def test_zeroed_is_disjoint_with_the_same_weights(kind, models):
    zeroed, disjoint = score(models[kind], protocol="zeroed"), score(models[kind], protocol="disjoint")
    assert_losses(zeroed.losses, disjoint.losses)
    assert zeroed.flops_per_token == disjoint.flops_per_token


@kinds
@pytest.mark.parametrize("lanes", [2, 3, 9])
def test_shuffled_makes_memory_truly_and_gives_it_to_another(kind, lanes, models):
    found = score(models[kind], protocol="shuffled", lanes=lanes)
    assert_losses(found.losses, plain_shuffled(models[kind], DOCUMENTS, lanes))


def test_shuffled_never_gives_a_document_its_own_memory(models):
    """Even with one lane asked for: there must be another one to take memory from."""
    alone = score(models["last"], protocol="shuffled", lanes=1)
    assert_losses(alone.losses, plain_shuffled(models["last"], DOCUMENTS, 2))
    true = score(models["last"], lanes=1)
    for tokens, left, right in zip(DOCUMENTS, alone.losses, true.losses, strict=True):
        np.testing.assert_allclose(left[:T], right[:T], rtol=1e-4, atol=1e-5)
        if len(tokens) > T + 1:
            assert not np.allclose(left[T:], right[T:], rtol=1e-3)


@kinds
def test_memory_matters_to_these_models(kind, models):
    """Else the tests above would compare nothing."""
    true, zeroed, shuffled = (score(models[kind], protocol=name) for name in ("recurrent", "zeroed", "shuffled"))
    for left, right in ((true, zeroed), (true, shuffled), (zeroed, shuffled)):
        assert not np.allclose(np.concatenate(left.losses), np.concatenate(right.losses), rtol=1e-2)


@kinds
@pytest.mark.parametrize("protocol", WITHOUT_CONTROLS)
def test_losses_depend_neither_on_lanes_nor_on_parallel_windows(kind, protocol, models):
    one = score(models[kind], protocol=protocol, lanes=1, parallel_windows=1)
    for lanes, parallel_windows in ((1, 3), (4, 1), (4, 2), (20, 9)):
        other = score(models[kind], protocol=protocol, lanes=lanes, parallel_windows=parallel_windows)
        assert_losses(other.losses, one.losses)
        assert other.tokens_read == one.tokens_read


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=2, max_size=5),
    lanes=st.integers(1, 4),
    parallel_windows=st.integers(1, 4),
    protocol=st.sampled_from(list(PROTOCOLS)),
    window=st.sampled_from([2, 5, 8]),
)
def test_every_token_but_a_documents_first_is_scored_exactly_once(lengths, lanes, parallel_windows, protocol, window):
    model = tiny_model(window=window, last_slots=1, n_layer=1)
    options = {"lanes": lanes, "parallel_windows": parallel_windows}
    found = score(model, random_documents(lengths), protocol, **options)
    assert [len(losses) for losses in found.losses] == [length - 1 for length in lengths]
    losses = np.concatenate(found.losses)
    assert np.isfinite(losses).all()
    assert (losses > 0).all(), "a place that nothing was written to"
    assert found.row("", protocol, window)["tokens"] == sum(lengths) - len(lengths)


def test_documents_come_back_in_the_order_given(models):
    found = score(models["last"])
    backwards = score(models["last"], DOCUMENTS[::-1])
    assert_losses(backwards.losses[::-1], found.losses)
    assert found.words.tolist() == backwards.words[::-1].tolist() == list(LENGTHS)


def test_overlap_reads_more_tokens_for_those_that_it_scores(models):
    scored = sum(LENGTHS) - len(LENGTHS)
    windows = [(length - 1, start) for length in LENGTHS for start in range(0, max(1, length - 1 - HALF), HALF)]
    overlapping = sum(min(T, targets - start) for targets, start in windows)
    config = models["last"].config
    for protocol, read in (("disjoint", scored), ("overlap", overlapping), ("recurrent", scored)):
        found = score(models["last"], protocol=protocol)
        assert found.tokens_read == read
        flops = flops_per_token(config, memory=protocol == "recurrent")
        assert found.flops_per_token == pytest.approx(flops * read / scored)


def test_shuffled_reads_every_token_twice_and_predicts_it_once(models):
    """As torch counts it, too: long documents, since only a first window reads no memory."""
    config, documents = models["last"].config, random_documents([60 * T + 1] * 2)
    counted = {}
    for protocol in ("recurrent", "shuffled"):
        found = score(models["last"], documents, protocol=protocol)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused, it would count as none
            score(models["last"], documents, protocol=protocol, parallel_windows=1)
        counted[protocol] = counter.get_total_flops() / (2 * 60 * T)
        assert found.flops_per_token == pytest.approx(counted[protocol], rel=0.01)
    assert found.tokens_read == 2 * 2 * 60 * T
    head = 2 * config.n_embd * config.vocab_size
    assert found.flops_per_token == pytest.approx(2 * flops_per_token(config) - head)
    assert counted["shuffled"] > 1.5 * counted["recurrent"]


def test_autocast_casts_weights_once_for_a_whole_document(models):
    named = models["last"].named_parameters()
    weights = {parameter.shape for name, parameter in named if parameter.ndim == 2 and "pointer" not in name}

    class Counter(TorchDispatchMode):
        casts = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket is torch.ops.aten._to_copy:
                self.casts += args[0].dtype == torch.float32 and args[0].shape in weights
            return function(*args, **kwargs or {})

    counts = []
    for windows in (3, 30):
        with Counter() as counter:
            score(models["last"], random_documents([windows * T]), dtype=torch.bfloat16, parallel_windows=1)
        counts.append(counter.casts)
    assert counts[0] == counts[1] > 0


def test_autocast_to_bfloat16_scores_nearly_the_same(models):
    exact, rough = score(models["last"]), score(models["last"], dtype=torch.bfloat16)
    assert rough.nats == pytest.approx(exact.nats, rel=0.02)
    assert rough.nats != exact.nats


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(protocol, training):
    model = tiny_model(dropout=0.5).train(training)
    randomness = torch.get_rng_state()
    one, two = (score(model, protocol=protocol) for _ in range(2))
    assert_losses(one.losses, two.losses)  # no dropout
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), randomness)


def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model().train()

    def failing(*args):
        raise MemoryError

    monkeypatch.setattr("recur_gpt2.evaluation.evaluate.token_losses", failing)
    with pytest.raises(MemoryError):
        score(model)
    assert model.training


# ---- numbers ---------------------------------------------------------------------------------------------------------


def some_evaluation(lengths=(5, 9, 30), seed=0, words=None, size=None):
    rng = np.random.default_rng(seed)
    return Evaluation(
        losses=[rng.uniform(1, 6, length).astype(np.float32) for length in lengths],
        words=np.array(words or lengths),
        bytes=np.array(size or lengths),
        by_position=np.zeros(T),
        tokens_read=sum(lengths),
        flops_per_token=100.0,
        seconds=2.0,
        peak_memory_bytes=7,
    )


def test_words_and_bytes_are_those_of_the_text(models):
    documents = [np.array([1, 4, 3, 2]), np.array([2, 2])]  # " wé1 wé4 w3 wéé2", " wéé2 wéé2"
    found = score(models["last"], documents)
    assert found.words.tolist() == [4, 2]
    texts = [WordTokenizer().decode(tokens) for tokens in documents]
    assert texts == [" wé1 wé4 w3 wéé2", " wéé2 wéé2"]
    assert found.bytes.tolist() == [len(text.encode("utf-8")) for text in texts] == [5 + 5 + 3 + 7, 14]


def test_perplexities_and_bits_divide_one_total_loss():
    found = some_evaluation(words=(3, 4, 20), size=(20, 40, 120))
    total = sum(float(losses.astype(np.float64).sum()) for losses in found.losses)
    row = found.row("mine", "recurrent", 8)
    assert (row["name"], row["protocol"], row["window"], row["tokens"]) == ("mine", "recurrent", 8, 44)
    assert row["nats"] == found.nats == pytest.approx(total / 44)
    assert row["token_ppl"] == pytest.approx(math.exp(total / 44))
    assert row["word_ppl"] == pytest.approx(math.exp(total / 27))
    assert found.row("mine", "recurrent", 8, words=10)["word_ppl"] == pytest.approx(math.exp(total / 10))
    assert row["bits_per_byte"] == pytest.approx(total / 180 / math.log(2))
    assert row["tokens_per_second"] == 22
    assert row["peak_memory_bytes"] == 7
    assert row["flops_per_token"] == 100


def test_a_word_perplexity_beyond_any_float_is_infinite():
    assert some_evaluation(words=(1, 0, 0)).row("", "disjoint", 8)["word_ppl"] < math.inf
    huge = some_evaluation(lengths=(500, 500, 500), words=(1, 1, 1))
    assert huge.row("", "disjoint", 8)["word_ppl"] == math.inf


@pytest.mark.parametrize("protocol", WITHOUT_CONTROLS)
def test_by_position_is_the_mean_by_place_in_the_window_that_scored(protocol, models):
    found = score(models["last"], protocol=protocol)
    places = [[] for _ in range(T)]
    for losses in found.losses:
        for target, loss in enumerate(losses):
            place = target % T
            overlapping = protocol.endswith("overlap") and len(losses) > T and target >= T
            if overlapping and place < HALF:
                place += HALF
            places[place].append(loss)
    wanted = [np.mean(losses) if losses else math.nan for losses in places]
    if protocol.endswith("overlap"):
        wanted[:HALF] = [math.nan] * HALF  # scored in first windows alone, and not shown
    np.testing.assert_allclose(found.by_position, wanted, rtol=1e-5)


def test_a_place_that_nothing_was_scored_at_is_nan(models):
    found = score(models["last"], [np.arange(1, 5)])
    assert np.isfinite(found.by_position[:3]).all()
    assert np.isnan(found.by_position[3:]).all()


# ---- intervals -------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_interval_lies_around_the_mean_within_the_documents(lengths, seed):
    found = some_evaluation(tuple(lengths), seed)
    low, high = found.nats_interval()
    means = [losses.mean() for losses in found.losses]
    assert min(means) - 1e-5 <= low <= high <= max(means) + 1e-5
    # A mean of documents of very different lengths can lie at an end of the resampled ones, but not outside them all.
    everything = found.nats_interval(level=1.0)
    assert everything[0] - 1e-5 <= found.nats <= everything[1] + 1e-5 or len(lengths) > 6
    assert everything[0] <= low <= high <= everything[1]


def test_the_interval_contains_the_mean_and_is_the_same_every_time():
    found = some_evaluation((40, 50, 60, 45, 55, 65, 40, 50))
    low, high = found.nats_interval()
    assert low < found.nats < high
    assert found.nats_interval() == (low, high)
    narrower = found.nats_interval(level=0.5)
    assert low < narrower[0] < found.nats < narrower[1] < high


def test_the_interval_is_that_of_resampled_documents():
    """Against resampling written down plainly, with draws of its own."""
    found = some_evaluation((10, 80, 30, 55, 20, 90, 40), seed=3)
    rng = np.random.default_rng(99)
    means = []
    for _ in range(4000):
        drawn = [found.losses[n] for n in rng.integers(7, size=7)]
        means.append(np.concatenate(drawn).mean())
    assert found.nats_interval() == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)


def test_a_difference_is_resampled_in_pairs():
    """So that a difference that every document shows has a narrow interval, however much documents differ."""
    found = some_evaluation((40, 50, 60, 45))
    shifted = some_evaluation((40, 50, 60, 45))
    shifted.losses = [losses - np.float32(0.25) for losses in shifted.losses]
    assert found.nats_interval(shifted) == pytest.approx((0.25, 0.25), abs=1e-5)
    assert found.nats_interval(found) == (0, 0)


def test_the_interval_of_one_document_is_its_mean():
    found = some_evaluation((30,))
    assert found.nats_interval() == pytest.approx((found.nats, found.nats), rel=1e-6)


def test_the_covered_gap_of_a_third_is_a_third():
    disjoint, overlap, recurrent = (some_evaluation((40, 50, 60)) for _ in range(3))
    overlap.losses = [losses - np.float32(0.3) for losses in disjoint.losses]
    recurrent.losses = [losses - np.float32(0.1) for losses in disjoint.losses]
    assert gap_covered_interval(disjoint, overlap, recurrent) == pytest.approx((1 / 3, 1 / 3), rel=1e-3)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([], {}, "there are no documents to evaluate; give at least one"),
        ([np.arange(5), np.array([3])], {}, "document 1 has 1 tokens; at least 2 are needed"),
        ([np.array([], np.int64)], {}, "document 0 has 0 tokens; at least 2 are needed"),
        (
            DOCUMENTS,
            {"protocol": "strided"},
            "protocol='strided' is not known; use one of disjoint, overlap, recurrent",
        ),
        (DOCUMENTS[:1], {"protocol": "shuffled"}, "a shuffled state needs at least 2 documents"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(documents, options, message, models):
    with pytest.raises(InputError) as refused:
        score(models["last"], documents, **options)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_documents_may_come_from_a_generator(models):
    found = score(models["last"], (tokens for tokens in DOCUMENTS))
    assert len(found.losses) == len(DOCUMENTS)
