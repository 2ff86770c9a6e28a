"""What has gone wrong for users of models like these elsewhere, each with the report, does not go wrong here."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from conftest import DATA, WINDOW
from torch.testing import assert_close
from transformers import AutoConfig, AutoTokenizer

from recur_gpt2 import DocumentEmbedder, InputError, RecurGPT2LMHeadModel
from recur_gpt2.models.hub import load_tokenizer

IDS = torch.arange(1, 3 * WINDOW + 4).remainder(97).view(1, -1).repeat(2, 1) + torch.tensor([[0], [5]])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["t2r, default", "hedgehog, gated", "near, default"])
def test_linear_layers_read_and_learn_beside_padding_as_alone(make_model, name, side):
    """flash-linear-attention#1263, #1272"""
    model, lengths = make_model(name), (IDS.shape[1], 11)
    rows = [row[:length] for row, length in zip(IDS, lengths, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    ones = [torch.ones_like(row) for row in rows]
    mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)

    def gradients(loss):
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    out = model(padded, attention_mask=mask)
    alone = [model(row[None]).logits[0] for row in rows]
    assert_close(out.logits[mask.bool()], torch.cat(alone))
    found = gradients(out.logits[mask.bool()].cos().sum())
    expected = gradients(sum(each.cos().sum() for each in alone))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["default", "yoshida2020", "t2r, default"])
def test_a_row_that_is_all_padding_stays_where_it_is(make_model, name):
    """transformers#45491"""
    model = make_model(name)
    before = model(IDS).state
    mask = torch.ones_like(IDS)
    mask[1] = 0
    out = model(IDS, attention_mask=mask, state=before)
    assert bool(out.logits[0].isfinite().all())
    assert_close(out.logits[:1], model(IDS[:1], state=before.select([0])).logits)
    kept, was = out.state.select([1]), before.select([1])
    assert kept.windows.tolist() == was.windows.tolist()
    assert kept.filled.tolist() == was.filled.tolist()
    for key, tensor in was.memory.items():
        assert_close(kept.memory[key], tensor)
    again = model(IDS[1:], state=kept).logits
    assert_close(again, model(IDS[1:], state=was).logits)


PROGRAM = """
import socket, sys
def refuse(self, address, *rest):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        sys.exit(f"a connection to {address}")
socket.socket.connect = refuse
from recur_gpt2.cli.main import main
main(sys.argv[1:])
"""


def run(*command, **environment):
    inherited = {name: each for name, each in os.environ.items() if name not in ("HF_HUB_OFFLINE", "LC_CTYPE", "LANG")}
    environment = inherited | {"RECUR_GPT2_RESTART": "0"} | environment
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *command], env=environment, capture_output=True, timeout=300, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "evaluate --window 64 --data {file} --protocols disjoint",
        "generate --prompt-file {file} --max-new-tokens 5 --greedy",
        "embed {file} -o {folder}/vectors.parquet",
        "finetune --window 16 --steps 1 --lanes 1 --bptt 1 --data {file} --rows --no-control --output-dir {folder}/run",
        "recommend --budget 1GiB",
    ],
)
def test_commands_call_no_hub_and_read_utf8_in_any_locale(command, tmp_path):
    """transformers#45545 and llm.c#374"""
    file = tmp_path / "Ærøskøbing 東京.txt"
    file.write_text("Der Weg war lang – «très» long, и холодный. 東京は雨。\n\n" * 60, encoding="utf-8")
    words = [part.format(file=file, folder=tmp_path) for part in command.split()]
    done = run(*words, LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-2000:]


def test_long_texts_raise_no_warning_of_their_length(caplog):
    """langchain#3647: "Token indices sequence length is longer than the specified maximum sequence length" """
    text = "It was a long way. " * 600
    logging.getLogger("transformers").propagate = True
    try:
        with caplog.at_level(logging.WARNING):
            model = RecurGPT2LMHeadModel.from_gpt2(DATA / "gpt2-mini", window=256)
            model.read(text, progress=False)
            DocumentEmbedder.from_pretrained(DATA / "recur-gpt2-mini").encode([text])
    finally:
        logging.getLogger("transformers").propagate = False
    assert "longer than" not in caplog.text


class Texts(torch.utils.data.Dataset):
    """Tokenises in whatever process asks."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __len__(self):
        return 8

    def __getitem__(self, number):
        return torch.tensor(self.tokenizer(f"Text number {number} was read.")["input_ids"][:6])


@pytest.mark.slow
def test_workers_of_a_loader_tokenise_after_their_parent_has():
    """tokenizers#187: a forked tokenizer that had run in its parent stood still."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "gpt2-mini")
    tokenizer(["used", "before"])
    model = RecurGPT2LMHeadModel.from_gpt2(DATA / "gpt2-mini", window=32)
    loader = torch.utils.data.DataLoader(Texts(tokenizer), batch_size=4, num_workers=2, timeout=120)
    alone = torch.utils.data.DataLoader(Texts(tokenizer), batch_size=4)
    losses, expected = ([float(model(ids, labels=ids).loss) for ids in each] for each in (loader, alone))
    assert losses == pytest.approx(expected)


def test_a_tokenizer_with_more_entries_than_the_model_has_embeddings_is_refused(tmp_path):
    """In one sentence, and not by an index error in the middle of a text; fewer are common, and taken."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "gpt2-mini")
    config = AutoConfig.from_pretrained(DATA / "gpt2-mini")
    for rows in (len(tokenizer) - 1, len(tokenizer) + 8):
        config.vocab_size = rows
        config.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        if rows < len(tokenizer):
            with pytest.raises(InputError, match=f"has {len(tokenizer)} entries and the model {rows} rows"):
                load_tokenizer(tmp_path)
        else:
            assert len(load_tokenizer(tmp_path)) == len(tokenizer)
