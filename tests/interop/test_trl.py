"""TRL's SFTTrainer on our models, with an adapter and without padding."""

import pytest
import torch
from conftest import DATA
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from recur_gpt2 import RecurGPT2LMHeadModel

trl = pytest.importorskip("trl")


@pytest.mark.slow
@pytest.mark.parametrize("padding_free", [False, True])
def test_supervised_finetuning_lowers_the_loss(tmp_path, padding_free):
    torch.manual_seed(0)
    rows = Dataset.from_dict({"text": ["The king went down to the river, and " * 12, "All was quiet. " * 5] * 4})
    args = trl.SFTConfig(
        str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_length=None,
        padding_free=padding_free,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
    )
    model = RecurGPT2LMHeadModel.from_gpt2(DATA / "gpt2-mini", window=64)
    trainer = trl.SFTTrainer(
        model,
        args,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(DATA / "gpt2-mini"),
        peft_config=LoraConfig(target_modules=["c_attn", "c_fc"], modules_to_save=["recurrence"], fan_in_fan_out=True),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
