"""embedder.py: each vector is what a plain loop over one document gives, whatever is read beside it."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALL_FORMS, WINDOW, perturb, random_gpt2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from transformers import AutoTokenizer, GPT2Model

from recur_gpt2 import DocumentEmbedder, InputError, RecurGPT2LMHeadModel
from recur_gpt2.data.bundle import BUNDLED_MODEL, POOLINGS
from recur_gpt2.utils import measure

FORMS = ("default", "gated", "yoshida2020", "pooled above", "near, default", "t2r, default", "carried", "none")
WORDS = ["It", " rained", " in", " Oldtown", "\n\n", " 1887", ", and", " naïveté", " the", " 🙂", "  ", " Mr.", "ing"]
TWO_THIRDS = 3  # of four layers: the default
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # float64 computation, float32 vectors


def words(count, seed=0):
    """A text of so many of WORDS, a few more tokens than words."""
    return "".join(np.random.default_rng(seed).choice(WORDS, size=count))


def of_tokens(count):
    return "a" + " a" * (count - 1) if count else ""


TEXTS = [words(50), "", "a", of_tokens(WINDOW), of_tokens(3 * WINDOW), words(3), of_tokens(WINDOW + 1), words(170), " "]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED_MODEL)


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("gpt2")
    random_gpt2(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make_embedder(gpt2_folder, tokenizer):
    made = {}

    def make(form):
        if form not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("recur_gpt2.models.feature_map_fitting.FIT_STEPS", 5)
                patch.setattr("recur_gpt2.models.feature_map_fitting.DISTIL_STEPS", 1)
                model = RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, window=WINDOW, **ALL_FORMS[form])
            perturb(model.transformer.recurrence)
            made[form] = DocumentEmbedder(model.double(), tokenizer)
        return made[form]

    return make


@torch.no_grad()
def naive(embedder, text, pooling="mean", layer=TWO_THIRDS):
    """One document, read at once."""
    core, width = embedder.model.transformer, embedder.model.config.n_embd
    ids = embedder.tokenizer(text)["input_ids"]
    if not ids:
        return np.zeros(embedder.dimension(pooling))
    out = core(torch.tensor([ids]), output_hidden_states=True)
    hidden, memory = out.hidden_states[layer][0], torch.zeros(width, dtype=torch.float64)
    if "memory" in pooling and len(ids) >= WINDOW:
        if "pooled" in out.state.memory:
            memory = core.recurrence.get("pooled").read(out.state.memory["pooled"])[0].mean(dim=0)
        else:
            block = layer - 1 if layer > 0 else core.config.n_layer + layer
            memory = torch.cat(list(out.state.memory[str(block)][0, 1].mean(dim=1)))
    mean = hidden.mean(dim=0)
    both = torch.cat([each / each.norm().clamp_min(1e-12) for each in (mean, memory)])
    return {"mean": mean, "last": hidden[-1], "memory": memory, "mean+memory": both}[pooling].numpy()


def poolings(form):
    return POOLINGS if form not in ("none", "carried") else ("mean", "last")


# ---- encode ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-1, 2, -2])
@pytest.mark.parametrize("form", FORMS)
def test_vectors_are_those_of_a_loop_over_documents(form, layer, make_embedder):
    embedder = make_embedder(form)
    for pooling in poolings(form):
        for batch_tokens in (1, 5 * WINDOW, 8192):
            found = embedder.encode(TEXTS, pooling=pooling, layer=layer, batch_tokens=batch_tokens)
            assert found.dtype == np.float32
            assert_allclose(found, [naive(embedder, text, pooling, layer) for text in TEXTS], **TOLERANCE)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(FORMS),
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    batch_tokens=st.integers(1, 200),
)
def test_a_document_gets_what_it_gets_alone(form, lengths, batch_tokens, make_embedder):
    embedder, texts = make_embedder(form), [words(length, seed) for seed, length in enumerate(lengths)]
    found = embedder.encode(texts, batch_tokens=batch_tokens, pooling=poolings(form)[-1])
    alone = [embedder.encode(text, pooling=poolings(form)[-1]) for text in texts]
    assert_allclose(found, alone, **TOLERANCE)
    assert_allclose(list(embedder.encode_iter(texts, batch_tokens=batch_tokens, pooling=poolings(form)[-1])), alone)


def test_a_string_gives_one_vector_and_no_documents_none(make_embedder):
    embedder = make_embedder("default")
    assert embedder.encode("It rained").shape == (32,)
    assert embedder.encode(["It rained"]).shape == (1, 32)
    assert embedder.encode([]).shape == (0, 32)
    assert list(embedder.encode_iter([])) == []


def test_an_empty_document_has_the_zero_vector(make_embedder):
    embedder = make_embedder("default")
    for pooling in POOLINGS:
        for normalize in (False, True):
            assert not embedder.encode(["", "a"], pooling=pooling, normalize=normalize)[0].any()


def test_a_document_of_one_token_is_that_token(make_embedder):
    embedder = make_embedder("default")
    vectors = [embedder.encode("a", pooling=pooling) for pooling in ("mean", "last")]
    vectors.append(next(embedder.encode_tokens("a")).vectors[0])
    expected = [naive(embedder, "a"), naive(embedder, "a"), naive(embedder, "a", layer=-1)]
    assert_allclose(vectors, expected, **TOLERANCE)


def test_normalized_vectors_have_unit_length_and_the_same_direction(make_embedder):
    embedder, texts = make_embedder("default"), TEXTS[2:]
    plain, unit = embedder.encode(texts), embedder.encode(texts, normalize=True)
    assert_allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), rtol=1e-5)


def test_torch_vectors_are_the_same(make_embedder):
    embedder = make_embedder("default")
    found = embedder.encode(TEXTS, convert_to="torch")
    assert found.dtype == torch.float32
    assert_allclose(found.numpy(), embedder.encode(TEXTS))


def test_a_generator_of_documents_is_consumed_lazily(make_embedder, monkeypatch):
    monkeypatch.setattr("recur_gpt2.embedding.embedder.CHUNK_BATCHES", 1)
    embedder, taken = make_embedder("default"), []

    def endless():
        while True:
            taken.append(words(20, seed=len(taken)))
            yield taken[-1]

    vectors = embedder.encode_iter(endless(), batch_tokens=64)
    for number in range(30):
        assert_allclose(next(vectors), naive(embedder, taken[number]), **TOLERANCE)
    assert len(taken) < 40


def test_a_progress_bar_goes_to_the_end_if_it_is_wanted(make_embedder, capsys):
    make_embedder("default").encode(TEXTS, show_progress_bar=True)
    assert "embedding: 100%" in capsys.readouterr().err
    make_embedder("default").encode(TEXTS, show_progress_bar=False)
    assert not capsys.readouterr().err


def test_few_places_are_pads(make_embedder):
    """Lengths from 1 to 60 windows, spread evenly on a logarithmic scale."""
    from recur_gpt2.embedding.batching import Reader, Tokens

    reader = Reader(make_embedder("default").model.transformer, 1, 64 * WINDOW)
    lengths = np.geomspace(1, 60 * WINDOW, 300).astype(int)[::-1]
    ids = [np.zeros(length, np.int64) for length in lengths]
    with torch.no_grad():
        ended = [
            n
            for numbers, _ in reader.documents((n, Tokens(iter([each]))) for n, each in enumerate(ids))
            for n in numbers
        ]
    assert sorted(ended) == list(range(300))
    assert reader.read - reader.padded == lengths.sum()
    assert reader.padded < 0.1 * reader.read


# ---- tokens, windows, spans ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_tokens", [1, 3 * WINDOW])
def test_tokens_have_their_hidden_states_and_characters(form, batch_tokens, make_embedder):
    embedder = make_embedder(form)
    for text in TEXTS:
        expected = embedder.tokenizer(text, return_offsets_mapping=True)
        windows = list(embedder.encode_tokens(text, layer=2, batch_tokens=batch_tokens))
        assert all(len(each.ids) == WINDOW for each in windows[:-1])
        ids = [number for each in windows for number in each.ids.tolist()]
        assert ids == expected["input_ids"]
        assert [tuple(pair) for each in windows for pair in each.offsets.tolist()] == expected["offset_mapping"]
        if ids:
            with torch.no_grad():
                hidden = embedder.model.transformer(torch.tensor([ids]), output_hidden_states=True).hidden_states[2]
            assert_allclose(np.concatenate([each.vectors for each in windows]), hidden[0], **TOLERANCE)


def test_tokens_are_streamed(make_embedder):
    embedder, read = make_embedder("default"), []
    hook = embedder.model.transformer.wte.register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    next(embedder.encode_tokens(words(1000), batch_tokens=2 * WINDOW))
    hook.remove()
    assert read == [2 * WINDOW]


def test_windows_have_the_mean_of_their_tokens(make_embedder):
    embedder, text = make_embedder("default"), words(60)
    found, tokens = embedder.encode_windows(text), list(embedder.encode_tokens(text))
    assert_allclose(found.vectors, [each.vectors.mean(axis=0) for each in tokens], **TOLERANCE)
    assert found.spans[0][0] == 0
    assert found.spans[-1][1] == len(text)
    assert found.spans.tolist() == [[each.offsets[0, 0], each.offsets[-1, 1]] for each in tokens]
    empty = embedder.encode_windows("")
    assert empty.vectors.shape == (0, 32)
    assert empty.spans.shape == (0, 2)


@pytest.mark.parametrize("batch_tokens", [1, 4 * WINDOW])
def test_spans_have_the_mean_of_the_tokens_in_them(batch_tokens, make_embedder):
    embedder, text = make_embedder("default"), words(200)
    spans = [(40, 60), (0, len(text)), (55, 300), (3, 4), (40, 60), (len(text) - 1, len(text)), (0, 1)]
    tokens = list(embedder.encode_tokens(text))
    vectors, offsets = (np.concatenate([each[part] for each in tokens]) for part in (1, 2))
    expected = []
    for start, end in spans:
        inside = [vectors[n] for n, (a, b) in enumerate(offsets) if a < end and b > start]
        expected.append(np.mean(inside, axis=0))
    assert_allclose(embedder.encode_spans(text, spans, batch_tokens=batch_tokens), expected, **TOLERANCE)
    unit = embedder.encode_spans(text, spans, normalize=True)
    assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-5)
    assert embedder.encode_spans(text, []).shape == (0, 32)


@pytest.mark.parametrize("span", [(-1, 2), (5, 5), (6, 5), (0, 10_000)])
def test_a_span_outside_the_document_is_refused(span, make_embedder):
    with pytest.raises(InputError, match=r"span \(.*\) is no part of a document of \d+ characters"):
        make_embedder("default").encode_spans(words(20), [(0, 3), span])


# ---- a text that grows -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(FORMS),
    text=st.integers(0, 120).map(words),
    cuts=st.lists(st.integers(0, 400), max_size=8),
    looks=st.sets(st.integers(0, 9)),
)
def test_a_text_in_pieces_is_the_text_at_once(form, text, cuts, looks, make_embedder):
    """Pieces end anywhere, in words too; looking at the vector in between changes nothing."""
    embedder, options = make_embedder(form), {"pooling": poolings(form)[-1], "layer": 3}
    stream = embedder.stream(**options)
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for number, (start, end) in enumerate(pairwise(borders)):
        stream.add(text[start:end])
        if number in looks:
            assert_allclose(stream.embedding(), naive(embedder, text[:end], **options), **TOLERANCE)
    assert_allclose(stream.embedding(), naive(embedder, text, **options), **TOLERANCE)


def test_nothing_is_read_twice_but_the_last_word(make_embedder):
    embedder, read = make_embedder("default"), []
    stream, text = embedder.stream(), words(400)
    hook = embedder.model.transformer.wte.register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    looks = 0
    for start in range(0, len(text), 50):
        stream.add(text[start : start + 50])
        stream.embedding()
        looks += 1
    hook.remove()
    longest_end = 12  # tokens from the last white space on, generously
    assert sum(read) < len(embedder.tokenizer(text)["input_ids"]) + longest_end * looks


def test_a_tokenizer_that_looks_across_white_space_is_read_whole(make_embedder, tokenizer):
    from tokenizers import normalizers

    other = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    other.backend_tokenizer.normalizer = normalizers.Replace(" \n", "!")
    embedder = DocumentEmbedder(make_embedder("default").model, other)
    stream = embedder.stream()
    for piece in ("It rained ", "\n in", " Oldtown"):
        stream.add(piece)
    assert_allclose(stream.embedding(), naive(embedder, "It rained \n in Oldtown"), **TOLERANCE)


# ---- loading, types, refusals ----------------------------------------------------------------------------------------


def test_a_saved_model_embeds_as_before(make_embedder, tokenizer, tmp_path):
    before = make_embedder("default")
    before.model.save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    embedder = DocumentEmbedder.from_pretrained(tmp_path / "model")
    assert embedder.model.dtype == torch.float32
    assert_allclose(embedder.encode(TEXTS), before.encode(TEXTS), rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match=f"window={WINDOW}, not 64"):
        DocumentEmbedder.from_pretrained(tmp_path / "model", window=64)


@torch.no_grad()
def test_a_gpt2_is_read_in_windows_apart_from_each_other(gpt2_folder, tokenizer):
    embedder = DocumentEmbedder.from_pretrained(gpt2_folder, window=16)
    text = words(40)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    gpt2 = GPT2Model.from_pretrained(gpt2_folder, dtype=torch.float32).eval()
    read = [gpt2(piece[None], output_hidden_states=True).hidden_states for piece in ids.split(16)]
    for layer, options in ((TWO_THIRDS, {}), (-1, {"layer": -1})):
        hidden = torch.cat([each[layer][0] for each in read])
        assert_allclose(embedder.encode(text, **options), hidden.mean(dim=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_16_bit_gives_nearly_the_same_in_float32(dtype, make_embedder, tokenizer, tmp_path):
    make_embedder("default").model.save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    embedder = DocumentEmbedder.from_pretrained(tmp_path / "model", dtype=dtype)
    assert embedder.model.dtype == torch.bfloat16
    found, expected = embedder.encode(TEXTS), make_embedder("default").encode(TEXTS)
    assert found.dtype == np.float32
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "pooling='max' is not known; use one of mean, last, memory"),
        ({"layer": 5}, "layer=5 does not exist; give 0, the embeddings, to 4"),
        ({"layer": -6}, "layer=-6 does not exist"),
        ({"batch_tokens": 0}, "batch_tokens=0 must be at least 1"),
        ({"layer": 0, "pooling": "memory"}, "layer=0 leaves no memory .*: 1, 2, 3, 4"),
    ],
)
def test_bad_arguments_are_refused(options, message, make_embedder):
    embedder = make_embedder("default")
    for method in (embedder.encode, embedder.encode_iter):
        with pytest.raises(InputError, match=message):
            method(["a"], **options)
    if "batch_tokens" not in options:
        with pytest.raises(InputError, match=message):
            embedder.stream(**options)


def test_what_is_no_text_is_refused_by_number(make_embedder):
    embedder = make_embedder("default")
    with pytest.raises(InputError, match="document 1 is of type NoneType; give a string"):
        embedder.encode(["a", None])
    with pytest.raises(InputError, match="document 1 is of type int"):
        list(embedder.encode_iter(["a", 3]))
    with pytest.raises(InputError, match="convert_to='list' is not known"):
        embedder.encode("a", convert_to="list")


def test_a_model_without_memory_has_no_memory_vector(make_embedder):
    with pytest.raises(InputError, match="needs a model with a recurrence, and this one has none; use mean"):
        make_embedder("none").encode("a", pooling="memory")


def test_an_unknown_type_is_refused(gpt2_folder):
    with pytest.raises(InputError, match="dtype='int8' is no floating-point type; use float32"):
        DocumentEmbedder.from_pretrained(gpt2_folder, window=16, dtype="int8")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is measured on Linux")
@pytest.mark.parametrize("method", ["encode", "encode_tokens"])
def test_memory_does_not_grow_with_the_document(method, make_embedder):
    embedder, text, peaks = make_embedder("default"), of_tokens(200_000), []
    for end in (40_000, 40_000, len(text)):
        measure.reset_peak()
        for _ in getattr(embedder, method)(text[:end], batch_tokens=512):
            pass
        peaks.append(measure.peak_resident())
    assert peaks[2] - peaks[1] < 10 * 2**20  # the hidden states of all tokens would take 51 MB
