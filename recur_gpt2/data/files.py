"""Your own .txt, .parquet and .jsonl files -> documents as text, and their splits. Bad input is refused by name.

Not for tokens, which are corpora.py's, nor for data on the hub.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError
from ..utils.files import name_of

SPLITS = ("train", "validation", "test")
ALL = "all"  # in place of a split: the test split; all documents of data that has no splits of its own
HELD_OUT = 0.05  # share of validation, and of test, in data without splits of its own
TITLE_COLUMNS = ("title", "short_book_title")
ROWS_AT_ONCE = 8  # of a parquet file, whose rows may be books


class Document(NamedTuple):
    """One document of a file: where in the file it is, its text, and what its row says of itself."""

    place: str
    text: str
    title: str | None = None
    id: str | None = None


# ---- which files, which documents ------------------------------------------------------------------------------------


def find_files(path: Path, split: str) -> tuple[list[Path], bool]:
    """(the files to read, whether they are the split already; if not they are all of the data). ALL means the test
    split here."""
    split = "test" if split == ALL else split
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise InputError(f"{path} is not a {', '.join(READERS)} file; convert it to one of these")
        return [path], False
    own = {name: files for name in SPLITS if (files := _split_files(path, name))}
    if split in own:
        return own[split], True
    if own:
        raise InputError(f"{path} has its own {' and '.join(own)} but no {split}; add {split}.parquet, .jsonl or .txt")
    if texts := _txt_files(path):
        return texts, False
    raise InputError(f"{path} holds no .txt file and no train, validation or test .parquet or .jsonl; add one of these")


def _split_files(folder, name):
    """A folder's own split: train.parquet, train.jsonl, train.txt or the .txt files of train/, the first there is."""
    for suffix in READERS:
        if (folder / f"{name}{suffix}").is_file():
            return [folder / f"{name}{suffix}"]
    return _txt_files(folder / name)


def _txt_files(folder):
    found = (path for path in folder.rglob("*") if path.suffix.lower() == ".txt" and path.is_file())
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from None


def digests_of(digests: list[str], split: str) -> set[str] | None:
    """Which documents are the split's, by the hashes of their texts; None if there are too few to go round.

    Equal texts are in the same split: a document to test on is never also trained on.
    """
    ranked = sorted(set(digests))
    if len(ranked) < len(SPLITS):
        return None
    held_out = max(1, round(HELD_OUT * len(ranked)))
    parts = {"validation": ranked[:held_out], "test": ranked[held_out : 2 * held_out], "train": ranked[2 * held_out :]}
    return set(parts[split])


def split_rule(digests: list[str]) -> str:
    """How data without splits of its own is split, for a person to read."""
    if digests_of(digests, "train") is None:
        return (
            f"few documents to share out: of each the first {1 - 2 * HELD_OUT:.0%} of the characters are train, the "
            f"next {HELD_OUT:.0%} validation, the last test"
        )
    counts = {split: sum(digest in digests_of(digests, split) for digest in digests) for split in SPLITS}
    shares = ", ".join(f"{count} {split}" for split, count in counts.items())
    return f"a hash of each text makes {shares} of its {len(digests)} documents"


def cut(row: dict, split: str) -> dict:
    """The split's part of one document's characters, for data of a document or two."""
    first, second = (int(len(row["text"]) * share) for share in (1 - 2 * HELD_OUT, 1 - HELD_OUT))
    parts = {"train": slice(first), "validation": slice(first, second), "test": slice(second, None)}
    return {**row, "text": row["text"][parts[split]], "where": f"the {split} part of {row['where']}"}


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_documents(files: list[Path]) -> Iterator[dict]:
    """{where, title, text, digest} of each document: where it is, for error messages, and the hash of its text."""
    for path in files:
        number = 0
        for number, document in enumerate(READERS[path.suffix.lower()](path), start=1):
            where = f"{name_of(path)} {document.place}".rstrip()
            digest = hashlib.sha256(check_text(document.text, where)).hexdigest()
            if not document.text.strip():
                raise InputError(f"{where} is an empty document or only white space; leave it out, or write text to it")
            title = document.title or f"document {number}"
            yield {"where": where, "title": title, "text": document.text, "digest": digest}
        if number == 0:
            raise InputError(f"{path} holds no document; leave it out, or write text to it")


def check_text(text: object, where: str) -> bytes:
    """The text as UTF-8; refuses what is no text."""
    if not isinstance(text, str):
        raise InputError(f"{where} has a text of type {type(text).__name__}; make it a string, or leave it out")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has half a surrogate pair at character {error.start}; repair or remove it") from None


def _read_txt(path):
    yield Document("", _decode(path.read_bytes(), path), name_of(path.stem))


def _read_jsonl(path):
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Document(f"line {number}", *_parse_line(_decode(line, path, offset), f"{path} line {number}"))
            offset += len(line)


def _parse_line(line, where):
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON ({error}); write one JSON object on each line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where} is no JSON object; write one with a text field on each line")
    check_columns(row, where)
    title = next((str(row[name]) for name in TITLE_COLUMNS if row.get(name)), None)
    return row["text"], title, None if row.get("id") is None else str(row["id"])


def _read_parquet(path):
    try:
        file = pq.ParquetFile(path)
        columns = check_columns(file.schema_arrow.names, path)
        batches = file.iter_batches(ROWS_AT_ONCE, columns=columns)
        rows = (row for batch in batches for row in zip(*batch.select(columns).columns, strict=True))
        for number, row in enumerate((dict(zip(columns, row, strict=True)) for row in rows), start=1):
            title = next((str(row[name]) for name in TITLE_COLUMNS if name in row and row[name].as_py()), None)
            id = str(row["id"]) if "id" in row and row["id"].is_valid else None
            yield Document(f"row {number}", _text_of(row["text"], f"{path} row {number}"), title, id)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is no readable parquet file ({first_line(error)}); copy or make it again") from None


def _text_of(value, where):
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 at byte {error.start} of its text; convert it to UTF-8") from None


def _decode(data, path, offset=0):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {offset + error.start}; convert it to UTF-8") from None


def check_columns(names: Iterable[str], where: object) -> list[str]:
    """The columns that are read: text and, where there are any, titles and ids."""
    if "text" not in names:
        listed = ", ".join(names) or "none at all"
        raise InputError(f"{where} has no text column, only {listed}; rename the one that holds the documents to text")
    return ["text", *(name for name in (*TITLE_COLUMNS, "id") if name in names)]


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".txt": _read_txt}
