"""sources.py: every text of what a command names, once, with an id that stays the same."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from recur_gpt2 import InputError
from recur_gpt2.data import sources
from recur_gpt2.data.sources import find_sources, named_texts


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of every kind of file, as the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("text b")
    (folder / "sub" / "a.TXT").write_text("")
    (folder / "notes.md").write_text("no text")
    (folder / "rows.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": "second"}\n{"text": "", "id": 3}\n')
    pq.write_table(pa.table({"text": ["p1", "p2"], "title": ["x", None]}), folder / "plain.parquet")
    pq.write_table(pa.table({"text": ["q1", "q2"], "id": [7, None]}), folder / "sub" / "named.parquet")
    return tmp_path


def read(*inputs, split="train", shard=(1, 1)):
    return {text.id: text.read() for text in named_texts(find_sources(inputs, split), shard)}


ALL = {
    "docs/b.txt": "text b",
    "docs/plain.parquet:1": "p1",
    "docs/plain.parquet:2": "p2",
    "docs/rows.jsonl:1": "one",
    "second": "two",
    "3": "",
    "docs/sub/a.TXT": "",
    "7": "q1",
    "docs/sub/named.parquet:2": "q2",
}


def test_a_folder_gives_all_texts_below_it_in_order(here):
    found = read("docs")
    assert found == ALL
    assert list(found) == list(ALL)


def test_files_and_globs_give_the_same_ids(here):
    assert read("docs/b.txt", "docs/plain.parquet") == {key: ALL[key] for key in list(ALL)[:3]}
    assert read("docs/*") == ALL  # what is no text is passed over
    assert read("docs/**/*.txt") == {"docs/b.txt": "text b"}


def test_counts_are_known_where_they_are_cheap(here):
    counts = {source_name: find_sources([source_name], "train")[0].count for source_name in ("docs/b.txt",)}
    assert counts == {"docs/b.txt": 1}
    assert [source.count for source in find_sources(["docs"], "train")] == [1, 2, None, 1, 2]


@pytest.mark.parametrize("shards", [1, 2, 4, 12])
def test_shards_share_the_texts(shards, here):
    parts = [read("docs", shard=(index, shards)) for index in range(1, shards + 1)]
    assert sorted(id for part in parts for id in part) == sorted(ALL)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_file_of_another_share_is_not_read(here):
    (here / "docs" / "b.txt").write_bytes(b"\xff")
    assert "docs/plain.parquet:1" in read("docs", shard=(2, 2))
    with pytest.raises(InputError, match=r"b\.txt is not UTF-8"):
        read("docs", shard=(1, 2))


def test_bundled_data_and_saved_datasets_have_splits(here):
    assert next(iter(read("pg19-sample", split="validation"))) == "pg19-sample/validation:1"
    splits = DatasetDict(
        {"train": Dataset.from_dict({"text": ["t1", "t2"]}), "test": Dataset.from_dict({"text": ["u"]})}
    )
    splits.save_to_disk("saved")
    assert read("saved", split="test") == {"saved:1": "u"}
    with pytest.raises(InputError, match="saved has no split 'dev', only train, test"):
        read("saved", split="dev")
    Dataset.from_dict({"text": ["v"], "id": ["i"]}).save_to_disk("alone")
    assert read("alone") == {"i": "v"}


def test_a_name_of_the_hub_is_streamed(here, monkeypatch):
    asked = []
    monkeypatch.setattr(
        sources, "hub_rows", lambda *name: asked.append(name) or [{"text": "h"}, {"text": "k", "id": 5}]
    )
    assert read("owner/books", split="test") == {"owner/books/test:1": "h", "5": "k"}
    assert asked == [("owner/books", "test")]


def test_an_id_that_stands_twice_is_refused(here):
    with pytest.raises(InputError, match=r"id 'docs/b\.txt' stands twice in the input"):
        read("docs/b.txt", "docs")


BAD = {
    "missing": (["nothing.txt"], r"'nothing\.txt' is neither a file, folder or glob that matches here nor a known"),
    "no match": (["docs/*.csv"], "neither a file, folder or glob"),
    "another kind": (["docs/notes.md"], r"docs/notes\.md is not a \.parquet, \.jsonl, \.txt file; convert it"),
    "an empty folder": (["empty"], "empty holds no .parquet, .jsonl, .txt file"),
}


@pytest.mark.parametrize(("inputs", "message"), BAD.values(), ids=BAD.keys())
def test_inputs_that_name_nothing_are_refused(inputs, message, here):
    Path("empty").mkdir()
    with pytest.raises(InputError, match=message):
        find_sources(inputs, "train")


def test_a_text_that_is_none_is_refused_when_it_is_read(here):
    Path("bad.jsonl").write_text(json.dumps({"text": 3}) + "\n")
    with pytest.raises(InputError, match=r"bad\.jsonl line 1 has a text of type int"):
        read("bad.jsonl")
