"""The main job's results in words: a table for the terminal, report.md, and the folder that holds them.

It evaluates nothing: every number comes from the results, or is a ratio of two of them.
"""

import json
from pathlib import Path

from ..utils.files import atomic_write_text
from .horizons import WHOLE
from .plots import plot_horizons, plot_loss_by_position, plot_protocols, plot_training, setting_line
from .protocols import ROWS

MISSING = "-"
MEBI = 2**20
INTERVAL_NOTE = (
    "The 95% intervals are of nats/token, by a bootstrap over documents. They hold what documents differ in, which all"
    " rows share: two rows may differ reliably though their intervals overlap."
)

# file name: (what draws it, what it shows)
PICTURES = {
    "protocols.png": (plot_protocols, "Token perplexity by row"),
    "loss_by_position.png": (plot_loss_by_position, "Loss by position in the window"),
    "training.png": (plot_training, "Training loss"),
    "horizons.png": (plot_horizons, "Loss by the windows that a state is built from"),
}


def write_report(results, folder):
    """Write results.json, report.md and its pictures to `folder`, each file whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    for name, (plot, _) in pictures(results).items():
        plot(results, folder / name)
    atomic_write_text(folder / "report.md", markdown_report(results))


def pictures(results):
    """Those that there is something to draw in."""
    return PICTURES if results.get("horizons") else {n: each for n, each in PICTURES.items() if n != "horizons.png"}


def cell(key, form, *, unit=1):
    """A function from a row to its text: row[key] in `unit`s, or MISSING."""

    def text(row):
        value = row.get(key)
        return MISSING if value is None else format(value / unit, form)

    return text


def interval_cell(row):
    interval = row.get("nats_interval")
    return "{:.4f} to {:.4f}".format(*interval) if interval else MISSING


WORDS = {"name": lambda row: row["name"], "protocol": lambda row: row.get("protocol") or MISSING}
NUMBERS = {
    "token ppl": cell("token_ppl", ",.2f"),
    "word ppl": cell("word_ppl", ",.2f"),
    "bits/byte": cell("bits_per_byte", ".4f"),
    "nats/token": cell("nats", ".4f"),
    "95% interval": interval_cell,
    "MFLOPs/token": cell("flops_per_token", ",.1f", unit=1e6),
    "peak MiB": cell("peak_memory_bytes", ",.0f", unit=MEBI),
    "tokens/s": cell("tokens_per_second", ",.0f"),
}
COLUMNS = WORDS | NUMBERS


def format_table(rows):
    """The rows as a fixed-width table: words to the left, numbers to the right."""
    lines = [list(COLUMNS), *([text(row) for text in COLUMNS.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    aligns = ["<"] * len(WORDS) + [">"] * len(NUMBERS)
    return "\n".join(
        "  ".join(f"{text:{align}{width}}" for text, align, width in zip(line, aligns, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown_report(results):
    """report.md: what was compared, what came out, the table, the pictures, and how to make it again."""
    settings = dict(results.get("settings", {}))
    command = settings.pop("command", None)
    parts = [
        f"# Recurrence across windows: {setting_line(results)}",
        compared(results["rows"]),
        finding(results["rows"]),
        "## Results",
        markdown_table(results["rows"]),
        INTERVAL_NOTE,
        *(
            ["## How far back the memory reaches", horizon_table(results["horizons"])]
            if results.get("horizons")
            else []
        ),
        *(f"![{shown}]({name})" for name, (_, shown) in pictures(results).items()),
        "## Settings",
        bullets(settings),
        "## Versions",
        bullets(results.get("versions", {})),
    ]
    if command:
        parts += ["## Command", f"```\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def markdown_table(rows):
    """The rows as in `format_table`, with what each one is in front."""
    return pipe_table({"row": row_label} | COLUMNS, rows, numbers=len(NUMBERS))


HORIZON_COLUMNS = {
    "state of the last": lambda row: "whole document" if row["horizon"] == WHOLE else f"{row['horizon']} windows",
    "nats/token": cell("nats", ".4f"),
    "behind the whole document's": cell("behind_whole", ".4f"),
    "95% interval": lambda row: "{:.4f} to {:.4f}".format(*row["behind_whole_interval"]),
}


def horizon_table(rows):
    """Horizons as a Markdown table."""
    return pipe_table(HORIZON_COLUMNS, rows, numbers=3)


def pipe_table(columns, rows, *, numbers=0):
    """{heading: function from a row to its text} and rows -> a Markdown table; `numbers` columns to the right."""
    marks = ["---"] * (len(columns) - numbers) + ["---:"] * numbers
    lines = [list(columns), marks, *([text(row) for text in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row_label(row):
    return ROWS[row["name"]].label if row["name"] in ROWS else row["name"]


def bullets(items):
    return "\n".join(f"- {key}: `{value}`" for key, value in items.items()) or "None recorded."


def compared(rows):
    """What the table compares, and a warning should the rows not be of the same tokens."""
    names = {row["name"] for row in rows}
    readings = "; ".join(row.reads for name, row in ROWS.items() if row.reads and name in names)
    counts = sorted({row["tokens"] for row in rows})
    text = f"Compared on {counts[0] if counts else 0:,} tokens: {readings or 'nothing'}."
    if any(name in ROWS and ROWS[name].protocol.passes == 2 for name in names):
        text += " Overlapping windows advance by half a window, at twice the computation."
    if len(counts) > 1:
        text += f" Not every row scored the same tokens (up to {counts[-1]:,}): they are not strictly comparable."
    return text


def finding(rows):
    """One sentence: what recurrence changes, at what cost, and how much of it another document's state explains.

    The baseline is the finetuned control; without it, GPT-2 as it is, which leaves the effect of recurrence open.
    """
    by_name = scored_rows(rows)
    recurrent = by_name.get("recurrent")
    baseline = by_name.get("finetuned_disjoint") or by_name.get("base_disjoint")
    if recurrent is None or baseline is None:
        missing = "the recurrent model" if recurrent is None else "a model without recurrence"
        return f"There is no finding: this run holds no row of {missing}."
    clauses = [
        change(baseline, recurrent, gap_part(by_name), cost_part(baseline, recurrent)),
        shuffled_clause(baseline, recurrent, by_name.get("recurrent_shuffled")),
    ]
    if baseline["name"] == "base_disjoint":
        clauses.append("the finetuned control was not run, so how much of this is finetuning alone is not known")
    elif (interval := gap_interval(by_name)) and interval[0] <= 0 <= interval[1]:
        clauses.append("the interval of the gap covered includes zero, so no effect of recurrence is established")
    return f"At window {recurrent['window']} " + "; ".join(filter(None, clauses)) + "."


def scored_rows(rows):
    """{name: row} of the rows with a loss and a perplexity."""
    return {row["name"]: row for row in rows if row.get("nats") is not None and row.get("token_ppl") is not None}


def change(baseline, recurrent, *parts):
    """'recurrence lowers token perplexity from A (...) to B', with the parts that are not empty."""
    before, after = perplexity(baseline), perplexity(recurrent)
    source = f"({row_label(baseline)})"
    if before == after:
        text = f"recurrence leaves token perplexity at {before} {source}"
    else:
        verb = "lowers" if recurrent["nats"] < baseline["nats"] else "raises"
        text = f"recurrence {verb} token perplexity from {before} {source} to {after}"
    return ", ".join([text, *filter(None, parts)])


def gap_part(by_name):
    """How far recurrence goes towards what overlapping windows gain, if they do gain."""
    if "finetuned_disjoint" not in by_name or "finetuned_overlap" not in by_name:
        return None
    overlap = perplexity(by_name["finetuned_overlap"])
    covered = gap_covered(by_name.values())
    if covered is None:
        return f"while overlapping windows gain nothing ({overlap})"
    interval = gap_interval(by_name)
    spread = " (95% interval {:z.0%} to {:z.0%})".format(*interval) if interval else ""
    return f"{covered:z.0%}{spread} of the way to overlapping windows ({overlap})"


def gap_interval(by_name):
    return by_name["recurrent"].get("gap_covered_interval")


def cost_part(baseline, recurrent):
    if not baseline.get("flops_per_token") or not recurrent.get("flops_per_token"):
        return None
    extra = recurrent["flops_per_token"] / baseline["flops_per_token"] - 1
    return f"at {abs(extra):.1%} {'more' if extra >= 0 else 'less'} computation a token"


def shuffled_clause(baseline, recurrent, shuffled):
    """What another document's state does: a gain that it keeps is no memory of the document."""
    if shuffled is None:
        return "another document's state was not tried"
    text = f"with another document's state it is {perplexity(shuffled)}"
    if perplexity(baseline) == perplexity(recurrent) or recurrent["nats"] > baseline["nats"]:
        return text
    kept = (baseline["nats"] - shuffled["nats"]) / (baseline["nats"] - recurrent["nats"])
    if kept <= 0:
        return f"{text}, which keeps none of the gain"
    return f"{text}, which keeps {kept:.0%} of the gain" + (", so most of it is no memory" if kept > 0.5 else "")


def perplexity(row):
    return f"{row['token_ppl']:,.2f}"


def gap_covered(rows):
    """(finetuned_disjoint - recurrent) / (finetuned_disjoint - finetuned_overlap), in nats.

    0 is as good as windows apart, 1 as good as overlapping windows; below 0 recurrence loses. None where a row is
    missing, and where overlapping windows gain nothing, for there is no gap then.
    """
    nats = {name: row["nats"] for name, row in scored_rows(rows).items()}
    if not {"finetuned_disjoint", "finetuned_overlap", "recurrent"} <= nats.keys():
        return None
    gap = nats["finetuned_disjoint"] - nats["finetuned_overlap"]
    return (nats["finetuned_disjoint"] - nats["recurrent"]) / gap if gap > 0 else None
