"""A memory-budget sweep in words: who predicts better at the same cost, tables of every point, and their folder.

Rows are of one task, for memory and speed compare within a task only. It measures nothing: every number is a row's,
or a difference of two with its bootstrap interval. The pictures are `sweep_plots`.
"""

import csv
import io
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from ...evaluation.evaluate import resample
from ...evaluation.plots import source_line
from ...evaluation.protocols import PROTOCOLS
from ...evaluation.report import INTERVAL_NOTE, MEBI, MISSING, NUMBERS, bullets, cell, pipe_table
from ...utils.files import atomic_write_text
from .plots import PICTURES, measured, scored, write_plots

SIDES = {
    "plain": ("disjoint", "overlap"),  # GPT-2, nothing carried
    "recurrent": ("recurrent", "recurrent+overlap", "recurrent+t2r"),
}  # t2r alone is on neither side: linear attention, nothing carried


@dataclass(frozen=True)
class Cost:
    """What a budget is a budget of, and how it is written."""

    name: str
    unit: str
    size: float
    form: str

    def text(self, value):
        return format(value / self.size, self.form)


COSTS = {
    "peak_memory_bytes": Cost("peak memory", "MiB", MEBI, ",.1f"),
    "flops_per_token": Cost("forward computation", "MFLOPs/token", 1e6, ",.2f"),
}
TABLE_NOTE = (
    "A level is a budget at which either best point changes; a row holds up to the next row's. The difference is"
    " recurrent minus plain, negative where recurrence is the better one; its 95% interval is a paired bootstrap over"
    " documents."
)


def frontier(rows, budgets, cost):
    """For each budget the best plain and the best recurrent point that cost no more, and their difference.

    Args:
        cost: a key of COSTS; `budgets` are in its plain units, bytes or FLOPs.

    Returns:
        A dictionary for each budget: "cost" and "budget" as given, "plain" and "recurrent" (rows, or None),
        "difference" (nats/token, recurrent minus plain, or None) and "interval" of it (or None).
    """
    points = scored(rows, cost)
    return [compare(points, budget, cost) for budget in budgets]


def compare(points, budget, cost):
    best = {side: best_within(points, methods, budget, cost) for side, methods in SIDES.items()}
    paired = all(best.values())
    return {
        "cost": cost,
        "budget": budget,
        **best,
        "difference": best["recurrent"]["nats"] - best["plain"]["nats"] if paired else None,
        "interval": difference_interval(best["recurrent"], best["plain"]) if paired else None,
    }


def best_within(points, methods, budget, cost):
    """The point of fewest nats, the cheapest of equal ones; None where nothing costs so little."""
    affordable = [row for row in points if row["method"] in methods and row[cost] <= budget]
    return min(affordable, key=lambda row: (row["nats"], row[cost]), default=None)


def difference_interval(one, other):
    """95% bootstrap interval over documents of `one`'s nats/token minus `other`'s; None if not of the same tokens.

    None for a single document too: drawn again it is always the same, which would pass for certainty.
    """
    keys = ("document_tokens", "document_nats")
    (tokens, nats), (other_tokens, other_nats) = ([row.get(key) for key in keys] for row in (one, other))
    if not (tokens and nats and other_nats) or len(tokens) < 2 or tokens != other_tokens:
        return None
    gaps, counts = np.subtract(nats, other_nats), np.array(tokens)
    draws = resample(len(counts))
    means = gaps[draws].sum(axis=1) / counts[draws].sum(axis=1)
    return [float(q) for q in np.quantile(means, [0.025, 0.975])]


def levels(rows, cost):
    """The costs of all scored points, ascending: between two of them no side's best changes.

    So `frontier(rows, levels(rows, cost), cost)` is the comparison at every budget from the smallest up.
    """
    return sorted({row[cost] for row in scored(rows, cost)})


def changes(compared):
    """Of `frontier` rows, those whose pair of best points is not that of the row before."""
    return [next(same) for _, same in groupby(compared, key=lambda row: (row["plain"], row["recurrent"]))]


def verdict(compared):
    """One or two sentences on `frontier` rows: how often recurrence is the better side, and where it is not."""
    with_plain = [row for row in compared if row["plain"]]
    if not with_plain:
        return "There is no scored plain point at any of these levels, so there is nothing to compare with."
    cost = COSTS[compared[0]["cost"]]
    paired = [row for row in with_plain if row["recurrent"]]
    below = [row for row in paired if row["difference"] < 0]
    text = (
        f"The best recurrent point has fewer nats/token than the best plain one at {len(below)} of the"
        f" {count(with_plain, 'level')} of {cost.name} at which there is a plain point"
    )
    text += f"; {exclusion(below)}" if below else ""
    clauses = [
        absence([row for row in with_plain if not row["recurrent"]], compared, cost),
        defeat([row for row in paired if row["difference"] >= 0], cost),
    ]
    rest = "; ".join(filter(None, clauses))
    return f"{text}." + (f" Elsewhere, {rest}." if rest else "")


def exclusion(rows):
    """At how many of the rows the difference is established, and at how many that is not known."""
    known = [row["interval"] for row in rows if row["interval"]]
    clear = sum(low > 0 or high < 0 for low, high in known)
    unknown = f" and is not known at {len(rows) - len(known)}" if len(known) < len(rows) else ""
    return f"the 95% interval of the difference excludes zero at {clear} of these {len(rows)}{unknown}"


def absence(missing, compared, cost):
    """Where no recurrent point costs so little, and what the first one takes."""
    if not missing:
        return None
    first = min((row["budget"] for row in compared if row["recurrent"]), default=None)
    start = "and there is none at more" if first is None else f"the first level with one is {cost.text(first)}"
    return f"there is no recurrent point at {count(missing, 'level')} ({extent(missing, cost)} {cost.unit}; {start})"


def defeat(lost, cost):
    """Where the plain point is as good or better, and which one it is."""
    if not lost:
        return None
    rivals = ", ".join(dict.fromkeys(point_name(row["plain"]) for row in lost))
    where = f"{count(lost, 'level')} ({extent(lost, cost)} {cost.unit}, against {rivals})"
    return f"the recurrent point has as many nats/token or more at {where}; {exclusion(lost)}"


def point_name(point):
    return f"{point['method']}, window {point['window']}"


def extent(rows, cost):
    budgets = [row["budget"] for row in rows]
    return " to ".join(dict.fromkeys(cost.text(end) for end in (min(budgets), max(budgets))))


def count(items, noun):
    return f"{len(items):,} {noun}{'' if len(items) == 1 else 's'}"


READ_TWICE = {name for name, protocol in PROTOCOLS.items() if protocol.passes == 2}  # methods are called as these


def write_report(rows, settings, folder):
    """Write results.csv, report.md and the pictures to `folder`, each file whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "results.csv", csv_text(rows))
    atomic_write_text(folder / "report.md", markdown_report(rows, settings))
    write_plots(rows, settings, folder)


def csv_text(rows):
    """One flat line a row, whatever its kind: settings as columns of their own, no array of documents."""
    lines = [flat(row) for row in rows]
    columns = dict.fromkeys(key for line in lines for key in line)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def flat(row):
    low, high = row.get("nats_interval") or (None, None)
    nested = ("settings", "nats_interval", "document_nats", "document_tokens")
    line = {key: value for key, value in row.items() if key not in nested}
    return line | (row.get("settings") or {}) | {"nats_low": low, "nats_high": high}


def markdown_report(rows, settings):
    """report.md: what was swept, who wins at which cost, the points, the pictures, and how to make it again."""
    settings = dict(settings)
    command, machine = settings.pop("command", None), settings.pop("machine", None) or {}
    parts = [f"# Memory-budget sweep: {source_line(settings)}", swept(rows, settings)]
    for name, some, cost in contests(rows):
        parts += comparison(name, some, cost)
    parts += [
        "## Points",
        points_table(measured(rows, "point")),
        INTERVAL_NOTE,
        *(f"![{title}]({name}.png)" for name, (_, title) in PICTURES.items()),
        "## Not measured",
        unmeasured(rows),
        "## Settings",
        bullets(settings),
        "## Machine",
        bullets(machine),
    ]
    if command:
        parts += ["## Command", f"```\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def swept(rows, settings):
    """What was tried and how each attempt ended; in several goes, maybe, and so by the rows."""
    tried = [row for row in rows if row.get("kind") == "point"]
    listed = {key: ", ".join(map(str, distinct(tried, key))) for key in ("method", "window")}
    budgets = ", ".join(f"{budget / MEBI:,.10g}" for budget in sorted(distinct(tried, "budget_bytes")))
    ends = {}
    for kind in ("point", "length"):
        of_kind = [row for row in rows if row.get("kind") == kind]
        statuses = Counter(status(row) for row in of_kind)
        ends[kind] = ", ".join(f"{number:,} {name}" for name, number in statuses.items()) or "none"
    return (
        f"Task {settings.get('task', 'unknown')}; methods {listed['method'] or 'none'}; windows"
        f" {listed['window'] or 'none'}; memory budgets {budgets or 'none'} MiB."
        f" Points: {ends['point']}. Documents of a given length: {ends['length']}."
    )


def verdicts(rows):
    """What the report says of each cost, a line each."""
    return "\n".join(f"By {name}: {verdict(everywhere(some, cost))}" for name, some, cost in contests(rows))


def contests(rows):
    """(name, rows, cost) of what is compared. Overlapping windows take no more memory than others and twice the
    computation: by memory the methods that compute every token once are compared among themselves too."""
    once = [row for row in rows if row.get("method") not in READ_TWICE]
    all_of_them = [(kind.name, rows, cost) for cost, kind in COSTS.items()]
    if len(once) == len(rows):
        return all_of_them
    cost = "peak_memory_bytes"
    return [*all_of_them, (f"{COSTS[cost].name}, without overlapping windows", once, cost)]


def everywhere(rows, cost):
    """The comparison at every budget from the smallest up, a row for each at which it changes."""
    return changes(frontier(rows, levels(rows, cost), cost))


def distinct(rows, key):
    """The values of a key, in the order in which they first come."""
    return list(dict.fromkeys(row[key] for row in rows if row.get(key) is not None))


def comparison(name, rows, cost):
    """The section of one comparison: verdict, table of its frontier, what the table says."""
    compared = everywhere(rows, cost)
    kind = COSTS[cost]
    columns = {f"{kind.name} from ({kind.unit})": lambda row: kind.text(row["budget"])}
    for side in SIDES:
        columns |= {
            f"best {side}": side_cell(side, point_name),
            f"{side} token ppl": side_cell(side, NUMBERS["token ppl"]),
        }
    columns |= {"difference (nats/token)": cell("difference", "+.4f"), "95% interval": difference_cell}
    return [f"## By {name}", verdict(compared), pipe_table(columns, compared), TABLE_NOTE]


def side_cell(side, text):
    return lambda row: text(row[side]) if row[side] else MISSING


def difference_cell(row):
    return "{:+.4f} to {:+.4f}".format(*row["interval"]) if row["interval"] else MISSING


def points_table(points):
    """The measured points; of the settings those that differ between them, of the numbers those that any has."""
    named = {"point": point_name, "budget MiB": cell("budget_bytes", ",.0f", unit=MEBI)}
    numbers = NUMBERS | {
        "predicted MiB": cell("predicted_memory_bytes", ",.0f", unit=MEBI),
        "training MFLOPs/token": cell("training_flops_per_token", ",.1f", unit=1e6),
    }
    filled = {head: text for head, text in numbers.items() if any(text(row) != MISSING for row in points)}
    return pipe_table(named | varying_settings(points) | filled, points)


def varying_settings(points):
    keys = dict.fromkeys(key for row in points for key in row.get("settings") or {})
    columns = {key: lambda row, key=key: str((row.get("settings") or {}).get(key, MISSING)) for key in keys}
    return {key: text for key, text in columns.items() if len({text(row) for row in points}) > 1}


def unmeasured(rows):
    """Every row that has no result or no score, and why."""
    lines = [f"- {attempt(row)}: {status(row)}{reason(row)}" for row in rows if row.get("status") != "ok"]
    lines += [f"- {attempt(row)}: measured, not scored ({row['unscored']})" for row in rows if "unscored" in row]
    return "\n".join(lines) or "Everything that was tried was measured."


def attempt(row):
    """'recurrent, window 256, 512 MiB', of what the row has."""
    forms = {"method": "{}", "window": "window {}", "length": "{:,} tokens"}
    parts = [form.format(row[key]) for key, form in forms.items() if row.get(key) is not None]
    parts += [f"{row['budget_bytes'] / MEBI:,.10g} MiB"] if row.get("budget_bytes") is not None else []
    return ", ".join(parts) or str(row.get("id", "a row without a name"))


def status(row):
    return row.get("status") or "no status"


def reason(row):
    """On one line, for a list."""
    return f" ({' '.join(row['reason'].split())})" if row.get("reason") else ""
