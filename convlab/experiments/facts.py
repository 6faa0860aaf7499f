"""Cases that compare no algorithms: what is copied, the machine's ceilings, a layer's stages."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from convlab import cost, machine, records, stages, timing
from convlab.experiments.cases import GUESS, Case, Settings, judge, marks, short_name
from convlab.problem import ConvProblem
from convlab.problems import thread_problem
from convlab.records import Row


def stages_case(
    problem: ConvProblem, algorithm: str, settings: Settings, flags: dict | None = None
) -> Case:
    """Time of each stage, forward and backward, and of the whole pass without marks."""
    name = f"stages/{short_name(problem)}/{algorithm}" + marks(flags)
    options = settings.options | {"seconds": 2 * settings.options["seconds"]}
    run = functools.partial(_stages, problem, algorithm, settings, options)
    once = 8 * cost.predicted_seconds("thread", problem, GUESS)  # forward, backward, twice
    seconds = max(options["seconds"], options["min_rounds"] * once) + once
    return Case("stages", name, run, (), flags or {}, seconds=seconds)


def _stages(problem, algorithm, settings, options) -> list[Row]:
    device = settings.device
    status, values = judge(algorithm, problem, settings)
    values["device"] = device
    if status != "ok":
        return [records.row("stages", algorithm, problem, "", status=status, **values)]
    times = stages.stage_times(problem, algorithm, device, **options)
    rows = []
    for (direction, part), group in times.groupby(["direction", "part"], sort=False):
        samples = tuple(group.sort_values("round")["seconds"])
        m = timing.Measurement(samples, 1, None, device, machine.flags(), *timing.clock(device))
        rows.append(records.row("stages", algorithm, problem, direction, m, part=part, **values))
    return rows


def storage_case(settings: Settings) -> Case:
    """Does each operation return a view of its input or memory of its own, and how much?"""
    return Case("storage", "storage", functools.partial(_storage, settings))


def _storage(settings: Settings) -> list[Row]:
    problem = thread_problem(2)
    x, weight, _ = problem.inputs(settings.device)
    columns = F.unfold(x, 3, padding=1)
    product = (columns.transpose(1, 2) @ weight.flatten(1).t()).transpose(1, 2)
    operations = {
        "F.unfold": (x, lambda: F.unfold(x, 3, padding=1)),
        "F.fold": (product, lambda: F.fold(product, (50, 50), kernel_size=1)),
        "Tensor.unfold": (x, lambda: x.unfold(2, 3, 1).unfold(3, 3, 1)),
        "Tensor.view": (x, lambda: x.view(2, 10, -1)),
    }
    rows = []
    for name, (source, operation) in operations.items():
        result = operation()
        shares = source.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
        written = 0 if shares else result.nbytes
        extra = {"view": shares, "bytes_in": source.nbytes, "bytes_written": written}
        values = {"device": settings.device, "part": name, "extra": extra}
        rows.append(records.row("storage", "thread", problem, "forward", **values))
    return rows


def ceilings_case(settings: Settings) -> Case:
    """FLOP/s of a large matrix product and bytes/s of a large copy: the roofline's two lines."""
    return Case("ceilings", "ceilings", functools.partial(_ceilings, settings))


def _ceilings(settings: Settings) -> list[Row]:
    """The product by `torch.mm`, and as the convolutions' own library does its best arithmetic.

    A matrix library may leave half of a processor's arithmetic unused that another one reaches.
    """
    device = settings.device
    side, values = (2048, 2**26) if device == "cpu" else (8192, 2**29)
    a, b, c = (torch.randn(side, side, device=device) for _ in range(3))
    image, weight = b.view(1, side, side // 64, 64), a.view(side, side, 1, 1)
    p = ConvProblem(32 if device == "cpu" else 512, 128, 128, 28, 28, kernel_size=3, padding=1)
    x, taps = (t.contiguous(memory_format=torch.channels_last) for t in p.inputs(device)[:2])
    source = torch.randn(values, device=device)
    target = torch.empty_like(source)
    functions = {
        "product": lambda: torch.mm(a, b, out=c),
        "product as a convolution": lambda: F.conv2d(image, weight),
        "convolution": lambda: F.conv2d(x, taps, padding=1),
        "copy": lambda: target.copy_(source),
    }
    measured = timing.interleaved(functions, device, peak=False, **settings.options)
    amounts = {"copy": {"bytes": 2 * source.nbytes}, "convolution": {"flops": cost.flops(p)}}
    rows = []
    for part, m in measured.items():
        extra = amounts.get(part, {"flops": 2 * side**3})
        rows.append(records.row("ceilings", "", None, "", m, device=device, part=part, extra=extra))
    return rows


def ceilings_of(rows: Iterable[Row]) -> cost.Ceilings:
    """`cost.Ceilings` from the rows of the experiment "ceilings": the fastest of its products.

    Raises:
        ValueError: there are no such rows.
    """
    found = [r for r in rows if r.experiment == "ceilings"]
    if not {"product", "copy"} <= {r.part for r in found}:
        raise ValueError("rows must hold the experiment 'ceilings', got none of it")
    flops, moved = (
        max(r.extra[amount] / r.median for r in found if amount in r.extra)
        for amount in ("flops", "bytes")
    )
    return cost.Ceilings(flops_per_second=flops, bytes_per_second=moved)
