"""The figures of `plots.basics` draw what they are given."""

import pytest

from convlab import plots
from convlab.pitfalls import Contrast


def drawn(contrasts, **options):
    """Bars, lines, arrows (marker and place) and labels of `plots.errors`."""
    (axes,) = plots.errors(contrasts, "title", "a machine", **options).axes
    bars = [bar.get_width() for bar in axes.patches]
    lines = [c.get_segments()[0][:, 0].tolist() for c in axes.collections]
    arrows = {(n.get_marker(), n.get_xdata()[0], n.get_ydata()[0]) for n in axes.lines}
    arrows = {arrow for arrow in arrows if arrow[0] in "<>"}
    return bars, lines, arrows, [text.get_text() for text in axes.texts]


def contrast(*factors):
    return Contrast(factors, (1.0,) * len(factors))


def test_an_error_is_a_bar_from_one_to_its_factor_with_its_spread():
    bars, lines, arrows, labels = drawn({"a": contrast(2, 3, 4), "b": contrast(0.4, 0.5, 0.6)})
    assert bars == [2, -0.5]
    assert lines == [[2, 4], [0.4, 0.6]]
    assert arrows == set()
    assert labels == ["3", "0.5"]


def test_what_passes_the_limit_is_cut_and_ends_in_an_arrow():
    contrasts = {
        "far below": contrast(1e-4, 1e-3, 2e-3),
        "far above": contrast(1e3, 1e4),
        "its line only": contrast(0.001, 0.1, 0.5),
    }
    bars, lines, arrows, labels = drawn(contrasts, limit=100)
    assert bars == pytest.approx([-0.99, 99, -0.9])
    assert lines == [[0.01, 0.5]], "a bar that is cut has no line"
    assert arrows == {("<", 0.01, 0), (">", 100, 1), ("<", 0.01, 2)}
    assert labels == ["1/1,000", "5,500", "0.1"]


def test_a_spread_around_one_is_noise_unless_it_is_the_error():
    contrasts = {"a": contrast(0.9, 1.0, 1.5), "b": contrast(0.9, 1.0, 1.5), "c": contrast(2.0)}
    labels = drawn(contrasts, either_way=["a", "c"])[-1]
    assert labels == ["1, either way", "1, within the noise", "2"]


def test_the_axis_of_errors_has_fractions_below_one():
    figure = plots.errors({"a": contrast(0.001), "b": contrast(50.0)}, "title", "a machine", 2000)
    labels = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert {"1/100", "1/10", "1", "10"} <= set(labels)
