"""The mistakes that only a GPU shows: the wrong number and the right one, as rows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from convlab import machine, pitfalls, records, timing
from convlab.experiments.cases import Case, Settings, one_pass
from convlab.problem import ConvProblem
from convlab.problems import thread_problem
from convlab.records import Row
from convlab.timing import Function, Measurement

REPEATS = 7


def mistakes_case(name: str, settings: Settings) -> Case:
    """One of `MISTAKES`."""
    run = functools.partial(MISTAKES[name], settings)
    return Case("pitfalls", f"pitfalls/{name}", run, seconds=2.0)


def rows_of(
    name: str, measured: dict[str, Measurement], problem: ConvProblem, settings: Settings
) -> list[Row]:
    """One row per part ("wrong", "right", …) of the mistake `name`."""
    return [
        records.row("pitfalls", name, problem, "forward", m, part=part, device=settings.device)
        for part, m in measured.items()
    ]


def _medians(times: list[Measurement], settings: Settings) -> Measurement:
    """The medians of repeated measurements, as samples of one."""
    return Measurement(
        tuple(m.median for m in times),
        1,
        None,
        settings.device,
        machine.flags(),
        *timing.clock("cpu"),
    )


def _in_turn(
    wrong: Callable[[], Measurement], right: Callable[[], Measurement], settings: Settings
) -> dict[str, Measurement]:
    pairs = [(wrong(), right()) for _ in range(REPEATS)]
    return {
        part: _medians(list(times), settings)
        for part, times in zip(("wrong", "right"), zip(*pairs, strict=True), strict=True)
    }


def _ready(problem: ConvProblem, settings: Settings, name: str = "thread") -> Function:
    fn = one_pass(name, problem, "forward", settings.device)
    fn()
    return fn


def no_waiting(settings: Settings) -> list[Row]:
    """Two timers that read the clock while the GPU still works."""
    problem, rows = thread_problem(64), []
    fn, device = _ready(problem, settings), settings.device
    for name in ("no_synchronization", "synchronization_after_the_clock"):
        wrong = functools.partial(pitfalls.PITFALLS[name], fn, device)
        right = functools.partial(pitfalls.synchronized, fn, device)
        rows += rows_of(name, _in_turn(wrong, right, settings), problem, settings)
    return rows


def first_call(settings: Settings) -> list[Row]:
    """The first call of a shape, for as many shapes as there are repetitions."""
    wrong, right = [], []
    for extra in range(REPEATS):
        fn = one_pass("native", thread_problem(64 + extra), "forward", settings.device)
        wrong.append(pitfalls.first_call(fn, settings.device))
        right.append(pitfalls.single_calls(fn, settings.device))
    measured = {"wrong": _medians(wrong, settings), "right": _medians(right, settings)}
    return rows_of("first_call", measured, thread_problem(64), settings)


def cold_cache(settings: Settings) -> list[Row]:
    """A small input that stays in the L2 cache, and the same with the cache written over."""
    problem = thread_problem(64)
    fn = _ready(problem, settings, "native")
    options = {"device": settings.device, "peak": False}
    wrong = functools.partial(timing.measure, fn, clear_cache=False, **options)
    right = functools.partial(timing.measure, fn, clear_cache=True, **options)
    return rows_of("hot_cache", _in_turn(wrong, right, settings), problem, settings)


def fresh_memory(settings: Settings) -> list[Row]:
    """The caching allocator emptied before every call."""
    problem = thread_problem(64)
    fn, device = _ready(problem, settings), settings.device
    wrong = functools.partial(pitfalls.fresh_memory, fn, device)
    right = functools.partial(pitfalls.single_calls, fn, device)
    return rows_of("fresh_memory", _in_turn(wrong, right, settings), problem, settings)


def tf32(settings: Settings) -> list[Row]:
    """nn.Conv2d and the layer under PyTorch's defaults, with TF32 on both sides, and on neither."""
    problem, rows = thread_problem(256), []
    functions = {name: _ready(problem, settings, name) for name in ("native", "thread")}
    for part, flags in (
        ("defaults", {"cudnn_tf32": True, "matmul_tf32": False}),
        ("on both sides", {"cudnn_tf32": True, "matmul_tf32": True}),
        ("on neither side", {"cudnn_tf32": False, "matmul_tf32": False}),
    ):
        with machine.setting(**flags):
            found = timing.interleaved(functions, settings.device, **settings.brief)
        for name, m in found.items():
            values = {"part": f"{name}, {part}", "device": settings.device}
            rows.append(
                records.row("pitfalls", "tf32_on_one_side", problem, "forward", m, **values)
            )
    return rows


def launches(settings: Settings) -> list[Row]:
    """Two images: the same kernels launched one by one, and replayed as one CUDA graph."""
    problem, rows = thread_problem(2), []
    for name in ("native", "thread"):
        fn = _ready(problem, settings, name)
        candidates = {f"{name}, launched": fn, f"{name}, graph": graphed(fn)}
        options = settings.brief | {"peak": False, "queued": False}
        found = timing.interleaved(candidates, settings.device, **options)
        count = timing.launches(fn)
        for part, m in found.items():
            values = {"part": part, "device": settings.device, "launches": count}
            rows.append(records.row("pitfalls", "launch_bound", problem, "forward", m, **values))
    return rows


def graphed(fn: Function) -> Function:
    """The kernels that `fn` launches, captured once and replayed with one launch (CUDA)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


MISTAKES: dict[str, Callable[[Settings], list[Row]]] = {
    f.__name__: f for f in (no_waiting, first_call, cold_cache, fresh_memory, tf32, launches)
}
