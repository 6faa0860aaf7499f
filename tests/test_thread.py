"""Every rule holds, fails and stays undecided on the rows that say so, and on no others."""

import dataclasses
import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convlab import machine, records, thread
from convlab.problems import thread_problem
from convlab.records import RecordError
from convlab.thread import DEPENDS, FAILS, HOLDS, UNKNOWN, Interval

SESSION = "2030-01-01 full-0"
ROUNDS = 11


def samples(seconds, spread=0.002):
    """A number: samples around it; a pair: samples that are half the one, half the other."""
    if isinstance(seconds, tuple):
        return [seconds[i % 2] for i in range(ROUNDS)]
    return [seconds * (1 + spread * (7 * i % ROUNDS - ROUNDS // 2)) for i in range(ROUNDS)]


def row(experiment, algorithm, pass_, batch, seconds, part=""):
    taken = samples(seconds)
    case = f"{experiment}/b{batch}/{pass_ if experiment != 'stages' else algorithm}"
    values = {"session": SESSION, "case": case, "part": part, "samples": taken}
    return records.row(
        experiment, algorithm, thread_problem(batch), pass_, median=np.median(taken), **values
    )


def case(experiment, pass_, batch=256, **seconds):
    return [row(experiment, name, pass_, batch, s) for name, s in seconds.items()]


def stages(batch=256, forward=(2, 1, 1), backward=(2, 1, 1), totals=None):
    """unfold, product and fold, and the totals, which are their sums if not given."""
    found = []
    pairs = (("forward", forward), ("backward", backward))
    for index, (pass_, times) in enumerate(pairs):
        total = totals[index] if totals else sum(times)
        for part, seconds in zip(("unfold", "product", "fold", "total"), (*times, total)):
            found.append(row("stages", "thread", pass_, batch, seconds, part))
    return found


def storage(unfold=False, fold=False):
    """Whether F.unfold and F.fold are views."""
    return [
        records.row(
            "storage",
            "thread",
            thread_problem(2),
            "forward",
            part=part,
            extra={"view": view, "bytes_in": 100, "bytes_written": 0 if view else written},
        )
        for part, view, written in (("F.unfold", unfold, 900), ("F.fold", fold, 100))
    ]


def in_network(pass_="train", network="ResNet-18", batch=8, stages=(), parts=(1, 1, 1, 1), **steps):
    """Steps of a whole network; unfold, product and fold in it; data … optimiser by `thread`."""
    several = [(name, "", seconds) for name, seconds in steps.items()]
    names = ("data", "forward", "backward", "optimiser") if stages else ()
    several += [("thread", *pair) for pair in zip(names, parts)]
    several += [("thread", *pair) for pair in zip(("unfold", "product", "fold"), stages)]
    rows = [row("network_step", name, pass_, batch, s, part) for name, part, s in several]
    case = f"network_step/{network}/b{batch}/{pass_}"
    extra = {"network": network}
    return [dataclasses.replace(r, case=case, extra=extra) for r in rows]


def batches(*ratios, native=1.0):
    """The thread's layer so many times slower than native at growing batches, both passes."""
    return [
        r
        for index, ratio in enumerate(ratios)
        for pass_ in ("forward", "train")
        for r in case("batch", pass_, 4**index, native=native, thread=ratio)
    ]


def steps(pass_="train", **seconds):
    return case("step", pass_, **seconds)


NOISY = (0.1, 10.0)  # samples that lie on both sides of every edge

# Claim → what its rule says → rows
EXAMPLES = {
    "T1": {
        HOLDS: [storage(True, True)],
        FAILS: [storage(False, False)],
        DEPENDS: [storage(True, False), storage(False, True)],
        UNKNOWN: [storage()[:1]],
    },
    "T2": {
        HOLDS: [stages(forward=(2, 1, 1), backward=(2, 1, 1)), stages(64) + stages(256)],
        FAILS: [stages(forward=(1, 4, 1), backward=(1, 4, 1))],
        DEPENDS: [
            stages(forward=(NOISY, 1, 1), backward=(NOISY, 1, 1), totals=(4, 4)),
            stages(2) + stages(64, (1, 4, 1), (1, 4, 1)),
            stages(2) + stages(64, (NOISY, 1, 1), (NOISY, 1, 1), (4, 4)),
        ],
        UNKNOWN: [stages()[:-1], stages()[4:]],
    },
    "T3": {
        HOLDS: [
            steps(native=1, thread=6),
            in_network(native=1, thread=6),
            steps(native=1, thread=6) + in_network(native=1, thread=5),
        ],
        FAILS: [
            steps(native=1, thread=3),
            steps(native=1, thread=12),
            steps(native=1, thread=12) + in_network(native=1, thread=3),
        ],
        DEPENDS: [
            steps(native=1, thread=(3, 6)),
            steps(native=1, thread=(6, 12)),
            steps(native=1, thread=6) + in_network(native=1, thread=3),
            steps(native=1, thread=6) + in_network(native=1, thread=(3, 6)),
        ],
        UNKNOWN: [steps(native=1), steps(thread=6), steps("forward", native=1, thread=6)],
    },
    "T4": {
        HOLDS: [storage(fold=True) + stages(forward=(2, 1, 0.1))],
        FAILS: [
            storage() + stages(forward=(2, 1, 1)),
            storage(fold=True) + stages(forward=(2, 1, 1)),
            storage() + stages(forward=(2, 1, NOISY), totals=(4, 4)),
        ],
        DEPENDS: [
            storage() + stages(forward=(2, 1, 0.1)),
            storage(fold=True) + stages(forward=(2, 1, (0.01, 1)), totals=(4, 4)),
        ],
        UNKNOWN: [storage(), stages(), storage()[:1] + stages()],
    },
    "T5": {
        HOLDS: [stages(forward=(1, 1.5, 1)), stages(forward=(1.5, 1, 1))],
        FAILS: [stages(forward=(1, 3, 1)), stages(forward=(3, 1, 1))],
        DEPENDS: [
            stages(forward=(1, NOISY, 1), totals=(4, 4)),
            stages(2, (1, 1, 1)) + stages(64, (3, 1, 1)),
        ],
        UNKNOWN: [stages()[4:]],
    },
    "T6": {
        HOLDS: [stages(backward=(3, 2, 1))],
        FAILS: [stages(backward=(6, 4, 2)), stages(backward=(0.2, 0.2, 0.2))],
        DEPENDS: [stages(totals=(4, (1, 20))), stages(2) + stages(64, backward=(9, 9, 9))],
        UNKNOWN: [stages()[:4]],
    },
    "T7": {
        HOLDS: [
            steps(native=1, thread=5) + stages(),
            in_network(native=1, thread=5, stages=(2, 0.4, 1)),
            steps(native=1, thread=5) + stages() + in_network(native=1, thread=5, stages=(2, 0, 2)),
        ],
        FAILS: [
            steps(native=1, thread=5) + stages(forward=(1, 4, 1), backward=(1, 4, 1)),
            in_network(native=1, thread=5, stages=(1, 2, 1)),
            in_network(native=1, thread=5, stages=(2, 0.4, 1), parts=(2, 2, 3, 1)),
        ],
        DEPENDS: [
            steps(native=1, thread=5) + stages() + in_network(native=1, thread=5, stages=(1, 2, 1)),
            in_network(native=5, thread=4, stages=(2, 0.4, 1)),
            steps(native=(0.1, 4), thread=5) + stages(forward=(1, 1, 1), backward=(1, 1, 1)),
            steps(native=5, thread=4) + stages(),
        ],
        UNKNOWN: [
            stages(),
            steps(native=1, thread=5),
            steps(native=1, thread=5) + stages(64),
            in_network(native=1, thread=5),
            in_network("forward", native=1, thread=5, stages=(2, 0.4, 1)),
        ],
    },
    "T8": {
        HOLDS: [batches(2.5, 3, 3.5)],
        FAILS: [batches(1, 6, 8), batches(3, 8, 9), batches(3, 3, 8)],
        DEPENDS: [batches((1, 3), (3, 5)), batches(3, (1, 5), 3)],
        UNKNOWN: [batches(3), case("batch", "train", native=1, thread=3)],
    },
    "T9": {
        HOLDS: [
            steps("forward", native=1, thread=6.5),
            in_network("forward", native=1, thread=6.5),
        ],
        FAILS: [steps("forward", native=1, thread=5), steps("forward", native=1, thread=8)],
        DEPENDS: [
            steps("forward", native=1, thread=(5, 6.5)),
            steps("forward", native=1, thread=6.5) + in_network("forward", native=1, thread=5),
        ],
        UNKNOWN: [steps("train", native=1, thread=6.5), in_network("train", native=1, thread=6.5)],
    },
    "T10": {
        HOLDS: [steps(native_no_library=5, thread=5)],
        FAILS: [steps(native_no_library=2, thread=5), steps(native_no_library=9, thread=5)],
        DEPENDS: [steps(native_no_library=(2, 5), thread=5)],
        UNKNOWN: [steps(native=1, thread=5)],
    },
    "T11": {
        HOLDS: [steps(native_no_library=5, native=1)],
        FAILS: [steps(native_no_library=1.5, native=1), steps(native_no_library=1, native=5)],
        DEPENDS: [steps(native_no_library=(1, 5), native=1)],
        UNKNOWN: [steps(native_no_library=5, thread=5)],
    },
    "T12": {
        HOLDS: [steps(thread=5, unfold=5, windows=4.5), case("layer", "forward", thread=1, fft=9)],
        FAILS: [
            steps(thread=5, unfold=5, windows=2),
            case("layer", "forward", thread=5, unfold=2),
            case("layer", "train", thread=5, unfold=5) + steps(thread=5, unfold=3),
        ],
        DEPENDS: [steps(thread=5, unfold=(1, 6))],
        UNKNOWN: [steps(thread=5, native=1, native_no_library=1, native_channels_last=1, auto=1)],
    },
}


def verdict(claim_id, rows):
    return {claim.id: found for claim, found in thread.judge(rows)}[claim_id]


@pytest.mark.parametrize(
    ("claim_id", "expected", "rows"),
    [
        pytest.param(name, expected, rows, id=f"{name} {expected} {index}")
        for name, examples in EXAMPLES.items()
        for expected, several in examples.items()
        for index, rows in enumerate(several)
    ],
)
def test_rule(claim_id, expected, rows):
    found = verdict(claim_id, rows)
    assert found.verdict == expected
    assert found.reason.endswith(".")
    assert (found == thread.missing()) == (expected == UNKNOWN)


@pytest.mark.parametrize("claim_id", EXAMPLES)
def test_every_rule_can_say_everything(claim_id):
    assert EXAMPLES[claim_id].keys() == {HOLDS, FAILS, DEPENDS, UNKNOWN}


def ratio(a, b, pass_="train"):
    """Median of `a` so many times as long as that of `b`."""
    return lambda times: steps(pass_, **{a: times, b: 1})


def part(forward=None, backward=None):
    """Stages whose times are made from the figure, of a whole of 100."""
    same = (2, 1, 1)
    return lambda x: stages(
        forward=forward(x) if forward else same, backward=backward(x) if backward else same
    )


def share(x):
    return (100 * x - 10, 100 - 100 * x, 10)


EDGES = [
    ("T2", part(share, share), [0.51, 0.9], [0.49, 0.2]),
    ("T3", ratio("thread", "native"), [4.6, 9.9], [4.4, 10.1]),
    ("T4", lambda x: storage(fold=True) + part(lambda x: (50, 50 - x, x))(x), [4.9], [5.1]),
    ("T5", part(lambda x: (1, x, 1)), [0.51, 1.9], [0.49, 2.1]),
    ("T6", part(backward=lambda x: (2 * x, x, x)), [0.51, 1.9], [0.49, 2.1]),
    ("T7", lambda x: steps(native=1, thread=2) + part(share, share)(x / 2), [0.81], [0.79]),
    ("T8", lambda x: batches(x, x, x), [2.1, 3.9], [1.9, 4.1]),
    ("T9", ratio("thread", "native", "forward"), [6.1, 6.9], [5.9, 7.1]),
    ("T10", ratio("native_no_library", "thread"), [0.81, 1.24], [0.79, 1.26]),
    ("T11", ratio("native_no_library", "native"), [2.1, 9], [1.9, 0.5]),
    ("T12", ratio("thread", "windows"), [1.24, 0.5], [1.26, 3]),
]


@pytest.mark.parametrize(
    ("claim_id", "make", "holding", "failing"), EDGES, ids=[edge[0] for edge in EDGES]
)
def test_where_the_edges_are(claim_id, make, holding, failing):
    assert [verdict(claim_id, make(x)).verdict for x in holding] == [HOLDS] * len(holding)
    assert [verdict(claim_id, make(x)).verdict for x in failing] == [FAILS] * len(failing)


@pytest.mark.parametrize("rows", [[], [records.row("photographs", "native", None, "forward")]])
def test_without_records_nothing_is_judged(rows):
    assert {found for _, found in thread.judge(rows)} == {thread.missing()}
    assert thread.missing().verdict == UNKNOWN


def test_rows_that_are_not_ok_are_ignored():
    good = steps(native=1, thread=5, native_no_library=5) + stages() + storage()
    bad = [
        records.row(
            r.experiment,
            "windows" if r.experiment == "step" else r.algorithm,
            thread_problem(2),
            r.pass_,
            part=r.part,
            status=status,
            extra=r.extra,
            session=SESSION,
            case=f"other {status}",
        )
        for r in good
        for status in records.STATUSES[1:]
    ]
    assert thread.judge(good + bad) == thread.judge(good)
    assert {found.verdict for _, found in thread.judge(bad)} == {UNKNOWN}


def test_a_reason_names_the_problems_that_agree():
    found = verdict("T5", stages(2, (1, 1, 1)) + stages(64, (1, 1, 1)) + stages(1, (9, 1, 1)))
    assert found.reason == "It holds for 2 images and 64 images only."
    assert [part.split(":")[0] for part in found.figure.split("; ")] == [
        "1 image",
        "2 images",
        "64 images",
    ]


def test_places_in_a_sentence():
    assert thread.listed(["1 image"]) == "1 image"
    places = ["2 images", "256 images, memory kept", "small CNN, 8 images, memory kept"]
    assert thread.listed(places) == (
        "2 images, 256 images (memory kept) and small CNN (8 images, memory kept)"
    )


def test_a_library_switched_off_is_faster_or_slower():
    """Both refute that it is as slow as the layer, and the reason says which it was."""
    slower, faster, alike = (steps(native_no_library=x, thread=5) for x in (9, 2, 5))
    for rows, way in ((faster, "faster"), (slower, "slower")):
        found = verdict("T10", rows)
        assert found.reason == (
            f"Without its library nn.Conv2d is over 25 % {way} than the layer for 256 images."
        )
        assert found.figure.endswith(f"], {way}")
        assert thread.span(found) == found.figure
    both = verdict("T10", faster + kept(slower))
    assert both.verdict == FAILS
    assert both.reason == (
        "Without its library nn.Conv2d is over 25 % faster than the layer for 256 images and "
        "over 25 % slower than the layer for 256 images (memory kept)."
    )
    assert re.findall(r"\], (\w+)", both.figure) == ["faster", "slower"]
    mixed = verdict("T10", alike + kept(faster))
    assert mixed.verdict == DEPENDS
    assert mixed.reason == (
        "It holds for 256 images only. Without its library nn.Conv2d is over 25 % faster than the "
        "layer for 256 images (memory kept)."
    )
    assert "er than" not in verdict("T10", alike).reason


def test_a_view_and_a_copy_are_told_apart():
    found = verdict("T1", storage(fold=True))
    assert found.figure == "F.unfold writes 9× its input, F.fold is a view"


def test_the_best_rewritten_form_is_named():
    found = verdict("T12", steps(thread=6, unfold=3, windows=2, native=1))
    assert found.figure.startswith("windows, 256 images, train: 3× [")
    assert found.figure.endswith("] faster (of unfold, windows)")
    assert found.reason == "windows is faster, without the library's convolution."


def test_many_rewritten_forms_are_counted():
    others = {"shifts": 5, "fft": 7, "row_windows": 1}
    found = verdict("T12", steps(thread=6, unfold=3, windows=2, native=1, **others))
    assert found.figure.startswith("row_windows, 256 images, train: 6× [")
    assert found.figure.endswith("] faster (of 5 forms)")


def test_only_the_threads_problem_says_whether_nothing_can_be_done():
    wide = [
        dataclasses.replace(r, problem={**r.problem, "out_channels": 64})
        for r in case("ladder", "train", 2, thread=9, windows=1)
    ]
    assert verdict("T12", wide) == thread.missing()
    rows = case("ladder", "train", 2, thread=5, windows=4.5)
    assert verdict("T12", rows + wide) == verdict("T12", rows)


def test_a_form_that_calls_the_librarys_convolution_is_no_rewritten_form():
    assert verdict("T12", case("ladder", "train", thread=5, unfoldnd=1)) == thread.missing()


# Several visits and two settings of malloc


def visited(number, rows):
    """The same rows as a later visit of the same session."""
    return [dataclasses.replace(r, case=f"{r.case} #{number}") for r in rows]


def kept(rows):
    """The same rows, measured while the C library kept freed memory."""
    flags = machine.flags() | {"allocator": f"glibc, {machine.KEEP_FREED}"}
    cases = [r.case.partition(" #") for r in rows]
    return [
        dataclasses.replace(r, flags=flags, case="".join((case, "/memory kept", mark, number)))
        for r, (case, mark, number) in zip(rows, cases)
    ]


# Claim → rows made from a figure, a figure for which it holds, one for which it fails
FIGURES = {
    "T3": (ratio("thread", "native"), 6, 3),
    "T9": (ratio("thread", "native", "forward"), 6.5, 9),
    "T10": (ratio("native_no_library", "thread"), 1, 0.4),
    "T11": (ratio("native_no_library", "native"), 4, 1.5),
}


@pytest.mark.parametrize("claim_id", FIGURES)
@pytest.mark.parametrize(
    ("default", "with_kept", "expected"),
    [
        (HOLDS, HOLDS, HOLDS),
        (FAILS, FAILS, FAILS),
        (FAILS, HOLDS, DEPENDS),
        (HOLDS, FAILS, DEPENDS),
    ],
)
def test_both_settings_of_malloc_decide(claim_id, default, with_kept, expected):
    make, holding, failing = FIGURES[claim_id]
    figures = {HOLDS: holding, FAILS: failing}
    rows = kept(make(figures[with_kept])) + make(figures[default])
    found = verdict(claim_id, rows)
    assert found.verdict == expected
    assert [i.where for i in found.intervals] == ["256 images", "256 images, memory kept"]
    assert [i.against(*found.claimed) for i in found.intervals] == [default, with_kept]
    assert [part.split(":")[0] for part in found.figure.split("; ")] == [
        "256 images",
        "256 images, memory kept",
    ]
    if expected == DEPENDS:
        where = "256 images" if default == HOLDS else "256 images (memory kept)"
        assert found.reason.startswith(f"It holds for {where} only.")


@pytest.mark.parametrize("claim_id", FIGURES)
def test_one_setting_of_malloc_inside_the_noise_leaves_it_undecided(claim_id):
    make, holding, failing = FIGURES[claim_id]
    for clear in (holding, failing):
        found = verdict(claim_id, make(clear) + kept(make(tuple(sorted((holding, failing))))))
        assert found.verdict == DEPENDS
        assert found.reason.startswith("1 of 2 intervals cross the edge: inside the noise.")


@pytest.mark.parametrize("claim_id", FIGURES)
def test_visits_of_a_case_are_one_figure(claim_id):
    make, holding, failing = FIGURES[claim_id]

    def visits(*figures):
        first, *later = [make(x) for x in figures]
        again = [r for i, rows in enumerate(later, 2) for r in visited(i, rows)]
        return first + again

    for figure, expected in ((holding, HOLDS), (failing, FAILS)):
        found = verdict(claim_id, visits(figure, figure, figure))
        assert found.verdict == expected
        assert [i.where for i in found.intervals] == ["256 images"]
    apart = verdict(claim_id, visits(holding, failing, holding))
    assert apart.verdict == DEPENDS, "the interval spans visits that disagree"
    (interval,) = apart.intervals
    low, high = sorted((holding, failing))
    assert interval.low == pytest.approx(low, rel=0.05)
    assert interval.high == pytest.approx(high, rel=0.05)
    both = visits(holding, holding) + kept(visits(failing, failing))
    assert verdict(claim_id, both).verdict == DEPENDS
    assert len(verdict(claim_id, both).intervals) == 2


def test_visits_of_stages_are_one_figure_per_batch_and_setting_of_malloc():
    rows = [
        r
        for batch in (2, 64)
        for i in (1, 2, 3)
        for r in (visited(i, stages(batch)) if i > 1 else stages(batch))
    ]
    for claim_id in ("T2", "T5", "T6"):
        found = verdict(claim_id, rows + kept(rows))
        assert [i.where for i in found.intervals] == [
            *("2 images", "2 images, memory kept", "64 images", "64 images, memory kept")
        ]


def test_the_extra_time_is_that_of_the_same_setting_of_malloc():
    """The layer's extra time and its stages are compared under one allocator each."""
    half = stages(forward=(1, 4, 1), backward=(1, 4, 1))
    default = steps(native=1, thread=5) + stages()  # unfold and fold: 75 % of the layer
    found = verdict("T7", default + kept(steps(native=1, thread=5) + half))
    assert found.verdict == DEPENDS
    assert found.reason == "It holds for 256 images only."
    first, second = (i.value for i in found.intervals)
    assert (first, second) == pytest.approx((0.75 / 0.8, (1 / 3) / 0.8), rel=0.01)
    only_default = verdict("T7", default + kept(half))
    assert [i.where for i in only_default.intervals] == ["256 images"]


def test_the_best_rewritten_form_says_where_it_was_best():
    rows = steps(thread=6, windows=3) + kept(steps(thread=6, windows=2))
    found = verdict("T12", rows)
    assert found.verdict == FAILS
    assert found.figure.startswith("windows, 256 images, memory kept, train: 3× [")
    assert len(found.intervals) == 2


def test_whole_networks_are_figures_of_their_own():
    rows = steps(native=1, thread=6) + in_network(native=1, thread=5)
    rows += in_network(network="small CNN", batch=256, native=1, thread=7)
    found = verdict("T3", rows + [r for r in visited(2, rows) if r.experiment == "step"])
    assert [(i.where, round(i.value, 2)) for i in found.intervals] == [
        ("256 images", 6),
        ("ResNet-18, 8 images", 5),
        ("small CNN, 256 images", 7),
    ]


def test_parts_of_a_network_are_not_its_steps():
    rows = in_network(native=1, thread=5, stages=(2, 0.4, 1), parts=(9, 9, 9, 9))
    (found,) = verdict("T3", rows).intervals
    assert found.value == pytest.approx(5, rel=0.01)
    (share,) = verdict("T7", in_network(native=1, thread=5, stages=(2, 0.4, 1))).intervals
    assert share.value == pytest.approx((3 / 4) / (1 - 1 / 5), rel=0.01)


def undecided(number, batch=2):
    """Stages of so many batches whose figures for T5 and T6 cross an edge."""
    return [
        r
        for i in range(number)
        for r in stages(batch * 2**i, (1, NOISY, 1), (NOISY, NOISY, NOISY), (4, NOISY))
    ]


@pytest.mark.parametrize("claim_id", ["T5", "T6"])
@pytest.mark.parametrize(
    ("clear", "unclear", "expected"),
    [(2, 1, True), (1, 1, False), (3, 2, True), (2, 2, False), (1, 2, False), (0, 3, False)],
)
@pytest.mark.parametrize("side", [HOLDS, FAILS])
def test_more_than_half_of_the_figures_decide(claim_id, side, clear, unclear, expected):
    stage = {HOLDS: stages, FAILS: lambda n: stages(n, (1, 9, 1), (90, 1, 1))}[side]
    rows = [r for i in range(clear) for r in stage(1024 * 2**i)] + undecided(unclear)
    found = verdict(claim_id, rows)
    count = clear + unclear
    if expected:
        assert found.verdict == side
        assert found.reason.endswith(f". {unclear} of {count} figures: inside the noise.")
    else:
        assert found.verdict == DEPENDS
        assert found.reason == f"{unclear} of {count} intervals cross the edge: inside the noise."


def test_one_figure_on_the_other_side_is_enough_to_depend():
    rows = stages(2) + stages(4) + stages(8) + stages(16, (1, 9, 1)) + undecided(2, 64)
    found = verdict("T5", rows)
    assert found.verdict == DEPENDS
    assert found.reason == "It holds for 2 images, 4 images and 8 images only."


def test_the_span_of_several_figures_is_its_ends():
    """All of one or two figures, else the smallest and the largest of them."""
    rows = stages(2, (1, 3, 1)) + stages(4, (1, 1, 1))
    assert re.sub(r" \[.*?\]", "", thread.span(verdict("T5", rows))) == "2 images: 3×\n4 images: 1×"
    rows += stages(8, (1, 5, 1))
    assert re.sub(r" \[.*?\]", "", thread.span(verdict("T5", rows))) == (
        "1× (4 images)\n5× (8 images)\nof 3 figures"
    )
    assert thread.span(thread.missing()) == "–"


def test_sessions_are_not_mixed():
    """Rows of another session are another measurement, not another visit."""
    later = [dataclasses.replace(r, session="2031-01-01 full-0") for r in steps(native=1, thread=3)]
    found = verdict("T3", steps(native=1, thread=6) + later)
    assert [round(i.value) for i in found.intervals] == [6, 3]


# Intervals


def test_an_interval_across_the_edge_decides_nothing():
    for low, high, expected in (
        (0.5, 3, HOLDS),
        (1, 2, HOLDS),
        (1.1, 3, DEPENDS),
        (0.5, 1.9, DEPENDS),
        (1.4, 1.6, DEPENDS),
        (2.1, 3, FAILS),
        (0, 0.9, FAILS),
    ):
        assert Interval("here", 1.5, 1, 2).against(low, high) == expected


def test_more_noise_widens_the_interval_and_takes_the_verdict_back():
    def found(spread):
        rng = np.random.default_rng(0)
        a, b = (rng.lognormal(np.log(s), spread, 21) for s in (5, 1))
        return thread.statistic("here", np.divide, [timed(a)], [timed(b)])

    narrow, wide = found(0.01), found(2.0)
    assert narrow.low < narrow.value < narrow.high
    assert wide.low < narrow.low < narrow.high < wide.high
    assert (narrow.against(4.5, 10), wide.against(4.5, 10)) == (HOLDS, DEPENDS)


def timed(values):
    """A row with these samples."""
    return records.row("step", "native", thread_problem(2), "train", samples=list(values))


def test_an_interval_knows_of_visits_that_disagree():
    """Two visits with clear but different ratios: the interval spans both."""
    one = [timed([1.0] * 9)]
    alike = thread.statistic("here", np.divide, [timed([5.0] * 9)] * 2, one * 2)
    differing = thread.statistic("here", np.divide, [timed([4.0] * 9), timed([6.0] * 9)], one * 2)
    assert (alike.low, alike.high) == (5, 5)
    assert (differing.low, differing.value, differing.high) == (4, 5, 6)


def test_visits_may_have_different_numbers_of_rounds():
    rows = [timed([5.0] * 3), timed([5.0] * 8)], [timed([1.0] * 4), timed([1.0] * 7)]
    found = thread.statistic("here", np.divide, *rows)
    assert (found.low, found.value, found.high) == (5, 5, 5)


def test_samples_are_compared_round_by_round():
    """What slows both down in the same round does not widen the interval of their ratio."""
    slow = [1, 1, 1, 9, 9, 9, 20]
    five = [5 * s for s in slow]
    found = thread.statistic("here", np.divide, [timed(five)], [timed(slow)])
    assert (found.low, found.value, found.high) == pytest.approx((5, 5, 5))
    longer = thread.statistic("here", np.divide, [timed([*five, 1e9])], [timed(slow)])
    assert longer == found


def test_a_change_is_the_quotient_of_the_medians_of_two_cases():
    """Sample i of one case has nothing to do with sample i of another."""
    before, after = [timed([1, 2, 3, 4, 50])], [timed([60, 5, 7, 6, 1, 4, 80])]
    found = thread.change("here", lambda layer: layer, [before], [after])
    assert found.value == 6 / 3
    assert found.low < found.value < found.high
    halved = thread.change("here", lambda layer: layer, [before], [after], scale=0.5)
    assert (halved.low, halved.value, halved.high) == (found.low / 2, 1, found.high / 2)
    backwards = [timed([50, 4, 3, 2, 1])]
    assert thread.change("here", lambda layer: layer, [backwards], [after]).value == found.value


def test_the_cases_of_a_change_are_resampled_apart_and_the_rows_of_one_together():
    noise = [1, 1, 1, 9, 9, 9, 20]
    layer, native = [timed([6 * s for s in noise])], [timed([2 * s for s in noise])]
    same = thread.change("here", lambda layer: layer, [layer], [layer])
    assert same.value == 1
    assert same.low < 0.5
    assert same.high > 2
    ratio = thread.change("here", np.divide, [native, native], [layer, native])
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((3, 3, 3))


def test_a_change_from_nothing_has_no_bounds(recwarn):
    found = thread.change("here", lambda layer: layer, [[timed([0.0] * 5)]], [[timed([1.0] * 5)]])
    assert (found.low, found.high) == (-thread.INF, thread.INF)
    assert not recwarn.list


def test_a_clock_too_coarse_decides_nothing(recwarn):
    for native, layer in ((0, 0), (0, 1)):
        found = verdict("T3", steps(native=native, thread=layer))
        assert found.verdict == DEPENDS
    verdict("T7", steps(native=1, thread=0) + stages(forward=(0, 0, 0), backward=(0, 0, 0)))
    assert not recwarn.list


def test_the_same_rows_give_the_same_verdicts_in_any_order():
    rows = realistic()
    shuffled = random.Random(1).sample(rows, len(rows))
    assert thread.judge(rows) == thread.judge(shuffled)


# No rows make a rule raise


def realistic():
    """A session as `reproduce` leaves it, one algorithm wrong and one out of memory."""
    rows = storage() + stages(2) + stages(64) + batches(1.5, 3, 5)
    for pass_ in ("forward", "train"):
        rows += steps(pass_, native=1, native_no_library=5, thread=5, unfold=4, windows=2)
        rows += case("layer", pass_, 2, native=1, native_channels_last=1, thread=3, unfold=2)
    extra = {"reason": "y differs"}
    for status in records.STATUSES[1:]:
        rows.append(
            records.row(
                "step", "windows", thread_problem(2), "train", status=status, extra=extra, error=2.0
            )
        )
    rows.append(records.row("ceilings", "", None, "", part="copy", median=1.0, samples=[1.0]))
    return rows


REALISTIC = realistic()


@given(st.sets(st.integers(0, len(REALISTIC) - 1)))
def test_judge_never_raises(chosen):
    found = thread.judge([REALISTIC[i] for i in sorted(chosen)])
    assert len(found) == 12
    assert all(v.verdict in (HOLDS, FAILS, DEPENDS, UNKNOWN) for _, v in found)


def test_a_whole_session_leaves_nothing_unmeasured():
    rows = REALISTIC + stages(256)
    assert UNKNOWN not in [found.verdict for _, found in thread.judge(rows)]


# The claims


def test_the_twelve_claims():
    assert [claim.id for claim in thread.CLAIMS] == [f"T{i}" for i in range(1, 13)]
    figures = thread.figures()
    for claim in thread.CLAIMS:
        assert claim.text.strip()
        assert claim.figure(figures).strip()
    assert len({claim.text for claim in thread.CLAIMS}) == 12


def test_the_table_puts_the_thread_beside_the_measurement():
    rows = steps(native=1, thread=6)
    table = thread.table(rows)
    third = table.iloc[2]
    assert third["claim"].startswith("T3 training is")
    assert third["the thread"] == "4.5× and 10× (GPU, batch 256)"
    assert third["measured"].startswith("256 images: 6×")
    assert third["verdict"] == HOLDS
    assert list(table["verdict"]).count(UNKNOWN) == 11


def test_the_title_says_where_when_and_how_quickly():
    (first, *_) = rows = steps(native=1)
    title = thread.title(rows)
    for part in (
        first.machine,
        "cpu",
        first.time[:10],
        f"{first.flags['threads']} thread",
        "malloc",
    ):
        assert part in title
    assert "quick" not in title
    for allocator, words in (
        ("glibc, default", "malloc: glibc's default"),
        (f"glibc, {machine.KEEP_FREED}", f"malloc: glibc, {machine.KEEP_FREED}"),
        ("jemalloc", "malloc: jemalloc"),
    ):
        flags = first.flags | {"allocator": allocator}
        assert f", {words}, " in thread.title([dataclasses.replace(first, flags=flags)])
    quick = records.row("step", "native", None, "train", session="2030-01-01 quick-0")
    assert "quick" in thread.title([quick])


DAMAGES = {
    "empty": lambda text: "",
    "cut": lambda text: text[:-9],
    "array": lambda text: "[]",
    "no list": lambda text: '{"figures": 3}',
    "no objects": lambda text: '{"figures": ["a"]}',
    "no figures": lambda text: '{"figures": []}',
    "no seconds": lambda text: text.replace('"seconds"', '"minutes"', 1),
    "text": lambda text: text.replace(": 0.45,", ': "0.45",'),
    "zero": lambda text: text.replace(": 0.08,", ": 0,"),
    "one missing": lambda text: text.replace('"train_custom"', '"other"'),
}


def thread_json():
    return (records.data_folder() / "thread.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_damaged_figures_are_an_error_that_names_the_file(monkeypatch, tmp_path, damage):
    assert damage(thread_json()) != thread_json()
    path = tmp_path / "thread.json"
    path.write_text(damage(thread_json()), encoding="utf-8")
    monkeypatch.setattr(thread, "data_folder", lambda: tmp_path)
    with pytest.raises(RecordError, match=f"^{re.escape(str(path))}: .") as raised:
        thread.table([])
    assert "\n" not in str(raised.value)


def test_missing_figures_are_an_error_that_names_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(thread, "data_folder", lambda: tmp_path)
    with pytest.raises(RecordError, match=f"^{re.escape(str(tmp_path / 'thread.json'))}: ."):
        thread.table([])


def test_figures_are_those_of_the_file(monkeypatch, tmp_path):
    text = thread_json().replace(": 0.45,", ": 0.9,")
    (tmp_path / "thread.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr(thread, "data_folder", lambda: tmp_path)
    assert thread.table([]).iloc[2]["the thread"].startswith("9× and 10×")
