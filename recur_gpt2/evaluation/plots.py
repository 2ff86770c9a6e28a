"""Pictures of the main job's results, from the dictionary that it writes to results.json.

Each function takes that dictionary and a path, and writes one PNG, whole or not at all. Figures are made without
pyplot, so that a caller's figures, backend and settings stay as they are. Nothing is computed here but bin means.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, StrMethodFormatter

from ..utils.files import atomic_path, name_of
from .horizons import WHOLE
from .protocols import ROWS

DPI = 150
WIDTH = 9.0  # inches
LABEL_GAP = 0.12  # least distance of two labels at line ends (two lines each), as a share of the axes' height


@dataclass(frozen=True)
class RowStyle:
    """How a row of the results is called and drawn; `line` is used where rows are lines, not dots."""

    label: str
    color: str
    line: str = "-"
    doubled: bool = False  # overlapping windows, at twice the computation


ROW_STYLES = {
    name: RowStyle(row.label, row.color, row.protocol.line, doubled=row.protocol.passes == 2)
    for name, row in ROWS.items()
}


def plot_protocols(results, path):
    """Token perplexity of every row: a dot, its 95% interval over documents and its value."""
    rows = {row["name"]: row for row in results["rows"] if is_number(row.get("token_ppl"))}
    names = [name for name in ROW_STYLES if name in rows]
    figure, (axes,) = new_figure(height=1.6 + 0.42 * max(len(names), 2))
    for height, name in enumerate(names):
        draw_row(axes, height, rows[name], ROW_STYLES[name])
    axes.set_yticks(range(len(names)), [ROW_STYLES[name].label for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first row on top
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.12)  # room for the value beside the last interval
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("token perplexity (lower is better); lines: 95% interval over documents")
    finish(figure, f"Token perplexity, {setting_line(results)}", path, drawn=bool(names))


def draw_row(axes, height, row, style):
    value = row["token_ppl"]
    low, high = (math.exp(nats) for nats in row["nats_interval"]) if row.get("nats_interval") else (value, value)
    axes.plot([low, high], [height, height], color=style.color, linewidth=1.5, alpha=0.6)
    face = "white" if style.doubled else style.color
    axes.plot([value], [height], "o", color=style.color, markerfacecolor=face, markersize=7)
    axes.annotate(f"{value:.2f}", (max(value, high), height), (6, 0), textcoords="offset points", va="center_baseline")


def plot_loss_by_position(results, path):
    """Mean loss by position in the window, and below it the difference that each row makes to the control's.

    Where in the window a memory helps: the loss falls so far over a window that only differences show it.
    """
    losses = {name: np.array(v, dtype=float) for name, v in results.get("loss_by_position", {}).items()}
    losses = {name: values for name, values in losses.items() if np.isfinite(values).any()}  # None and [] have none
    control = "finetuned_disjoint" if "finetuned_disjoint" in losses else "base_disjoint"
    names = [n for n in (control, "finetuned_overlap", "recurrent", "recurrent_zeroed") if n in losses]
    window = max((len(losses[name]) for name in names), default=0)
    figure, (axes, below) = new_figure(height=7.0, height_ratios=(3, 2))
    ends = [draw_positions(axes, name, losses[name], window) for name in names]
    if control in names:
        for name in names:
            draw_positions(below, name, losses[name] - losses[control][-len(losses[name]) :], window)
    below.set_xscale("log", base=2)
    below.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    label_ends(axes, ends)
    below.set_xlabel("position in the window (tokens, the first is 1; means over bins)")
    axes.set_ylabel("loss (nats per token)")
    below.set_ylabel(f"difference from\n{ROW_STYLES[control].label}\n(nats per token)")
    finish(figure, f"Loss by position, {setting_line(results)}", path, drawn=bool(names))


def draw_positions(axes, name, losses, window):
    """Draw a row's bin means; returns what `label_ends` wants of the line."""
    positions, means = position_bins(losses, window=window)
    style = ROW_STYLES[name]
    axes.plot(positions, means, style.line, color=style.color, linewidth=1.8)
    return style.label, style.color, positions[-1], means[-1]


def position_bins(losses, *, window, per_octave=4):
    """Losses at the last len(losses) positions of a window -> bin centres and bin means, bins evenly spaced in log2.

    A protocol that overlaps windows scores their later part only, hence the last positions. NaN stands for a
    position that was never scored.
    """
    positions = np.arange(window - len(losses), window) + 1
    scored = np.isfinite(losses)
    losses, positions = losses[scored], positions[scored]
    bins = np.ceil(np.log2(positions) * per_octave)
    groups = [bins == bin for bin in np.unique(bins)]
    centres = np.array([np.exp(np.log(positions[group]).mean()) for group in groups])
    return centres, np.array([losses[group].mean() for group in groups])


def plot_training(results, path):
    """Training loss against tokens seen: faint as it was, and smoothed."""
    styles = {"recurrent": ROW_STYLES["recurrent"], "disjoint": ROW_STYLES["finetuned_disjoint"]}
    training = results.get("training", {})
    figure, (axes,) = new_figure(height=5.0)
    ends = []
    for name, style in styles.items():
        if records := [record for record in training.get(name, ()) if "loss" in record]:  # not attention transfer
            tokens = [record["tokens"] for record in records]
            losses = np.array([record["loss"] for record in records], dtype=float)
            smooth = running_mean(losses, reach=len(losses) // 40)
            axes.plot(tokens, losses, color=style.color, linewidth=0.8, alpha=0.25)
            axes.plot(tokens, smooth, color=style.color, linewidth=1.8)
            ends.append((style.label, style.color, tokens[-1], smooth[-1]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    label_ends(axes, ends)
    axes.set_xlabel("training tokens seen")
    axes.set_ylabel("training loss (nats per token)")
    finish(figure, f"Training loss, {setting_line(results)}", path, drawn=bool(ends))


def plot_horizons(results, path):
    """What a state of the last h windows alone costs, against the whole document's, with intervals over documents."""
    rows = [row for row in results.get("horizons", ()) if row["horizon"] != WHOLE]
    figure, (axes,) = new_figure(height=4.5)
    places = range(len(rows))
    behind = [row["behind_whole"] for row in rows]
    spread = [
        [value - row["behind_whole_interval"][0], row["behind_whole_interval"][1] - value]
        for value, row in zip(behind, rows, strict=True)
    ]
    style = ROW_STYLES["recurrent"]
    axes.errorbar(
        places, behind, np.abs(np.transpose(spread)) if rows else None, fmt="-o", color=style.color, capsize=3
    )
    for place, value in zip(places, behind, strict=True):
        axes.annotate(f"{value:.3f}", (place, value), (8, 4), textcoords="offset points")
    axes.set_xticks(places, [row["horizon"] for row in rows])
    axes.axhline(0, color="0.5", linewidth=1)
    axes.set_xlabel("windows that the state is built from; lines: 95% interval over documents")
    axes.set_ylabel("nats a token behind the\nstate of the whole document")
    finish(figure, f"How far back the memory reaches, {setting_line(results)}", path, drawn=bool(rows))


def running_mean(values, *, reach):
    """Mean over up to `reach` neighbours on each side; fewer where the values end."""
    return np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))])


def new_figure(*, height, height_ratios=(1,)):
    """A figure and its panels, one above the other with one x axis."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(height_ratios), sharex=True, squeeze=False, height_ratios=height_ratios)[:, 0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    return figure, panels


def finish(figure, title, path, *, drawn):
    """Title and save; say so in the picture where there was nothing to draw."""
    if not drawn:
        axes = figure.axes[0]
        axes.text(0.5, 0.5, "not measured in this run", transform=axes.transAxes, ha="center", va="center")
    figure.suptitle(title, fontsize=12)
    save(figure, path)


def save(figure, path, *, dpi=DPI):
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def label_ends(axes, ends):
    """Write each line's label right of the axes at the height of its end, moved where two would overlap.

    `ends` holds (label, color, x, y) of every line. Call it once the lines are drawn: it reads the y limits.
    """
    ends = sorted(ends, key=lambda end: end[3])
    low, high = axes.get_ylim()
    gap = min(LABEL_GAP, 1 / max(1, len(ends) - 1))  # many labels: all of them within the axes
    heights = spread([(y - low) / (high - low) for *_, y in ends], gap=gap)
    for (label, color, x, y), height in zip(ends, heights, strict=True):
        leader = {"arrowstyle": "-", "color": color, "shrinkA": 2, "shrinkB": 2, "relpos": (0, 0.5)}
        place = {"xytext": (1.04, height), "textcoords": "axes fraction", "va": "center", "annotation_clip": False}
        axes.annotate(fill(label, 24), (x, y), arrowprops=leader, **place)


def spread(heights, *, gap):
    """Ascending shares of the axes' height, moved so that neighbours are `gap` apart and none leaves the axes.

    As little as can be, in least squares: less the gaps, the heights have only to ascend, which is isotonic
    regression, here in its max-min form.
    """
    steps = gap * np.arange(len(heights))
    free = np.array(heights) - steps
    count = len(free)
    placed = [max(min(free[j : k + 1].mean() for k in range(i, count)) for j in range(i + 1)) for i in range(count)]
    return np.clip(placed, 0, 1 - gap * (count - 1)) + steps


def setting_line(results):
    """'window 256, gpt2 on pg19': what a picture's title says of the run, as far as the settings tell."""
    settings = results.get("settings", {})
    window = f"window {settings.get('window', 'unknown')}"
    return f"{window}, {source_line(settings)}"


def source_line(settings):
    """'gpt2 on pg19'."""
    model, data = (name_of(Path(str(settings.get(key, f"unknown {key}"))).name) for key in ("model", "data"))
    return f"{model} on {data}"


def is_number(value):
    return value is not None and math.isfinite(value)
