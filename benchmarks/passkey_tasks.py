"""Retrieval over long documents that can be made offline, as tasks of MTEB: a fact is hidden in filler.

After LongEmbed (Zhu et al. 2024, arXiv 2404.12096): `passkey` hides a number of a person in five sentences said over
and over; `needle` hides where a person keeps a thing in pages of books. A question names the person; one document has
the answer. Chance is 1 in as many documents.
"""

from __future__ import annotations

import random

from datasets import Dataset
from mteb import TaskMetadata
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NAMES = "Ada|Bert|Clara|Dora|Emil|Frida|Georg|Hanna|Ivan|Jonas|Karin|Ludwig|Maria|Nora|Oskar|Paula|Rudolf|Selma|Tessa"
THINGS = "silver watch|red lantern|brass key|old map|violin|blue ledger|walking stick|tin box|prayer book|telescope"
PLACES = "in the cellar|under the stairs|behind the mill|at the harbour|in the clock tower|by the well"


def make_documents(kind: str, tokens: int, count: int, tokenizer, books: list[str]) -> tuple[list[str], list[str]]:
    """Texts of about so many tokens of `tokenizer`, and the question that each of them answers."""
    draw = random.Random(f"{kind} {tokens}")
    texts, questions = [], []
    for name in NAMES.split("|")[:count]:
        if kind == "passkey":
            key = draw.randrange(10_000, 100_000)
            fact = f"{name}'s pass key is {key}. Remember it. {key} is the pass key for {name}. "
            questions.append(f"What is the pass key for {name}?")
            around = FILLER * (tokens // 10)
        else:
            thing, place = draw.choice(THINGS.split("|")), draw.choice(PLACES.split("|"))
            fact = f"{name} keeps the {thing} {place}. "
            questions.append(f"Where does {name} keep the {thing}?")
            around = draw.choice(books)
        texts.append(_hidden(fact, around, tokens, tokenizer, draw))
    return texts, questions


def _hidden(fact, around, tokens, tokenizer, draw):
    """The fact at a random place among as much filler as makes `tokens` tokens."""
    room = max(0, tokens - len(tokenizer(fact)["input_ids"]))
    ids = tokenizer(around[: 8 * tokens], verbose=False)["input_ids"][:room]
    place = draw.randrange(len(ids) + 1)
    return f"{tokenizer.decode(ids[:place])} {fact}{tokenizer.decode(ids[place:])}"


def make_task(kind: str, tokens: int, count: int, tokenizer, books: list[str]) -> AbsTaskRetrieval:
    """An MTEB task of `count` documents, scored by the share of questions whose own document is nearest."""
    texts, questions = make_documents(kind, tokens, count, tokenizer, books)
    name = f"{kind.capitalize()}{tokens}"

    class Task(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=name,
            dataset={"path": "made/here", "revision": "1"},
            description=f"{kind} in {tokens} tokens",
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="recall_at_1",
        )

        def load_data(self, **_):
            ids = [str(n) for n in range(count)]
            data = RetrievalSplitData(
                corpus=Dataset.from_dict({"id": ids, "title": [""] * count, "text": texts}),
                queries=Dataset.from_dict({"id": [f"q{n}" for n in ids], "text": questions}),
                relevant_docs={f"q{n}": {n: 1} for n in ids},
                top_ranked=None,
            )
            self.dataset, self.data_loaded = {"default": {"test": data}}, True

    return Task()
