"""Folders, globs, files and Hugging Face datasets -> texts with ids, one after another: what `recur-gpt2 embed` reads.

A .txt file's id is its path as given; a row's is its `id` column or, without one, "<file>:<row>". Ids must be unique.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from glob import glob
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_from_disk

from ..errors import InputError
from ..utils.files import name_of
from .corpora import BUNDLED, HELP, bundled, hub_rows, is_hub_name
from .files import READERS, check_columns, check_text, find_files


class NamedText(NamedTuple):
    """A text that is read when it is needed."""

    id: str
    read: Callable[[], str]


class Source(NamedTuple):
    """Some of the texts.

    Attributes:
        texts: to walk through them, from the first one each time.
        count: how many there are; None if only a walk can tell.
    """

    texts: Callable[[], Iterator[NamedText]]
    count: int | None


def find_sources(inputs: Sequence[str], split: str) -> list[Source]:
    """What the inputs name: folders (with all below them), globs, .txt, .jsonl and .parquet files, datasets.

    Args:
        split: of datasets: those on the hub, bundled ones, and folders that `datasets` has saved.

    Raises:
        InputError: an input names nothing.
    """
    return [source for name in inputs for source in _find(name, split)]


def named_texts(sources: Sequence[Source], shard: tuple[int, int] = (1, 1)) -> Iterator[NamedText]:
    """All texts of the sources, or of n shards the i-th: every n-th text, from the i-th on.

    Raises:
        InputError: a file cannot be read, or an id stands there twice.
    """
    index, shards = shard
    seen = set()
    for text in islice((text for source in sources for text in source.texts()), index - 1, None, shards):
        if text.id in seen:
            raise InputError(f"the id {text.id!r} stands twice in the input; give each document an id of its own")
        seen.add(text.id)
        yield text


def _find(name, split):
    path = Path(name)
    if name in BUNDLED:
        files, _ = find_files(bundled(name), split)
        return [_file(file, f"{name}/{file.stem}") for file in files]
    if path.is_dir():
        return _folder(path, split)
    if path.is_file():
        return [_file(path)]
    if matches := sorted(glob(name, recursive=True)):
        return [source for match in matches for source in _find_match(Path(match), split)]
    if is_hub_name(name):
        return [Source(lambda: _rows(hub_rows(name, split), f"{name}/{split}"), None)]
    raise InputError(f"{name!r} is neither a file, folder or glob that matches here nor a known dataset; {HELP}")


def _find_match(path, split):
    """What a glob matched; files of other kinds are passed over, as in folders."""
    if path.is_dir():
        return _folder(path, split)
    return [_file(path)] if path.suffix.lower() in READERS else []


def _folder(path, split):
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return [_saved(path, split)]
    files = (file for file in path.rglob("*") if file.suffix.lower() in READERS and file.is_file())
    files = sorted(files, key=lambda file: file.relative_to(path).as_posix())
    if not files:
        raise InputError(f"{path} holds no {', '.join(READERS)} file; give another folder")
    return [_file(file) for file in files]


def _saved(path, split):
    """A dataset that `save_to_disk` wrote."""
    dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise InputError(f"{path} has no split {split!r}, only {', '.join(dataset)}; give one of them as --split")
        dataset = dataset[split]
    check_columns(dataset.column_names, path)
    return Source(lambda: _rows(dataset, path.as_posix()), len(dataset))


def _file(path, name=None):
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise InputError(f"{path} is not a {', '.join(READERS)} file; convert it to one of these")
    name = name_of(name or path.as_posix())
    if suffix == ".txt":
        return Source(lambda: iter([NamedText(name, lambda: _only(path).text)]), 1)
    return Source(lambda: _documents(path, name), _count(path))


def _only(path):
    (document,) = READERS[".txt"](path)
    return document


def _count(path):
    try:
        return pq.read_metadata(path).num_rows if path.suffix.lower() == ".parquet" else None
    except Exception:  # reading the file says what is wrong with it
        return None


def _documents(path, name):
    for document in READERS[path.suffix.lower()](path):
        place = document.place.split()[-1]
        yield NamedText(document.id or f"{name}:{place}", _checked(document.text, f"{path} {document.place}"))


def _rows(rows: Dataset, name):
    for number, row in enumerate(rows, start=1):
        id = row.get("id")
        yield NamedText(f"{name}:{number}" if id is None else str(id), _checked(row["text"], f"{name} row {number}"))


def _checked(text, where):
    def read():
        check_text(text, where)
        return text

    return read
