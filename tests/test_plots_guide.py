"""The guide's figures draw what they are given, and every branch has its place in the tree."""

import numpy as np
import pandas as pd
from matplotlib.text import Text

from convlab import plots


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_the_tree_holds_every_question_and_answer():
    steps = [(f"Is it {n}?", f"kind {n}", f"do {n}", f"such as {n}") for n in range(3)]
    figure = plots.tree(steps, ("the rest", "do that", "all others"), "note")
    found = texts(figure)
    for step in steps:
        assert set(step) <= set(found)
    assert {"the rest", "do that", "all others", "note"} <= set(found)
    assert found.count("yes") == found.count("no") == 3


def test_no_text_of_the_tree_leaves_the_picture():
    long = "a sentence of some length that has to be broken into lines " * 2
    figure = plots.tree([(long, "kind", long, long)], ("rest", long, long), "note")
    figure.canvas.draw()
    axis = figure.axes[0].get_window_extent()
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert box.x0 >= axis.x0
        assert box.x1 <= axis.x1


def test_gains_are_bars_from_one():
    frame = pd.DataFrame(
        {
            "ratio": [8.0, 0.5, np.nan],
            "ratio_low": [7, 0.4, np.nan],
            "ratio_high": [9, 0.6, np.nan],
        },
        index=["a", "b", "c"],
    )
    figure = plots.gains({"time": frame, "memory": frame[["ratio"]]}, "t", "n")
    for axis in figure.axes:
        assert [text.get_text() for text in axis.texts] == ["8×", "0.5×", "not measured"]
        assert [bar.get_width() for bar in axis.patches] == [7, -0.5]
        low, high = axis.get_xlim()
        assert low < 0.5
        assert high > 9
        colours = [bar.get_facecolor() for bar in axis.patches]
        assert colours[0] != colours[1]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["a", "b", "c"]


def test_a_bar_ends_at_the_floor_and_says_its_number():
    frame = pd.DataFrame({"ratio": [0.001, 2.0]}, index=["a", "b"])
    axis = plots.gains({"time": frame}, "t", "n", floor=0.1).axes[0]
    assert [text.get_text() for text in axis.texts] == ["0.001×", "2×"]
    assert axis.patches[0].get_width() == 0.1 - 1


def test_the_forms_have_colours():
    assert {"flex_conv2d", "by_definition"} <= plots.COLOURS.keys()
    assert len(set(plots.COLOURS.values())) == len(plots.COLOURS)
