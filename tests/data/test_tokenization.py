"""tokenization.py: a text in pieces has the ids of the whole, and what is settled stays."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from recur_gpt2.data import tokenization
from recur_gpt2.data.tokenization import Encoder
from recur_gpt2.utils import measure

# What GPT-2's splitting of words has rules for: white space of all kinds, contractions, digits, marks, other scripts.
FRAGMENTS = ["word", "I'll", "'s", "'", "12", "3.5", "...", "!", "é", "语言", "🙂", "<|endoftext|>", "_", "\u0301"]
SPACES = [" ", "  ", "\n", "\n\n", " \n ", "\r\n", "\t", "\u00a0", "\u2003", "\x1c", "\x85", "\u200b", ""]
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
texts = st.lists(st.sampled_from(FRAGMENTS) | st.sampled_from(SPACES) | anything, max_size=40).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "data" / "gpt2-mini")


@pytest.fixture(scope="module")
def encode(tokenizer):
    return Encoder(tokenizer)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
def test_pieces_have_the_ids_of_the_whole(text, encode, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenization, "PIECE", 3)
    monkeypatch.setattr(tokenization, "PIECES", 2)
    assert encode.in_pieces
    assert encode(text).tolist() == tokenizer(text)["input_ids"]


def test_a_book_is_encodedin_pieces(encode, tokenizer):
    text = pq.read_table(ROOT / "data" / "pg19-sample" / "validation.parquet")["text"][0].as_py()
    cut = list(tokenization.pieces(text))
    assert "".join(cut) == text
    assert max(map(len, cut)) < tokenization.PIECE + 100
    assert encode(text).tolist() == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("change", ["prefix", "normalizer", "splitter", "token with a space", "token that strips"])
def test_a_tokenizer_that_might_look_across_a_cut_gets_whole_texts(change, tokenizer, monkeypatch):
    other = AutoTokenizer.from_pretrained(ROOT / "data" / "gpt2-mini")
    backend = other.backend_tokenizer
    if change == "prefix":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "normalizer":
        backend.normalizer = normalizers.Replace(" \n", "!")
    elif change == "splitter":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        strips = change == "token that strips"
        content = "at last" if change == "token with a space" else "at"
        backend.add_tokens([AddedToken(content, rstrip=strips)])
    monkeypatch.setattr(tokenization, "PIECE", 3)
    encode = Encoder(other)
    assert not encode.in_pieces
    text = "It rained \n at last , at  \n noon"
    assert encode(text).tolist() == other(text)["input_ids"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is measured on Linux")
def test_tokenising_takes_little_memory(encode):
    """A text of 2 MB: its ids, 2 MB too, and a few pieces at a time; at once it took 270 MB."""
    text = "Chapter 12. It was the 3rd of May, and the rain went on.\n" * 35_000
    before = measure.reset_peak()
    ids = encode(text)
    assert ids.dtype == np.int32
    assert measure.peak_resident() - before < 30 * len(text)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
def test_offsets_are_those_of_the_whole(text, encode, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenization, "PIECE", 3)
    monkeypatch.setattr(tokenization, "PIECES", 2)
    whole = tokenizer(text, return_offsets_mapping=True)
    found = np.concatenate([np.empty((0, 3), np.int64), *encode.stream_with_offsets(text)])
    assert found[:, 0].tolist() == whole["input_ids"]
    assert found[:, 1:].tolist() == [list(pair) for pair in whole["offset_mapping"]]


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts, more=texts)
def test_what_is_settled_is_so_whatever_follows(text, more, encode):
    settled = encode.settled(text)
    ids = [*encode(text[:settled]), *encode(text[settled:] + more)]
    assert ids == encode(text + more).tolist()


def test_all_but_the_last_word_is_settled(encode):
    assert encode.settled("It rained in Oldt") == len("It rained in")
    assert encode.settled("It rained ") == len("It rained")
    assert encode.settled("It") == 0
