import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from recur_gpt2.budget.sweep.plots import (
    HEIGHT,
    METHOD_STYLES,
    PICTURES,
    draw_lines,
    first_of_windows,
    fronts_of_windows,
    pareto_front,
    staircase,
    write_plots,
)
from recur_gpt2.evaluation.plots import DPI, WIDTH, new_figure
from recur_gpt2.evaluation.protocols import BLUE

SETTINGS = {"model": "models/gpt2", "data": "pg19", "task": "score"}
FILES = sorted(f"{name}{suffix}.png" for name in PICTURES for suffix in ("", "@2x"))
GAINS = dict(zip(METHOD_STYLES, (0.0, 0.08, 0.05, 0.11, -0.05, 0.02), strict=True))
POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12)
MEBI = 2**20


def make_point(method, window, mebibytes, **changed):
    nats = 3.6 - GAINS[method] - 0.05 * math.log2(window / 64)
    return {
        "kind": "point",
        "method": method,
        "window": window,
        "status": "ok",
        "peak_memory_bytes": mebibytes * MEBI,
        "flops_per_token": (2 if METHOD_STYLES[method].doubled else 1) * (20e6 + 4e3 * window),
        "tokens_per_second": 5.0 * mebibytes,
        "nats": nats,
        "token_ppl": math.exp(nats),
        **changed,
    }


def make_length(method, length, mebibytes, **changed):
    row = {"kind": "length", "method": method, "window": 256, "length": length, "status": "ok"}
    return row | {"peak_memory_bytes": mebibytes * MEBI, **changed}


def make_rows(methods=tuple(METHOD_STYLES)):
    points = [make_point(m, w, w + b) for m in methods for w in (64, 256, 1024) for b in (100, 200, 900)]
    return points + [make_length(m, n, 300) for m in methods for n in (1024, 4096, 2**18)]


def drawn(name, rows):
    """The axes of one picture, not saved."""
    _, (axes,) = new_figure(height=HEIGHT)
    assert PICTURES[name][0](axes, rows)
    return axes


def line_of(axes, method, *, dots=False):
    """The places of a method's line, or of its dots."""
    style = METHOD_STYLES[method]
    kind = "None" if dots else style.line
    (line,) = (line for line in axes.lines if (line.get_color(), line.get_linestyle()) == (style.color, kind))
    return [tuple(place) for place in line.get_xydata().tolist()]


def texts(axes):
    return [text.get_text().replace("\n", " ").replace("\N{NO-BREAK SPACE}", " ") for text in axes.texts]


def overlapping(boxes):
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


def test_every_picture_is_written_at_two_resolutions(tmp_path):
    write_plots(make_rows(), SETTINGS, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    for name in PICTURES:
        small, large = (imread(tmp_path / f"{name}{suffix}.png") for suffix in ("", "@2x"))
        assert small.shape[:2] == (HEIGHT * DPI, WIDTH * DPI)
        assert large.shape[:2] == (2 * HEIGHT * DPI, 2 * WIDTH * DPI)
        assert (small[..., :3].min(axis=2) < 0.5).mean() > 0.005


@pytest.fixture
def saved(monkeypatch):
    """The figures given to savefig, by title; nothing is rendered."""
    figures = {}

    def savefig(self, path, **_):
        path.write_bytes(b"")
        figures[self.get_suptitle()] = self

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_what_was_not_measured_is_said_in_the_picture(tmp_path, saved):
    failed = [{"kind": "point", "status": "failed"}, {"kind": "length", "status": "out of memory"}, {}]
    unscored = make_point("recurrent", 256, 100, nats=None, token_ppl=None, tokens_per_second=None)
    write_plots([*failed, unscored], {}, tmp_path)
    assert len(saved) == len(PICTURES)
    assert all(texts(figure.axes[0]) == ["not measured in this run"] for figure in saved.values())


def test_titles_name_the_model_and_the_data(tmp_path, saved):
    write_plots(make_rows(), SETTINGS, tmp_path)
    assert sorted(saved) == sorted(f"{title}, gpt2 on pg19" for _, title in PICTURES.values())


def test_nothing_is_cut_off_and_no_labels_of_lines_overlap(tmp_path, saved):
    write_plots(make_rows(), SETTINGS, tmp_path)
    for figure in saved.values():
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= figure.get_figwidth()
        assert box.y1 <= figure.get_figheight()
        labels = [text for text in figure.axes[0].texts if not text.get_text().isdigit()]
        assert len(labels) == len(METHOD_STYLES)
        # Text's extent: an annotation's own holds its leader line too.
        assert not overlapping([Text.get_window_extent(label) for label in labels])


def test_windows_are_written_apart_from_each_other():
    for name in ("perplexity_memory", "perplexity_flops"):
        axes = drawn(name, make_rows(["disjoint", "overlap", "recurrent"]))
        axes.figure.draw_without_rendering()
        numbers = [text for text in axes.texts if text.get_text().isdigit()]
        assert sorted(text.get_text() for text in numbers) == sorted(3 * ["64", "256", "1024"])
        assert not overlapping([Text.get_window_extent(text) for text in numbers])


def test_every_scored_window_is_a_dot_and_each_method_a_line_through_its_best():
    rows = [
        make_point("recurrent", 64, 100, token_ppl=30.0),
        make_point("recurrent", 256, 300, token_ppl=25.0),
        make_point("recurrent", 256, 200, token_ppl=25.0),
        make_point("recurrent", 1024, 400, token_ppl=26.0),
        make_point("overlap", 256, 150, token_ppl=27.0),
        make_point("overlap", 256, 120, nats=None),
        make_point("overlap", 256, 130, peak_memory_bytes=None),
        make_point("overlap", 256, 110, status="out of memory"),
    ]
    axes = drawn("perplexity_memory", rows)
    assert line_of(axes, "recurrent", dots=True) == [(100, 30), (200, 25), (400, 26)]
    assert line_of(axes, "recurrent") == [(100, 30), (200, 30), (200, 25), (420, 25)]
    assert line_of(axes, "overlap", dots=True) == [(150, 27)]
    assert line_of(axes, "overlap") == [(150, 27), (420, 27)]
    best = axes.lines[0].get_xydata().tolist()
    assert best == [[100, 30], [150, 30], [150, 27], [200, 27], [200, 25], [420, 25]]


def test_computation_has_one_dot_for_a_method_and_window():
    axes = drawn("perplexity_flops", make_rows(["recurrent"]))
    assert [x for x, _ in line_of(axes, "recurrent", dots=True)] == pytest.approx([20.256, 21.024, 24.096])


def test_speed_is_that_of_the_fastest_point_of_a_window():
    axes = drawn("speed_window", make_rows(["overlap", "t2r"]))
    assert [line.get_xydata().tolist() for line in axes.lines] == 2 * [[[64, 4820], [256, 5780], [1024, 9620]]]
    assert sorted(texts(axes)) == ["overlap (2x compute)", "t2r"]
    assert axes.get_ylim()[0] == 0


def test_memory_by_length_leaves_out_what_failed_and_sorts_the_rest():
    rows = [make_length("recurrent", n, m) for n, m in ((4096, 301), (1024, 300))]
    rows += [make_length("recurrent", 2**20, 0, status="out of memory", peak_memory_bytes=None)]
    axes = drawn("memory_length", rows)
    assert axes.lines[0].get_xydata().tolist() == [[1024, 300], [4096, 301]]
    assert texts(axes) == ["recurrent, window 256"]
    assert axes.get_ylim()[0] == 0


def test_methods_that_compute_twice_are_dashed_and_hollow():
    axes = drawn("speed_window", make_rows())
    dashed = {line.get_color() for line in axes.lines if line.get_linestyle() == "--"}
    assert dashed == {METHOD_STYLES[m].color for m in ("overlap", "recurrent+overlap")}
    assert BLUE in dashed
    assert all((line.get_linestyle() == "--") == (line.get_markerfacecolor() == "white") for line in axes.lines)


def test_no_two_methods_look_alike():
    looks = {(style.color, style.line) for style in METHOD_STYLES.values()}
    assert len(looks) == len(METHOD_STYLES)


def test_labels_of_many_lines_all_fit():
    figure, (axes,) = new_figure(height=HEIGHT)
    draw_lines(axes, {(m, w): {1: 300.0, 2: 300.0} for m in METHOD_STYLES for w in (64, 256, 1024)})
    figure.draw_without_rendering()
    boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)
    assert len(boxes) == 18
    assert all(lower.y1 <= upper.y0 for lower, upper in pairwise(boxes))
    assert boxes[0].y0 >= 0


@pytest.mark.parametrize("most", [110, 200, 1000, 60_000])
def test_the_memory_axis_has_ticks_however_far_it_reaches(most):
    axes = drawn("perplexity_memory", [make_point("recurrent", w, m) for w, m in ((64, 100), (256, most))])
    low, high = axes.get_xlim()
    shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert 1 <= len(shown) <= 12


@given(POINTS)
def test_the_front_holds_what_no_other_point_is_as_good_as_for_no_more(points):
    def beaten(one):
        return any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in points)

    assert pareto_front(points) == sorted({point for point in points if not beaten(point)})


@given(POINTS.filter(bool))
def test_the_staircase_is_the_best_loss_at_no_more_cost(points):
    corners = staircase(pareto_front(points), 20)
    assert corners[0][0] == min(cost for cost, _ in points)
    assert corners[-1][0] == 20
    for (start, loss), (end, same) in zip(corners[::2], corners[1::2], strict=True):
        assert loss == same
        for budget in range(start, end):
            assert loss == min(loss for cost, loss in points if cost <= budget)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from([64, 128])), max_size=9))
def test_a_window_is_written_once_at_its_cheapest_dot(places):
    chosen = first_of_windows(places)
    assert sorted(window for *_, window in chosen) == sorted({window for *_, window in places})
    assert all(place == min(other for other in places if other[2] == place[2]) for place in chosen)


def test_a_window_has_another_dot_only_where_more_memory_is_better():
    places = [(64, 110, 3.3), (64, 100, 3.3), (64, 120, 3.1), (64, 130, 3.2), (128, 100, 4.0)]
    points = [make_point("recurrent", w, m, nats=n) for w, m, n in places]
    assert fronts_of_windows(points, "peak_memory_bytes") == [points[1], points[4], points[2]]
