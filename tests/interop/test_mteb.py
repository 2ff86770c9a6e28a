"""MTEB on the sentence-transformers module, by the real library and tasks made here."""

import sys

import mteb
import numpy as np
import pytest
from conftest import DATA, ROOT
from sentence_transformers import SentenceTransformer

from recur_gpt2.models.hub import load_tokenizer
from recur_gpt2.sentence_transformers import RecurGPT2Embedding

sys.path.insert(0, str(ROOT / "benchmarks"))

from passkey_tasks import make_documents, make_task


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["passkey", "needle"])
def test_a_retrieval_task_scores_what_the_vectors_say(kind):
    tokenizer, size, count = load_tokenizer(DATA / "gpt2-mini"), 600, 5
    books = ["It was a long way to the river, and nobody spoke. " * 200]
    model = SentenceTransformer(
        modules=[RecurGPT2Embedding.from_pretrained(str(DATA / "recur-gpt2-mini"))], device="cpu"
    )
    task = make_task(kind, size, count, tokenizer, books)
    found = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    texts, questions = make_documents(kind, size, count, tokenizer, books)
    assert all(abs(len(tokenizer(text)["input_ids"]) - size) < 20 for text in texts)
    vectors, asked = (model.encode(each, normalize_embeddings=True) for each in (texts, questions))
    expected = ((asked @ vectors.T).argmax(axis=1) == np.arange(count)).mean()
    assert found.task_results[0].scores["test"][0]["main_score"] == pytest.approx(expected, abs=1e-4)
