"""PEFT on our models: LoRA, DoRA and prompt tuning train, save, load and merge; nothing passes an adapter by."""

import json
import sys

import pytest
import torch
from conftest import ROOT, WINDOW
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch.testing import assert_close

from recur_gpt2 import InputError, RecurGPT2LMHeadModel, RecurState
from recur_gpt2.cli.main import main
from recur_gpt2.models.adapters import add_lora
from recur_gpt2.models.loading import load_any
from recur_gpt2.training.arguments import TrainingArguments
from recur_gpt2.training.loss import SegmentLoss

IDS = torch.arange(1, 3 * WINDOW + 4).remainder(97).view(1, -1)


def fresh(gpt2_folder, name="default", **options):
    torch.manual_seed(0)
    forms = {"default": {"last_slots": 3}, "yoshida2020": {"recurrence": "yoshida2020"}}
    model = RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, window=WINDOW, **forms[name], **options).double()
    for parameter in model.transformer.recurrence.parameters():
        parameter.data.normal_(std=0.2)
    return model


def lora(model, *, dora=False, targets=("c_attn", "c_fc", "lm_head")):
    torch.manual_seed(1)
    config = LoraConfig(
        r=3, target_modules=list(targets), modules_to_save=["recurrence"], use_dora=dora, fan_in_fan_out=False
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first
            parameter.data.normal_(std=0.2)
    return adapted.double().eval()


def segment_loss(model, *, checkpointing):
    """Of two blocks of windows, with gradients."""
    ids = IDS[:, : 2 * WINDOW].view(1, 2, WINDOW)

    class Segment:
        input_ids, targets, starts = ids, ids.flip(2), torch.tensor([[True, False]])

    args = TrainingArguments(checkpointing=checkpointing, parallel_windows=1)
    loss, _ = SegmentLoss(model, args)(Segment, RecurState.empty(1))
    return loss


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["default", "yoshida2020"])
def test_adapters_on_every_projection_and_the_head_equal_the_merged_model(gpt2_folder, name, dora):
    base = fresh(gpt2_folder, name, tie_word_embeddings=False)
    before = base(IDS, labels=IDS).loss, segment_loss(base, checkpointing=False)
    adapted = lora(base, dora=dora)
    after = adapted(input_ids=IDS, labels=IDS).loss, segment_loss(base, checkpointing=False)
    recomputed = segment_loss(base, checkpointing=True)
    written = base.generate(IDS, max_new_tokens=WINDOW + 3, do_sample=False, pad_token_id=0, eos_token_id=None)
    merged = adapted.merge_and_unload()
    assert_close(after[0], merged(IDS, labels=IDS).loss)
    assert_close(after[1], segment_loss(merged, checkpointing=False))
    assert_close(after[1], recomputed)
    assert all(abs(float(new - old)) > 1e-3 for new, old in zip(after, before, strict=True))
    again = merged.generate(IDS, max_new_tokens=WINDOW + 3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(written, again)


@pytest.mark.parametrize("name", ["default", "yoshida2020"])
def test_adapters_alone_learn_with_and_without_recomputation(gpt2_folder, name):
    model = fresh(gpt2_folder, name, tie_word_embeddings=False)
    adapted = lora(model)
    found = []
    for checkpointing in (False, True):
        model.zero_grad(set_to_none=True)
        segment_loss(model, checkpointing=checkpointing).backward()
        found.append({n: p.grad for n, p in adapted.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora" in name or "recurrence" in name for name in found[0])
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_the_memory_is_saved_with_the_adapter(gpt2_folder, tmp_path):
    adapted = lora(fresh(gpt2_folder), targets=["c_attn", "c_fc"])
    adapted.get_base_model().transformer.recurrence.get("0").shift.data += 1
    expected = adapted(input_ids=IDS).logits
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    base = RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, window=WINDOW, last_slots=3)
    loaded = PeftModel.from_pretrained(base, tmp_path).double().eval()
    assert_close(loaded(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)  # saved in float32


def test_prompt_tuning_trains_and_generates(gpt2_folder):
    model = get_peft_model(fresh(gpt2_folder), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).double()
    model(input_ids=IDS, labels=IDS).loss.backward()
    prompt = model.prompt_encoder["default"].embedding.weight
    assert bool(prompt.grad.abs().sum(dim=1).gt(0).all())
    embeds = model.get_base_model().get_input_embeddings()(IDS)
    whole = model.get_base_model()(inputs_embeds=torch.cat((prompt[None], embeds), dim=1))
    assert_close(model(input_ids=IDS).logits, whole.logits)
    model.eval()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    written = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)
    assert written[0, -3] == whole.logits[0, -1].argmax()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """What `recur-gpt2 finetune --lora-rank` writes, on the bundled GPT-2."""
    folder = tmp_path_factory.mktemp("run")
    command = [
        "finetune",
        "--window",
        "32",
        "--steps",
        "3",
        "--lanes",
        "2",
        "--lora-rank",
        "4",
        "--no-control",
        "--rows",
    ]
    main([*command, "--data", "wikitext-103-sample", "--output-dir", str(folder), "--precision", "float32"])
    return folder / "recurrent" / "model"


@pytest.mark.slow
def test_the_command_writes_an_adapter_that_every_loader_takes(adapter):
    assert sum(path.stat().st_size for path in adapter.glob("adapter_*")) < 2**20
    assert not (adapter / "model.safetensors").exists()
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == str(ROOT / "data" / "gpt2-mini")
    merged = load_any(str(adapter))
    base = RecurGPT2LMHeadModel.from_gpt2(str(ROOT / "data" / "gpt2-mini"), window=32)
    untrained = base(IDS).logits
    with_peft = PeftModel.from_pretrained(base, adapter).eval()
    assert_close(merged(IDS).logits, with_peft(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)
    assert float((merged(IDS).logits - untrained).abs().max()) > 1e-3
    assert merged.config.window == 32


@pytest.mark.slow
def test_an_adapter_of_another_model_is_refused(adapter, gpt2_folder, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = str(gpt2_folder)
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(InputError, match="does not fit the base that it names"):
        load_any(str(folder))
    with pytest.raises(InputError, match="was made for window=32, not 64"):
        load_any(str(adapter), window=64)


def test_without_peft_the_extra_is_named(gpt2_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # as Python does for what cannot be imported
    with pytest.raises(InputError, match=r"recur-gpt2\[peft\]"):
        add_lora(fresh(gpt2_folder), 4, "gpt2")


def test_a_memory_budget_and_adapters_are_refused_together(capsys):
    assert main(["finetune", "--lora-rank", "4", "--memory-budget", "1GiB"]) != 0
    assert "does not know what adapters take; leave it or --lora-rank out" in capsys.readouterr().err
