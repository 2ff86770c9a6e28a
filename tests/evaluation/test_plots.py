import math
import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from recur_gpt2.evaluation.plots import (
    DPI,
    LABEL_GAP,
    ROW_STYLES,
    WIDTH,
    plot_loss_by_position,
    plot_protocols,
    plot_training,
    position_bins,
    running_mean,
    spread,
)

PLOTS = [plot_protocols, plot_loss_by_position, plot_training]
NATS = dict(zip(ROW_STYLES, (3.61, 3.50, 3.45, 3.34, 3.40, 3.32, 3.46, 3.47), strict=True))
WINDOW = 64


def results(names=tuple(ROW_STYLES)):
    fall = 3 * np.arange(1, WINDOW + 1) ** -0.5
    steps = range(1, 101)
    curve = [{"step": s, "tokens": 1000 * s, "loss": 3 + 1 / s, "tokens_per_second": 9.0} for s in steps]
    return {
        "rows": [
            {"name": n, "token_ppl": math.exp(NATS[n]), "nats_interval": [NATS[n] - 0.05, NATS[n] + 0.05]}
            for n in names
        ],
        "settings": {"window": WINDOW, "model": "models/gpt2", "data": "pg19"},
        "loss_by_position": {n: (NATS[n] + fall).tolist() for n in names if "overlap" not in n},
        "training": {"recurrent": curve, "disjoint": [record | {"loss": record["loss"] + 0.1} for record in curve]},
    }


@pytest.fixture
def saved(monkeypatch):
    """The figures that were saved, to look inside."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


def settings():
    """matplotlib's, less the backend: to read it is to choose it."""
    return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}


def texts(axes):
    return [text.get_text().replace("\n", " ") for text in axes.texts]


@pytest.mark.parametrize("plot", PLOTS)
def test_a_png_of_the_right_size_that_is_not_blank(plot, tmp_path, saved):
    plot(results(), tmp_path / "a.png")
    image = imread(tmp_path / "a.png")
    assert image.shape[1] == WIDTH * DPI
    assert image.shape[0] == pytest.approx(saved[0].get_figheight() * DPI, abs=1)
    assert (image[..., :3].min(axis=2) < 0.5).mean() > 0.005
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("plot", PLOTS)
def test_nothing_is_cut_off(plot, tmp_path, saved):
    plot(results(), tmp_path / "a.png")
    figure = saved[0]
    box = figure.get_tightbbox()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= figure.get_figwidth()
    assert box.y1 <= figure.get_figheight()


@pytest.mark.parametrize("plot", PLOTS)
def test_labels_do_not_overlap(plot, tmp_path, saved):
    plot(results(), tmp_path / "a.png")
    # Text's extent: an annotation's own holds its leader line too.
    boxes = sorted((Text.get_window_extent(text) for text in saved[0].axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) > 1
    assert all(lower.y1 <= upper.y0 for lower, upper in pairwise(boxes))


@pytest.mark.parametrize("plot", PLOTS)
def test_the_title_names_window_model_and_data(plot, tmp_path, saved):
    plot(results(), tmp_path / "a.png")
    assert saved[0].get_suptitle().endswith(", window 64, gpt2 on pg19")


@pytest.mark.parametrize("plot", PLOTS)
def test_what_was_not_measured_is_said_in_the_picture(plot, tmp_path, saved):
    plot({"rows": [], "loss_by_position": {"recurrent": None}, "training": {"disjoint": []}}, tmp_path / "a.png")
    assert texts(saved[0].axes[0]) == ["not measured in this run"]


@pytest.mark.parametrize("plot", PLOTS)
def test_a_failed_save_leaves_the_old_picture_and_no_temporary(plot, tmp_path, monkeypatch):
    def fail(self, path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    (tmp_path / "a.png").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        plot(results(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_global_matplotlib_state_stays_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it is an error now
    before = settings()
    for plot in PLOTS:
        plot(results(), tmp_path / "a.png")
    assert settings() == before


def test_protocols_are_drawn_in_order_with_their_values(tmp_path, saved):
    shuffled = results(["recurrent_shuffled", "recurrent", "finetuned_disjoint", "base_overlap"])
    plot_protocols(shuffled, tmp_path / "a.png")
    axes = saved[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "GPT-2, overlapping windows (2x compute)",
        "finetuned, windows apart",
        "with recurrence",
        "with recurrence, another document's state",
    ]
    assert texts(axes) == ["33.12", "31.50", "29.96", "32.14"]
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first row is uppermost


def test_a_row_without_interval_or_perplexity_is_drawn_without_it(tmp_path, saved):
    given = results(["base_disjoint", "recurrent", "recurrent_zeroed"])
    del given["rows"][0]["nats_interval"]
    given["rows"][1]["token_ppl"] = None
    given["rows"][2]["token_ppl"] = math.nan
    plot_protocols(given, tmp_path / "a.png")
    assert texts(saved[0].axes[0]) == ["36.97"]


def test_loss_by_position_shows_differences_from_the_control(tmp_path, saved):
    given = results()
    given["loss_by_position"]["finetuned_overlap"] = given["loss_by_position"]["finetuned_disjoint"][WINDOW // 2 :]
    plot_loss_by_position(given, tmp_path / "a.png")
    losses, differences = saved[0].axes
    assert sorted(texts(losses)) == [
        "finetuned, overlapping windows (2x compute)",
        "finetuned, windows apart",
        "with recurrence",
        "with recurrence, state removed",
    ]
    control, overlap, recurrent, zeroed = (line.get_ydata() for line in differences.lines)
    assert np.allclose(control, 0)
    assert np.allclose(overlap, 0)
    assert np.allclose(recurrent, -0.05)
    assert np.allclose(zeroed, 0.01)
    assert min(differences.lines[1].get_xdata()) > WINDOW // 2
    assert "finetuned, windows apart" in differences.get_ylabel()


def test_without_the_finetuned_control_gpt2_as_it_is_stands_in(tmp_path, saved):
    plot_loss_by_position(results(["base_disjoint", "recurrent"]), tmp_path / "a.png")
    losses, differences = saved[0].axes
    assert sorted(texts(losses)) == ["GPT-2, windows apart", "with recurrence"]
    assert "GPT-2, windows apart" in differences.get_ylabel()


def test_position_bins_hold_every_scored_position_once():
    losses = np.random.default_rng(0).normal(size=256)
    losses[0] = np.nan
    positions, means = position_bins(losses, window=256)
    assert positions[0] == 2
    assert means[0] == losses[1]
    last = np.arange(1, 257) > 256 * 2**-0.25
    assert means[-1] == pytest.approx(losses[last].mean())
    assert np.all(np.diff(positions) > 0)


def test_a_shorter_array_stands_for_the_last_positions():
    positions, means = position_bins(np.arange(4.0), window=8, per_octave=100)
    assert positions == pytest.approx([5, 6, 7, 8])
    assert means == pytest.approx([0, 1, 2, 3])


def test_training_shows_the_raw_and_the_smoothed_loss_of_both_runs(tmp_path, saved):
    plot_training(results(), tmp_path / "a.png")
    axes = saved[0].axes[0]
    raw, smooth, raw_control, smooth_control = (line.get_ydata() for line in axes.lines)
    assert np.allclose(raw, 3 + 1 / np.arange(1, 101))
    assert np.allclose(smooth, running_mean(raw, reach=2))
    assert np.allclose(raw_control - raw, 0.1)
    assert np.allclose(smooth_control - smooth, 0.1)
    assert axes.lines[0].get_xdata()[-1] == 100_000
    assert texts(axes) == ["with recurrence", "finetuned, windows apart"]


def test_running_mean_narrows_at_the_ends_and_keeps_single_values():
    assert running_mean(np.array([1.0, 2, 3, 10]), reach=1) == pytest.approx([1.5, 2, 5, 6.5])
    assert running_mean(np.array([7.0]), reach=0) == pytest.approx([7])


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([0.2, 0.8], [0.2, 0.8]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.0, 0.0, 0.9], [0.0, 0.1, 0.9]),
        ([0.3, 1.0, 1.0], [0.3, 0.9, 1.0]),
        ([], []),
    ],
    ids=["apart", "together", "at the bottom", "at the top", "none"],
)
def test_spread_moves_only_labels_that_would_overlap(heights, expected):
    assert spread(heights, gap=0.1) == pytest.approx(expected)


def test_five_equal_ends_still_fit_the_axes():
    placed = spread([0.02] * 5, gap=LABEL_GAP)
    assert placed[0] >= 0
    assert np.diff(placed) == pytest.approx([LABEL_GAP] * 4)
