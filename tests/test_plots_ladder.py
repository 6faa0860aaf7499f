"""The figures of `plots.ladder` draw what they are given."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from convlab import plots
from convlab.experiments.named import LADDER
from convlab.peers import PEERS

NAMES = ["native", "thread", "unfold"]


@pytest.fixture
def table():
    """Three algorithms; nn.Conv2d is the fastest, `unfold` the smallest."""
    time = np.array([1e-3, 4e-3, 2e-3])
    return pd.DataFrame(
        {
            "time": time,
            "time_low": time * 0.9,
            "time_high": time * 1.1,
            "ratio": time / 1e-3,
            "memory": [2e6, 8e6, 1e6],
        },
        index=NAMES,
    )


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_every_algorithm_has_a_colour_of_its_own_and_peers_are_grey():
    colours = [plots.COLOURS[name] for name in LADDER]
    assert len(set(colours)) == len(LADDER)
    for name in LADDER:
        red, green, blue = to_rgb(plots.COLOURS[name])
        assert (red == green == blue) == (name in PEERS or name == "auto"), name


def test_rungs_writes_time_ratio_and_memory_beside_each_bar(table):
    figure = plots.rungs({"a": table, "b": table.drop("thread")}, {"a": 5e-4, "b": 5e-4}, "t", "n")
    first, second = figure.axes
    assert texts(first) == ["1 ms   1×   2 MB", "4 ms   4×   8 MB", "2 ms   2×   1 MB", " floor"]
    assert "no time" in texts(second), "what only the other panel has"
    assert [bar.get_width() for bar in first.patches] == [1e-3, 4e-3, 2e-3]
    assert [bar.get_facecolor()[:3] for bar in first.patches] == [
        to_rgb(plots.COLOURS[name]) for name in NAMES
    ]
    assert [tick.get_text() for tick in first.get_yticklabels()] == NAMES
    assert [line.get_xdata()[0] for line in first.lines] == [5e-4]


def test_front_is_what_no_other_beats_in_both():
    points = np.array([[1, 4], [2, 2], [3, 3], [4, 1], [5, 1]], float)
    assert plots.front(points) == [0, 1, 3]
    assert plots.front(points[:0]) == []


def test_trade_labels_every_point_inside_and_apart():
    rng = np.random.default_rng(0)
    values = {"ratio": np.exp(rng.normal(0, 1, len(LADDER)))}
    values["memory"] = 1e6 * np.exp(rng.normal(0, 1, len(LADDER)))
    crowd = pd.DataFrame(values, index=LADDER)
    crowd.loc["winograd"] = np.nan
    figure = plots.trade({"a": crowd, "b": crowd}, {"a": 0.1, "b": 0.1}, "title", "note")
    figure.canvas.draw()
    for axis in figure.axes:
        labels = {text.get_text(): text for text in axis.texts if text.get_text() in LADDER}
        assert labels.keys() == set(LADDER) - {"winograd"}
        boxes = [Text.get_window_extent(text) for text in labels.values()]
        inside = axis.get_window_extent()
        assert all(inside.count_overlaps([box]) and inside.containsx(box.x0) for box in boxes)
        for a, b in itertools.combinations(boxes, 2):
            assert plots.ladder._common(a, b) <= 5, "square pixels; the layout moves a little"


def test_trade_rings_the_front_and_names_its_lines(table):
    figure = plots.trade({"a": table, "b": table}, {"a": 0.5, "b": 0.5}, "t", "n")
    axis = figure.axes[0]
    (rings,) = [line for line in axis.lines if line.get_markersize() > 10]
    assert rings.get_xdata().tolist() == [1, 2], "nn.Conv2d, and what is slower and smaller"
    assert {" floor", " nn.Conv2d's time"} <= set(texts(axis))


def test_labels_of_points_in_one_place_do_not_meet():
    taken, inside, point = [], Bbox.from_bounds(0, 0, 400, 350), np.array([200.0, 175.0])
    for _ in LADDER:
        box, _ = plots.ladder._place(point, 60, 11, taken, inside, 1)
        assert not any(plots.ladder._common(box, other) for other in taken)
        taken.append(box)


def test_ladder_map_frames_the_best_of_those_named_and_says_why_there_is_no_ratio():
    ratios = pd.DataFrame(
        [[4.0, 2.0, 0.5], [100.0, np.nan, 0.25]],
        index=["p", "q"],
        columns=["thread", "fft", "auto"],
    )
    words = {"forward": pd.DataFrame("–", ratios.index, ratios.columns)}
    words["forward"].loc["q", "fft"] = "M"
    figure = plots.ladder_map({"forward": ratios}, "t", "n", framed=["thread", "fft"], words=words)
    (axis,) = figure.axes
    assert texts(axis) == ["4", "2", "0.5", "100", "M", "0.25"]
    assert [frame.get_xy() for frame in axis.patches] == [(1, 0), (0, 1)]
    assert axis.collections[0].get_clim() == (-3, 3)
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["p", "q"]


def test_dumbbells_join_two_settings_and_write_their_factor():
    pair = pd.DataFrame({"as called": [4.0, 2.0, np.nan], "kept": [1.0, 2.0, np.nan]}, NAMES)
    figure = plots.dumbbells({"forward": pair}, ("as called", "kept"), "t", "n")
    (axis,) = figure.axes
    assert texts(axis) == ["4×", "1×", "no time"], "fastest first, in the second setting"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["as called", "kept"]


def test_versus_draws_a_row_per_problem_and_a_marker_per_table():
    rows = {"value": [0.5, 2.0], "low": [0.4, 1.5], "high": [0.6, 2.5], "text": ["a / b", "c / d"]}
    forward = pd.DataFrame(rows, index=["p", "q"])
    training = forward.drop("q").drop(columns="text")
    figure = plots.versus({"forward": forward, "training": training}, "label", "t", "n")
    (axis,) = figure.axes
    assert texts(axis) == ["0.5×  a / b", "2×  c / d", "0.5×  "]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["p", "q"]
    spans = [c.get_segments()[0][:, 0].tolist() for c in axis.collections]
    assert spans == [[0.4, 0.6], [1.5, 2.5], [0.4, 0.6]]


def test_at_a_time_marks_a_number_of_images_in_every_panel():
    frame = pd.DataFrame({"algorithm": "windows", "images": [1, 2, 4], "time": [3.0, 2.0, 4.0]})
    frame["memory"] = 1e6
    quantities = {"time": "time", "memory": "memory"}
    figure = plots.at_a_time(frame, quantities, "t", "n", {"the cache": 2})
    assert [axis.lines[-1].get_xdata()[0] for axis in figure.axes] == [2, 2]
    assert "Dashed: the cache. n" in [text.get_text() for text in figure.texts]
