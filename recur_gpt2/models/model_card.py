"""The page that a model has on the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..errors import InputError
from .configuration import RecurGPT2Config

BODY = """
# {name}

A GPT-2 that reads documents of any length in windows of {window} tokens, by
[recur_gpt2](https://pypi.org/project/recur-gpt2/). {recurrence}

```python
from recur_gpt2 import {architecture}
from transformers import AutoTokenizer

model = {architecture}.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```

`pip install recur-gpt2` first. After `import recur_gpt2`, transformers' Auto classes load it too.

| | |
|---|---|
| layers, width, heads | {config.n_layer}, {config.n_embd}, {config.n_head} |
| vocabulary | {config.vocab_size:,} |
| window | {window} tokens |
| memory slots a layer | {config.memory_slots}: {slots} |
| positions to point at | {config.pointer_slots:,} |
| layers that read memory | {insert_layers} |
| layers with linear attention | {linear_layers} |
"""


def model_card(config: RecurGPT2Config, architecture: str, repo_id: str, results: str | Path | None) -> ModelCard:
    """A card that says what the model is, how to load it, and how it did.

    Args:
        results: results.json of the comparison that it was finetuned in.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    task = "text-generation" if architecture.endswith("LMHeadModel") else None
    data = ModelCardData(library_name="transformers", pipeline_tag=task, tags=["recur_gpt2", "gpt2", "long-documents"])
    recurrence = "What one window leaves, the next ones attend to."
    body = BODY.format(
        name=repo_id.split("/")[-1],
        repo=repo_id,
        architecture=architecture,
        config=config,
        window=config.window,
        slots=f"{config.sink_slots} constant, {config.pooled_slots} pooled, {config.last_slots} last positions",
        recurrence=recurrence if config.is_recurrent else "Nothing is carried from one window to the next.",
        insert_layers=_names(config.insert_layers),
        linear_layers=_names(config.linear_layers),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}{_table(results)}")


def _names(layers):
    return ", ".join(map(str, layers)) or "none"


def _table(results):
    if results is None:
        return ""
    try:
        found = json.loads(Path(results).read_text(encoding="utf-8"))
        rows = [(row["name"], row["token_ppl"], row["word_ppl"], row["bits_per_byte"]) for row in found["rows"]]
        data = found["settings"]["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{results} holds no results of a comparison ({error}); give its results.json") from error
    lines = [f"| {name} | {token:.2f} | {word:.1f} | {bits:.3f} |" for name, token, word, bits in rows]
    head = (
        f"\n## Results\n\nOn {data}:\n\n| | token perplexity | word perplexity | bits per byte |\n|---|---|---|---|\n"
    )
    return head + "\n".join(lines) + "\n"
