"""The stages are the algorithm, their times leave nothing out, and the right one is blamed."""

import json
import time

import pytest
import torch
from drawn import problems
from hypothesis import given
from hypothesis import strategies as st

from convlab import ALGORITHMS, ConvProblem, cost, machine, stages
from convlab.problems import thread_problem

SMALL = ConvProblem(2, 3, 4, 6, 6, kernel_size=3, padding=1)
STAGES = {"thread": ("unfold", "product", "fold"), "unfold": ("unfold", "product", "view")}
SLEEP = 0.05  # seconds; far above what a stage of SMALL takes


class SlowBackward(torch.autograd.Function):
    """The identity; its backward sleeps first."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        time.sleep(SLEEP)
        return grad


def lopsided(p):
    return any(before != after for before, after in p.pads)


@pytest.mark.parametrize("algorithm", STAGES)
@given(p=problems(min_batch=1), seed=st.integers(0, 99))
def test_the_chain_is_the_algorithm_bit_for_bit(algorithm, p, seed):
    x, weight, _ = p.inputs(seed=seed, requires_grad=True)
    if lopsided(p):
        with pytest.raises(ValueError, match="padding must be the same on both sides, got 'same'"):
            stages.stage_functions(algorithm, p, weight)
        return

    y, value = ALGORITHMS[algorithm](x, weight, **p.kwargs), x
    for stage in stages.stage_functions(algorithm, p, weight).values():
        value = stage(value)
    assert torch.equal(value, y)

    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    expected, found = (torch.autograd.grad(out, (x, weight), grad) for out in (y, value))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": 2, "in_channels": 4},
        {"stride": (2, 1)},
        {"dilation": (1, 2)},
        {"groups": 2, "in_channels": 4, "stride": 2, "dilation": 2, "padding": 2},
    ],
)
@pytest.mark.parametrize("algorithm", STAGES)
def test_groups_stride_and_dilation_reach_the_stages(algorithm, changes):
    p = ConvProblem(**{**SMALL.as_dict(), **changes})
    x, weight, _ = p.inputs()
    value = x
    for stage in stages.stage_functions(algorithm, p, weight).values():
        value = stage(value)
    assert torch.equal(value, ALGORITHMS[algorithm](x, weight, **p.kwargs))


def test_what_has_no_stages_is_refused():
    _, weight, _ = SMALL.inputs()
    with pytest.raises(ValueError, match="algorithm must be one of thread, unfold, got 'native'"):
        stages.stage_functions("native", SMALL, weight)
    with pytest.raises(ValueError, match="algorithm must be one of"):
        stages.stage_times(SMALL, "native")


def test_lopsided_padding_is_refused_by_name():
    p = SMALL.replace(kernel_size=(2, 2), padding="same")
    with pytest.raises(ValueError, match="padding must be the same on both sides, got 'same'"):
        stages.stage_times(p)


@pytest.mark.parametrize("algorithm", STAGES)
def test_every_round_has_every_part_in_both_directions(algorithm):
    times = stages.stage_times(SMALL, algorithm, seconds=0, min_rounds=3)
    assert (times["seconds"] >= 0).all()
    parts = {*STAGES[algorithm], "remainder", "total"}
    groups = times.groupby(["round", "direction"])
    assert set(groups.groups) == {(r, d) for r in range(3) for d in ("forward", "backward")}
    for _, group in groups:
        assert len(group) == len(parts)
        assert set(group["part"]) == parts


def test_the_number_of_rounds_is_bounded():
    assert stages.stage_times(SMALL, seconds=1e-9, min_rounds=2)["round"].nunique() == 2
    assert stages.stage_times(SMALL, seconds=60, max_rounds=4)["round"].nunique() == 4


def test_shares_are_medians_and_the_explained_part():
    times = stages.stage_times(SMALL, seconds=0, min_rounds=5)
    shares = stages.shares(times)
    assert list(shares.index) == ["forward", "backward"]
    assert {*shares.columns} == {*STAGES["thread"], "remainder", "total", "explained"}
    wide = times[times["direction"] == "backward"].pivot(
        index="round", columns="part", values="seconds"
    )
    assert shares.loc["backward", "fold"] == wide["fold"].median()
    explained = (wide.sum(axis=1) - wide["total"]) / wide["total"]
    assert shares.loc["backward", "explained"] == pytest.approx(explained.median())


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", STAGES)
def test_stages_and_remainder_are_the_whole_pass(algorithm):
    """Within 5 % of the pass without marks, in the median; a busy machine gets three attempts."""
    p = thread_problem(64)
    off = {}
    for attempt in range(3):
        with machine.setting(threads=1):  # fewer waits that depend on other programs
            times = stages.stage_times(p, algorithm, min_rounds=15, seed=attempt)
        off = (stages.shares(times)["explained"] - 1).abs()
        if (off <= 0.05).all():
            return
    pytest.fail(f"parts and remainder miss the total by {off.to_dict()}")


def least(times, direction):
    """The least time of each part: what other programs add is not in it."""
    return times[times["direction"] == direction].groupby("part")["seconds"].min()


def planted(monkeypatch, name, change):
    """stage_times of SMALL with the function of the stage `name` replaced by `change` of it."""
    honest = stages.stage_functions

    def changed(*args):
        found = honest(*args)
        return found | {name: change(found[name])}

    monkeypatch.setattr(stages, "stage_functions", changed)
    return stages.stage_times(SMALL, seconds=0, min_rounds=3)


@pytest.mark.parametrize("name", STAGES["thread"])
def test_a_sleep_in_a_stage_shows_in_that_stage_forward_and_nowhere_else(monkeypatch, name):
    def slow(stage):
        def sleeps_first(x):
            time.sleep(SLEEP)
            return stage(x)

        return sleeps_first

    times = planted(monkeypatch, name, slow)
    forward, backward = least(times, "forward"), least(times, "backward")
    assert forward[name] >= SLEEP
    assert (forward.drop(name) < SLEEP / 2).all()
    assert (backward < SLEEP / 2).all()


@pytest.mark.parametrize("name", STAGES["thread"])
def test_a_sleep_in_a_stages_backward_shows_there_and_nowhere_else(monkeypatch, name):
    times = planted(monkeypatch, name, lambda stage: lambda x: SlowBackward.apply(stage(x)))
    forward, backward = least(times, "forward"), least(times, "backward")
    assert backward[name] >= SLEEP
    assert (backward.drop(name) < SLEEP / 2).all()
    assert (forward < SLEEP / 2).all()


def test_a_sleep_before_the_first_and_after_the_last_stage_is_remainder(monkeypatch):
    honest = torch.autograd.grad

    def slow(*args, **kwargs):
        time.sleep(SLEEP)
        return honest(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", slow)
    backward = least(stages.stage_times(SMALL, seconds=0, min_rounds=3), "backward")
    assert backward["remainder"] >= SLEEP
    assert (backward.drop(["remainder", "total"]) < SLEEP / 2).all()


def test_the_threads_hooks_add_up_to_the_total():
    found = stages.thread_hooks(SMALL)
    assert list(found) == ["fold", "product", "unfold", "between", "total"]
    assert all(value >= 0 for value in found.values())
    total = found.pop("total")
    assert sum(found.values()) == pytest.approx(total)


def passes(algorithm, p=SMALL):
    """Forward, and forward with backward, as functions of no arguments."""
    x, weight, _ = p.inputs(requires_grad=True)
    grad = torch.randn(p.output_shape)

    def forward():
        return ALGORITHMS[algorithm](x, weight, **p.kwargs)

    return forward, lambda: torch.autograd.grad(forward(), (x, weight), grad)


@pytest.mark.parametrize(
    ("algorithm", "forward", "train"),
    [
        ("thread", (1, 2, 1, 1), (2, 4, 3, 2)),
        ("unfold", (1, 2, 1, 0), (1, 4, 3, 1)),
        ("native", (0, 0, 0, 0), (0, 0, 0, 0)),
    ],
)
def test_operators_counts_the_calls(algorithm, forward, train):
    for fn, expected in zip(passes(algorithm), (forward, train), strict=True):
        calls = stages.operators(fn)["calls"]
        names = ("im2col", "copy_", "mm", "col2im")
        assert tuple(calls.get(f"aten::{name}", 0) for name in names) == expected


@pytest.mark.parametrize("algorithm", STAGES)
def test_the_cost_model_counts_what_the_profiler_sees(algorithm):
    for directions, fn in zip(
        (["forward"], ["forward", "backward"]), passes(algorithm), strict=True
    ):
        calls = stages.operators(fn)["calls"]
        seen = sum(calls.get(f"aten::{name}", 0) for name in ("im2col", "copy_", "mm", "col2im"))
        assert seen == sum(len(cost.steps(algorithm, SMALL, direction=d)) for d in directions)


def test_operators_share_the_whole_self_time():
    frame = stages.operators(passes("thread")[1])
    assert list(frame.columns) == ["calls", "self_seconds", "share", "allocated_bytes"]
    assert frame["share"].sum() == pytest.approx(1)
    assert (frame["self_seconds"] >= 0).all()
    assert frame["self_seconds"].is_monotonic_decreasing


def test_a_trace_is_json_that_holds_the_operators(tmp_path):
    path = stages.save_trace(passes("thread")[1], tmp_path / "trace.json")
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"aten::im2col", "aten::copy_", "aten::mm", "aten::col2im", "MmBackward0"} <= names


def test_a_trace_needs_an_existing_folder(tmp_path):
    path = tmp_path / "missing" / "trace.json"
    with pytest.raises(ValueError, match="path must lie in an existing folder"):
        stages.save_trace(lambda: None, path)
    assert not path.parent.exists()
