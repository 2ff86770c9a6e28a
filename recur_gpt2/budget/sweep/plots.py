"""Pictures of a memory-budget sweep, from the rows that it wrote: what quality, memory, computation and speed go with.

Rows are of one task. Nothing is measured here, and nothing is compared in words: that is `sweep_report`. Points that
did not fit or failed have nothing to draw. Intervals over documents are left out on purpose: they hold mostly what
documents differ in, which all points share.
"""

import math
from itertools import pairwise
from pathlib import Path

from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from ...evaluation.plots import DPI, RowStyle, finish, is_number, label_ends, new_figure, save, source_line
from ...evaluation.protocols import BLACK, BLUE, PURPLE, VERMILLION
from ...evaluation.report import MEBI

ORANGE = "#E69F00"  # Okabe and Ito's too, the neighbour of vermillion
HEIGHT = 5.5  # inches
MEGA = 1e6
FIXED_SPACE = "\N{NO-BREAK SPACE}"  # a label's line does not end here
TWICE = f"(2x{FIXED_SPACE}compute)"
METHOD_STYLES = {
    "disjoint": RowStyle("disjoint", BLACK),
    "overlap": RowStyle(f"overlap {TWICE}", BLUE, "--", doubled=True),
    "recurrent": RowStyle("recurrent", VERMILLION),
    "recurrent+overlap": RowStyle(f"recurrent+overlap {TWICE}", VERMILLION, "--", doubled=True),
    "t2r": RowStyle("t2r", PURPLE),
    "recurrent+t2r": RowStyle("recurrent+t2r", ORANGE),
}
# Where a dot's text may stand, in points from the dot, best first.
PLACES = [(0, 9), (0, -9), (12, 8), (-12, 8), (12, -8), (-12, -8), (14, 0), (-14, 0), (0, 18), (0, -18)]


def write_plots(rows, settings, folder):
    """Write each picture to `folder` twice: NAME.png, and NAME@2x.png with twice the pixels."""
    folder, source = Path(folder), source_line(settings)
    for name, (draw, title) in PICTURES.items():
        figure, (axes,) = new_figure(height=HEIGHT)
        drawn = draw(axes, rows)
        finish(figure, f"{title}, {source}", folder / f"{name}.png", drawn=drawn)
        save(figure, folder / f"{name}@2x.png", dpi=2 * DPI)


def draw_perplexity_memory(axes, rows):
    axes.set_xlabel("peak memory (MiB), the least of each window; the number at a dot is its window")
    return draw_perplexity(axes, scored(rows, "peak_memory_bytes"), "peak_memory_bytes", MEBI)


def draw_perplexity_flops(axes, rows):
    axes.set_xlabel("forward computation (MFLOPs per token); the number at a dot is its window")
    return draw_perplexity(axes, scored(rows, "flops_per_token"), "flops_per_token", MEGA)


def draw_perplexity(axes, points, cost, unit):
    """A dot for every window, a staircase for every method and, behind, that of all together.

    More lanes cost memory and buy speed, which is not drawn here: a window has a second dot only where that is better.
    Returns whether there was anything to draw, as every function here that draws a picture.
    """
    axes.set_ylabel("token perplexity (lower is better)")
    places = {method: [] for method in METHOD_STYLES}
    for row in fronts_of_windows(points, cost):
        if row["method"] in places:
            places[row["method"]].append((row[cost] / unit, row["token_ppl"], row["window"]))
    everywhere = [place[:2] for each in places.values() for place in each]
    if not everywhere:
        return False
    left, right = min(everywhere)[0], 1.05 * max(everywhere)[0]
    log_axis(axes, octaves=math.log2(right / left))
    steps = zip(*staircase(pareto_front(everywhere), right), strict=True)
    axes.plot(*steps, color="0.85", linewidth=9, zorder=1, label="the best of all methods at no more cost")
    axes.legend(loc="upper right", frameon=False)
    ends = [draw_method(axes, method, places[method], right) for method in METHOD_STYLES if places[method]]
    axes.margins(y=0.08)
    axes.set_xlim(right=right)
    label_ends(axes, ends)
    label_windows(axes, places)
    return True


def draw_method(axes, method, places, right):
    """A method's dots and staircase; returns what `label_ends` wants of the line."""
    style = METHOD_STYLES[method]
    steps = staircase(pareto_front(place[:2] for place in places), right)
    axes.plot(*zip(*steps, strict=True), style.line, color=style.color, linewidth=1.5)
    xs, ys, _ = zip(*places, strict=True)
    axes.plot(xs, ys, marker(method), color=style.color, markerfacecolor=face(style), markersize=6, zorder=3)
    return style.label, style.color, *steps[-1]


def label_windows(axes, places):
    """Write each window of a method at its cheapest dot, where it covers the fewest dots and texts, then lines."""
    axes.figure.draw_without_rendering()  # so that the axes have the size that they will have
    reach = 4 * axes.figure.dpi / 72  # half a dot
    lines = [axes.transData.transform(line.get_xydata()) for line in axes.lines if line.get_linestyle() != "None"]
    steps = [Bbox(ends) for line in lines for ends in pairwise(line)]
    dots = axes.transData.transform([place[:2] for each in places.values() for place in each])
    taken = [Bbox([dot - reach, dot + reach]) for dot in dots]
    halo = [withStroke(linewidth=2.5, foreground="white")]  # for where no place is free of lines
    for method, of_method in places.items():
        look = {"color": METHOD_STYLES[method].color, "fontsize": 8, "path_effects": halo, "zorder": 4}
        for x, y, window in first_of_windows(of_method):
            place = {"textcoords": "offset points", "ha": "center", "va": "center"}
            text = axes.annotate(str(window), (x, y), PLACES[0], **place, **look)
            taken.append(settle(text, taken, steps))


def settle(text, taken, lines):
    """Move the text to the first of the places that cover least; returns the box that it takes there."""

    def box(place):
        text.set_position(place)
        return text.get_window_extent()

    boxes = {place: box(place) for place in PLACES}
    covered = {place: (each.count_overlaps(taken), each.count_overlaps(lines)) for place, each in boxes.items()}
    best = min(PLACES, key=covered.get)
    text.set_position(best)
    return boxes[best]


def draw_memory_length(axes, rows):
    axes.set_xlabel("length of the document (tokens)")
    axes.set_ylabel("peak memory (MiB)")
    lines = {}
    for row in measured(rows, "length"):
        if is_number(row.get("peak_memory_bytes")) and is_number(row.get("length")):
            line = lines.setdefault((row["method"], row["window"]), {})
            line[row["length"]] = row["peak_memory_bytes"] / MEBI
    return draw_lines(axes, lines)


def draw_speed_window(axes, rows):
    axes.set_xlabel("window (tokens)")
    axes.set_ylabel("speed (tokens/s, the fastest point of each window)")
    lines = {}
    for row in measured(rows, "point"):
        if is_number(row.get("tokens_per_second")):
            line = lines.setdefault((row["method"], None), {})
            line[row["window"]] = max(line.get(row["window"], 0), row["tokens_per_second"])
    return draw_lines(axes, lines)


def draw_lines(axes, lines):
    """{(method, window or None): {x: y}} as lines over log2 x, with y from zero so that flat looks flat."""
    keys = [key for method in METHOD_STYLES for key in lines if key[0] == method]
    if not keys:
        return False
    ends = []
    for method, window in keys:
        style = METHOD_STYLES[method]
        xs, ys = zip(*sorted(lines[method, window].items()), strict=True)
        look = {"marker": marker(method), "color": style.color, "markerfacecolor": face(style), "linewidth": 1.5}
        axes.plot(xs, ys, style.line, **look)
        label = style.label if window is None else f"{style.label}, window{FIXED_SPACE}{window}"
        ends.append((label, style.color, xs[-1], ys[-1]))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({x for key in keys for x in lines[key]}))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axes.figure.set_figheight(max(HEIGHT, 0.6 * len(ends)))  # room for every label
    label_ends(axes, ends)
    return True


def log_axis(axes, *, octaves):
    """Ticks at powers of two, and at the quarters between them where there are few powers."""
    axes.set_xscale("log", base=2)
    subs = (1, 1.25, 1.5, 1.75) if octaves < 3 else (1,)
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=subs, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))


def marker(method):
    return "s" if method.endswith("t2r") else "o"


def face(style):
    return "white" if style.doubled else style.color


def pareto_front(points):
    """The (cost, loss) that no other is as good as at no more cost: cost rises, loss falls.

    Of one method's points it is the lower envelope: the best loss at no more than a cost.
    """
    front = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def staircase(front, right):
    """The corners of a front's steps, the last one drawn out to `right`: more budget than the dearest is no loss."""
    ends = [*(cost for cost, _ in front[1:]), right]
    return [corner for (cost, loss), end in zip(front, ends, strict=True) for corner in ((cost, loss), (end, loss))]


def first_of_windows(places):
    """Of (x, y, window) the one with the least x of each window."""
    return list({window: (x, y, window) for x, y, window in sorted(places, reverse=True)}.values())


def fronts_of_windows(points, cost):
    """The points that have fewer nats than all others of their method and window at no more cost."""
    best, kept = {}, []
    for row in sorted(points, key=lambda row: (row[cost], row["nats"])):
        key = row["method"], row["window"]
        if row["nats"] < best.get(key, math.inf):
            best[key] = row["nats"]
            kept.append(row)
    return kept


def scored(rows, cost):
    """The points that were measured and scored and whose `cost` is known."""
    needed = ("nats", "token_ppl", cost)
    return [row for row in measured(rows, "point") if all(is_number(row.get(key)) for key in needed)]


def measured(rows, kind):
    """The rows of a kind that came to an end; one that failed may lack any key."""
    whole = {"method", "window"}
    return [row for row in rows if row.get("kind") == kind and row.get("status") == "ok" and row.keys() >= whole]


PICTURES = {
    "perplexity_memory": (draw_perplexity_memory, "Perplexity against peak memory"),
    "perplexity_flops": (draw_perplexity_flops, "Perplexity against computation"),
    "memory_length": (draw_memory_length, "Peak memory against document length"),
    "speed_window": (draw_speed_window, "Speed against window"),
}
