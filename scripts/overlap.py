"""Text overlap of a training corpus with held-out documents, by 10-word shingles.

    python scripts/overlap.py --books FOLDER --held-out data/pg19-sample/test.parquet ...

prints each pair of a book and a held-out document that share more than 1% of the smaller one's shingles, and exits
with status 1 if there is one. `scripts/pretrain_base.py` applies the same check before it trains.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

SHINGLE = 10
LIMIT = 0.01


def shingles(text):
    """Sorted, unique 64-bit hashes of every run of SHINGLE words, letters and digits only."""
    words = np.array([hash_word(word) for word in re.findall(r"\w+", text.lower())], dtype=np.uint64)
    count = len(words) - SHINGLE + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    rolled = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(SHINGLE):
            rolled = rolled * np.uint64(0x9E3779B97F4A7C15) + words[offset : offset + count]
            rolled ^= rolled >> np.uint64(29)
    return np.unique(rolled)


def hash_word(word, _cache={}):  # noqa: B006 (the cache is meant to be shared)
    if word not in _cache:
        value = 0xCBF29CE484222325
        for byte in word.encode():
            value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
        _cache[word] = value
    return _cache[word]


def overlap(a, b):
    """Share of the smaller set's shingles that the other one holds too."""
    return len(np.intersect1d(a, b, assume_unique=True)) / max(1, min(len(a), len(b)))


def held_out_shingles(paths):
    """{title: shingles} of every row of the parquet files."""
    found = {}
    for path in paths:
        for row in pq.read_table(path).to_pylist():
            found[row.get("short_book_title") or row.get("title")] = shingles(row["text"])
    return found


def overlapping(text, held_out):
    """[(title, share)] of the held-out documents that `text` shares more than LIMIT with."""
    own = shingles(text)
    shares = ((title, overlap(own, other)) for title, other in held_out.items())
    return [(title, share) for title, share in shares if share > LIMIT]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--books", type=Path, required=True, help="folder of .txt files, searched recursively")
    parser.add_argument("--held-out", type=Path, nargs="+", required=True, help="parquet files with a text column")
    args = parser.parse_args()
    held_out = held_out_shingles(args.held_out)
    bad = 0
    for path in sorted(args.books.rglob("*.txt")):
        for title, share in overlapping(path.read_text(encoding="utf-8"), held_out):
            print(f"{path}: {share:.1%} of its shingles are shared with {title!r}")
            bad += 1
    print(f"{bad} overlapping pairs")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
