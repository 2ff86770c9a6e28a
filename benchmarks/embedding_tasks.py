"""What bench_embedding.py measures the quality of vectors by: three tasks on books that no model of ours has seen."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
from common import ROOT
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from recur_gpt2.data.tokenization import Encoder
from recur_gpt2.evaluation.evaluate import resample

PASSAGES, PASSAGE_TOKENS = 12, 2000  # of each book
STRETCH_WINDOWS = 80  # of each book, whose beginnings are to tell the book
FIRST = 32  # tokens of a window: those with least context
CHAPTERS, CHAPTER_TOKENS = 8, 4000  # of each book; longer ones are cut
HEADING = re.compile(r"^ *(?:CHAPTER|Chapter|BOOK|LETTER) +[IVXLC\d]+.*$", re.MULTILINE)
Scores = dict[str, np.ndarray]  # {score: one number a book}
EDGE = 0.05  # of a book on either side, where titles, contents and licences are


@dataclass
class Text:
    """A stretch of a book: its tokens (n,), the characters [start, end) of each in `text`, the book's number."""

    text: str
    ids: np.ndarray
    offsets: np.ndarray
    book: int

    def part(self, start: int, end: int) -> Text:
        """Tokens [start, end)."""
        offsets = self.offsets[start:end]
        first, last = int(offsets[0, 0]), int(offsets[-1, 1])
        return Text(self.text[first:last], self.ids[start:end], offsets - first, self.book)


def read_books(split: str, tokenizer) -> list[Text]:
    """The books of pg19-sample, without their edges."""
    texts = pq.read_table(ROOT / "data" / "pg19-sample" / f"{split}.parquet")["text"].to_pylist()
    encoder, books = Encoder(tokenizer), []
    for number, text in enumerate(texts):
        text = text[int(EDGE * len(text)) : int((1 - EDGE) * len(text))]
        tokens = np.concatenate(list(encoder.stream_with_offsets(text)))
        books.append(Text(text, tokens[:, 0], tokens[:, 1:], number))
    return books


def passages(books: list[Text]) -> list[Text]:
    """PASSAGES of each book, spread evenly over it."""
    starts = {book.book: np.linspace(0, len(book.ids) - PASSAGE_TOKENS, PASSAGES).astype(int) for book in books}
    return [book.part(start, start + PASSAGE_TOKENS) for book in books for start in starts[book.book]]


def stretches(books: list[Text], window: int) -> list[Text]:
    """The first STRETCH_WINDOWS windows of each book."""
    return [book.part(0, STRETCH_WINDOWS * window) for book in books]


def chapters(books: list[Text]) -> list[Text]:
    """CHAPTERS of each book: what follows a heading; pieces of CHAPTER_TOKENS where a book has too few headings."""
    found = []
    for book in books:
        places = [match.start() for match in HEADING.finditer(book.text)]
        starts = np.searchsorted(book.offsets[:, 0], places)
        lengths = np.diff([*starts, len(book.ids)])
        starts = starts[lengths >= CHAPTER_TOKENS // 4]  # a table of contents has headings too
        if len(starts) < CHAPTERS:
            starts = np.arange(0, len(book.ids) - CHAPTER_TOKENS, CHAPTER_TOKENS)
        starts = starts[np.linspace(0, len(starts) - 1, CHAPTERS).astype(int)]
        ends = np.minimum([*starts[1:], len(book.ids)], starts + CHAPTER_TOKENS)
        found += [book.part(start, end) for start, end in zip(starts, ends, strict=True)]
    return found


# ---- scores, one number for each text --------------------------------------------------------------------------------


def retrieval(vectors: np.ndarray, books: np.ndarray, *, centred: bool) -> tuple[np.ndarray, np.ndarray]:
    """Each text looks for others of its book, by cosine -> whether the nearest is one, 1 / rank of the first one."""
    vectors = vectors - vectors.mean(axis=0) if centred else vectors
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    same = books[np.argsort(-similarity, axis=1)] == books[:, None]
    rank = 1 + same.argmax(axis=1)
    return (rank == 1).astype(float), 1 / rank


def probe(train, train_books, test, test_books) -> np.ndarray:
    """Whether a linear classifier, its regularisation chosen on `train`, tells the book of each of `test`."""
    scaler = StandardScaler(with_mean=isinstance(train, np.ndarray))
    classifier = make_pipeline(scaler, RidgeClassifierCV(alphas=np.logspace(-1, 5, 13)))
    return (classifier.fit(train, train_books).predict(test) == test_books).astype(float)


def by_book(scores: np.ndarray, books: np.ndarray) -> np.ndarray:
    """The mean score of each book."""
    return np.array([scores[books == book].mean() for book in np.unique(books)])


def interval(scores: np.ndarray) -> tuple[float, float]:
    """95% of the mean over books, resampling them."""
    return tuple(np.quantile(scores[resample(len(scores))].mean(axis=1), [0.025, 0.975]))


def run_tasks(books: list[Text], window: int, embed: Embed) -> dict[str, Scores]:
    """Every score of each pooling of one way to read; that of the windows' beginnings stands with the first."""
    found, texts = {}, passages(books)
    for pooling, vectors in embed.documents(texts).items():
        found[pooling] = _retrieval_scores(vectors, texts)
    texts = chapters(books)
    for pooling, vectors in embed.documents(texts).items():
        found[pooling] |= _chapter_scores(vectors, texts)
    if embed.beginnings is not None:
        found[next(iter(found))]["boundary"] = _boundary_scores(embed.beginnings(stretches(books, window), window))
    return found


def _retrieval_scores(vectors, texts):
    numbers, scores = _numbers(texts), {}
    for name, centred in (("retrieval", False), ("retrieval, centred", True)):
        at_1, reciprocal = retrieval(_dense(vectors), numbers, centred=centred)
        scores |= {f"{name}: at 1": by_book(at_1, numbers), f"{name}: MRR": by_book(reciprocal, numbers)}
    return scores


def _chapter_scores(vectors, texts):
    numbers, held_out = _numbers(texts), np.arange(len(texts)) % 2 == 1
    right = probe(vectors[~held_out], numbers[~held_out], vectors[held_out], numbers[held_out])
    return {"chapters": by_book(right, numbers[held_out])}


def _boundary_scores(beginnings):
    """Of a book each, (windows, D)."""
    half = STRETCH_WINDOWS // 2
    train, test = ([vectors[part] for vectors in beginnings] for part in (slice(half), slice(half, None)))
    numbers = np.repeat(np.arange(len(beginnings)), half)
    return by_book(probe(_stack(train), numbers, _stack(test), numbers), numbers)


def _numbers(texts):
    return np.array([text.book for text in texts])


@dataclass
class Embed:
    """A way to read: texts to vectors (n, D) by the name of their pooling, and each text's (windows, D), of the first
    FIRST tokens of each window."""

    documents: Callable[[list[Text]], dict[str, np.ndarray]]
    beginnings: Callable[[list[Text], int], list[np.ndarray]] | None = None


def beginnings_alone(embed: Callable[[list[Text]], np.ndarray]) -> Callable[[list[Text], int], list[np.ndarray]]:
    """Of a way that embeds texts only: the beginning of each window as a text of its own."""

    def make(texts, window):
        return [embed([text.part(at, at + FIRST) for at in range(0, len(text.ids), window)]) for text in texts]

    return make


def _dense(vectors):
    return vectors if isinstance(vectors, np.ndarray) else vectors.toarray()


def _stack(parts):
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    from scipy.sparse import vstack

    return vstack(parts).tocsr()
