"""The figures of `plots.scaling` draw what they are given."""

import math

import numpy as np
import pandas as pd
import pytest

from convlab import plots

SIZES = [1, 2, 4, 8, 16]


@pytest.fixture
def frame():
    """Two algorithms: native with slope 1, the thread with slope 2 and a prediction of slope 1."""
    n = np.array(SIZES, float)
    tables = [
        pd.DataFrame({"algorithm": "native", "batch": SIZES, "time": n, "memory": 1e6}),
        pd.DataFrame({"algorithm": "thread", "batch": SIZES, "time": n**2, "memory": 1e6 * n}),
    ]
    tables[1]["time_predicted"] = n
    frame = pd.concat(tables, ignore_index=True).assign(ratio=n.tolist() * 2)
    return frame.assign(ratio_low=frame["ratio"] / 2, ratio_high=frame["ratio"] * 2)


def axes_with_lines(figure):
    return [axis for axis in figure.axes if axis.lines]


def legend_of(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


@pytest.mark.parametrize("exponent", [0, 0.5, 2])
def test_slope_is_the_exponent(exponent):
    x = np.array(SIZES, float)
    assert plots.slope(x, 3 * x**exponent) == pytest.approx(exponent)


def test_slope_is_that_of_the_upper_half_in_any_order():
    x = np.array([1, 2, 4, 8, 16, 32.0])
    y = np.where(x > 4, x**2, 64.0)
    assert plots.slope(x[::-1], y[::-1]) == pytest.approx(2)


def test_slope_leaves_out_what_was_not_measured():
    assert plots.slope([1, 2, 4], [1, 2, float("nan")]) == pytest.approx(1)
    assert math.isnan(plots.slope([1, 2], [1, float("nan")]))
    assert math.isnan(plots.slope([], []))


def test_scaling_has_a_row_per_quantity_and_a_column_per_frame(frame):
    quantities = {"time": "time", "ratio": "ratio"}
    figure = plots.scaling({"a": frame, "b": frame}, "batch", quantities, "title", "a machine")
    panels = axes_with_lines(figure)
    assert len(panels) == 4
    assert [axis.get_title("left") for axis in panels] == ["a", "b", "", ""]
    assert [axis.get_xlabel() for axis in panels] == ["", "", "a", "b"]
    assert [len(axis.collections) for axis in panels] == [0, 0, 2, 2], "bands of the ratio only"
    assert all(axis.get_xscale() == axis.get_yscale() == "log" for axis in panels)
    assert "a machine" in [text.get_text() for text in figure.texts]


def test_scaling_states_measured_and_predicted_slopes(frame):
    figure = plots.scaling({"": frame}, "batch", {"time": "t"}, "", "", slopes=["time"])
    (panel,) = axes_with_lines(figure)
    assert legend_of(panel) == ["native 1.00", "thread 2.00 (1.00)"]
    drawn = [line.get_ydata().tolist() for line in panel.lines]
    assert drawn == [SIZES, SIZES, [n**2 for n in SIZES]], "native, the prediction, the thread"


def test_the_legend_speaks_of_predictions_only_where_there_are_some(frame):
    plain = frame.drop(columns="time_predicted")
    titles = []
    for table in (frame, plain):
        figure = plots.scaling({"": table}, "batch", {"time": "t"}, "", "", slopes=["time"])
        (panel,) = axes_with_lines(figure)
        titles.append(panel.get_legend().get_title().get_text())
    assert titles == ["slope: measured (predicted)", "slope"]


def test_scaling_draws_a_setting_in_its_algorithms_colour_with_dashes(frame):
    again = frame.assign(algorithm=frame["algorithm"] + ", one thread")
    figure = plots.scaling({"": pd.concat([frame, again])}, "batch", {"memory": "m"}, "", "")
    (panel,) = axes_with_lines(figure)
    looks = [(line.get_label(), line.get_color(), line.get_linestyle()) for line in panel.lines]
    assert looks == [
        (f"{name}{setting}", plots.COLOURS[name], style)
        for setting, style in (("", "-"), (", one thread", "--"))
        for name in ("native", "thread")
    ]


def test_scaling_labels_no_tick_in_the_room_of_the_legend(frame):
    figure = plots.scaling({"": frame}, "batch", {"time": "t"}, "", "", slopes=["time"])
    (panel,) = axes_with_lines(figure)
    top = max(frame["time"])
    assert panel.get_ylim()[1] > 3 * top, "the room"
    ticks = [tick for tick in panel.get_yticks() if tick >= 1]
    assert 3 <= len(ticks) <= 10
    assert max(ticks) < 2 * top


def test_scaling_shades_a_band_and_survives_missing_values(frame):
    frame.loc[frame["batch"] == 16, ["time", "ratio"]] = float("nan")
    band = {"ratio": (2, 4, "claimed")}
    figure = plots.scaling({"": frame}, "batch", {"ratio": "r"}, "", "", bands=band)
    (panel,) = axes_with_lines(figure)
    assert [text.get_text() for text in panel.texts] == ["claimed"]
    assert panel.lines[0].get_xdata().tolist() == SIZES[:-1]


def test_heat_writes_every_ratio_on_one_scale_around_1():
    plane = pd.DataFrame([[0.5, 1], [4, float("nan")]], index=[1, 2], columns=[3, 4])
    figure = plots.heat({"a": plane, "b": plane * 2}, "title", "note")
    first, second, bar = figure.axes
    assert [axis.get_title("left") for axis in (first, second)] == ["a", "b"]
    assert [text.get_text() for text in first.texts] == ["0.5", "1", "4"]
    for axis in (first, second):
        assert axis.collections[0].get_clim() == (-3, 3), "8 is the largest ratio"
    assert bar.get_ylabel() == "time / nn.Conv2d's"
    text = bar.yaxis.get_major_formatter()
    assert [text(v) for v in (-4, -1, 0, 3)] == ["1/16×", "1/2×", "1×", "8×"]


def test_agreement_draws_a_point_per_row_and_the_diagonal(frame):
    table = frame[frame["algorithm"] == "thread"].assign(**{"pass": "forward"})
    more = table.assign(**{"pass": "train"})
    figure = plots.agreement(
        pd.concat([table, more]),
        "time_predicted",
        "time",
        "title",
        "note",
        x_label="counted",
        y_label="measured",
        within=0.05,
        forbidden="too fast",
    )
    axis, error = figure.axes
    diagonal, *points = axis.lines
    assert diagonal.get_xdata().tolist() == diagonal.get_ydata().tolist()
    assert [line.get_label() for line in points] == ["thread, forward", "thread, training"]
    assert points[0].get_ydata().tolist() == [n**2 for n in SIZES]
    assert [text.get_text() for text in axis.texts] == ["too fast"]
    assert error.lines[0].get_ydata().tolist() == [n - 1 for n in SIZES]


def test_budget_marks_what_was_not_started():
    table = pd.DataFrame({"algorithm": "thread", "kernel": [1, 3, 5]})
    table["counted"] = [1e8, 5e8, 2e9]
    table["measured"] = [1e8, 5e8, float("nan")]
    figure = plots.budget(table, "kernel", 1e9, "title", "note")
    (axis,) = figure.axes
    assert "budget 1 GB" in [text.get_text() for text in axis.texts]
    crosses = [line for line in axis.lines if line.get_marker() == "x" and len(line.get_xdata())]
    (missing,) = crosses
    assert (missing.get_xdata().tolist(), missing.get_ydata().tolist()) == ([5], [2e9])
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["thread, measured", "counted", "out of memory (predicted)"]
