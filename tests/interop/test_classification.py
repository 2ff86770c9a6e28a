"""GPT-2's heads for classes, over documents longer than a window."""

import pytest
import torch
from conftest import WINDOW
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
)

from recur_gpt2 import InputError, RecurGPT2ForSequenceClassification, RecurGPT2ForTokenClassification

IDS = torch.arange(1, 3 * WINDOW + 4).remainder(97).view(1, -1).repeat(3, 1) + torch.tensor([[0], [5], [11]])
SHORT = IDS[:, :WINDOW]


def made(cls, gpt2_folder, **options):
    return cls.from_gpt2(gpt2_folder, window=WINDOW, num_labels=3, **options).double().eval()


@pytest.mark.parametrize(
    ("ours", "theirs", "labels"),
    [
        (RecurGPT2ForSequenceClassification, GPT2ForSequenceClassification, torch.tensor([2, 0, 1])),
        (RecurGPT2ForTokenClassification, GPT2ForTokenClassification, SHORT % 3),
    ],
)
def test_a_first_window_is_classified_as_gpt2_would(gpt2_folder, ours, theirs, labels):
    model = made(ours, gpt2_folder)
    config = theirs.config_class.from_pretrained(gpt2_folder, num_labels=3, pad_token_id=96)
    gpt2 = theirs(config).double().eval()
    missing, unexpected = gpt2.load_state_dict(
        {name: each for name, each in model.state_dict().items() if "recurrence" not in name}, strict=False
    )
    assert not missing
    assert not unexpected
    expected, out = gpt2(SHORT, labels=labels), model(SHORT, labels=labels)
    assert_close(out.logits, expected.logits)
    assert_close(out.loss.float(), expected.loss.float())


def test_a_document_is_classified_by_its_last_token_whatever_its_padding(gpt2_folder):
    model = made(RecurGPT2ForSequenceClassification, gpt2_folder)
    alone = torch.cat([model(row[None, :n]).logits for row, n in zip(IDS, (4, 2 * WINDOW, 19), strict=True)])
    n = IDS.shape[1]
    right = (torch.arange(n) < torch.tensor([[4], [2 * WINDOW], [19]])).long()
    assert_close(model(IDS, attention_mask=right).logits, alone)
    left = torch.zeros_like(IDS)
    for row, length in enumerate((4, 2 * WINDOW, 19)):
        left[row, n - length :] = IDS[row, :length]
    assert_close(model(left, attention_mask=right.flip(1)).logits, alone)
    model.config.pad_token_id = 96
    assert_close(model(IDS.masked_fill(right == 0, 96)).logits, alone)  # by the id where there is no mask


@pytest.mark.parametrize(
    ("options", "labels", "problem"),
    [
        ({"num_labels": 1}, torch.tensor([0.5, 1.0, -2.0]), "regression"),
        ({}, torch.tensor([[1.0, 0.0, 1.0]] * 3), "multi_label_classification"),
    ],
)
def test_the_loss_is_that_of_the_problem(gpt2_folder, options, labels, problem):
    model = RecurGPT2ForSequenceClassification.from_gpt2(gpt2_folder, window=WINDOW, **{"num_labels": 3} | options)
    out = model(IDS, labels=labels)
    losses = {"regression": torch.nn.MSELoss(), "multi_label_classification": torch.nn.BCEWithLogitsLoss()}
    assert_close(out.loss, losses[problem](out.logits.squeeze(-1), labels))
    assert model.config.problem_type == problem


def test_tokens_are_classified_in_every_window_and_learn_with_the_memory(gpt2_folder):
    model = made(RecurGPT2ForTokenClassification, gpt2_folder)
    read = model.transformer(IDS).last_hidden_state
    out = model(IDS, labels=(IDS % 3).masked_fill(IDS < 20, -100))
    assert_close(out.logits, model.classifier(read))
    out.loss.backward()
    assert model.transformer.recurrence.get("0").shift.grad.abs().max() > 0
    with pytest.raises(InputError, match="labels have shape"):
        model(IDS, labels=SHORT)


@pytest.mark.parametrize(
    ("ours", "auto"),
    [
        (RecurGPT2ForSequenceClassification, AutoModelForSequenceClassification),
        (RecurGPT2ForTokenClassification, AutoModelForTokenClassification),
    ],
)
def test_the_auto_classes_load_what_was_saved(gpt2_folder, tmp_path, ours, auto):
    model = ours.from_gpt2(gpt2_folder, window=WINDOW, num_labels=3).eval()
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path).eval()
    assert type(loaded) is ours
    assert_close(loaded(IDS).logits, model(IDS).logits)
