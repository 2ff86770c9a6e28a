"""runs.py: a run is made once for each folder, and what was found is kept after each."""

import json

import pytest

from recur_gpt2.budget.runs import Record, finetuned


def test_a_folder_that_holds_results_is_not_run_again(tmp_path):
    (tmp_path / "results.json").write_text('{"rows": []}')
    assert finetuned(tmp_path, ["--no-such-flag"]) == {"rows": []}


def test_what_is_recorded_is_not_found_again(tmp_path):
    record = Record(tmp_path / "record.json")
    record.once(record.at("sample", "256"), "softmax", lambda: {"nats": 4.0})
    again = Record(tmp_path / "record.json")
    assert again.found == {"sample": {"256": {"softmax": {"nats": 4.0}}}}
    again.once(again.at("sample", "256"), "softmax", lambda: pytest.fail("found again"))
    assert json.loads((tmp_path / "record.json").read_text()) == again.found
