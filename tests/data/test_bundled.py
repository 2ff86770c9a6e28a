"""data/: the bundled samples are what data/README.md says, and nothing to be tested on was trained on."""

import csv
import hashlib
import re
import sys
import unicodedata

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import DATA, ROOT
from transformers import AutoTokenizer

from recur_gpt2 import RecurGPT2LMHeadModel
from recur_gpt2.evaluation.evaluate import evaluate

sys.path.insert(0, str(ROOT / "scripts"))

from overlap import SHINGLE, held_out_shingles, overlap, overlapping, shingles

COLUMNS = {
    "pg19-sample": ["short_book_title", "publication_date", "url", "text"],
    "wikitext-103-sample": ["title", "text"],
}
DOCUMENTS = {
    ("pg19-sample", "train"): 21,
    ("pg19-sample", "validation"): 9,
    ("pg19-sample", "test"): 18,
    ("wikitext-103-sample", "train"): 154,
    ("wikitext-103-sample", "validation"): 60,
    ("wikitext-103-sample", "test"): 60,
}
SPLITS = ("train", "validation", "test")
MEGABYTE = 1_000_000


def table(sample, split):
    return pq.read_table(DATA / sample / f"{split}.parquet")


def size(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


# ---- the samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sample", "split"), DOCUMENTS)
def test_samples_have_the_columns_and_documents_they_claim(sample, split):
    rows = table(sample, split)
    assert rows.column_names == COLUMNS[sample]
    assert rows.num_rows == DOCUMENTS[sample, split]
    assert all(len(text.split()) > 250 for text in rows["text"].to_pylist())
    titles = rows[COLUMNS[sample][0]].to_pylist()
    assert all(titles)
    assert len(set(titles)) == len(titles)


def test_books_are_of_pg19s_time_and_named_by_their_gutenberg_page():
    for split in SPLITS:
        rows = table("pg19-sample", split).to_pylist()
        assert all(row["publication_date"] is None or row["publication_date"] < 1919 for row in rows)
        assert all(re.fullmatch(r"http://www\.gutenberg\.org/ebooks/\d+", row["url"]) for row in rows)


@pytest.mark.parametrize("split", SPLITS)
def test_articles_begin_with_their_heading(split):
    for row in table("wikitext-103-sample", split).to_pylist():
        assert row["text"].startswith(f" = {row['title']} = \n")


def test_only_the_train_articles_have_unknown_words():
    texts = {split: " ".join(table("wikitext-103-sample", split)["text"].to_pylist()) for split in SPLITS}
    unknown = {split: text.count("<unk>") for split, text in texts.items()}
    assert unknown["train"] > 1000
    assert unknown["validation"] == unknown["test"] == 0


def test_the_data_stay_small():
    assert size(DATA / "pg19-sample") <= 12 * MEGABYTE
    assert size(DATA) <= 60 * MEGABYTE


# ---- nothing that is tested on was trained on ------------------------------------------------------------------------


def words(text):
    """Lower case, without accents, marks and what is in brackets."""
    text = unicodedata.normalize("NFKD", re.sub(r"\[.*?\]", "", text).replace("’", "'"))
    text = "".join(letter for letter in text if not unicodedata.combining(letter))
    return re.findall(r"\w+", text.lower().replace("'", ""))


def same_book(title, author, other_title, other_author):
    """One title begins with the other ("Old Mortality", "Old Mortality Complete") and the authors share a name."""
    shorter, longer = sorted((words(title), words(other_title)), key=len)
    names = {name for name in words(author) if len(name) > 2}
    return longer[: len(shorter)] == shorter and bool(names & set(words(other_author)))


@pytest.fixture(scope="module")
def training_books():
    path = DATA / "gpt2-mini" / "training_books.csv"
    if not path.is_file():
        pytest.fail("data/gpt2-mini/training_books.csv is missing: what the base model was trained on is not known")
    with path.open(encoding="utf-8", newline="") as file:
        books = list(csv.DictReader(file))
    assert books
    assert {"file", "title", "author", "gutenberg_id", "sha256"} <= set(books[0])
    return books


@pytest.mark.parametrize(
    ("title", "author", "other_title", "other_author", "same"),
    [
        ("Silas Marner", "Eliot, George [pseud.]", "Silas Marner: The Weaver of Raveloe", "George Eliot", True),
        ("Amiel's Journal", "Amiel, Henri Frédéric", "Amiel’s Journal", "Henri-Frederic Amiel", True),
        ("The Diary Vol. I", "John Evelyn", "The Diary Vol. II", "John Evelyn", False),
        ("Kim", "Rudyard Kipling", "Kim", "Somebody Else", False),
    ],
)
def test_books_are_told_apart_by_title_and_author(title, author, other_title, other_author, same):
    assert same_book(title, author, other_title, other_author) == same
    assert same_book(other_title, other_author, title, author) == same


@pytest.mark.parametrize("split", SPLITS)
def test_the_base_model_was_trained_on_no_book_of_the_sample(training_books, split):
    rows = table("pg19-sample", split).to_pylist()
    ids = {row["url"].rsplit("/", 1)[1] for row in rows}
    hashes = {hashlib.sha256(row["text"].encode()).hexdigest() for row in rows}
    names = [row["short_book_title"].rsplit(" by ", 1) for row in rows]
    for book in training_books:
        assert book["gutenberg_id"] not in ids, book["file"]
        assert book["sha256"] not in hashes, book["file"]
        assert not any(same_book(book["title"], book["author"], *name) for name in names), book["file"]


@pytest.mark.parametrize("split", SPLITS)
def test_the_base_model_was_trained_on_no_article_of_the_sample(training_books, split):
    """By the title alone: an article has no author."""
    titles = {tuple(words(title)) for title in table("wikitext-103-sample", split)["title"].to_pylist()}
    assert not [book["file"] for book in training_books if tuple(words(book["title"])) in titles]


def test_no_training_book_of_the_sample_shares_text_with_a_held_out_one():
    held_out = held_out_shingles([DATA / "pg19-sample" / f"{split}.parquet" for split in ("validation", "test")])
    assert len(held_out) == DOCUMENTS["pg19-sample", "validation"] + DOCUMENTS["pg19-sample", "test"]
    for row in table("pg19-sample", "train").to_pylist():
        assert overlapping(row["text"], held_out) == [], row["short_book_title"]


# ---- the bundled models ----------------------------------------------------------------------------------------------


def test_the_recurrent_models_books_are_among_the_base_models(training_books):
    card = (DATA / "recur-gpt2-mini" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^- (\S+\.txt)$", card, flags=re.MULTILINE)
    assert len(named) == 32
    assert set(named) <= {book["file"] for book in training_books}


@torch.no_grad()
def test_the_recurrent_model_gains_from_its_own_document_and_from_no_other():
    tokenizer = AutoTokenizer.from_pretrained(DATA / "recur-gpt2-mini")
    model = RecurGPT2LMHeadModel.from_pretrained(DATA / "recur-gpt2-mini").eval()
    texts = [text.as_py()[50_000:70_000] for text in table("pg19-sample", "test")["text"][:6]]
    documents = [np.array(tokenizer(text)["input_ids"][:2048]) for text in texts]
    nats = {
        name: evaluate(model, documents, tokenizer, protocol=protocol).nats
        for name, protocol in (("own", "recurrent"), ("zeroed", "zeroed"), ("shuffled", "shuffled"))
    }
    assert nats["own"] < nats["zeroed"] - 0.03
    assert nats["zeroed"] < nats["shuffled"]


# ---- scripts/overlap.py ----------------------------------------------------------------------------------------------


@pytest.fixture
def texts():
    """Two texts of 1,000 words that have nothing but their words in common."""
    vocabulary = np.array([f"word{number}" for number in range(500)])
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(vocabulary, 1000)) for _ in range(2)]


def test_unrelated_text_does_not_overlap(texts):
    a, b = map(shingles, texts)
    assert overlap(a, b) == 0


def test_shared_text_is_found_at_its_share(texts):
    a, b = texts
    shared = " ".join([*a.split()[:500], *b.split()[500:]])
    assert overlap(shingles(a), shingles(shared)) == pytest.approx(0.5, abs=0.02)


def test_case_marks_and_line_breaks_hide_nothing(texts):
    changed = texts[0].title().replace(" ", ",\r\n— ")
    assert overlap(shingles(texts[0]), shingles(changed)) == 1


def test_an_excerpt_is_found_in_a_long_text(texts):
    a, b = texts
    excerpt = " ".join(a.split()[100:200])
    assert overlap(shingles(excerpt), shingles(f"{b} {a}")) == 1


def test_word_order_counts(texts):
    assert overlap(shingles(texts[0]), shingles(" ".join(reversed(texts[0].split())))) == 0


def test_text_shorter_than_a_shingle_overlaps_with_nothing(texts):
    short = " ".join(texts[0].split()[: SHINGLE - 1])
    assert len(shingles(short)) == 0
    assert overlap(shingles(short), shingles(texts[0])) == 0


def test_overlapping_names_the_document_and_the_share(texts):
    a, b = texts
    held_out = {"a": shingles(a), "b": shingles(b)}
    ((title, share),) = overlapping(a, held_out)
    assert (title, share) == ("a", 1)
    assert overlapping(" ".join(a.split()[: SHINGLE + 2]), {"b": held_out["b"]}) == []
