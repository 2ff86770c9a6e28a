"""PG-19, WikiText-103, your own text -> documents as token ids: `load_corpus` gives one split as a `Corpus`.

Bundled and local data are tokenised once with Hugging Face `datasets`, cached and memory-mapped; data on the hub are
streamed and tokenised on the fly. Not for windows or lanes, which batches.py makes from what comes out here.
"""

import hashlib
import json
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value, config, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..utils.files import atomic_write_text
from . import bundle
from .files import (
    ALL,
    READERS,
    SPLITS,
    check_columns,
    cut,
    digests_of,
    find_files,
    first_line,
    hash_file,
    read_documents,
    split_rule,
)
from .tokenization import Encoder, plain

BUNDLED = ("pg19-sample", "wikitext-103-sample")
# deepmind/pg19 is a loading script, which datasets>=4 refuses; emozilla/pg19 has its rows as parquet.
HUB = {"pg19": ("emozilla/pg19", None), "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1")}
HELP = f"bundled are {' and '.join(BUNDLED)}, and a path to your own .txt, .parquet or .jsonl text works too"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
ARTICLE_HEADING = re.compile(r"^ = ([^=].*?[^=]|[^=]) = $")
BATCH = 4  # documents that are read and written at a time
SHUFFLE_BUFFER = 512  # streamed documents that are shuffled among each other: of PG-19's books about 200 MB
LONGEST_TOKEN = 1000  # characters, and generous: GPT-2's longest token has 128
CACHE_FORMAT = 2  # a part of every fingerprint; change it with what the cache holds


class Corpus(ABC):
    """One split of a collection of texts, as token ids without special tokens."""

    fingerprint: str
    """Of data, split and tokenizer: the same wherever the same documents get the same ids."""
    num_documents: int | None = None
    """None when streamed."""
    titles: list[str] | None = None
    """One for each document, in the natural order; None when streamed."""
    split_rule: str | None = None
    """How the split was made, in a sentence; None where the data came with it."""

    @abstractmethod
    def documents(self, seed: int | None = None, epoch: int = 0, skip: int = 0) -> Iterator[np.ndarray]:
        """Each document once, as 1-D int64 ids, in an order that is a function of (seed, epoch) alone.

        seed=None is the natural order. The first `skip` documents of the order are left out, which is cheap.
        """


class TokenisedCorpus(Corpus):
    """Documents that were tokenised before, in a memory-mapped table of `title` and `input_ids`."""

    def __init__(self, table: Dataset, fingerprint: str, split_rule: str | None = None):
        self.fingerprint, self.split_rule = fingerprint, split_rule
        self.num_documents = len(table)
        self.titles = table["title"][:]
        self._ids = table.with_format("numpy", columns=["input_ids"])

    def documents(self, seed: int | None = None, epoch: int = 0, skip: int = 0) -> Iterator[np.ndarray]:
        order = np.arange(self.num_documents)
        if seed is not None:
            np.random.default_rng((seed, epoch)).shuffle(order)
        for index in order[skip:]:
            yield self._ids[int(index)]["input_ids"].astype(np.int64)


class StreamedCorpus(Corpus):
    """Rows with a `text`, read and tokenised when they are asked for, never all in memory.

    A document that cannot be scored is left out, with one warning for all of them.
    """

    def __init__(self, rows: IterableDataset, tokenizer: PreTrainedTokenizerBase, fingerprint: str):
        self.fingerprint = fingerprint
        self._encode = Encoder(tokenizer)
        self._warned = False
        self._rows = rows.select_columns(["text"]).filter(self._can_be_scored, input_columns=["text"])

    def documents(self, seed: int | None = None, epoch: int = 0, skip: int = 0) -> Iterator[np.ndarray]:
        rows = self._rows
        if seed is not None:
            # A generator of its own for each epoch, not set_epoch: walks of two epochs do not disturb each other.
            # One file after another: by default ten are open at a time, each with hundreds of MB of books in memory.
            generator = np.random.default_rng((seed, epoch))
            rows = rows.shuffle(generator=generator, buffer_size=SHUFFLE_BUFFER, max_buffer_input_shards=1)
        for row in rows.skip(skip):
            yield self._encode(row["text"]).astype(np.int64)

    def _can_be_scored(self, text):
        good = isinstance(text, str) and bool(text.strip())
        if good and len(text) <= LONGEST_TOKEN:  # only a short text is tokenised to find out: skipping stays cheap
            good = len(self._encode(text)) > 1
        if not good and not self._warned:
            self._warned = True
            warnings.warn("streamed documents of fewer than two tokens are left out: nothing to predict", stacklevel=2)
        return good


def load_corpus(
    data: str | Path, split: str, tokenizer: PreTrainedTokenizerBase, *, cache_dir: Path | None = None
) -> Corpus:
    """One split ("train", "validation" or "test") of `data`, or what there is to score: "all".

    `data` is "pg19-sample" or "wikitext-103-sample" (bundled), "pg19", "wikitext-103" or any "owner/name" of the hub
    with a text column (streamed), or a path: a .txt, .parquet or .jsonl file, a folder of .txt files, or a folder with
    a file or a folder for each split (train.parquet, ...). The names win over paths of the same name.

    A path without splits of its own is split by document, 90/5/5, by a hash of the text; fewer than three different
    documents are each cut by characters. "all" reads such a path whole, and elsewhere the test split. The ids are kept
    in `cache_dir` (default: in the cache of `datasets`).
    """
    if split not in (*SPLITS, ALL):
        raise InputError(f"split={split!r} is not a split; use {', '.join(SPLITS)} or {ALL}")
    name, path = str(data), Path(data)
    if name in BUNDLED:
        return _local_corpus(bundled(name), split, tokenizer, cache_dir)
    if name not in HUB and path.exists():
        return _local_corpus(path, split, tokenizer, cache_dir)
    if is_hub_name(name):
        return _hub_corpus(name, "test" if split == ALL else split, tokenizer)
    raise InputError(f"{name!r} is neither a file or folder here nor a known dataset; {HELP}")


# ---- tokens ----------------------------------------------------------------------------------------------------------


def _fingerprint(tokenizer, *parts):
    """32 hex digits that are the same in every process, as hashes of pickled objects are not."""
    content = json.dumps([CACHE_FORMAT, plain(tokenizer).to_str(), *parts])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


# ---- bundled and local -----------------------------------------------------------------------------------------------


def bundled(name: str) -> Path:
    """The folder of texts that come with the project."""
    folder = bundle.BUNDLED / name
    if not folder.is_dir():
        raise InputError(f"{name!r} is missing at {folder}; install the project again, whole, or give a path")
    return folder


def _local_corpus(path, split, tokenizer, cache_dir):
    files, has_splits = find_files(path, split)
    root = path if path.is_dir() else path.parent
    contents = [[file.relative_to(root).as_posix(), hash_file(file)] for file in files]
    fingerprint = _fingerprint(tokenizer, split, has_splits, contents)
    cached = Path(cache_dir or Path(config.HF_DATASETS_CACHE) / "recur_gpt2") / f"{fingerprint}.arrow"
    is_split = has_splits or split == ALL
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cached.parent, ignore_cleanup_errors=True) as scratch:
            texts = _read(files, scratch)
            if not is_split:
                atomic_write_text(_rule_of(cached), split_rule(texts["digest"][:]))
            _tokenise(texts if is_split else _part(texts, split), Encoder(tokenizer), cached)
    rule = None if is_split else f"{path} has no splits of its own: {_rule_of(cached).read_text(encoding='utf-8')}"
    return TokenisedCorpus(Dataset.from_file(str(cached)), fingerprint, rule)


def _rule_of(cached):
    """The file beside cached ids that says how their split was made."""
    return cached.with_suffix(".split.txt")


def _read(files, scratch):
    """Every document of the files as a row of text, memory-mapped from the scratch folder."""
    try:
        return Dataset.from_generator(
            read_documents,
            features=Features({name: Value("string") for name in ("where", "title", "text", "digest")}),
            cache_dir=scratch,
            gen_kwargs={"files": files},
            writer_batch_size=BATCH,
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise


def _part(texts, split):
    """The split's share of texts that come without splits."""
    digests = texts["digest"][:]
    chosen = digests_of(digests, split)
    if chosen is None:
        return Dataset.from_list([cut(row, split) for row in texts])
    return texts.select([index for index, digest in enumerate(digests) if digest in chosen])


def _tokenise(texts, encoder, output):
    """Write title and ids of every row to `output`, whole or not at all."""

    def encode(batch):
        ids = [encoder(text) for text in batch["text"]]
        for where, document in zip(batch["where"], ids, strict=True):
            if len(document) < 2:
                raise InputError(
                    f"{where} has fewer than two tokens, so nothing to predict; make it longer or remove it"
                )
        return {"title": batch["title"], "input_ids": ids}

    texts.map(
        encode,
        batched=True,
        batch_size=BATCH,
        writer_batch_size=BATCH,
        remove_columns=texts.column_names,
        features=Features({"title": Value("string"), "input_ids": List(Value("int32"))}),
        cache_file_name=str(output),
        new_fingerprint=output.stem,  # else `datasets` would pickle and hash the tokenizer
        desc="tokenising",
    )


# ---- the hub ---------------------------------------------------------------------------------------------------------


def _hub_corpus(name, split, tokenizer):
    return StreamedCorpus(
        hub_rows(name, split), tokenizer, _fingerprint(tokenizer, *HUB.get(name, (name, None)), split)
    )


def is_hub_name(name: str) -> bool:
    """Whether this is the name of a dataset on the hub, and not of a file that is missing."""
    return name in HUB or (HUB_ID.fullmatch(name) is not None and Path(name).suffix.lower() not in READERS)


def hub_rows(name: str, split: str) -> IterableDataset:
    """Rows with a text, streamed.

    Raises:
        InputError: the hub cannot be reached, or has no such dataset.
    """
    repository, configuration = HUB.get(name, (name, None))
    try:
        rows = load_dataset(repository, configuration, split=split, streaming=True)
        columns = rows.column_names or list(next(iter(rows), {}))
    except ConnectionError:
        raise InputError(_hub_failure(name, repository, "which could not be reached")) from None
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise InputError(_hub_failure(name, repository, f"which failed with: {first_line(error)}")) from None
    check_columns(columns, f"the dataset {repository} on the Hugging Face Hub")
    if name == "wikitext-103":
        rows = IterableDataset.from_generator(_article_rows, gen_kwargs={"lines": rows})
    return rows


def _hub_failure(name, repository, why):
    return f"{name!r} was looked for as the dataset {repository} on the Hugging Face Hub, {why}; {HELP}"


def _article_rows(lines):
    """Articles from the hub's rows of a line each, whose blank lines have lost their one space."""
    return wikitext_articles(row["text"].rstrip("\n") or " " for row in lines)


def wikitext_articles(lines: Iterable[str]) -> Iterator[dict]:
    """{title, text} of each article in the lines of a WikiText file, reading one line ahead.

    A heading ` = Title = ` stands alone between two blank lines; else formulas and legends of tables give false ones.
    """
    title, article, before = None, [], ""
    for line, after in pairwise(chain(lines, [""])):
        heading = ARTICLE_HEADING.match(line)
        if heading and not before.strip() and not after.strip():
            if title is not None:
                yield {"title": title, "text": "\n".join(article)}
            title, article = heading.group(1), []
        article.append(line)
        before = line
    if title is not None:
        yield {"title": title, "text": "\n".join(article)}
