"""Where the time of a layer goes: stage by stage, operator by operator.

A stage's backward time is what passes between the gradient arriving at its output and leaving at
its input. The boundaries touch, so nothing between them is lost: stages and remainder are the
whole pass. The remainder is what lies outside every stage: starting autograd, releasing what the
pass no longer needs. The same pass without any marks is measured beside it, in the same rounds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from convlab import machine
from convlab.algorithms import ALGORITHMS
from convlab.algorithms.thread import fold_stage, product_stage, unfold_stage
from convlab.algorithms.unfold import weight_first_product
from convlab.problem import ConvProblem, parse_device
from convlab.timing import Function, grow_heap, profile, synchronize, undisturbed

if TYPE_CHECKING:
    import pandas as pd

Stage = Callable[[Tensor], Tensor]
STAGED = ("thread", "unfold")


def stage_functions(algorithm: str, p: ConvProblem, weight: Tensor) -> dict[str, Stage]:
    """The stages of `algorithm`, each one tensor to one tensor; their chain is the algorithm.

    Raises:
        ValueError: an algorithm that has no stages, or lopsided 'same' padding.
    """
    if algorithm not in STAGED:
        raise ValueError(f"algorithm must be one of {', '.join(STAGED)}, got {algorithm!r}")
    (top, bottom), (left, right) = p.pads
    if (top, left) != (bottom, right):
        raise ValueError(f"padding must be the same on both sides, got {p.padding!r}")
    size = p.output_shape[2:]

    def unfold(x: Tensor) -> Tensor:
        return unfold_stage(x, weight, p.stride, (top, left), p.dilation)

    if algorithm == "thread":
        return {
            "unfold": unfold,
            "product": lambda columns: product_stage(columns, weight, p.groups),
            "fold": lambda product: fold_stage(product, size),
        }
    return {
        "unfold": unfold,
        "product": lambda columns: weight_first_product(columns, weight, p.groups),
        "view": lambda product: product.unflatten(2, size),
    }


def stage_times(
    p: ConvProblem,
    algorithm: str = "thread",
    device: str | torch.device = "cpu",
    *,
    seconds: float = 4.0,
    min_rounds: int = 5,
    max_rounds: int = 30,
    seed: int = 0,
) -> pd.DataFrame:
    """Seconds of each stage, forward and backward, and of the whole measured the ordinary way.

    Returns:
        Columns round, direction ("forward", "backward"), part (the stages, "remainder", and
        "total": the pass without marks, in the same round), seconds.
    """
    import pandas as pd

    device = parse_device(device)
    x, weight, _ = p.inputs(device, seed=seed, requires_grad=True)
    grad = torch.randn(p.output_shape, generator=torch.Generator().manual_seed(seed)).to(device)
    stages = stage_functions(algorithm, p, weight)

    def whole(x: Tensor) -> Tensor:
        return ALGORITHMS[algorithm](x, weight, **p.kwargs)

    passes = {
        "marked": lambda: _marked_pass(stages, x, weight, grad),
        "ordinary": lambda: _ordinary_pass(whole, x, weight, grad),
    }
    start = time.perf_counter()
    for run in passes.values():
        run()
    once = time.perf_counter() - start
    rounds = int(min(max(seconds / once, min_rounds), max_rounds))
    if machine.keeps_freed_memory():
        grow_heap(list(passes.values()))
    order, rows = list(passes), []
    shuffle = random.Random(seed).shuffle
    for index in range(rounds):
        shuffle(order)
        for name in order:
            for direction, parts in undisturbed(passes[name]).items():
                rows += [(index, direction, part, value) for part, value in parts.items()]
    return pd.DataFrame(rows, columns=["round", "direction", "part", "seconds"])


def shares(times: pd.DataFrame) -> pd.DataFrame:
    """Medians of `stage_times`: rows direction, columns parts, then the share that they explain.

    `explained` is (stages + remainder) / total, round by round, as a median: 1 if the marks cost
    nothing and leave nothing out.
    """
    wide = times.pivot_table(index=["direction", "round"], columns="part", values="seconds")
    parts = [part for part in wide.columns if part != "total"]
    medians = wide.groupby("direction").median()
    explained = (wide[parts].sum(axis=1) / wide["total"]).groupby("direction").median()
    order = list(dict.fromkeys(times["part"]))
    return medians[order].assign(explained=explained).loc[["forward", "backward"]]


Clock = Callable[[], "float | torch.cuda.Event"]


def stopwatch(device: torch.device) -> tuple[Clock, Callable]:
    """A function that marks now, and one that turns two marks into seconds."""
    if device.type == "cpu":
        return time.perf_counter, lambda a, b: b - a

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return mark, lambda a, b: a.elapsed_time(b) / 1e3


def _marked_pass(
    stages: Mapping[str, Stage], x: Tensor, weight: Tensor, grad: Tensor
) -> dict[str, dict[str, float]]:
    mark, elapsed = stopwatch(x.device)
    synchronize(x.device)
    forward, backward, values = [mark()], [], [x]
    for stage in stages.values():
        values.append(stage(values[-1]))
        forward.append(mark())
    y = values[-1]
    hooks = [v.register_hook(lambda _: backward.append(mark())) for v in values]
    del values  # the columns are released here, as they are when a function returns
    end = mark()
    synchronize(x.device)
    start = mark()
    torch.autograd.grad(y, (x, weight), grad)
    done = mark()
    synchronize(x.device)
    for hook in hooks:
        hook.remove()
    names = list(stages)
    return {
        "forward": _parts(names, forward, forward[0], end, elapsed),
        "backward": _parts(names[::-1], backward, start, done, elapsed),
    }


def _parts(names: list[str], marks: list, start, end, elapsed: Callable) -> dict[str, float]:
    parts = {name: elapsed(*marks[i : i + 2]) for i, name in enumerate(names)}
    remainder = elapsed(start, end) - sum(parts.values())
    return {**parts, "remainder": max(remainder, 0.0)}  # CUDA events round each time on its own


def _ordinary_pass(
    whole: Stage, x: Tensor, weight: Tensor, grad: Tensor
) -> dict[str, dict[str, float]]:
    mark, elapsed = stopwatch(x.device)
    synchronize(x.device)
    marks = [mark()]
    y = whole(x)
    marks.append(mark())
    synchronize(x.device)
    marks.append(mark())
    torch.autograd.grad(y, (x, weight), grad)
    marks.append(mark())
    synchronize(x.device)
    return {
        "forward": {"total": elapsed(*marks[:2])},
        "backward": {"total": elapsed(*marks[2:])},
    }


def thread_hooks(p: ConvProblem, seed: int = 0) -> dict[str, float]:
    """Backward seconds as the thread's script took them, on the CPU, once.

    It reads the clock in hooks on the tensors next to each operation. The views between two
    operations, the start of the backward pass and its end belong to no hook: `between` is what
    the three numbers leave out of `total`.
    """
    x, weight, _ = p.inputs(seed=seed, requires_grad=True)
    (pad, _), _ = p.pads
    columns = F.unfold(x, p.kernel_size, padding=pad)
    rows = columns.transpose(1, 2)
    product = rows.matmul(weight.flatten(1).t())
    turned = product.transpose(1, 2)
    y = F.fold(turned, p.output_shape[2:], kernel_size=1)
    at = {}
    watched = {"y": y, "turned": turned, "product": product, "rows": rows, "columns": columns}
    for name, tensor in {**watched, "x": x}.items():
        tensor.register_hook(lambda _, name=name: at.update({name: time.perf_counter()}))
    start = time.perf_counter()
    y.sum().backward()
    total = time.perf_counter() - start
    found = {
        "fold": at["turned"] - at["y"],
        "product": at["rows"] - at["product"],
        "unfold": at["x"] - at["columns"],
    }
    return {**found, "between": total - sum(found.values()), "total": total}


def operators(fn: Function, device: str | torch.device = "cpu") -> pd.DataFrame:
    """What `torch.profiler` saw during `fn()`: one row per operator, costliest first.

    Returns:
        Index operator; columns calls, self_seconds (without the operators it calls), share (of all
        self time), allocated_bytes (its own allocations less releases). Device time on CUDA.
    """
    import pandas as pd

    device = parse_device(device)
    fn()
    found = profile(fn, device, profile_memory=True).key_averages()
    kind = "cpu" if device.type == "cpu" else "device"
    rows = [
        {
            "operator": event.key,
            "calls": event.count,
            "self_seconds": getattr(event, f"self_{kind}_time_total") / 1e6,
            "allocated_bytes": getattr(event, f"self_{kind}_memory_usage"),
        }
        for event in found
        if event.key != "[memory]"
    ]
    frame = pd.DataFrame(rows).set_index("operator")
    frame.insert(2, "share", frame["self_seconds"] / frame["self_seconds"].sum())
    return frame.sort_values("self_seconds", ascending=False)


def save_trace(fn: Function, path: str | Path, device: str | torch.device = "cpu") -> Path:
    """Write what `torch.profiler` saw during `fn()` for chrome://tracing or ui.perfetto.dev."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"path must lie in an existing folder, got {str(path)!r}")
    fn()
    profile(fn, parse_device(device)).export_chrome_trace(str(path))
    return path
