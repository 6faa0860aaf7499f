"""The figures of the library: every variant and layer is drawn, and nothing wrong gets a bar."""

import matplotlib
import pandas as pd
import pytest

from convlab import plots

matplotlib.use("Agg")


def texts(axis):
    return [text.get_text() for text in axis.texts]


@pytest.fixture
def times():
    return pd.DataFrame(
        {
            "ratio": [1.0, 0.5, 40.0],
            "ratio_low": [1.0, 0.4, 35.0],
            "ratio_high": [1.0, 0.6, 41.0],
            "median": [2e-3, 1e-3, 0.08],
        },
        index=["as called", "channels last", "thread"],
    )


def test_switches_show_time_beside_error(times, recwarn):
    errors = pd.Series({"as called": 1e-7, "channels last": 2e-7, "broken": 0.3, "thread": 0.0})
    missing = {"broken": "wrong: no time"}
    panels = {"inference": times, "training": times}
    figure = plots.switches(panels, errors, "Title", "machine, date", missing)
    left, middle, right = figure.axes
    assert left.get_title(loc="left") == "inference"
    assert middle.get_title(loc="left") == "training"
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels == ["as called", "channels last", "broken", "the thread's layer"]
    assert len(left.patches) == 3, "what has no time has no bar"
    assert texts(left) == ["1×  2 ms", "0.5×  1 ms", "wrong: no time", "40×  80 ms"]
    assert texts(right) == ["1e-07", "2e-07", "3e-01"]
    assert not recwarn.list


def test_labels_of_the_switches_end_inside_their_panels(times):
    times["ratio"], times["median"] = [1.0, 0.752, 23.1], [704e-6, 530e-6, 0.0162]
    times["ratio_low"], times["ratio_high"] = [1.0, 0.75, 22.9], [1.0, 0.76, 24.0]
    times.index = ["as called", "channels last", "bf16, channels last, padded, benchmark"]
    errors = pd.Series([1e-7, 5e-3, 4e-7], times.index)
    figure = plots.switches({"a": times, "b": times}, errors, "Title", "note")
    figure.canvas.draw()
    for axis in figure.axes:
        edge = axis.bbox.x1
        assert [t.get_text() for t in axis.texts if t.get_window_extent().x1 > edge] == []


def test_no_label_of_an_axis_of_ratios_lies_at_the_edge_of_its_panel(times):
    panels = {"a": times.assign(ratio_high=11.7), "b": times.assign(ratio_high=5.8)}
    figure = plots.ratio_bars(panels, "Title", "note", "as called")
    for axis in figure.axes:
        ticks, right = axis.get_xticks(), axis.get_xlim()[1]
        labels = axis.xaxis.get_major_formatter().format_ticks(ticks)
        shown = [x for x, text in zip(ticks, labels, strict=True) if text]
        assert shown[0] == 0
        assert right / 2 < shown[-1] < 0.94 * right


def test_switches_where_nothing_has_a_known_error(times, recwarn):
    errors = pd.Series({name: None for name in times.index}, dtype=float)
    figure = plots.switches({"inference": times}, errors, "Title", "note")
    assert texts(figure.axes[-1]) == []
    assert not recwarn.list


def test_variants_have_the_colours_of_their_algorithms():
    colours = {
        "as called": "native",
        "bf16, channels last": "native_channels_last",
        "TF32 off, library off": "native_no_library",
        "thread": "thread",
    }
    for name, algorithm in colours.items():
        assert plots.variant_colour(name) == plots.COLOURS[algorithm]


@pytest.mark.parametrize("networks", [1, 2, 3])
def test_the_map_has_every_layer_of_every_network(networks, recwarn):
    frame = pd.DataFrame(
        {
            "network": f"net{n}",
            "kind": kind,
            "channels": 2**i,
            "algorithm": algorithm,
            "ratio": 2.0,
            "ratio_low": 1.5,
            "ratio_high": 2.5,
        }
        for n in range(networks)
        for i, kind in enumerate(plots.KINDS, 6)
        for algorithm in ("native_no_library", "thread")
    )
    figure = plots.layer_map(frame, "channels", "channels", "Title", "note")
    panels = [axis for axis in figure.axes if axis.get_title(loc="left")]
    assert [axis.get_title(loc="left") for axis in panels] == [f"net{n}" for n in range(networks)]
    for axis in panels:
        assert len(axis.containers) == 2 * len(plots.KINDS)
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["library off", "the thread's layer", *plots.KINDS]
    assert not recwarn.list


def test_whole_networks_have_one_bar_per_algorithm_and_pass(recwarn):
    frame = pd.DataFrame(
        {
            "pass": pass_,
            "network": network,
            "algorithm": algorithm,
            "median": 0.5,
            "ratio": ratio,
            "ratio_low": ratio / 1.1,
            "ratio_high": ratio * 1.1,
        }
        for pass_ in ("inference", "training")
        for network in ("a", "b")
        for algorithm, ratio in (("native_no_library", 0.8), ("thread", 6.0))
    )
    figure = plots.network_bars(frame, "Title", "note")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["inference", "training"]
    for axis in figure.axes:
        assert texts(axis) == ["0.8×  500 ms", "6×  500 ms"] * 2
    assert not recwarn.list
