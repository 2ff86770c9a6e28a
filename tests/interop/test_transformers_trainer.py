"""transformers' Trainer, pipelines and collators on our models."""

import pytest
import torch
from conftest import DATA, WINDOW
from torch.testing import assert_close
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    pipeline,
)

from recur_gpt2 import RecurGPT2LMHeadModel

IDS = torch.arange(1, 5 * WINDOW + 4).remainder(97).view(1, -1)


def fresh(gpt2_folder, recurrence="default"):
    model = RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, window=WINDOW, recurrence=recurrence)
    torch.manual_seed(0)
    for parameter in model.transformer.recurrence.parameters():
        parameter.data.normal_(std=0.2)
    return model


def saved_bytes(model):
    """Gradients of a loss, and the bytes that its graph held."""
    kept = {}
    model.train().zero_grad()

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(IDS.repeat(4, 1), labels=IDS.repeat(4, 1), parallel_windows=4).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recurrence", ["default", "yoshida2020"])
def test_gradient_checkpointing_gives_the_same_gradients_from_less_memory(gpt2_folder, recurrence, reentrant):
    model = fresh(gpt2_folder, recurrence)
    expected, plain = saved_bytes(model)
    model.enable_input_require_grads()  # which PyTorch's reentrant form asks for
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    found, less = saved_bytes(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    assert less < plain / 2
    model.gradient_checkpointing_disable()
    assert saved_bytes(model)[1] == plain


class Steps(Trainer):
    """Keeps what each optimizer step is made of."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return loss


def train(model, rows, folder, **options):
    args = TrainingArguments(
        str(folder), max_steps=1, learning_rate=0.0, use_cpu=True, report_to=[], save_strategy="no", **options
    )
    trainer = Steps(model, args, train_dataset=rows, data_collator=collate)
    trainer.train()
    return trainer.gradients


def collate(rows):
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_four_documents_accumulated_are_a_batch_of_four(gpt2_folder, tmp_path):
    """Of unequal lengths: `num_items_in_batch` is honoured, and every token weighs the same."""
    rows = [IDS[0, :length] for length in (3, 40, 9, 21)]
    whole = train(fresh(gpt2_folder), rows, tmp_path, per_device_train_batch_size=4)
    each = train(fresh(gpt2_folder), rows, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for name, gradient in whole.items():
        assert_close(each[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_checkpointing_by_the_trainers_switch_trains_the_same(gpt2_folder, tmp_path):
    rows = [IDS[0, :20], IDS[0, 5:]]
    plain = train(fresh(gpt2_folder), rows, tmp_path, per_device_train_batch_size=2)
    checkpointed = train(fresh(gpt2_folder), rows, tmp_path, per_device_train_batch_size=2, gradient_checkpointing=True)
    for name, gradient in plain.items():
        assert_close(checkpointed[name], gradient)


def test_the_trainers_metrics_see_logits_and_labels_alone(gpt2_folder, tmp_path):
    seen = []

    def metrics(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {"shape": prediction.predictions.shape[-1]}

    rows = [IDS[0], IDS[0].flip(0)]
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=1)
    trainer = Trainer(fresh(gpt2_folder), args, eval_dataset=rows, data_collator=collate, compute_metrics=metrics)
    assert trainer.evaluate()["eval_shape"] == 97
    (logits, labels), *_ = seen
    assert logits.shape == (2, IDS.shape[1], 97)
    assert labels.shape == (2, IDS.shape[1])


def test_documents_flattened_by_a_collator_train_as_rows_do(gpt2_folder):
    model, rows = fresh(gpt2_folder).double(), [IDS[0, :5], IDS[0, 3:30], IDS[0, 2:11]]
    for options in ({}, {"return_flash_attn_kwargs": True, "return_position_ids": False, "return_seq_idx": True}):
        flat = DataCollatorWithFlattening(**options)([{"input_ids": row.tolist()} for row in rows])
        assert_close(model(**flat).loss, model(**collate(rows)).loss)
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such'"):
        model(IDS, no_such=1)


def test_pipelines_write_in_batches_with_the_bundled_tokenizer():
    model = RecurGPT2LMHeadModel.from_gpt2(DATA / "gpt2-mini", window=32)
    tokenizer = AutoTokenizer.from_pretrained(DATA / "gpt2-mini")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["It was a dark night, and", "The king"]
    options = {"max_new_tokens": 40, "do_sample": False, "return_full_text": False}
    together = write(prompts, batch_size=2, **options)
    alone = [write(prompt, **options) for prompt in prompts]
    assert together == alone


def test_the_end_of_text_is_scored_where_it_is_no_padding(make_model):
    """Though it is the padding's token too: the mask says which is which, not the id."""
    model = make_model("default")
    ids = torch.tensor([[5, 0, 7, 0, 0], [5, 6, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    alone = [model(row[None, :n], labels=row[None, :n]).loss * (n - 1) for row, n in zip(ids, (4, 3), strict=True)]
    assert_close(model(ids, attention_mask=mask, labels=ids).loss, sum(alone) / 5)


def test_transformers_collator_trains_with_the_bundled_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(DATA / "gpt2-mini")
    model = RecurGPT2LMHeadModel.from_gpt2(DATA / "gpt2-mini", window=32)
    texts = ["One day in the forest there was a sound.", "Two."]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([tokenizer(text) for text in texts])
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    alone = [
        model(row[None, :n], labels=row[None, :n]).loss for row, n in zip(batch["input_ids"], lengths, strict=True)
    ]
    expected = sum(loss * (n - 1) for loss, n in zip(alone, lengths, strict=True)) / sum(n - 1 for n in lengths)
    assert_close(model(**batch).loss, expected)
