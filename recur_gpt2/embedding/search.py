"""Vectors in Parquet files -> the documents nearest to a text, exactly, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nlargest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from ..data.files import READERS, check_text
from ..errors import InputError, check_range
from .embedder import DocumentEmbedder
from .parquet import GROUP_ROWS, fingerprint, read_settings

try:
    import faiss
except ImportError:  # an extra
    faiss = None


class Found(NamedTuple):
    """A document: its id, its length in characters, and the cosine of its vector with the query's."""

    id: str
    characters: int
    cosine: float


def nearest(
    files: Sequence[Path], query_file: Path, k: int, model: str | None = None, device: str | None = None
) -> list[Found]:
    """The k documents whose vectors have the largest cosine with the query's, the nearest first.

    Raises:
        InputError: the files hold no vectors, vectors of different kinds, or of another model.
    """
    check_range(1, k=k)
    settings = _common_settings(files)
    if not query_file.is_file():
        raise InputError(f"{query_file} does not exist; give a text file as --query-file")
    (query,) = READERS[".txt"](query_file)
    check_text(query.text, str(query_file))
    if not query.text.strip():
        raise InputError(f"{query_file} is empty; write a text to it")
    name = model or settings["model"]
    embedder = DocumentEmbedder.from_pretrained(name, settings["window"], device, settings["precision"])
    if fingerprint(embedder) != settings["fingerprint"]:
        raise InputError(f"{name} is not the model that {files[0]} was made with; give that one as --model")
    options = {key: settings[key] for key in ("pooling", "layer")}
    vector = embedder.encode([query.text], normalize=True, **options)
    return _nearest(files, vector, k)


def _common_settings(files):
    found = [read_settings(path) for path in files]
    for path, settings in zip(files, found, strict=True):
        for key in ("fingerprint", "pooling", "layer"):
            if settings[key] != found[0][key]:
                raise InputError(f"{path} has {key}={settings[key]} and {files[0]} {found[0][key]}; search them apart")
    return found[0]


def _nearest(files, query, k):
    _check_faiss()
    found = []
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(GROUP_ROWS, columns=["id", "characters", "vector"]):
            vectors = batch.column("vector").flatten().to_numpy(zero_copy_only=False).astype(np.float32)
            vectors = np.ascontiguousarray(vectors.reshape(len(batch), -1))
            faiss.normalize_L2(vectors)
            cosines, places = faiss.knn(query, vectors, min(k, len(batch)), metric=faiss.METRIC_INNER_PRODUCT)
            for cosine, place in zip(cosines[0].tolist(), places[0].tolist(), strict=True):
                id, characters = (batch.column(name)[place].as_py() for name in ("id", "characters"))
                found.append(Found(id, characters, cosine))
            found = nlargest(k, found, key=lambda each: each.cosine)
    return found


def _check_faiss():
    if faiss is None:
        raise InputError("search needs faiss, which is not installed; run: pip install 'recur-gpt2[search]'")
