"""files.py: documents come out as they were written, splits hold what they promise, bad files are named."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recur_gpt2.data.files import SPLITS, cut, digests_of, find_files, hash_file, read_documents
from recur_gpt2.errors import InputError


def texts_of(*files):
    return [row["text"] for row in read_documents(list(files))]


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def write_bytes(path, data):
    path.write_bytes(data)
    return path


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["one\r\ntwo\rthree\n", "\ufeffmarked", "naïve — 日本語 🙂", "  kept  "])
def test_text_is_kept_as_it_is(tmp_path, text):
    files = [
        write_bytes(tmp_path / "a.txt", text.encode()),
        write_bytes(tmp_path / "a.jsonl", json.dumps({"text": text}).encode()),
        write_parquet(tmp_path / "a.parquet", text=[text]),
    ]
    assert texts_of(*files) == [text] * 3


def test_documents_are_named_by_their_data_or_by_number(tmp_path):
    files = [
        write_bytes(tmp_path / "Emma.txt", b"a b"),
        write_bytes(tmp_path / "a.jsonl", b'{"text": "a b", "title": "Kim"}\n\n{"text": "c d", "title": null}\n'),
        write_parquet(tmp_path / "a.parquet", text=["a b", "c d"], short_book_title=["Nero", None]),
    ]
    titles = [row["title"] for row in read_documents(files)]
    assert titles == ["Emma", "Kim", "document 2", "Nero", "document 2"]


def test_column_order_does_not_matter(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", title=["Kim"], year=[1901], text=["a b"])
    (row,) = read_documents([path])
    assert (row["title"], row["text"]) == ("Kim", "a b")


# ---- which files -----------------------------------------------------------------------------------------------------


def test_folders_are_searched_recursively_and_in_order(tmp_path):
    for name in ("b.txt", "a/z.TXT", "a/b/c.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("some words")
    files, has_splits = find_files(tmp_path, "train")
    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["a/b/c.txt", "a/z.TXT", "b.txt"]
    assert not has_splits


@pytest.mark.parametrize("pattern", ["{}.parquet", "{}.jsonl", "{}.txt", "{}/book.txt"])
def test_splits_of_its_own_are_kept(tmp_path, pattern):
    for split in SPLITS:
        path = tmp_path / pattern.format(split)
        path.parent.mkdir(exist_ok=True)
        path.write_text("some words")
    for split in SPLITS:
        assert find_files(tmp_path, split) == ([tmp_path / pattern.format(split)], True)


def test_a_split_that_is_not_there_is_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", text=["some words"])
    with pytest.raises(InputError, match=r"has its own train but no validation; add validation\.parquet"):
        find_files(tmp_path, "validation")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no \.txt file"):
        find_files(tmp_path, "train")


def test_an_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"book\.pdf is not a \.parquet, \.jsonl, \.txt file"):
        find_files(write_bytes(tmp_path / "book.pdf", b"%PDF"), "train")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"gone\.txt cannot be read \(No such file"):
        hash_file(tmp_path / "gone.txt")


# ---- splits by hash --------------------------------------------------------------------------------------------------


@given(st.sets(st.text(), min_size=3, max_size=200))
def test_each_document_is_in_one_split_and_no_split_is_empty(texts):
    digests = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in texts]
    parts = [digests_of(digests, split) for split in SPLITS]
    assert all(parts)
    assert sorted(digest for part in parts for digest in part) == sorted(digests)
    assert len(parts[1]) == len(parts[2]) == max(1, round(0.05 * len(digests)))


@given(st.permutations([str(number) for number in range(40)]))
def test_the_split_does_not_depend_on_the_order_of_the_files(digests):
    assert digests_of(digests, "test") == digests_of(sorted(digests), "test")


def test_equal_texts_are_in_the_same_split():
    digests = ["a", "b", "c", "c", "c"]
    assert sum("c" in digests_of(digests, split) for split in SPLITS) == 1


@given(st.text())
def test_a_cut_document_loses_no_character(text):
    assert "".join(cut({"text": text, "where": ""}, split)["text"] for split in SPLITS) == text


def test_a_document_is_cut_90_5_5():
    parts = [cut({"text": "x" * 1000, "where": ""}, split)["text"] for split in SPLITS]
    assert [len(part) for part in parts] == [900, 50, 50]


# ---- bad input: named, with the way out ------------------------------------------------------------------------------

BAD = {
    "bytes of a text file": (".txt", b"caf\xe9 au lait", r"bad\.txt is not UTF-8 at byte 3; convert"),
    "bytes of a line": (".jsonl", b'{"text": "ab"}\n{"text": "\xff"}', r"bad\.jsonl is not UTF-8 at byte 25; convert"),
    "an empty file": (".txt", b"", r"bad\.txt is an empty document"),
    "white space": (".txt", b" \r\n\t", r"bad\.txt is an empty document or only white space; leave it out"),
    "an empty field": (".jsonl", b'{"text": "a b"}\n{"text": " "}', r"bad\.jsonl line 2 is an empty document"),
    "no line": (".jsonl", b"\n", r"bad\.jsonl holds no document"),
    "half a line": (".jsonl", b'{"text": "a b"}\n\n{"text": "a', r"bad\.jsonl line 3 is not valid JSON \(Unterminated"),
    "no object": (".jsonl", b"[1]", r"bad\.jsonl line 1 is no JSON object"),
    "no field": (".jsonl", b'{"body": "a", "id": 1}', r"bad\.jsonl line 1 has no text column, only body, id; rename"),
    "no string": (".jsonl", b'{"text": 3}', r"bad\.jsonl line 1 has a text of type int; make it a string"),
    "half a pair": (".jsonl", b'{"text": "a\\ud800"}', r"bad\.jsonl line 1 has half a surrogate pair at character 1"),
    "no parquet": (".parquet", b"PAR1 and then nothing", r"bad\.parquet is no readable parquet file \("),
}


@pytest.mark.parametrize(("suffix", "data", "message"), BAD.values(), ids=BAD.keys())
def test_bad_files_are_named(tmp_path, suffix, data, message):
    path = write_bytes(tmp_path / f"bad{suffix}", data)
    with pytest.raises(InputError, match=message):
        texts_of(path)


BAD_TABLES = {
    "no column": ({"body": ["a"], "id": [1]}, r"bad\.parquet has no text column, only body, id; rename the one"),
    "no row": ({"text": pa.array([], pa.string())}, r"bad\.parquet holds no document"),
    "an empty row": ({"text": ["a b", ""]}, r"bad\.parquet row 2 is an empty document"),
    "a null": ({"text": ["a b", None]}, r"bad\.parquet row 2 has a text of type NoneType"),
    "bytes": ({"text": [b"a b"]}, r"bad\.parquet row 1 has a text of type bytes; make it a string"),
    "not UTF-8": ({"text": pa.array([b"ab\xff"]).view(pa.string())}, r"bad\.parquet row 1 is not UTF-8 at byte 2"),
}


@pytest.mark.parametrize(("columns", "message"), BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_bad_tables_are_named(tmp_path, columns, message):
    path = write_parquet(tmp_path / "bad.parquet", **columns)
    with pytest.raises(InputError, match=message):
        texts_of(path)


@pytest.mark.parametrize("keep", [0, 4, 0.5, 0.9])
def test_a_truncated_parquet_file_is_refused(tmp_path, keep):
    path = write_parquet(tmp_path / "bad.parquet", text=[f"book {number} " * 50 for number in range(20)])
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(InputError, match=r"bad\.parquet is no readable parquet file"):
        texts_of(path)


def test_a_parquet_file_with_a_damaged_page_is_refused(tmp_path):
    path = write_parquet(tmp_path / "bad.parquet", text=[f"book {number} " * 50 for number in range(20)])
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"bad\.parquet is no readable parquet file"):
        texts_of(path)
