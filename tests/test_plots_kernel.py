"""The figures on the kernel draw the numbers they are given."""

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb

from convlab import cost, pictures, plots


def texts(axis):
    return [text.get_text() for text in axis.texts]


def lines_of(axis, marker="None"):
    """(x, y) of the lines with this marker."""
    found = [line for line in axis.lines if line.get_marker() == marker]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in found]


def test_traffic_has_a_panel_per_column_and_writes_the_values():
    frame = pd.DataFrame({"a": [1.0, 20.0], "b": [300.0, 4.0]}, ["one", "two"])
    figure = plots.traffic(frame, "title", "note", "for one value")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["a", "b"]
    for axis, (_, column) in zip(figure.axes, frame.items(), strict=True):
        assert [bar.get_width() for bar in axis.patches] == list(column)
        assert texts(axis) == [f"{value:.3g}" for value in column]
        assert axis.get_xscale() == "linear"
        assert axis.get_xlabel() == "for one value"
        assert axis.get_xlim()[0] == 0
        assert axis.get_xlim()[1] > column.max()
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["one", "two"]


def test_waste_draws_lines_and_dots():
    computed = pd.DataFrame({"flattened": [0.5, 0.25], "by tap": [0.75, 0.5]}, [1, 2])
    figure = plots.waste(computed, computed.loc[[2]], "title", "note")
    (axis,) = figure.axes
    assert lines_of(axis) == [([1, 2], [0.5, 0.25]), ([1, 2], [0.75, 0.5])]
    assert lines_of(axis, "o") == [([2], [0.25]), ([2], [0.5])]
    figure = plots.waste(computed, pd.DataFrame(columns=computed.columns), "title", "note")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["flattened, computed", "by tap, computed"]


def test_the_roof_is_the_smaller_of_arithmetic_and_memory():
    roofs = {"fp32": cost.Ceilings(1e12, 1e11), "bf16": cost.Ceilings(4e12, 1e11)}
    columns = ["algorithm", "format", "intensity", "flops_per_second"]
    rows = [("native", "fp32", 5.0, 4e11), ("thread", "bf16", 20.0, 1e12)]
    figure = plots.roofline(roofs, pd.DataFrame(rows, columns=columns), "title", "note")
    (axis,) = figure.axes
    for (x, y), roof in zip(lines_of(axis), roofs.values(), strict=True):
        assert y == pytest.approx([min(roof.flops_per_second, v * 1e11) for v in x])
    assert (lines_of(axis, "o"), lines_of(axis, "s")) == ([([5.0], [4e11])], [([20.0], [1e12])])
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["roof, fp32", "roof, bf16", "fp32", "bf16", "native", "thread"]


def test_above_floor_has_a_mark_per_time():
    frame = pd.DataFrame(
        {"native": [1.5, 2.0], "native, NHWC": [1.2, np.nan], "thread": [9.0, 8.0]}, ["p", "q"]
    )
    figure = plots.above_floor({"fp32": frame, "bf16": frame.iloc[:, :2]}, "title", "note")
    first, second = figure.axes
    marked = [line for line in first.lines if line.get_marker() != "None"]
    marks = [(*line.get_xdata(), *line.get_ydata()) for line in marked]
    assert [x for x, _ in marks] == [1.5, 1.2, 9.0, 2.0, 8.0]
    heights = [y for _, y in marks]
    assert [round(y) for y in heights] == [0, 0, 0, 1, 1]
    assert heights[0] < heights[1] < heights[2], "marks of one row do not cover each other"
    assert [y - 1 for y in heights[3:]] == pytest.approx([heights[0], heights[2]])
    colours = [to_rgb(plots.COLOURS[n]) for n in ("native", "native_channels_last", "thread")]
    assert [to_rgb(line.get_color()) for line in marked[:3]] == colours
    assert len([line for line in second.lines if line.get_marker() != "None"]) == 3
    assert [t.get_text() for t in first.get_yticklabels()] == ["p", "q"]
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == list(frame.columns)


def test_above_floor_names_every_row_by_its_own_problem():
    panels = {
        "TF32": pd.DataFrame({"native": [2.0, 3.0]}, ["p", "q"]),
        "fp32": pd.DataFrame({"native": [4.0, 5.0]}, ["q", "r"]),
    }
    figure = plots.above_floor(panels, "title", "note")
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["p", "q", "r"]
    marks = lines_of(figure.axes[1], "o")
    assert [(x, round(y)) for (x,), (y,) in marks] == [(4.0, 1), (5.0, 2)]


def test_touched_pixels_show_their_counts_and_the_tile():
    counts = torch.tensor([[0.0, 2.0, 1.0], [3.0, 4.0, 0.0]])
    figure = pictures.touched({"a": counts, "b": counts}, [(0, 1), (1, 1)])
    for ax in figure.axes:
        assert texts(ax) == ["0", "2", "1", "3", "4", "0"]
        assert len(ax.lines) == 6, "the sides of a rectangle of two pixels, one line per pixel"
    assert [ax.get_title() for ax in figure.axes] == ["a", "b"]


@pytest.mark.parametrize(
    ("channels", "depth", "flattened", "by_tap"), [(10, 16, 96, 144), (16, 16, 144, 144)]
)
def test_the_reduction_marks_every_empty_lane(channels, depth, flattened, by_tap):
    figure = pictures.reduction(channels, 9, depth, 16)
    for ax, lanes in zip(figure.axes, (flattened, by_tap), strict=True):
        shown = ax.images[0].get_array()
        assert shown.size == lanes
        assert len(texts(ax)) == lanes - 9 * channels == int(np.ma.count_masked(shown))
        assert f"{lanes} for {9 * channels}" in ax.get_title()
