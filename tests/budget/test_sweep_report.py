import csv
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recur_gpt2.budget.sweep import report
from recur_gpt2.budget.sweep.plots import METHOD_STYLES, PICTURES
from recur_gpt2.budget.sweep.report import changes, csv_text, frontier, levels, markdown_report, verdict, write_report
from recur_gpt2.evaluation.evaluate import resample

MEBI = 2**20
TOKENS = [900, 2000, 1500, 4000]
MEMORY = "peak_memory_bytes"
SETTINGS = {
    "model": "data/gpt2-mini",
    "data": "pg19-sample",
    "task": "score",
    "budgets": [256 * MEBI, 512 * MEBI],
    "windows": [64, 256],
    "methods": ["disjoint", "recurrent"],
    "finetune_tokens": 1000,
    "command": "recur-gpt2 sweep --task score",
    "machine": {"device": "cpu", "threads": 2},
}


def make_point(method, nats, mebibytes, window=256, **changed):
    """A scored point whose documents are as hard as one another, but for a little that is its own."""
    own = np.random.default_rng(round(1e6 * nats) + mebibytes).normal(scale=0.001, size=len(TOKENS))
    sums = np.array(TOKENS) * (nats + own)
    nats = float(sums.sum() / sum(TOKENS))
    return {
        "kind": "point",
        "id": f"score-{method}-w{window}",
        "method": method,
        "window": window,
        "budget_bytes": 512 * MEBI,
        "settings": {"lanes": 8, "precision": "bfloat16"},
        "status": "ok",
        "reason": None,
        "predicted_memory_bytes": 2 * mebibytes * MEBI,
        "peak_memory_bytes": mebibytes * MEBI,
        "tokens_per_second": 8123.4,
        "flops_per_token": 250e6,
        "nats": nats,
        "nats_interval": [nats - 0.05, nats + 0.04],
        "token_ppl": math.exp(nats),
        "document_nats": sums.tolist(),
        "document_tokens": TOKENS,
        **changed,
    }


def compared(rows, budgets=None, cost=MEMORY):
    return frontier(rows, levels(rows, cost) if budgets is None else [b * MEBI for b in budgets], cost)


def lines_of(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


POINTS = st.lists(
    st.tuples(st.sampled_from(list(METHOD_STYLES)), st.sampled_from([3.1, 3.2, 3.3]), st.integers(1, 9)), max_size=10
)


@given(POINTS)
def test_the_frontier_is_the_best_of_each_side_at_no_more_cost(places):
    rows = [make_point(*place) for place in places]
    for row in compared(rows, budgets=range(11)):
        for side, methods in (
            ("plain", ["disjoint", "overlap"]),
            ("recurrent", ["recurrent", "recurrent+overlap", "recurrent+t2r"]),
        ):
            affordable = [r for r in rows if r["method"] in methods and r[MEMORY] <= row["budget"]]
            assert (row[side] is None) == (not affordable)
            if affordable:
                assert row[side]["nats"] == min(r["nats"] for r in affordable)
        if row["plain"] and row["recurrent"]:
            assert row["difference"] == row["recurrent"]["nats"] - row["plain"]["nats"]
        else:
            assert row["difference"] is None
            assert row["interval"] is None


@given(POINTS)
def test_between_two_levels_nothing_changes(places):
    rows = [make_point(*place) for place in places]
    at_levels = {row["budget"]: row for row in compared(rows)}
    for budget in range(11):
        (row,) = compared(rows, budgets=[budget])
        below = [level for level in at_levels if level <= row["budget"]]
        expected = at_levels[max(below)] if below else {"plain": None, "recurrent": None}
        assert (row["plain"], row["recurrent"]) == (expected["plain"], expected["recurrent"])


def test_levels_are_the_costs_of_scored_points_ascending():
    rows = [make_point("overlap", 3.2, 500), make_point("recurrent", 3.1, 300), make_point("t2r", 3.1, 300)]
    rows += [make_point("disjoint", 3.3, 100, status="failed"), make_point("disjoint", 3.3, 200) | {"nats": None}]
    rows += [{"kind": "length", "status": "ok", "peak_memory_bytes": 5}, {"kind": "point", "status": "failed"}]
    assert levels(rows, MEMORY) == [300 * MEBI, 500 * MEBI]
    assert levels(rows, "flops_per_token") == [250e6]


def test_of_equally_good_points_the_cheaper_one_is_the_best():
    dear, cheap = (make_point("disjoint", 3.2, mebibytes) | {"nats": 3.2} for mebibytes in (300, 200))
    assert compared([dear, cheap], budgets=[400])[0]["plain"] is cheap


def test_the_interval_is_a_paired_bootstrap_over_documents():
    plain, recurrent = make_point("disjoint", 3.3, 100), make_point("recurrent", 3.2, 100)
    means = []
    for draw in resample(len(TOKENS)):
        gap = sum(recurrent["document_nats"][d] - plain["document_nats"][d] for d in draw)
        means.append(gap / sum(TOKENS[d] for d in draw))
    (row,) = compared([plain, recurrent])
    assert row["interval"] == pytest.approx([np.quantile(means, 0.025), np.quantile(means, 0.975)])
    assert row["interval"][0] <= row["difference"] <= row["interval"][1]


@pytest.mark.parametrize(
    "changed",
    [
        {"document_tokens": [900, 2000, 1500, 4001]},
        {"document_tokens": [900], "document_nats": [9.0]},
        {"document_tokens": None},
        {"document_nats": None},
    ],
    ids=["other tokens", "fewer documents", "no tokens", "no nats"],
)
def test_without_the_same_documents_there_is_no_interval(changed):
    for rows in (
        [make_point("disjoint", 3.3, 100, **changed), make_point("recurrent", 3.2, 100)],
        [make_point("disjoint", 3.3, 100), make_point("recurrent", 3.2, 100, **changed)],
    ):
        (row,) = compared(rows)
        assert row["interval"] is None
        assert row["difference"] == pytest.approx(-0.1, abs=0.01)


def test_a_single_document_gives_no_interval():
    alone = {"document_tokens": [900], "document_nats": [2900.0]}
    (row,) = compared([make_point("disjoint", 3.3, 100, **alone), make_point("recurrent", 3.2, 100, **alone)])
    assert row["interval"] is None


def test_changes_drop_levels_at_which_both_bests_stay():
    rows = [make_point("disjoint", 3.3, 100), make_point("disjoint", 3.4, 200), make_point("recurrent", 3.2, 300)]
    assert [row["budget"] for row in changes(compared(rows))] == [100 * MEBI, 300 * MEBI]


def test_the_verdict_counts_levels_and_names_where_recurrence_does_not_fit():
    rows = [
        make_point("disjoint", 3.3, 100),
        make_point("disjoint", 3.25, 200),
        make_point("recurrent", 3.2, 300),
        make_point("recurrent", 3.1, 400),
    ]
    assert verdict(compared(rows)) == (
        "The best recurrent point has fewer nats/token than the best plain one at 2 of the 4 levels of peak memory at "
        "which there is a plain point; the 95% interval of the difference excludes zero at 2 of these 2. "
        "Elsewhere, there is no recurrent point at 2 levels (100.0 to 200.0 MiB; the first level with one is 300.0)."
    )


def test_the_verdict_names_the_plain_point_that_is_not_beaten():
    rows = [make_point("recurrent", 3.2, 100), make_point("overlap", 3.1, 200, window=512)]
    assert verdict(compared(rows)) == (
        "The best recurrent point has fewer nats/token than the best plain one at 0 of the 1 level of peak memory at "
        "which there is a plain point. Elsewhere, the recurrent point has as many nats/token or more at 1 level "
        "(200.0 MiB, against overlap, window 512); "
        "the 95% interval of the difference excludes zero at 1 of these 1."
    )


def test_the_verdict_says_so_where_there_is_nothing_to_compare():
    nothing = "There is no scored plain point at any of these levels, so there is nothing to compare with."
    assert verdict([]) == nothing
    assert verdict(compared([make_point("recurrent", 3.2, 100)])) == nothing
    assert verdict(compared([make_point("disjoint", 3.2, 100)])).endswith("(100.0 MiB; and there is none at more).")


def test_an_interval_that_is_not_known_is_not_counted():
    rows = [make_point("disjoint", 3.3, 100, document_nats=None), make_point("recurrent", 3.2, 100)]
    assert "excludes zero at 0 of these 1 and is not known at 1." in verdict(compared(rows))


@given(POINTS)
def test_counts_in_the_verdict_add_up(places):
    at_levels = changes(compared([make_point(*place) for place in places]))
    text = verdict(at_levels)
    if with_plain := [row for row in at_levels if row["plain"]]:
        below = sum(row["difference"] is not None and row["difference"] < 0 for row in with_plain)
        assert f" at {below} of the {len(with_plain)} level" in text
        assert (" Elsewhere, " in text) == (below < len(with_plain))
        assert ("there is no recurrent point at" in text) == any(not row["recurrent"] for row in with_plain)


def test_a_point_that_ran_out_of_memory_is_listed_with_its_reason():
    rows = [
        make_point("disjoint", 3.3, 100),
        make_point("recurrent", 3.2, 100, status="out of memory", reason="CUDA out of\nmemory"),
        {"kind": "length", "method": "t2r", "window": 64, "length": 4096, "status": "failed", "reason": "killed"},
        {"kind": "point", "id": "lost", "status": "failed"},
        {"kind": "point"},
    ]
    assert lines_of(markdown_report(rows, {}), "- ") == [
        "- recurrent, window 256, 512 MiB: out of memory (CUDA out of memory)",
        "- t2r, window 64, 4,096 tokens: failed (killed)",
        "- lost: failed",
        "- a row without a name: no status",
    ]


def test_the_report_has_every_measured_number_with_its_unit():
    rows = [make_point("disjoint", 3.3, 100), make_point("recurrent", 3.2, 120, settings={"lanes": 4})]
    text = markdown_report(rows, SETTINGS)
    head, _, disjoint, recurrent = lines_of(text.split("## Points")[1], "|")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, disjoint, recurrent)]
    first, second = (dict(zip(cells[0], values, strict=True)) for values in cells[1:])
    assert first["point"] == "disjoint, window 256"
    assert (first["budget MiB"], first["peak MiB"], first["predicted MiB"]) == ("512", "100", "200")
    assert (first["MFLOPs/token"], first["tokens/s"]) == ("250.0", "8,123")
    assert first["token ppl"] == f"{rows[0]['token_ppl']:.2f}"
    assert (first["lanes"], second["lanes"]) == ("8", "4")
    assert (first["precision"], second["precision"]) == ("bfloat16", "-")
    assert "word ppl" not in first  # no row has it


def test_the_report_says_what_was_swept_and_how_to_sweep_it_again():
    rows = [make_point("disjoint", 3.3, 100), make_point("overlap", 3.3, 100, 64, status="failed", budget_bytes=2**28)]
    text = markdown_report(rows, SETTINGS)
    assert text.startswith("# Memory-budget sweep: gpt2-mini on pg19-sample\n")
    assert "Task score; methods disjoint, overlap; windows 256, 64; memory budgets 256, 512 MiB." in text
    assert "Points: 1 ok, 1 failed. Documents of a given length: none." in text
    assert "- finetune_tokens: `1000`" in text
    assert "- device: `cpu`" in text
    assert text.endswith("```\nrecur-gpt2 sweep --task score\n```\n")
    assert all(f"]({name}.png)" in text for name in PICTURES)


def test_both_frontiers_are_in_the_report():
    rows = [make_point("disjoint", 3.3, 100), make_point("recurrent", 3.2, 120, flops_per_token=253e6)]
    memory, computation = markdown_report(rows, SETTINGS).split("## By ")[1:]
    disjoint, recurrent = (f"{row['token_ppl']:.2f}" for row in rows)
    assert lines_of(memory, "| 100.0 ") == [f"| 100.0 | disjoint, window 256 | {disjoint} | - | - | - | - |"]
    (row,) = compared(rows, budgets=[120])
    (line,) = lines_of(computation, "| 253.00 ")
    assert f"| disjoint, window 256 | {disjoint} | recurrent, window 256 | {recurrent} |" in line
    assert line.endswith(f"| {row['difference']:+.4f} | {row['interval'][0]:+.4f} to {row['interval'][1]:+.4f} |")
    assert verdict(compared(rows)) in memory
    assert verdict(compared(rows, cost="flops_per_token")) in computation


def test_without_overlapping_windows_the_others_are_compared_among_themselves():
    """Overlap costs no memory, so by memory it would hide what is best at its computation."""
    rows = [make_point("disjoint", 4.3, 100), make_point("overlap", 4.0, 100), make_point("recurrent", 4.1, 120)]
    sections = markdown_report(rows, SETTINGS).split("## By ")[1:]
    assert [section.partition("\n")[0] for section in sections] == [
        "peak memory",
        "forward computation",
        "peak memory, without overlapping windows",
    ]
    assert "| overlap, window 256 |" in sections[0]
    assert "| overlap, window 256 |" not in sections[2].split("## Points")[0]
    assert "at 1 of the 2 levels" in sections[2]


def test_results_csv_is_flat_and_holds_every_row():
    rows = [make_point("disjoint", 3.3, 100), {"kind": "point", "status": "failed", "reason": 'a "b",\nc'}]
    first, second = csv.DictReader(csv_text(rows).splitlines(keepends=True))
    assert first["lanes"] == "8"
    assert float(first["nats"]) == rows[0]["nats"]
    assert [float(first["nats_low"]), float(first["nats_high"])] == rows[0]["nats_interval"]
    assert not {"settings", "nats_interval", "document_nats", "document_tokens"} & first.keys()
    assert second == dict.fromkeys(first, "") | {"kind": "point", "status": "failed", "reason": 'a "b",\nc'}


def test_a_sweep_in_which_everything_failed_still_has_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write_plots", lambda rows, settings, folder: (folder / "plots").touch())
    write_report([{"kind": "point", "status": "failed"}, {}], {}, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["plots", "report.md", "results.csv"]
    assert "nothing to compare with" in (tmp_path / "new" / "report.md").read_text(encoding="utf-8")


def test_a_report_has_its_pictures_beside_it(tmp_path):
    rows = [make_point("disjoint", 3.3, 100), make_point("recurrent", 3.2, 120)]
    write_report(rows, SETTINGS, tmp_path)
    pictures = {f"{name}{suffix}.png" for name in PICTURES for suffix in ("", "@2x")}
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "results.csv", *pictures}
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == markdown_report(rows, SETTINGS)
    assert (tmp_path / "results.csv").read_text(encoding="utf-8") == csv_text(rows)
