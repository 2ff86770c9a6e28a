"""lm-evaluation-harness on our models, by the real library and local task files."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from conftest import DATA
from torch.testing import assert_close

from recur_gpt2.evaluation.arguments import EvaluationArguments
from recur_gpt2.evaluation.scoring import evaluate_model
from recur_gpt2.models.hub import load_tokenizer
from recur_gpt2.models.loading import load_any

lm_eval = pytest.importorskip("lm_eval")
MODEL = DATA / "recur-gpt2-mini"
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
metric_list: [{{metric: {metric}}}]
"""


def run(folder, name, rows, **task):
    """Results of one task on our model."""
    from lm_eval.tasks import TaskManager

    import recur_gpt2.lm_eval  # noqa: F401

    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {"text": "", "more": "", "metric": "acc"} | task
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, **task), encoding="utf-8")
    found = lm_eval.simple_evaluate(
        model="recur_gpt2",
        model_args={"pretrained": str(MODEL)},
        tasks=[name],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        batch_size=2,
        log_samples=True,
        bootstrap_iters=0,
    )
    return found["results"][name], found["samples"][name]


@pytest.fixture(scope="module")
def article():
    texts = pq.read_table(DATA / "wikitext-103-sample" / "test.parquet")["text"].to_pylist()
    tokenizer = load_tokenizer(MODEL)
    return next(text.strip() for text in texts if len(tokenizer(text, verbose=False)["input_ids"]) > 6000)


@pytest.mark.slow
def test_the_rolling_perplexity_of_a_long_article_is_that_of_evaluate(article, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    task = {"kind": "loglikelihood_rolling", "target": "{{page}}", "metric": "word_perplexity"}
    found, _ = run(tmp_path, "article", [{"page": article}], **task)
    (tmp_path / "article.txt").write_text(article, encoding="utf-8")
    args = EvaluationArguments(
        model=str(MODEL), data=str(tmp_path / "article.txt"), protocols=["recurrent"], precision="float32"
    )
    expected = evaluate_model(args)["rows"][0]["word_ppl"]
    assert found["word_perplexity,none"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_choices_after_a_prompt_longer_than_the_model_are_scored_with_all_of_it(article, tmp_path):
    """Against the model's own logits: prompts of several windows, answers of several tokens, in batches."""
    choices = [" the end of the line", " a city", " and"]
    rows = [{"text": article[:size], "choices": choices, "label": 1} for size in (9000, 300)]
    task = {"kind": "multiple_choice", "text": "{{text}}", "target": "{{label}}"}
    _, samples = run(tmp_path, "choices", rows, more='doc_to_choice: "{{choices}}"\ntarget_delimiter: ""', **task)
    model, tokenizer = load_any(str(MODEL)), load_tokenizer(MODEL)
    for sample, row in zip(sorted(samples, key=lambda each: each["doc_id"]), rows, strict=True):
        for (likelihood, is_greedy), choice in zip(sample["filtered_resps"], choices, strict=True):
            whole = torch.tensor(tokenizer(row["text"] + choice, verbose=False)["input_ids"])
            start = len(tokenizer(row["text"], verbose=False)["input_ids"])
            with torch.no_grad():
                logits = model(whole[None]).logits[0, start - 1 : -1].log_softmax(dim=-1)
            expected = logits.gather(1, whole[start:, None]).sum()
            assert_close(torch.tensor(float(likelihood)), expected, atol=1e-3, rtol=1e-4)
            assert is_greedy in (False, "False")


@pytest.mark.slow
def test_generation_tasks_stop_where_they_are_told_to(article, tmp_path):
    task = {"kind": "generate_until", "text": "{{text}}", "target": "x", "metric": "exact_match"}
    more = 'generation_kwargs: {until: ["."], max_gen_toks: 30, do_sample: false}'
    _, samples = run(tmp_path, "writing", [{"text": article[:6000]}, {"text": "The king"}], more=more, **task)
    for sample in samples:
        assert sample["filtered_resps"][0]
        assert "." not in sample["filtered_resps"][0]
