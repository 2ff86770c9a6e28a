"""sentence_transformers.py, with the real library: our vectors through its API, saved, loaded, evaluated, finetuned."""

import json

import numpy as np
import pytest
import torch
from conftest import DATA
from numpy.testing import assert_allclose
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.modules import Normalize

from recur_gpt2 import DocumentEmbedder, InputError
from recur_gpt2.sentence_transformers import RecurGPT2Embedding, load

FOLDER = str(DATA / "recur-gpt2-mini")
TEXTS = [
    "It rained in Oldtown.",
    "",
    "a",
    "The rain went on and on. " * 150,
    "Mr. Weston was a man of character. " * 40,
]


@pytest.fixture(scope="module")
def embedder():
    return DocumentEmbedder.from_pretrained(FOLDER, device="cpu")


def sentence_transformer(*more, **options):
    return SentenceTransformer(modules=[RecurGPT2Embedding.from_pretrained(FOLDER, **options), *more], device="cpu")


@pytest.mark.parametrize(("pooling", "layer"), [("mean", -1), ("mean+memory", 3)])
def test_vectors_are_those_of_the_embedder(pooling, layer, embedder):
    model = sentence_transformer(pooling=pooling, layer=layer)
    expected = embedder.encode(TEXTS, pooling=pooling, layer=layer)
    assert_allclose(model.encode(TEXTS), expected, atol=1e-4)
    assert_allclose(model.encode(TEXTS, batch_size=2), expected, atol=1e-4)
    assert_allclose(model.encode(TEXTS[3]), expected[3], atol=1e-4)
    assert model.get_embedding_dimension() == expected.shape[1]
    assert model.max_seq_length is None


def test_a_prompt_stands_in_front_of_the_text(embedder):
    found = sentence_transformer().encode(TEXTS, prompt="Rain: ")
    assert_allclose(found, embedder.encode([f"Rain: {text}" for text in TEXTS]), atol=1e-4)


def test_similarity_is_the_cosine(embedder):
    model, vectors = sentence_transformer(), embedder.encode(TEXTS[2:], normalize=True)
    assert_allclose(model.similarity(*[model.encode(TEXTS[2:])] * 2), vectors @ vectors.T, atol=1e-4)


def test_a_saved_folder_embeds_as_before(tmp_path):
    model = sentence_transformer(Normalize(), pooling="last", layer=2, batch_tokens=512)
    model.similarity_fn_name = "dot"
    model.save_pretrained(str(tmp_path / "model"))
    loaded = load(str(tmp_path / "model"))
    assert np.array_equal(loaded.encode(TEXTS), model.encode(TEXTS))
    assert loaded.similarity_fn_name == "dot"
    assert loaded[0].get_config_dict() == {"pooling": "last", "layer": 2, "batch_tokens": 512}
    own = DocumentEmbedder.from_pretrained(tmp_path / "model", device="cpu")  # the folder is one of our models too
    assert_allclose(own.encode(TEXTS, pooling="last", layer=2, normalize=True), model.encode(TEXTS), atol=1e-5)


def test_its_evaluation_tools_work():
    books = {
        "rain": "The rain went on in Oldtown, and the river rose. ",
        "sums": "Two and two are four, and four is even. ",
    }
    corpus = {name: text * 30 for name, text in books.items()}
    queries = {f"q-{name}": text * 20 for name, text in books.items()}
    evaluator = InformationRetrievalEvaluator(queries, corpus, {f"q-{name}": {name} for name in books}, name="books")
    assert sentence_transformer().evaluate(evaluator)["books_cosine_accuracy@1"] == 1


def test_gradients_reach_the_first_window():
    model = sentence_transformer()
    model.train()
    features = model.preprocess(["The rain went on and on. " * 80])
    model(features)["sentence_embedding"].sum().backward()
    gradient = model[0].model.transformer.wte.weight.grad
    assert gradient[features["input_ids"][0, 0]].any()


def test_folders_that_hold_no_model_of_ours_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"give a folder with modules\.json"):
        load(str(tmp_path))
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "os.path.Other", "path": ""}]))
    with pytest.raises(InputError, match=r"has a module os\.path\.Other, not of sentence-transformers"):
        load(str(tmp_path))
    with pytest.raises(InputError, match="pooling='max' is not known"):
        RecurGPT2Embedding.from_pretrained(FOLDER, pooling="max")


@torch.no_grad()
def test_only_empty_texts_have_zero_vectors():
    found = sentence_transformer().encode(["", ""])
    assert found.shape == (2, 256)
    assert not found.any()
