"""The figures of `plots.training` draw what they are given."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from convlab import plots
from convlab.sameness import distances
from convlab.training import History

CURVES = {
    "native": [2.0, 1.0, 0.5],
    "native_no_library": [2.0, 1.0, 0.5001],
    "thread": [2.0, 1.00001, 0.5],
}


def test_loss_curves_show_the_losses_and_their_distances():
    found = distances({name: History(x, [0.9]) for name, x in CURVES.items()})
    figure = plots.loss_curves(CURVES, found, "title", "note", noise=["native_no_library"])
    left, right = figure.axes
    assert [line.get_ydata().tolist() for line in left.lines] == [*CURVES.values()]
    assert [line.get_color() for line in left.lines] == [plots.COLOURS[name] for name in CURVES]
    widths = [line.get_linewidth() for line in left.lines]
    assert widths == sorted(widths, reverse=True)
    np.testing.assert_allclose(right.lines[0].get_ydata(), [1e-9, 1e-9, 1e-4], rtol=1e-6)
    np.testing.assert_allclose(right.lines[1].get_ydata(), [1e-9, 1e-5, 1e-5], rtol=1e-6)
    assert (right.get_yscale(), len(right.collections)) == ("log", 1)
    assert left.get_title(loc="left") == "title"


def test_accuracy_dots_show_every_run_and_the_interval():
    runs = {"native": [0.98, 0.99], "unfold": [0.97]}
    intervals = {"native": (0.985, 0.98, 0.99), "unfold": (0.97, -np.inf, np.inf)}
    figure = plots.accuracy_dots(intervals, runs, "title", "note", least=0.97)
    (axes,) = figure.axes
    dots = [line.get_xdata() for line in axes.lines]
    assert [list(np.atleast_1d(x)) for x in dots] == [
        *([0.98, 0.99], [0.98, 0.99], [0.985], [0.97], [0.97], [0.97, 0.97])
    ]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["native", "unfold"]
    assert not axes.texts


def test_the_axis_of_accuracies_is_not_stretched_to_a_line_far_below():
    runs, intervals = {"native": [0.98, 1.0]}, {"native": (0.99, 0.97, 1.2)}
    (axes,) = plots.accuracy_dots(intervals, runs, "title", "note", least=0.5).axes
    low, high = axes.get_xlim()
    assert 0.96 < low < 0.97
    assert 1 < high < 1.01
    assert [text.get_text() for text in axes.texts] == ["← 50%"]


def test_step_parts_are_stacked_and_labelled():
    frame = pd.DataFrame(
        {"data": [1e-3, 1e-3], "forward": [1e-3, 4e-3], "backward": [2e-3, 7e-3]},
        index=["native", "thread"],
    )
    wholes = pd.DataFrame(
        {"seconds": [5e-3, 13e-3], "ratio": [1.0, 2.6]}, index=["native", "thread"]
    )
    figure = plots.step_parts({"a": frame, "b": frame[:1]}, {"a": wholes, "b": wholes}, "t", "n")
    first, second = figure.axes
    widths = [bar.get_width() for bar in first.patches]
    assert widths == pytest.approx([1e-3, 1e-3, 1e-3, 4e-3, 2e-3, 7e-3])
    starts = [bar.get_x() for bar in first.patches]
    assert starts == pytest.approx([0, 0, 1e-3, 1e-3, 2e-3, 5e-3])
    colours = {to_rgb(bar.get_facecolor()[:3]) for bar in first.patches}
    assert colours == {to_rgb(plots.PART_COLOURS[part]) for part in frame}
    assert [text.get_text() for text in first.texts] == [" 5 ms  1×", " 13 ms  2.6×"]
    assert [line.get_xdata()[0] for line in first.lines] == [5e-3, 13e-3]
    assert first.get_xlim()[1] > 13e-3
    assert len(second.patches) == 3
