"""The figures and folding rows of the verdicts show what the rules decided, for any machines."""

import base64
import functools
import html
import io
import itertools
import re
import warnings
from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from test_thread import REALISTIC, stages, steps, storage

from convlab import plots, thread
from convlab.plots import verdicts
from convlab.thread import DEPENDS, FAILS, HOLDS, INF, UNKNOWN, Interval, Verdict

matplotlib.use("Agg")

WHOLE = REALISTIC + stages(256)
MACHINES = {
    "first, cpu": WHOLE,
    "second <b>, cuda": [replace(r, device="cuda") for r in WHOLE],
    "third, cpu": steps(native=1, thread=6),
}


@functools.cache
def judged():
    """Machine → its twelve verdicts."""
    return {name: [found for _, found in thread.judge(rows)] for name, rows in MACHINES.items()}


def drawn(function, *args, **kwargs):
    """The figure, drawn with warnings as errors and closed, so that a notebook shows it once."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = function(*args, **kwargs)
        figure.canvas.draw()
    assert plt.get_fignums() == []
    return figure


def verdict(*figures, claimed=(2.0, 4.0), style="×"):
    found = [Interval(f"{i} images", *f) for i, f in enumerate(figures, 1)]
    reasons = {HOLDS: "Inside.", FAILS: "Outside."}
    return thread.decide(found, *claimed, reasons, style)


def texts(axes):
    return [text.get_text() for text in axes.texts]


# The figure behind a claim


@pytest.mark.parametrize("index", range(12), ids=[claim.id for claim in thread.CLAIMS])
@pytest.mark.parametrize("count", [1, 3])
def test_every_claim_has_a_figure_for_any_number_of_machines(index, count):
    found = {name: judged()[name][index] for name in list(MACHINES)[:count]}
    claim = thread.CLAIMS[index]
    marks = plots.thread_marks().get(claim.id, {})
    figure = drawn(plots.forest, found, verdicts.MEANINGS[claim.id], claim.text, "", marks)
    assert len(figure.axes) == count + bool(marks)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[bool(marks) :] == [f"{name}: {v.verdict}" for name, v in found.items()]
    for axes, v in zip(figure.axes[bool(marks) :], found.values(), strict=True):
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == [f.where for f in v.intervals]
        for text, f in zip(texts(axes) if v.intervals else [], v.intervals, strict=True):
            assert text.startswith(f.text(v.style))


def test_each_interval_says_on_which_side_it_lies():
    found = verdict((3, 2.5, 3.5), (5, 4.5, 5.5), (2, 1.5, 2.5))
    (axes,) = drawn(plots.forest, {"here": found}, "ratio", "title", "note").axes
    assert [text.split("  ")[1] for text in texts(axes)] == ["inside", "outside", "across the edge"]
    faces = [to_hex(line.get_markerfacecolor()).upper() for line in axes.lines]
    assert faces == [plots.VERDICT_COLOURS[w] for w in (HOLDS, FAILS, DEPENDS)]


@pytest.mark.parametrize(
    ("claimed", "shaded"), [((2, 4), "between 2× and 4×"), ((2, INF), "at least 2×")]
)
def test_the_claimed_range_is_shaded(claimed, shaded):
    found = verdict((3, 2.5, 3.5), (8, 7, 9), claimed=claimed)
    (axes,) = drawn(plots.forest, {"here": found}, "ratio", "title", "note").axes
    (band,) = axes.patches
    right = axes.get_xlim()[1]
    assert band.get_x() == pytest.approx(2)
    assert band.get_x() + band.get_width() == pytest.approx(min(claimed[1], right))
    assert axes.get_xlabel() == f"ratio\n(shaded: {shaded})"


@pytest.mark.parametrize("style", ["×", "%"])
@pytest.mark.parametrize(
    "figures",
    [
        [(0.6, -INF, INF)],
        [(float("nan"), -INF, INF)],
        [(0.9, 0.5, INF), (3, 2, 4)],
        [(0.5, 0.001, 400)],
        [(0.0, 0.0, 0.0)],
        [(-0.2, -0.4, 0.1)],
        [],
    ],
)
def test_figures_without_a_bound_are_drawn(style, figures):
    found = verdict(*figures, claimed=(0.8, INF), style=style)
    figure = drawn(plots.forest, {"here": found}, "share", "title", "note", {"GPU": 0.9})
    low, high = figure.axes[0].get_xlim()
    assert np.isfinite([low, high]).all()
    assert low < 0.9 < high


def test_far_ends_become_arrows_and_leave_the_values_apart():
    found = verdict((3, 0.001, 3000), (2, 1.9, 2.1))
    (axes,) = drawn(plots.forest, {"here": found}, "ratio", "title", "note").axes
    assert {line.get_marker() for line in axes.lines} >= {"<", ">"}
    low, high = axes.get_xlim()
    assert high / low < 100


def test_the_threads_figures_have_no_interval_and_no_side():
    figure = drawn(plots.forest, {"here": verdict((3, 2, 4))}, "ratio", "t", "n", {"GPU": 4.5})
    (text,) = texts(figure.axes[0])
    assert text == "4.5×"


def test_ticks_are_round_and_few():
    for low, high in ((0.9, 1.3), (1, 2), (0.3, 40), (1e-3, 1e3), (3, 11)):
        found = verdict((low, low, low), (high, high, high))
        (axes,) = drawn(plots.forest, {"here": found}, "ratio", "title", "note").axes
        limits = axes.get_xlim()
        ticks = [t for t in axes.get_xticks() if limits[0] <= t <= limits[1]]
        assert 3 <= len(ticks) <= 10
        assert all(float(f"{t:.3g}") == pytest.approx(t) for t in ticks)


@pytest.mark.parametrize(
    ("claimed", "values"),
    [
        ((0.5, 2), (1.1, 1.6)),
        ((0, 1.25), (0.93, 5.8)),
        ((0.8, 1.25), (0.3, 3)),
        ((4.5, 10), (3, 6)),
    ],
)
def test_the_edges_have_ticks_and_no_two_labels_touch(claimed, values):
    found = verdict(*((v, v, v) for v in values), claimed=claimed)
    figure = drawn(plots.forest, {"here": found}, "ratio", "title", "note")
    (axes,) = figure.axes
    ticks = [t for t in axes.get_xticks() if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    assert len(ticks) >= 3
    assert set(claimed) - {0} <= set(ticks)
    boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
    boxes = sorted(boxes, key=lambda box: box.x0)
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


# The thread's figures and the rules


def test_the_threads_figures_as_numbers():
    marks = plots.thread_marks()
    assert marks.keys() <= {claim.id for claim in thread.CLAIMS}
    assert list(marks["T3"].values()) == pytest.approx([4.5, 10])
    assert list(marks["T4"].values()) == pytest.approx([0.085258 / 0.864412], rel=1e-4)
    assert list(marks["T2"].values()) == pytest.approx([0.5635], rel=1e-3)
    assert list(marks["T7"].values()) == pytest.approx([0.9032], rel=1e-3)
    assert list(marks["T8"].values()) == pytest.approx([3.98, 1.98], rel=1e-2)
    assert list(marks["T11"].values()) == pytest.approx([4])


def test_marks_agree_with_the_threads_figures_in_words():
    figures, marks = thread.figures(), plots.thread_marks()
    for claim in thread.CLAIMS:
        if claim.id in ("T3", "T5", "T6", "T8", "T9", "T11"):
            told = [float(n) for n in re.findall(r"([\d.]+)×", claim.figure(figures))]
            assert sorted(told) == pytest.approx(sorted(marks[claim.id].values()), rel=5e-3)


@pytest.mark.parametrize(
    ("claim_id", "within"),
    [
        ("T2", "at least 50%"),
        ("T3", "between 4.5× and 10×"),
        ("T4", "at most 5%, and F.fold copies nothing"),
        ("T5", "between 0.5× and 2×"),
        ("T8", "between 2× and 4× everywhere; one clear exception refutes it"),
        ("T12", "at most 1.25× everywhere; one clear exception refutes it"),
    ],
)
def test_rules_in_words(claim_id, within):
    found = judged()["first, cpu"][int(claim_id[1:]) - 1]
    sentence = plots.rule(claim_id, [thread.missing(), found])
    assert sentence == f"Right where ({verdicts.MEANINGS[claim_id]}) is {within}."


def test_a_rule_without_records_still_says_what_is_judged():
    for claim in thread.CLAIMS:
        assert verdicts.MEANINGS[claim.id] in plots.rule(claim.id, [thread.missing()])


# The grid


def grid_frame():
    words = [[HOLDS, FAILS, DEPENDS], [UNKNOWN, HOLDS, FAILS]]
    return pd.DataFrame(words, index=["T1 one", "T2 two"], columns=["a", "b", "c " * 20])


def test_the_grid_shows_every_word_on_its_colour():
    frame = grid_frame()
    (axes,) = drawn(plots.verdict_grid, frame, "title", "note").axes
    assert texts(axes) == frame.to_numpy().ravel().tolist()
    colours = [to_hex(patch.get_facecolor()).upper() for patch in axes.patches]
    assert colours == [plots.VERDICT_COLOURS[word] for word in frame.to_numpy().ravel()]


@pytest.mark.parametrize("width", [1, 4, 6])
def test_a_grid_fits_on_a_page_and_its_words_into_their_cells(width):
    names = [f"AMD EPYC (family {i}, model 2), 2 cores, cpu" for i in range(width)]
    frame = pd.DataFrame([[FAILS] * width] * 3, index=["T1", "T2", "T3"], columns=names)
    figure = drawn(plots.verdict_grid, frame, "title", "note")
    assert figure.get_figwidth() <= 11.1
    (axes,) = figure.axes
    cell = axes.patches[0].get_window_extent().width
    assert all(text.get_window_extent().width < cell for text in axes.texts)
    heads = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(heads))


def test_the_grid_refuses_other_words():
    with pytest.raises(ValueError, match=r"words must be verdicts \('holds', .*got 'perhaps'"):
        plots.verdict_grid(grid_frame().replace(HOLDS, "perhaps"), "title", "note")


def test_words_can_be_read_on_their_colours():
    for colour in plots.VERDICT_COLOURS.values():
        low, high = sorted(map(luminance, (colour, verdicts._ink(colour))))
        assert (high + 0.05) / (low + 0.05) > 4.5


def luminance(colour):
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
        for v in matplotlib.colors.to_rgb(colour)
    ]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_factors_are_drawn_where_there_is_one():
    frame = pd.DataFrame({"a": [1.0, 2.5, np.nan], "b": [1.1, np.inf, 30.0]}, index=list("xyz"))
    (axes,) = drawn(plots.factor_dots, frame, "factor", "title", "note").axes
    assert texts(axes) == ["1×", "2.5×", "1.1×", "30×"]
    assert axes.get_xlim()[1] > 30
    drawn(plots.factor_dots, frame * np.nan, "factor", "title", "note")


# What folds out


def test_a_small_picture_keeps_the_colours_and_the_size():
    figure = plots.verdict_grid(grid_frame(), "title", "note")
    small = Image.open(io.BytesIO(plots.png(figure, dpi=100))).convert("RGB")
    counts = {colour: count for count, colour in small.getcolors(1 << 16)}
    assert len(counts) <= 256
    for colour in plots.VERDICT_COLOURS.values():
        wanted = np.array(matplotlib.colors.to_rgb(colour)) * 255
        area = sum(n for c, n in counts.items() if np.abs(np.array(c) - wanted).max() < 6)
        assert area > 5000
    assert small.width > 100 * figure.get_figwidth() * 0.8


def test_copies_side_by_side():
    machines = {"a": storage(), "b": storage(unfold=True), "c": []}
    frame = plots.copies(machines)
    assert list(frame.index) == ["F.unfold", "F.fold"]
    assert list(frame.loc["F.unfold"]) == [
        "a copy, writes 9× its input",
        "a view, writes nothing",
        UNKNOWN,
    ]
    assert list(plots.copies(machines, ["F.fold"]).index) == ["F.fold"]


@pytest.fixture(scope="module")
def folded():
    return re.findall(r"<details>.*?</details>", plots.ledger(MACHINES), re.DOTALL)


def test_the_ledger_has_one_row_per_claim_with_every_machines_word(folded):
    assert len(folded) == 12
    for i, (claim, row) in enumerate(zip(thread.CLAIMS, folded)):
        summary = re.search(r"<summary>(.*?)</summary>", row, re.DOTALL)[1]
        assert f"<b>{claim.id}</b> {html.escape(claim.text)}" in summary
        assert html.escape(claim.figure(thread.figures())) in summary
        words = re.findall(r'<b style="[^"]*">([^<]*)</b>', summary)
        assert words == [found[i].verdict for found in judged().values()]
        for found in judged().values():
            assert html.escape(found[i].reason) in row


def test_the_ledgers_images_are_small_pictures_and_say_the_same_in_words(folded):
    for claim, row in zip(thread.CLAIMS, folded):
        images = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', row)
        assert len(images) == (claim.id != "T1")
        for alt, data in images:
            assert "first, cpu: " in alt
            picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            assert min(picture.size) > 150
    assert sum(map(len, folded)) < 500_000


def test_what_copies_is_a_table(folded):
    rows = dict(zip([claim.id for claim in thread.CLAIMS], folded))
    assert "writes 9× its input" in rows["T1"]
    assert "F.unfold" not in re.sub(r"<summary>.*?</summary>", "", rows["T4"], flags=re.DOTALL)
    assert [name for name, row in rows.items() if "<table" in row] == ["T1", "T4"]


def test_names_are_text_and_not_markup(folded):
    for row in folded:
        assert "second &lt;b&gt;, cuda" in row
        assert "second <b>" not in row


def test_a_ledger_of_nothing_measured():
    rows = steps(native=1)
    ledger = plots.ledger({"here": rows})
    assert ledger.count(UNKNOWN) > 12
    assert "<img" not in ledger
    assert thread.title(rows) in html.unescape(ledger)


def test_the_note_says_what_memory_kept_means_where_it_is_mixed():
    plain = steps(native=1)
    kept = [replace(r, flags={**r.flags, "allocator": thread.machine.KEEP_FREED}) for r in plain]
    default = [replace(r, flags={**r.flags, "allocator": "glibc, default"}) for r in plain]
    assert plots.measured_on(default) == thread.title(default)
    assert plots.measured_on(default + kept).startswith(thread.title(default))
    assert "memory kept" in plots.measured_on(default + kept)


def test_a_verdict_without_a_figure_is_a_panel_that_says_so():
    found = Verdict(DEPENDS, "–", "The layer takes no extra time.")
    figure = drawn(plots.forest, {"a": found, "b": verdict((3, 2.5, 3.5))}, "r", "t", "n")
    assert texts(figure.axes[0]) == ["no figure"]
