"""DocumentEmbedder as a module of sentence-transformers, an optional extra: `encode`, `similarity`, evaluation tools.

    from sentence_transformers import SentenceTransformer
    from recur_gpt2.sentence_transformers import RecurGPT2Embedding, load

    model = SentenceTransformer(modules=[RecurGPT2Embedding.from_pretrained("folder")])
    model.save_pretrained("embedder")
    model = load("embedder")

`load`, because `SentenceTransformer("embedder")` refuses classes that are not its own unless it is told to trust them.
Finetuning by its trainer goes through all windows of a document. B documents, N tokens, D width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from sentence_transformers.util import import_from_string
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .data.bundle import BATCH_TOKENS, POOLING
from .embedding.batching import Reader, Tokens
from .embedding.embedder import DocumentEmbedder
from .embedding.pooling import dimension, pool
from .errors import InputError
from .models.modeling import RecurGPT2LMHeadModel


class RecurGPT2Embedding(InputModule):
    """Texts of any length -> one vector each. The arguments are those of DocumentEmbedder."""

    config_file_name = "recur_gpt2_embedding.json"  # beside the model's own config.json
    config_keys = ("pooling", "layer", "batch_tokens")
    max_seq_length = None  # none

    def __init__(
        self,
        model: RecurGPT2LMHeadModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pooling: str = POOLING,
        layer: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        embedder = DocumentEmbedder(model, tokenizer)
        self.pooling, self.batch_tokens = pooling, batch_tokens
        self.layer = embedder.check(pooling, layer, batch_tokens)["layer"]
        self._encoder = embedder.encoder

    @classmethod
    def from_pretrained(cls, folder: str, window: int | None = None, **options: Any) -> RecurGPT2Embedding:
        """One of our models, or a GPT-2, from a folder or the hub.

        Args:
            window: T; default: the model's own, or 256 for a GPT-2.
            options: pooling, layer, batch_tokens.
        """
        embedder = DocumentEmbedder.from_pretrained(folder, window, device="cpu")
        return cls(embedder.model, embedder.tokenizer, **options)

    def preprocess(self, inputs: list[str], prompt: str | None = None, **_: Any) -> dict[str, Tensor]:
        """Texts -> input_ids and attention_mask, (B, N) each."""
        ids = [torch.from_numpy(self._encoder((prompt or "") + text)).long() for text in inputs]
        masks = [torch.ones_like(each) for each in ids]
        pad = torch.nn.utils.rnn.pad_sequence
        return {"input_ids": pad(ids, batch_first=True), "attention_mask": pad(masks, batch_first=True)}

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Adds sentence_embedding, (B, D) float32."""
        lengths = features["attention_mask"].sum(dim=1).tolist()
        rows = [row[:length].cpu().numpy() for row, length in zip(features["input_ids"], lengths, strict=True)]
        model = self.model.transformer
        vectors: dict[int, Tensor] = {}
        reader = Reader(model, self.layer, self.batch_tokens)
        for numbers, reading in reader.all(lengths, lambda number: Tokens(iter([rows[number]]))):
            vectors |= zip(numbers, pool(model, reading, self.pooling, self.layer, normalize=False), strict=True)
        features["sentence_embedding"] = torch.stack([vectors[number] for number in range(len(rows))])
        return features

    def get_embedding_dimension(self) -> int:
        """D."""
        return dimension(self.model.transformer, self.pooling)

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write the model, its tokenizer and this module's arguments."""
        self.model.save_pretrained(output_path, tokenizer=self.tokenizer)
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **_: Any) -> RecurGPT2Embedding:
        """What `save` wrote."""
        return cls.from_pretrained(str(Path(model_name_or_path, subfolder)), **cls.load_config(model_name_or_path))


def load(folder: str) -> SentenceTransformer:
    """What `SentenceTransformer.save_pretrained` wrote of a model whose first module is ours.

    Raises:
        InputError: it holds no such model.
    """
    path = Path(folder, "modules.json")
    if not path.exists():
        raise InputError(f"{folder} holds no model that sentence-transformers saved; give a folder with modules.json")
    modules = []
    for each in json.loads(path.read_text()):
        own = each["type"] == f"{RecurGPT2Embedding.__module__}.{RecurGPT2Embedding.__qualname__}"
        if not own and not each["type"].startswith("sentence_transformers."):
            raise InputError(f"{folder} has a module {each['type']}, not of sentence-transformers; leave it out")
        module = RecurGPT2Embedding if own else import_from_string(each["type"])
        modules.append(module.load(folder, subfolder=each["path"]))
    settings = json.loads(Path(folder, "config_sentence_transformers.json").read_text())
    kept = ("prompts", "default_prompt_name", "similarity_fn_name")
    return SentenceTransformer(modules=modules, **{key: settings[key] for key in kept if key in settings})
