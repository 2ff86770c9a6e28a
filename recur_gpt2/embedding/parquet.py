"""Texts -> a Parquet file of vectors, in bounded memory, that a killed run can go on with: `recur-gpt2 embed`.

Rows are written to parts in a folder beside the output, each whole or not at all, and joined at the end. A document
is done when its id is in a part or in the output: none is lost, none is there twice.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from ..data.files import first_line
from ..data.sources import NamedText, Source, named_texts
from ..errors import InputError
from ..utils.files import atomic_path, atomic_write_text
from ..utils.itertools import batched_by_size
from .embedder import DocumentEmbedder

METADATA = b"recur_gpt2"  # key of the settings in a Parquet file's metadata
PARTS = f"{'[0-9]' * 6}.parquet"
# What is written to the folder of parts, half-written files of a killed run included.
OWN = re.compile(r"(\d{6}|\.\d{6}\.[0-9a-f]{8})\.parquet|(settings|\.settings\.[0-9a-f]{8})\.json")
PART_SECONDS = 20  # between two parts, so that a killed run loses little
PART_ROWS = 50_000
GROUP_ROWS = 8192  # of the output, which its readers take at a time
TYPES = {"float32": pa.float32(), "float16": pa.float16()}


def fingerprint(embedder: DocumentEmbedder) -> str:
    """32 hex digits of the weights, the configuration and the tokenizer: the same wherever vectors are the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(embedder.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(embedder.tokenizer.backend_tokenizer.to_str().encode())
    digest.update(str(embedder.model.config.window).encode())
    return digest.hexdigest()[:32]


def embed_texts(
    embedder: DocumentEmbedder,
    sources: Sequence[Source],
    output: Path,
    *,
    settings: dict,
    batch_tokens: int,
    dtype: str = "float32",
    shard: tuple[int, int] = (1, 1),
    progress: bool = True,
) -> tuple[int, int]:
    """Embed what is not embedded yet, and write all of it to `output`.

    Args:
        settings: pooling, layer and normalize, as of DocumentEmbedder.encode, and the model's name.
        dtype: of the vectors in the file, "float32" or "float16".
        shard: (i, n), the i-th of n shares of the documents.

    Returns:
        How many documents were embedded now, and how many are in the output.

    Raises:
        InputError: the output was made with other settings, or a document cannot be read; what was embedded is kept.
    """
    about = {"fingerprint": fingerprint(embedder), "window": embedder.model.config.window, "dtype": dtype}
    rows = Rows(output, settings | about | {"dimension": embedder.dimension(settings["pooling"])})
    counts = [source.count for source in sources]
    total = None if None in counts else len(range(shard[0] - 1, sum(counts), shard[1])) - len(rows.done)
    waiting: deque[tuple[str, int]] = deque()

    def texts() -> Iterator[str]:
        for named in _not_done(named_texts(sources, shard), rows.done):
            text = named.read()
            waiting.append((named.id, len(text)))
            yield text

    options = {key: settings[key] for key in ("pooling", "layer", "normalize")}
    vectors = embedder.encode_iter(texts(), batch_tokens=batch_tokens, **options)
    bar = tqdm(vectors, total=total, unit="doc", desc="embedding", disable=not progress)
    try:
        for vector in bar:
            rows.add(*waiting.popleft(), vector)
    finally:
        rows.flush()
    rows.finish()
    return rows.added, rows.added + len(rows.done)


def _not_done(texts: Iterator[NamedText], done: set[str]) -> Iterator[NamedText]:
    return (text for text in texts if text.id not in done)


class Rows:
    """The rows of an output: those it has, those in parts, those added.

    Attributes:
        done: ids of the rows that are on the disk.
        added: rows since.
    """

    def __init__(self, output: Path, settings: dict):
        self.output, self.settings = output, settings
        self.folder = output.with_name(output.name + ".parts")
        self._check_settings()
        self._parts = sorted(self.folder.glob(PARTS))
        self.done = {id for path in self._files() for id in _read_ids(path)}
        self.added, self._pending, self._flushed = 0, [], time.monotonic()

    def add(self, id: str, characters: int, vector: np.ndarray) -> None:
        """One more row; rows go to the disk every PART_SECONDS."""
        self._pending.append((id, characters, vector))
        self.added += 1
        if time.monotonic() - self._flushed > PART_SECONDS or len(self._pending) >= PART_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what was added since to a part."""
        if self._pending:
            number = int(self._parts[-1].stem) + 1 if self._parts else 0
            path = self.folder / f"{number:06d}.parquet"
            with atomic_path(path) as temporary:
                pq.write_table(self._table(), temporary)
            self._parts.append(path)
            self._pending = []
        self._flushed = time.monotonic()

    def finish(self) -> None:
        """Join the output with the parts."""
        if self._parts or not self.output.exists():
            with atomic_path(self.output) as temporary, pq.ParquetWriter(temporary, self._schema()) as writer:
                batches = (batch for path in self._files() for batch in pq.ParquetFile(path).iter_batches(GROUP_ROWS))
                for group in batched_by_size(batches, len, GROUP_ROWS):
                    writer.write_table(pa.Table.from_batches(group).cast(self._schema()))
        for path in self.folder.iterdir():
            if OWN.fullmatch(path.name):
                path.unlink()
        if not any(self.folder.iterdir()):  # else somebody keeps files of his own there
            self.folder.rmdir()

    def _files(self):
        return [*([self.output] if self.output.exists() else []), *self._parts]

    def _check_settings(self):
        path = self.folder / "settings.json"
        if self.output.exists():
            self._refuse_others(read_settings(self.output), self.output)
        if path.exists():
            self._refuse_others(json.loads(path.read_text()), self.folder)
        elif any(self.folder.glob(PARTS)):
            raise InputError(f"{self.folder} holds files that embed did not write; move them, or give another --output")
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(self.settings, indent=1) + "\n")

    def _refuse_others(self, settings, where):
        for key in self.settings.keys() - {"model"}:
            if settings.get(key) != self.settings[key]:
                raise InputError(
                    f"{where} was made with {key}={settings.get(key)}, not {self.settings[key]}; "
                    "give another --output, or remove it"
                )

    def _schema(self):
        vector = pa.list_(TYPES[self.settings["dtype"]], self.settings["dimension"])
        model = pa.dictionary(pa.int32(), pa.string())
        columns = {"id": pa.string(), "characters": pa.int64(), "vector": vector, "model": model}
        return pa.schema(columns.items(), metadata={METADATA: json.dumps(self.settings)})

    def _table(self):
        ids, characters, vectors = zip(*self._pending, strict=True)
        values = pa.array(np.concatenate(vectors).astype(self.settings["dtype"]))
        vectors = pa.FixedSizeListArray.from_arrays(values, self.settings["dimension"])
        model = pa.array([self.settings["fingerprint"]] * len(ids)).dictionary_encode()
        return pa.table([pa.array(ids), pa.array(characters, pa.int64()), vectors, model], schema=self._schema())


def read_settings(path: Path) -> dict:
    """What a file of vectors was made with.

    Raises:
        InputError: it is no such file.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is no readable parquet file ({first_line(error)}); make it again") from None
    if METADATA not in metadata:
        raise InputError(f"{path} holds no vectors of recur-gpt2 embed; give a file that it wrote")
    return json.loads(metadata[METADATA])


def _read_ids(path):
    for batch in pq.ParquetFile(path).iter_batches(columns=["id"]):
        yield from batch.column("id").to_pylist()
