"""Texts -> token ids without special tokens, piece by piece, so that a text of any length takes little memory.

A text is cut only where that changes no id; a tokenizer for which no such places are known gets it whole.
"""

import json
import re
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ..utils.itertools import batched

PIECE = 2**14  # characters that are tokenised at once, which takes up to 140 times the bytes of their text
PIECES = 8  # such pieces at a time, side by side on as many processors
# Where a text may be cut without changing an id: before a space or a line's end that a word or a mark stands before.
CUT = re.compile(r"(?<=\S)(?=[ \n])")


class Encoder:
    """Texts -> ids, in little memory: piece by piece where that gives the ids of the whole text.

    Attributes:
        in_pieces: whether it may cut texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._plain = plain(tokenizer)
        self.in_pieces = _splits_words_as_gpt2(self._plain)

    def __call__(self, text: str) -> np.ndarray:
        """-> (n,) int32."""
        return np.concatenate([np.empty(0, np.int32), *self.stream(text)])

    def stream(self, text: str) -> Iterator[np.ndarray]:
        """The same in blocks (n,) int32, tokenised when they are asked for."""
        for some in batched(self._pieces(text), PIECES):
            for encoding in self._plain.encode_batch_fast(some, add_special_tokens=False):
                yield np.array(encoding.ids, np.int32)

    def stream_with_offsets(self, text: str) -> Iterator[np.ndarray]:
        """Stretches (n, 3) int64: id, and the characters [start, end) of the text that it stands for."""
        start = 0
        for some in batched(self._pieces(text), PIECES):
            for piece, encoding in zip(some, self._plain.encode_batch(some, add_special_tokens=False), strict=True):
                offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2) + start
                yield np.column_stack((np.array(encoding.ids, np.int64), offsets))
                start += len(piece)

    def settled(self, text: str) -> int:
        """How many characters of a text have ids that nothing which may follow the text can change."""
        return max((cut.start() for cut in CUT.finditer(text)), default=0) if self.in_pieces else 0

    def _pieces(self, text) -> Iterable[str]:
        return pieces(text) if self.in_pieces else [text]


def pieces(text: str) -> Iterator[str]:
    """The text cut at the first CUT behind every PIECE characters."""
    start = 0
    while start < len(text):
        cut = CUT.search(text, start + PIECE)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def plain(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer that neither truncates nor pads, whatever an earlier call of it has left set.

    The backend itself: twice as fast on books, and without the warning that a text is longer than GPT-2's positions.
    """
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _splits_words_as_gpt2(plain):
    """Whether the tokenizer never looks across a CUT.

    GPT-2 first splits a text by an expression in which white space begins a new word and nothing looks backwards.
    """
    parts = json.loads(plain.to_str())
    splitter = parts["pre_tokenizer"] or {}
    by_words = splitter.get("type") == "ByteLevel" and splitter["use_regex"] and not splitter["add_prefix_space"]
    added = parts["added_tokens"]
    apart = not any(token["lstrip"] or token["rstrip"] or re.search(r"\s", token["content"]) for token in added)
    return by_words and apart and parts["normalizer"] is None
