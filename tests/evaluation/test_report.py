import json
import math

import pytest

from recur_gpt2.evaluation import report
from recur_gpt2.evaluation.report import finding, format_table, gap_covered, markdown_report, write_report

NATS = {
    "base_disjoint": 3.60,
    "base_overlap": 3.50,
    "finetuned_disjoint": 3.45,
    "finetuned_overlap": 3.35,
    "recurrent": 3.41,
    "recurrent_overlap": 3.33,
    "recurrent_zeroed": 3.46,
    "recurrent_shuffled": 3.47,
}


def make_row(name, nats, **changed):
    cost = (2 if name.endswith("overlap") else 1) * (1.013 if name.startswith("recurrent") else 1)
    return {
        "name": name,
        "protocol": "overlap" if name.endswith("overlap") else "disjoint",
        "window": 256,
        "tokens": 400_000,
        "token_ppl": math.exp(nats),
        "word_ppl": math.exp(1.3 * nats),
        "bits_per_byte": nats / 3,
        "flops_per_token": 250e6 * cost,
        "peak_memory_bytes": 512 * 2**20,
        "tokens_per_second": 8123.4,
        "nats": nats,
        "nats_interval": [nats - 0.05, nats + 0.04],
        **changed,
    }


def make_rows(*, without=(), **nats):
    return [make_row(name, value) for name, value in (NATS | nats).items() if name not in without]


def make_results(rows):
    records = [{"step": s, "tokens": 100 * s, "loss": 4 - 0.1 * s, "tokens_per_second": 9.0} for s in range(1, 5)]
    return {
        "rows": rows,
        "settings": {"window": 256, "model": "gpt2", "data": "pg19", "command": "python run_pg19.py --steps 4"},
        "versions": {"torch": "2.13.0"},
        "loss_by_position": {"finetuned_disjoint": [5.0, 4.0, 3.5, 3.4], "recurrent": [4.5, 3.9, 3.4, 3.4]},
        "training": {"recurrent": records, "disjoint": records},
    }


def test_the_table_has_every_number_under_its_heading():
    lines = format_table(make_rows()).splitlines()
    assert len(lines) == 2 + len(NATS)
    head, recurrent = lines[0], lines[2 + list(NATS).index("recurrent")]
    assert head.split("  ")[0] == "name"
    values = " ".join(recurrent.split())
    assert values == "recurrent disjoint 30.27 84.18 1.1367 3.4100 3.3600 to 3.4500 253.2 512 8,123"
    for heading, value in {"token ppl": "30.27", "nats/token": "3.4100", "peak MiB": "512"}.items():
        assert head.index(heading) + len(heading) == recurrent.index(value) + len(value)


def test_the_table_is_aligned():
    lines = format_table(make_rows()).splitlines()
    assert len({len(line) for line in lines}) == 1
    gaps = [i for i, mark in enumerate(lines[1]) if mark == " "]
    assert all(line[i] == " " for line in lines for i in gaps)


def test_missing_values_are_dashes():
    row = {"name": "recurrent", "protocol": "recurrent", "nats": 3.4, "peak_memory_bytes": None}
    values = format_table([row]).splitlines()[-1].split()
    assert values == ["recurrent", "recurrent", "-", "-", "-", "3.4000", "-", "-", "-", "-"]


def test_an_empty_table_is_its_heading():
    assert len(format_table([]).splitlines()) == 2


def test_gap_covered_is_a_share_of_what_overlapping_windows_gain():
    assert gap_covered(make_rows()) == pytest.approx(0.4)
    assert gap_covered(make_rows(recurrent=3.50)) == pytest.approx(-0.5)


@pytest.mark.parametrize("missing", ["finetuned_disjoint", "finetuned_overlap", "recurrent"])
def test_gap_covered_is_none_without_a_row_it_needs(missing):
    assert gap_covered(make_rows(without=[missing])) is None


def test_gap_covered_is_none_where_there_is_no_gap():
    assert gap_covered(make_rows(finetuned_overlap=3.45)) is None
    assert gap_covered(make_rows(finetuned_overlap=3.50)) is None


def test_a_gain_is_reported_with_its_cost_and_its_control():
    assert finding(make_rows()) == (
        "At window 256 recurrence lowers token perplexity from 31.50 (finetuned, windows apart) to 30.27, "
        "40% of the way to overlapping windows (28.50), at 1.3% more computation a token; "
        "with another document's state it is 32.14, which keeps none of the gain."
    )


def test_a_loss_is_called_one():
    assert finding(make_rows(recurrent=3.46)) == (
        "At window 256 recurrence raises token perplexity from 31.50 (finetuned, windows apart) to 31.82, "
        "-10% of the way to overlapping windows (28.50), at 1.3% more computation a token; "
        "with another document's state it is 32.14."
    )


def test_no_change_is_called_none():
    text = finding(make_rows(recurrent=3.450001))
    assert "recurrence leaves token perplexity at 31.50 (finetuned, windows apart), 0% of the way" in text
    assert "the gain" not in text


def test_a_gain_that_another_documents_state_keeps_is_called_no_memory():
    text = finding(make_rows(recurrent_shuffled=3.42))
    assert text.endswith("it is 30.57, which keeps 75% of the gain, so most of it is no memory.")
    assert finding(make_rows(recurrent_shuffled=3.44)).endswith("it is 31.19, which keeps 25% of the gain.")


def test_an_interval_of_the_gap_is_shown_and_one_with_zero_in_it_is_doubted():
    rows = make_rows()
    row = next(row for row in rows if row["name"] == "recurrent")
    row["gap_covered_interval"] = [0.31, 0.52]
    assert "40% (95% interval 31% to 52%) of the way" in finding(rows)
    assert "no effect" not in finding(rows)
    row["gap_covered_interval"] = [-0.02, 0.52]
    assert finding(rows).endswith("includes zero, so no effect of recurrence is established.")


def test_without_the_control_the_finding_says_what_is_not_known():
    assert finding(make_rows(without=["finetuned_disjoint", "finetuned_overlap"])) == (
        "At window 256 recurrence lowers token perplexity from 36.60 (GPT-2, windows apart) to 30.27, "
        "at 1.3% more computation a token; "
        "with another document's state it is 32.14, which keeps 68% of the gain, so most of it is no memory; "
        "the finetuned control was not run, so how much of this is finetuning alone is not known."
    )


def test_other_missing_rows_are_left_out_or_named():
    assert "overlapping" not in finding(make_rows(without=["finetuned_overlap"]))
    assert finding(make_rows(without=["recurrent_shuffled"])).endswith("another document's state was not tried.")
    assert "while overlapping windows gain nothing (31.50)" in finding(make_rows(finetuned_overlap=3.45))
    without_cost = [row | {"flops_per_token": None} for row in make_rows()]
    assert "computation" not in finding(without_cost)


def test_without_a_row_to_compare_there_is_no_finding():
    no_model = finding(make_rows(without=["recurrent"]))
    assert no_model == "There is no finding: this run holds no row of the recurrent model."
    no_peer = finding(make_rows(without=["base_disjoint", "finetuned_disjoint"]))
    assert no_peer == "There is no finding: this run holds no row of a model without recurrence."


def test_the_report_holds_sentences_table_pictures_and_settings():
    text = markdown_report(make_results(make_rows()))
    assert text.startswith("# Recurrence across windows: window 256, gpt2 on pg19\n\nCompared on 400,000 tokens: ")
    assert finding(make_rows()) in text
    recurrent = next(line for line in text.splitlines() if line.startswith("| with recurrence | recurrent |"))
    assert recurrent == (
        "| with recurrence | recurrent | disjoint | 30.27 | 84.18 | 1.1367 | 3.4100 | 3.3600 to 3.4500 "
        "| 253.2 | 512 | 8,123 |"
    )
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(NATS)
    assert len({line.count("|") for line in table}) == 1
    for name in ("protocols.png", "loss_by_position.png", "training.png"):
        assert f"]({name})" in text
    assert "- model: `gpt2`" in text
    assert "- torch: `2.13.0`" in text
    assert text.endswith("## Command\n\n```\npython run_pg19.py --steps 4\n```\n")
    assert text.count("--steps 4") == 1


def test_the_report_names_only_what_was_compared():
    full = markdown_report(make_results(make_rows()))
    assert "another document's state." in full
    assert "twice the computation" in full
    part = markdown_report(make_results([make_row("base_disjoint", 3.6), make_row("recurrent", 3.4)]))
    assert "Compared on 400,000 tokens: GPT-2 as it is; GPT-2 finetuned with recurrence.\n" in part
    assert "same tokens and steps" not in part


def test_rows_of_unequal_tokens_are_warned_of():
    rows = [make_row("base_disjoint", 3.6), make_row("recurrent", 3.4, tokens=500_000)]
    assert "(up to 500,000): they are not strictly comparable" in markdown_report(make_results(rows))


def test_a_report_without_rows_settings_or_command_can_be_read():
    text = markdown_report({"rows": []})
    assert "There is no finding" in text
    assert "None recorded." in text
    assert "## Command" not in text


def test_the_folder_holds_results_report_and_pictures(tmp_path):
    results = make_results(make_rows())
    write_report(results, tmp_path / "runs" / "one")
    files = {path.name: path for path in (tmp_path / "runs" / "one").iterdir()}
    assert sorted(files) == ["loss_by_position.png", "protocols.png", "report.md", "results.json", "training.png"]
    assert json.loads(files["results.json"].read_text()) == results
    assert files["results.json"].read_text().startswith('{\n "rows"')
    assert files["report.md"].read_text(encoding="utf-8") == markdown_report(results)
    assert all(files[name].read_bytes().startswith(b"\x89PNG") for name in files if name.endswith("png"))


def test_horizons_are_reported_where_they_were_measured(tmp_path):
    rows = [{"horizon": 2, "nats": 4.1, "behind_whole": 0.1, "behind_whole_interval": [0.05, 0.125]}]
    rows.append({"horizon": "all", "nats": 4.0, "behind_whole": 0.0, "behind_whole_interval": [0.0, 0.0]})
    write_report(make_results(make_rows()) | {"horizons": rows}, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| 2 windows | 4.1000 | 0.1000 | 0.0500 to 0.1250 |" in text
    assert "| whole document | 4.0000 |" in text
    assert "(horizons.png)" in text
    assert (tmp_path / "horizons.png").read_bytes().startswith(b"\x89PNG")


def test_a_failure_midway_leaves_old_files_whole(tmp_path, monkeypatch):
    (tmp_path / "report.md").write_text("old")

    def fail(results, path):
        raise RuntimeError("no picture")

    monkeypatch.setitem(report.PICTURES, "training.png", (fail, "Training loss"))
    with pytest.raises(RuntimeError, match="no picture"):
        write_report(make_results(make_rows()), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["loss_by_position.png", "protocols.png", "report.md", "results.json"]
    assert (tmp_path / "report.md").read_text() == "old"


def test_results_that_json_cannot_hold_leave_the_old_file(tmp_path):
    (tmp_path / "results.json").write_text("old")
    with pytest.raises(TypeError):
        write_report(make_results(make_rows()) | {"versions": {"torch": object()}}, tmp_path)
    assert (tmp_path / "results.json").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
