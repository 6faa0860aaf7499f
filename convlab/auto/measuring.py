"""One kind of call measured: candidates checked against float64, then timed in rounds.

All are timed on random tensors like those of the call. After every few rounds those clearly behind
the fastest drop out, so that the close ones get most rounds.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone

import torch
from torch import Tensor

from convlab import cost, machine, oracle, timing
from convlab.algorithms import ALGORITHMS
from convlab.auto.memory import Choice
from convlab.problem import ConvProblem
from convlab.timing import Function

Samples = Mapping[str, list[float]]  # candidate → seconds per call, round by round

FIRST, FIRST_SECONDS = 3, 0.5  # calls before the rounds: as many, unless they are long
SLOW = 3.0  # times the fastest of them: no rounds for what is slower
CLOSE = 0.03  # rounds end when none may still be faster than the choice by more than this part
SECONDS = 0.4  # for rounds, per candidate
BATCH = {"min_rounds": 3, "max_rounds": 10, "peak": False}  # rounds between two looks at them
BATCH_SECONDS = 0.08  # per candidate
ENOUGH = 8  # rounds, before another than `native` is chosen
FREE = 0.9  # of the free memory may be used
ALL_COLUMNS = ("native_no_library", "unfold", "unfold_batched", "windows")  # at once in memory


def measured(kind: dict, tensors: tuple, sizes: tuple) -> Choice:
    """The choice for calls like that with x, weight, bias and stride, padding, dilation, groups."""
    device, samples, skipped = tensors[0].device, {}, {}
    needs = [name in kind["gradients"] for name in oracle.NAMES]
    with _apart(device, any(needs)):
        try:
            reasons = {name: _obstacle(name, kind, tensors[0]) for name in kind["candidates"]}
            skipped = {name: reason for name, reason in reasons.items() if reason}
            if usable := [name for name in reasons if name not in skipped]:
                like, grad = _inputs(kind, tensors, needs)
                functions = {n: _one_pass(called(n, kind), like, sizes, grad) for n in usable}
                samples, slow = rounds(functions, device)
                skipped |= slow
        except Exception as error:
            skipped["native"] = f"used as measuring failed: {_line(error)}"
    return Choice(
        kind,
        winner(samples) if samples else "native",
        {name: statistics.median(s) for name, s in samples.items()},
        {name: len(s) for name, s in samples.items()},
        {name: _ratio(samples, name, baseline(samples))[1:] for name in samples},
        skipped,
        datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def called(name: str, kind: dict) -> Callable[..., Tensor]:
    """The candidate as `auto` calls it: y laid out as `F.conv2d` does it, for `view` after it."""
    function = ALGORITHMS[name].function
    if name == "native":
        return function
    nhwc = "channels_last" in kind["layout"]
    layout = torch.channels_last if nhwc else torch.contiguous_format
    return lambda *arguments: function(*arguments).contiguous(memory_format=layout)


@contextlib.contextmanager
def _apart(device: torch.device, train: bool) -> Iterator[None]:
    """The caller's autocast and hooks on saved tensors are off inside; gradients as told."""
    graph = torch.autograd.graph
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(train))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        try:
            with graph.disable_saved_tensors_hooks("only to ask whether there are any"):
                pass
        except RuntimeError:  # there are: checkpointing counts what is saved
            stack.enter_context(graph.saved_tensors_hooks(lambda t: t, lambda t: t))
        yield


def _inputs(kind: dict, tensors: tuple, needs: list[bool]) -> tuple[list[Tensor | None], Tensor]:
    """Random x, weight and bias like `tensors`, and a gradient of y."""
    x = tensors[0]
    generator = torch.Generator(x.device).manual_seed(0)
    like = [_like(t, generator, need) for t, need in zip(tensors, needs)]
    shape = ConvProblem.from_dict(kind["problem"]).output_shape
    grad = torch.empty(shape, device=x.device, dtype=x.dtype)
    if "channels_last" in kind["layout"]:
        grad = grad.contiguous(memory_format=torch.channels_last)
    return like, grad.normal_(generator=generator)


def _like(tensor: Tensor | None, generator: torch.Generator, need: bool) -> Tensor | None:
    """Random numbers with the shape and the strides of `tensor`, in memory of their own."""
    if tensor is None:
        return None
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    numbers = torch.empty(last + 1, dtype=tensor.dtype, device=tensor.device)
    numbers.normal_(generator=generator)
    return numbers.as_strided(tensor.shape, tensor.stride()).requires_grad_(need)


def _one_pass(function: Callable, tensors: list, sizes: tuple, grad: Tensor) -> Function:
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    if not wanted:
        return lambda: function(*tensors, *sizes)
    return lambda: torch.autograd.grad(function(*tensors, *sizes), wanted, grad)


def _obstacle(name: str, kind: dict, x: Tensor) -> str | None:
    """Why a candidate is not timed: unsupported, too large for the memory, failing or wrong."""
    candidate, problem = ALGORITHMS[name], ConvProblem.from_dict(kind["problem"])
    if reason := candidate.supports(problem, x.device):
        return reason
    s, forward = cost.Sizes.of(problem), kind["pass"] == "forward"
    needed = (2 if forward else 4) * x.itemsize * (s.x + s.weight + s.y)
    if name in ALL_COLUMNS:
        needed += cost.peak_bytes("thread", problem, x.itemsize, kind["pass"])
    free = math.inf if x.is_cuda else FREE * machine.free_bytes()  # CUDA: an error like others
    if needed > free:
        return f"needs about {timing.size(needed)} of memory, may use {timing.size(free)}"
    if kind["layout"][0] == "channels_last":  # checked as it will be called
        function, candidate, nhwc = candidate.function, copy.copy(candidate), torch.channels_last
        candidate.function = lambda x, *rest: function(x.contiguous(memory_format=nhwc), *rest)
    part = oracle.checked_part(problem)
    try:
        with torch.device("cpu"):  # else `torch.set_default_device` would reach its generators
            found = oracle.check(candidate, part, x.device, x.dtype, gradients=not forward)
    except Exception as error:
        return _line(error)
    return None if found.ok else f"wrong: {found.reason}"


def _line(error: Exception) -> str:
    """The first line of an error that is not to stop the caller."""
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {textwrap.shorten(line, 120, placeholder=' …')}"


def rounds(functions: Mapping[str, Function], device: torch.device) -> tuple[Samples, dict]:
    """Times of the candidates that keep up; candidate → why it got no round.

    The baseline is in every round.
    """
    first, slow = {}, {}
    for name, function in functions.items():
        try:
            calls = [timing.once(function, device)]
            # On CUDA the first may build a kernel; on the CPU something may be in the way.
            while len(calls) < FIRST and (sum(calls) < FIRST_SECONDS or device.type == "cuda"):
                calls.append(timing.once(function, device))
            first[name] = min(calls)
        except Exception as error:
            slow[name] = _line(error)
    base = baseline(first)
    for name in first:
        if name != base and first[name] > SLOW * min(first.values()):
            slow[name] = f"its first calls took {timing.seconds(first[name])}"
    alive = [name for name in first if name not in slow]
    samples = {name: [] for name in alive}
    end = time.perf_counter() + SECONDS * len(functions)
    for seed in itertools.count():
        if not alive or (alive == [base] and samples[base]):
            break
        options = {**BATCH, "seconds": BATCH_SECONDS * len(alive), "seed": seed, "known": first}
        found = timing.interleaved({name: functions[name] for name in alive}, device, **options)
        for name, measurement in found.items():
            samples[name] += measurement.samples
        choice, fastest = winner(samples), _fastest(samples)
        settled = all(_ratio(samples, name, choice)[1] > 1 - CLOSE for name in alive)
        if len(samples[base]) >= ENOUGH and (settled or time.perf_counter() > end):
            break
        alive = [n for n in alive if n == base or _ratio(samples, n, fastest)[1] <= 1]
    return samples, slow


def baseline(names: Mapping[str, object]) -> str:
    """What the others are compared with: `native`, or the first where that failed."""
    return "native" if "native" in names else next(iter(names), "native")


def winner(samples: Samples) -> str:
    """The fastest, if it is faster than the baseline with its whole interval; else the baseline."""
    fastest, base = _fastest(samples), baseline(samples)
    return fastest if _ratio(samples, fastest, base)[2] < 1 else base


def _fastest(samples: Samples) -> str:
    """Of those that were in every round."""
    base = baseline(samples)
    complete = [name for name in samples if len(samples[name]) == len(samples[base])]
    return min(complete, key=lambda name: _ratio(samples, name, base)[0])


def _ratio(samples: Samples, a: str, b: str) -> tuple[float, float, float]:
    """Median of a over median of b with its interval, from the rounds that both were in."""
    common = min(len(samples[a]), len(samples[b]))
    x, y = samples[a][:common], samples[b][:common]
    return statistics.median(x) / max(statistics.median(y), 1e-12), *timing.ratio_interval(x, y)
