"""Make data/pg19-sample and data/wikitext-103-sample from a folder of collected texts.

The folder holds `books.csv`, the unpacked archive `books/` and `wikitext/` (data/README.md names their sources).
Run once by the maintainers; users get the result with the repository.

    python scripts/make_samples.py --books books --books-csv books.csv --wikitext wikitext --output data
"""

import argparse
import csv
import hashlib
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recur_gpt2.data.corpora import wikitext_articles

TRAIN_BYTES = 14_000_000
TRAIN_BOOK_BYTES = (200_000, 1_200_000)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--books", type=Path, required=True, help="folder that holds pg19/{train,validation,test}")
    parser.add_argument("--books-csv", type=Path, required=True, help="one row a book: file, title, author, year, ...")
    parser.add_argument("--wikitext", type=Path, required=True, help="folder of wiki.*.raw and wikitext-103.*.tokens")
    parser.add_argument("--output", type=Path, default=Path("data"), help="where the two samples go")
    args = parser.parse_args()

    rows = [row for row in csv.DictReader(args.books_csv.open(encoding="utf-8")) if row["file"].startswith("pg19/")]
    for split in ("train", "validation", "test"):
        chosen = [row for row in rows if row["file"].startswith(f"pg19/{split}/")]
        if split == "train":
            chosen = train_sample(chosen)
        books = [pg19_row(row, args.books) for row in chosen]
        write(books, args.output / "pg19-sample" / f"{split}.parquet")

    sources = {
        "train": "wikitext-103.train-prefix.tokens",
        "validation": "wiki.valid.raw",
        "test": "wiki.test.raw",
    }
    for split, name in sources.items():
        lines = (args.wikitext / name).read_text(encoding="utf-8").split("\n")
        write(list(wikitext_articles(lines)), args.output / "wikitext-103-sample" / f"{split}.parquet")


def train_sample(rows):
    """Books of middling size in the order of their hash (no choice of ours), up to TRAIN_BYTES."""
    low, high = TRAIN_BOOK_BYTES
    chosen, total = [], 0
    for row in sorted(rows, key=lambda row: hashlib.sha256(row["file"].encode()).hexdigest()):
        if low <= int(row["bytes"]) <= high and total + int(row["bytes"]) <= TRAIN_BYTES:
            chosen.append(row)
            total += int(row["bytes"])
    return chosen


def pg19_row(row, books):
    identifier = row["gutenberg_id"]
    return {
        "short_book_title": f"{plain_title(row['title'])} by {plain_author(row['author'])}",
        "publication_date": int(row["year"]) if row["year"].isdigit() else None,
        "url": f"http://www.gutenberg.org/ebooks/{identifier}" if identifier else None,
        "text": (books / row["file"]).read_text(encoding="utf-8"),
    }


def plain_title(title):
    """Without the marks that the ELTeC encoders left in their titles."""
    return re.sub(r"\s*:\s*ELTeC edition$", "", title, flags=re.IGNORECASE)


def plain_author(author):
    """`Eliot, George [pseud.]` -> `George Eliot`, as PG-19 writes it."""
    author = re.sub(r"\s*\[.*?\]", "", author)
    last, comma, first = author.partition(", ")
    return f"{first} {last}" if comma and ", " not in first else author


def write(rows, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, path, compression="zstd", compression_level=19, row_group_size=4)
    size = sum(len(row["text"].encode()) for row in rows)
    print(f"{path}: {len(rows)} rows, {size:,} bytes of text, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
