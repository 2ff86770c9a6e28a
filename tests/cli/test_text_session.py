"""text_session.py and `recur-gpt2 generate`: text put aside and gone on with is as text that was not; the pipeline."""

import os
import signal

import pytest
import torch
from conftest import ROOT, assert_same_state
from transformers import AutoTokenizer, pipeline

import recur_gpt2  # noqa: F401 (registers the model type)
from recur_gpt2 import RecurGPT2LMHeadModel, RecurState
from recur_gpt2.cli.main import main
from recur_gpt2.cli.text_session import TextSession, TextStream
from recur_gpt2.errors import InputError

MINI, RECURRENT = str(ROOT / "data" / "gpt2-mini"), str(ROOT / "data" / "recur-gpt2-mini")
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom; “naïve”, they said – 🙂. " * 3
GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MINI)


@pytest.fixture(scope="module")
def model():
    return RecurGPT2LMHeadModel.from_gpt2(MINI, window=16).double().eval()


def written(session, count):
    pieces = []
    assert session.write(count, pieces.append, **GREEDY) == count
    return "".join(pieces)


def test_a_document_in_turns_is_the_document_at_once(model, tokenizer, tmp_path):
    ids = tokenizer(TEXT)["input_ids"]
    once = TextSession(model, tokenizer)
    once.read(ids)
    whole = written(once, 40)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=40, **GREEDY)[0, len(ids) :]
    assert whole == tokenizer.decode(expected)
    turns = TextSession(model, tokenizer)
    turns.read(ids[:20])
    turns.read(ids[20:])
    text = written(turns, 7)
    turns.save(tmp_path / "aside")
    again = TextSession(model, tokenizer)
    again.load(tmp_path / "aside")
    assert again.can_write
    text += written(again, 1) + written(again, 32)
    assert text == whole
    assert_same_state(again.state, once.state, rtol=1e-9, atol=1e-9)


def test_the_file_is_a_state_of_all_the_text(model, tokenizer, tmp_path):
    ids = tokenizer(TEXT)["input_ids"]
    session = TextSession(model, tokenizer)
    session.read(ids)
    text = written(session, 10)
    session.save(tmp_path / "aside")
    everything = ids + tokenizer(text)["input_ids"]
    assert_same_state(RecurState.load(tmp_path / "aside"), model.read(everything, progress=False), rtol=1e-9, atol=1e-9)


def test_a_state_that_was_read_apart_wants_a_prompt(model, tokenizer, tmp_path):
    ids = tokenizer(TEXT)["input_ids"]
    model.read(ids[:50], progress=False).save(tmp_path / "state")
    session = TextSession(model, tokenizer)
    with pytest.raises(InputError, match="nothing to go on from"):
        session.write(3, print)
    session.load(tmp_path / "state")
    assert not session.can_write
    session.read(ids[50:])
    expected = model.generate(torch.tensor([ids]), max_new_tokens=9, **GREEDY)[0, len(ids) :]
    assert written(session, 9) == tokenizer.decode(expected)


def test_ctrl_c_keeps_what_was_written(model, tokenizer):
    session, pieces = TextSession(model, tokenizer), []
    session.read(tokenizer(TEXT)["input_ids"])

    def interrupting(text):
        pieces.append(text)
        if len(pieces) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    count = session.write(500, interrupting, **GREEDY)
    assert 5 <= count < 20
    assert signal.getsignal(signal.SIGINT) is before
    longer = TextSession(model, tokenizer)
    longer.read(tokenizer(TEXT)["input_ids"])
    assert written(longer, count) + written(longer, 6) == "".join(pieces) + written(session, 6)


def test_text_streams_in_whole_characters(tokenizer):
    pieces = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    ids = tokenizer(TEXT)["input_ids"]
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len(pieces) > len(ids) / 2


def generate(*options):
    return main(["generate", "--model", MINI, "--window", "16", "--seed", "3", *map(str, options)])


def test_the_command_goes_on_where_it_was_left(tmp_path, capsys):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(TEXT, encoding="utf-8")
    assert generate("--prompt-file", prompt, "--max-new-tokens", 30, "--greedy") == 0
    whole = capsys.readouterr()
    assert "30 tokens" in whole.err
    state = tmp_path / "state.safetensors"
    assert generate("--prompt-file", prompt, "--max-new-tokens", 12, "--greedy", "--state-out", state) == 0
    first = capsys.readouterr()
    assert f"recur-gpt2 generate --state-in {state}" in first.err
    assert generate("--state-in", state, "--max-new-tokens", 18, "--greedy") == 0
    assert first.out[:-1] + capsys.readouterr().out == whole.out


def test_the_command_draws_the_same_with_the_same_seed_and_reads_alone(tmp_path, capsys):
    texts = []
    for _ in range(2):
        assert generate("--max-new-tokens", 20, "--top-k", 50) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert generate("--prompt", TEXT, "--max-new-tokens", 0, "--state-out", tmp_path / "state") == 0
    assert capsys.readouterr().out == ""
    assert RecurState.load(tmp_path / "state").windows[0] > 0


def test_bad_input_is_refused_in_a_sentence(tmp_path, capsys):
    state = tmp_path / "state"
    assert generate("--prompt", "It was", "--max-new-tokens", 2, "--state-out", state) == 0
    capsys.readouterr()
    for options, said in (
        (["--prompt-file", tmp_path / "none.txt"], "none.txt could not be read"),
        (["--state-in", tmp_path / "none"], "none"),
        (["--max-new-tokens", -1], "max_new_tokens=-1"),
        (["--state-in", state, "--recurrence", "none"], "left by another model"),
    ):
        assert generate(*options) == 2
        err = capsys.readouterr().err
        assert said in err
        assert "Traceback" not in err


def test_transformers_own_pipeline_writes_with_a_saved_model(tmp_path, tokenizer, capsys):
    saved = RecurGPT2LMHeadModel.from_pretrained(RECURRENT)
    saved.save_pretrained(tmp_path / "saved", tokenizer=tokenizer)
    pipe = pipeline("text-generation", model=str(tmp_path / "saved"), device="cpu")
    assert isinstance(pipe.model, RecurGPT2LMHeadModel)
    long = TEXT * 12  # more than all positions
    ids = tokenizer(long, return_tensors="pt", verbose=False)["input_ids"]
    assert ids.shape[1] > 1024
    capsys.readouterr()
    (out,) = pipe(long, max_new_tokens=12, do_sample=False, return_full_text=False)
    expected = saved.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert out["generated_text"] == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert "maximum" not in capsys.readouterr().err, "no warning of a length that is no limit here"
    pipe.tokenizer.pad_token_id, pipe.tokenizer.padding_side = saved.config.eos_token_id, "left"
    many = pipe(["It was", TEXT], max_new_tokens=5, do_sample=True, num_return_sequences=2, batch_size=2)
    assert [len(each) for each in many] == [2, 2]
