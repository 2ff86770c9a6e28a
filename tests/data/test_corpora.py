"""corpora.py: documents come out as the tokenizer's ids, once an epoch, in an order that can be had again."""

import os
import subprocess
import sys
import warnings

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from recur_gpt2.data import corpora
from recur_gpt2.data.corpora import BUNDLED, StreamedCorpus, load_corpus, wikitext_articles
from recur_gpt2.errors import InputError

BOOKS = [f"Chapter {number}. It was the {number}th of May, and " + "the rain went on " * number for number in range(30)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "data" / "gpt2-mini")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """BOOKS as the train split, with the rest of a corpus beside it."""
    folder = tmp_path_factory.mktemp("books")
    write_parquet(folder / "train.parquet", text=BOOKS, title=[f"Book {number}" for number in range(len(BOOKS))])
    write_parquet(folder / "test.parquet", text=["another book"])
    return folder


@pytest.fixture(scope="module")
def local(folder, tokenizer, tmp_path_factory):
    return load_corpus(folder, "train", tokenizer, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def streamed(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    shards = [write_parquet(folder / f"{start}.parquet", text=BOOKS[start : start + 12]) for start in (0, 12, 24)]
    return StreamedCorpus(stream(*shards), tokenizer, "a fingerprint")


@pytest.fixture(params=["local", "streamed"])
def corpus(request):
    return request.getfixturevalue(request.param)


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def stream(*paths):
    return datasets.load_dataset("parquet", data_files=list(map(str, paths)), split="train", streaming=True)


def ids_of(documents):
    return [document.tolist() for document in documents]


def texts_of(data, split, tokenizer, cache_dir):
    corpus = load_corpus(data, split, tokenizer, cache_dir=cache_dir)
    return [tokenizer.decode(document) for document in corpus.documents()]


# ---- what comes out, local or streamed -------------------------------------------------------------------------------


def test_documents_are_the_tokenizers_ids(corpus, tokenizer):
    documents = list(corpus.documents())
    assert ids_of(documents) == [tokenizer(text)["input_ids"] for text in BOOKS]
    assert all(document.dtype == np.int64 and document.ndim == 1 for document in documents)


def test_order_is_a_function_of_the_seed_and_the_epoch(corpus):
    first = ids_of(corpus.documents(seed=1, epoch=2))
    assert ids_of(corpus.documents(seed=1, epoch=2)) == first
    assert ids_of(corpus.documents(seed=1, epoch=3)) != first
    assert ids_of(corpus.documents(seed=2, epoch=2)) != first


def test_without_a_seed_every_epoch_has_the_natural_order(corpus):
    assert ids_of(corpus.documents(epoch=5)) == ids_of(corpus.documents())


def test_every_document_appears_once_an_epoch(corpus):
    assert sorted(ids_of(corpus.documents(seed=3, epoch=1))) == sorted(ids_of(corpus.documents()))


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.none() | st.integers(0, 2**63), epoch=st.integers(0, 1000), skip=st.integers(0, len(BOOKS) + 2))
def test_skip_equals_dropping(corpus, seed, epoch, skip):
    skipped = ids_of(corpus.documents(seed, epoch, skip=skip))
    assert skipped == ids_of(corpus.documents(seed, epoch))[skip:]


def test_two_walks_at_once_do_not_disturb_each_other(corpus):
    one, other = corpus.documents(seed=1, epoch=0), corpus.documents(seed=1, epoch=1)
    pairs = list(zip(one, other, strict=True))
    assert ids_of(a for a, _ in pairs) == ids_of(corpus.documents(seed=1, epoch=0))
    assert ids_of(b for _, b in pairs) == ids_of(corpus.documents(seed=1, epoch=1))


def test_documents_may_be_written_to(corpus):
    document = next(corpus.documents())
    document[:] = 0
    assert next(corpus.documents()).any()


def test_titles_and_number_of_documents(local, streamed):
    assert local.titles == [f"Book {number}" for number in range(len(BOOKS))]
    assert (local.num_documents, streamed.num_documents, streamed.titles) == (len(BOOKS), None, None)


def test_an_earlier_truncation_of_the_tokenizer_changes_nothing(folder, local, tokenizer, tmp_path):
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=2000)
    corpus = load_corpus(folder, "train", tokenizer, cache_dir=tmp_path)
    assert corpus.fingerprint == local.fingerprint
    assert ids_of(corpus.documents()) == ids_of(local.documents())


def test_long_documents_are_no_reason_to_warn(tokenizer, tmp_path, caplog):
    (tmp_path / "train.txt").write_text("a long story " * 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = load_corpus(tmp_path, "train", tokenizer, cache_dir=tmp_path)
    assert len(next(corpus.documents())) > tokenizer.model_max_length
    assert not caplog.records


# ---- the cache -------------------------------------------------------------------------------------------------------


def refuse(*args, **kwargs):
    raise AssertionError("tokenised again")


def test_tokens_are_cached(folder, tokenizer, tmp_path, monkeypatch):
    first = load_corpus(folder, "train", tokenizer, cache_dir=tmp_path)
    monkeypatch.setattr(datasets.Dataset, "map", refuse)
    second = load_corpus(folder, "train", tokenizer, cache_dir=tmp_path)
    assert ids_of(second.documents()) == ids_of(first.documents())
    assert second.fingerprint == first.fingerprint


def test_tokens_are_memory_mapped(tokenizer, tmp_path):
    (tmp_path / "train.txt").write_text("a long story " * 50_000)
    load_corpus(tmp_path, "train", tokenizer, cache_dir=tmp_path)
    before = pa.total_allocated_bytes()
    corpus = load_corpus(tmp_path, "train", tokenizer, cache_dir=tmp_path)
    assert len(next(corpus.documents())) >= 150_000
    assert pa.total_allocated_bytes() - before < 50_000


def test_only_the_tokens_are_left_in_the_cache(folder, tokenizer, tmp_path):
    corpus = load_corpus(folder, "train", tokenizer, cache_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{corpus.fingerprint}.arrow"]


def test_changed_tokenizer_is_not_served_old_tokens(folder, local, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    changed = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    changed.add_tokens(["rain went"])
    for name, its_tokenizer in (("old", tokenizer), ("changed", changed)):
        corpus = load_corpus(folder, "train", its_tokenizer, cache_dir=tmp_path / "cache")
        assert ids_of(corpus.documents()) == [its_tokenizer(text)["input_ids"] for text in BOOKS], name
    assert corpus.fingerprint != local.fingerprint


def test_changed_data_are_not_served_old_tokens(tokenizer, tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("one of two")
    stamp = path.stat()
    old = load_corpus(tmp_path, "train", tokenizer, cache_dir=tmp_path)
    path.write_text("two of two")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    new = load_corpus(tmp_path, "train", tokenizer, cache_dir=tmp_path)
    assert ids_of(new.documents()) == [tokenizer("two of two")["input_ids"]]
    assert new.fingerprint != old.fingerprint


def test_a_copy_elsewhere_has_the_same_fingerprint(folder, local, tokenizer, tmp_path):
    (tmp_path / "train.parquet").write_bytes((folder / "train.parquet").read_bytes())
    assert load_corpus(tmp_path, "train", tokenizer, cache_dir=tmp_path).fingerprint == local.fingerprint


def test_another_process_has_the_same_fingerprint(folder, local, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    script = (
        "import sys; from transformers import AutoTokenizer; from recur_gpt2.data.corpora import load_corpus\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(load_corpus(sys.argv[2], 'train', tokenizer, cache_dir=sys.argv[1]).fingerprint)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", script, str(tmp_path), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [local.fingerprint]


def test_the_default_cache_is_that_of_datasets(folder, local, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    load_corpus(folder, "train", tokenizer)
    assert (tmp_path / "recur_gpt2" / f"{local.fingerprint}.arrow").is_file()


# ---- bundled and local data ------------------------------------------------------------------------------------------


def test_bundled_data_go_by_name(tokenizer, tmp_path):
    corpus = load_corpus("wikitext-103-sample", "validation", tokenizer, cache_dir=tmp_path)
    text = pq.read_table(ROOT / "data" / "wikitext-103-sample" / "validation.parquet")["text"][0].as_py()
    assert (corpus.num_documents, corpus.titles[0]) == (60, "Homarus gammarus")
    assert next(corpus.documents()).tolist() == tokenizer(text, verbose=False)["input_ids"]


def test_bundled_data_that_are_missing_are_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("recur_gpt2.data.bundle.BUNDLED", tmp_path)
    with pytest.raises(InputError, match="'pg19-sample' is missing at"):
        load_corpus("pg19-sample", "train", tokenizer)


def test_data_without_splits_are_split_by_document(tokenizer, tmp_path):
    data = write_parquet(tmp_path / "all.parquet", text=BOOKS)
    parts = [texts_of(data, split, tokenizer, tmp_path / "cache") for split in corpora.SPLITS]
    assert [len(part) for part in parts] == [26, 2, 2]
    assert sorted(text for part in parts for text in part) == sorted(BOOKS)


@pytest.mark.parametrize("copies", [1, 2])
def test_data_of_a_document_or_two_are_cut_by_characters(tokenizer, tmp_path, copies):
    text = "A very short story of a man and his dog. " * 10
    (tmp_path / "data").mkdir()
    for number in range(copies):
        (tmp_path / "data" / f"story {number}.txt").write_text(text)
    parts = [texts_of(tmp_path / "data", split, tokenizer, tmp_path / "cache") for split in corpora.SPLITS]
    assert ["".join(cuts) for cuts in zip(*parts, strict=True)] == [text] * copies


def test_a_document_too_short_to_cut_is_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("a few words")
    with pytest.raises(InputError, match=r"the test part of .*a\.txt has fewer than two tokens, so nothing to predict"):
        load_corpus(tmp_path / "a.txt", "test", tokenizer, cache_dir=tmp_path)


def test_a_single_token_is_refused(tokenizer, tmp_path):
    data = write_parquet(tmp_path / "train.parquet", text=["two words", "a"])
    with pytest.raises(InputError, match=rf"{data.name} row 2 has fewer than two tokens, so nothing to predict"):
        load_corpus(tmp_path, "train", tokenizer, cache_dir=tmp_path)


def test_bad_input_is_refused_when_loading_and_leaves_no_cache(tokenizer, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "two words"}\n{"text": ')
    with pytest.raises(InputError, match=r"train\.jsonl line 2 is not valid JSON"):
        load_corpus(tmp_path, "train", tokenizer, cache_dir=tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())


def test_an_unknown_split_is_refused(tokenizer):
    with pytest.raises(InputError, match="split='valid' is not a split; use train, validation, test or all"):
        load_corpus("pg19-sample", "valid", tokenizer)


@pytest.mark.parametrize("name", ["pg-19", "no/such/folder", "missing/book.txt", "/no/such.parquet", ""])
def test_unknown_data_are_refused_without_asking_the_hub(tokenizer, name, monkeypatch):
    monkeypatch.setattr(corpora, "load_dataset", refuse)
    monkeypatch.chdir(ROOT / "tests")
    with pytest.raises(InputError) as caught:
        load_corpus(name, "train", tokenizer)
    if name:
        assert repr(name) in str(caught.value)
        assert all(bundled in str(caught.value) for bundled in BUNDLED)


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "repository"),
    [("pg19", "emozilla/pg19"), ("wikitext-103", "Salesforce/wikitext"), ("someone/books", "someone/books")],
)
def test_offline_the_message_names_the_dataset_and_the_way_out(tokenizer, name, repository, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=f"'{name}' .* dataset {repository} .* could not be reached") as caught:
        load_corpus(name, "train", tokenizer)
    assert all(bundled in str(caught.value) for bundled in BUNDLED)
    assert "a path to your own" in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        ValueError('Bad split: test. Available splits: ["train"]'),
        RuntimeError("Dataset scripts are no longer supported, but found books.py"),
        datasets.exceptions.DatasetNotFoundError("Dataset 'someone/books' doesn't exist"),
    ],
)
def test_what_the_hub_says_is_passed_on(tokenizer, error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(corpora, "load_dataset", fail)
    with pytest.raises(InputError) as caught:
        load_corpus("someone/books", "test", tokenizer)
    assert str(error) in str(caught.value)


def test_hub_datasets_are_streamed(folder, tokenizer, monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return stream(folder / "train.parquet")

    monkeypatch.setattr(corpora, "load_dataset", load)
    corpus = load_corpus("pg19", "test", tokenizer)
    assert asked == [(("emozilla/pg19", None), {"split": "test", "streaming": True})]
    assert ids_of(corpus.documents()) == [tokenizer(text)["input_ids"] for text in BOOKS]
    assert corpus.fingerprint != load_corpus("pg19", "train", tokenizer).fingerprint


def test_a_hub_dataset_without_text_is_refused(tokenizer, tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", body=["a b"], label=[1])
    monkeypatch.setattr(corpora, "load_dataset", lambda *args, **kwargs: stream(path))
    with pytest.raises(InputError, match="someone/books on the Hugging Face Hub has no text column, only body, label"):
        load_corpus("someone/books", "train", tokenizer)


def test_streamed_documents_that_cannot_be_scored_are_skipped_with_one_warning(tokenizer, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", text=["one two", "", " \n", None, "a", "three four"])
    corpus = StreamedCorpus(stream(path), tokenizer, "a fingerprint")
    with pytest.warns(UserWarning, match="fewer than two tokens are left out") as caught:
        documents = ids_of(corpus.documents())
    assert documents == [tokenizer(text)["input_ids"] for text in ("one two", "three four")]
    assert len(caught) == 1
    assert ids_of(corpus.documents(skip=1)) == documents[1:]


def test_streaming_reads_no_further_than_it_must(tokenizer):
    read = []

    def rows():
        for number in range(10_000):
            read.append(number)
            yield {"text": f"this is book {number}"}

    corpus = StreamedCorpus(datasets.IterableDataset.from_generator(rows), tokenizer, "a fingerprint")
    next(corpus.documents(seed=0))
    assert len(read) < 2 * corpora.SHUFFLE_BUFFER


# ---- articles of WikiText --------------------------------------------------------------------------------------------


def test_streamed_wikitext_has_the_articles_of_the_sample(tokenizer, tmp_path, monkeypatch):
    texts = pq.read_table(ROOT / "data" / "wikitext-103-sample" / "test.parquet")["text"].to_pylist()[:5]
    lines = [
        f"{line}\n" if line.strip() else "" for line in "\n".join([" ", *texts]).split("\n")
    ]  # as the hub has them
    path = write_parquet(tmp_path / "lines.parquet", text=lines)
    monkeypatch.setattr(corpora, "load_dataset", lambda *args, **kwargs: stream(path))
    corpus = load_corpus("wikitext-103", "test", tokenizer)
    assert ids_of(corpus.documents()) == [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    shuffled = ids_of(corpus.documents(seed=0))
    assert sorted(shuffled) == sorted(ids_of(corpus.documents()))
    assert ids_of(corpus.documents(seed=0, skip=2)) == shuffled[2:]


def test_a_heading_stands_alone_between_two_blank_lines():
    lines = [" ", " = One = ", " ", " With k ", " = 1 rad ; s = ", " 2 . ", " = = Part = = ", " ", " = Two = ", " "]
    articles = list(wikitext_articles(lines))
    assert [article["title"] for article in articles] == ["One", "Two"]
    assert [article["text"] for article in articles] == ["\n".join(lines[1:8]), "\n".join(lines[8:])]


@given(st.lists(st.sampled_from([" = A = ", " = = B = = ", " ", "", " some words . "])))
def test_articles_hold_every_line_from_the_first_heading_on(lines):
    articles = list(wikitext_articles(iter(lines)))
    joined = [line for article in articles for line in article["text"].split("\n")]
    assert joined == lines[len(lines) - len(joined) :]
    blank = [" ", *lines, " "]
    alone = [not blank[i].strip() and not blank[i + 2].strip() for i in range(len(lines))]
    assert len(articles) == sum(line == " = A = " and free for line, free in zip(lines, alone, strict=True))
