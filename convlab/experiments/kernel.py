"""`implicit_gemm` beside the library and beside columns in memory, in the same number format.

Only on CUDA. Every candidate is checked against float64 with the batch, and so with the tile or the
algorithm of cuDNN, that is timed: a forward pass on its first and last image, a training pass as a
whole. What is made of unfold and products trains on fewer images for its check.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from convlab import cost, machine, oracle, records, timing
from convlab.experiments.cases import (
    Case,
    Settings,
    checked_part,
    memory_error,
    needed_bytes,
    outcome,
    prepared_pass,
    short_name,
)
from convlab.peers import find
from convlab.problem import DTYPES, ConvProblem
from convlab.problems import NETWORKS, PROBLEMS, thread_problem
from convlab.records import Row
from convlab.timing import Function


@dataclass(frozen=True)
class Mode:
    """A number format, with the same flags for convolutions and for matrix products."""

    dtype: str
    flags: dict = field(default_factory=dict)


def _tf32(on: bool) -> dict:
    return {"cudnn_tf32": on, "matmul_tf32": on, "cudnn_benchmark": True}


MODES = {
    "TF32": Mode("float32", _tf32(True)),
    "fp32": Mode("float32", _tf32(False)),
    "bf16": Mode("bfloat16", _tf32(False)),
    "fp16": Mode("float16", _tf32(False)),
}
RIVALS = ("native", "implicit_gemm")
LAYOUTS = ("NCHW", "NHWC")
EXPLICIT = ("unfold", "unfold_batched", "thread")
INDUCTOR = "compiled_native_matmul"
COMPILED_MODES = ("TF32", "bf16")  # seconds of compiling each
BATCH = 256


def candidates(problem: ConvProblem, pass_: str, mode: str) -> list[tuple[str, str]]:
    """(algorithm, layout) of all that are compared; inductor only on the thread's problem."""
    found = [(name, layout) for name in RIVALS for layout in LAYOUTS]
    found += [(name, "NCHW") for name in EXPLICIT]
    threads = problem == thread_problem(BATCH) and pass_ == "forward"
    return found + [(INDUCTOR, "NCHW")] * (threads and mode in COMPILED_MODES)


def kernel_cases(s: Settings) -> list[Case]:
    """The thread's problem forward and in training, ResNet-50's 3×3 layers forward, each mode."""
    batches = (s.batch(BATCH),) if s.quick else (BATCH, 2 * BATCH)
    problems = [(thread_problem(n), q) for n in batches for q in ("forward", "train")]
    layers = [PROBLEMS[name] for name in NETWORKS["resnet50"]]
    layers = [p.replace(batch=s.batch(BATCH)) for p in layers if p.kernel_size == (3, 3)]
    problems += [(p, "forward") for p in (layers[:1] if s.quick else layers)]
    cases = [kernel_case(p, q, mode, s) for p, q in problems for mode in MODES]
    return [roof_case(mode, s) for mode in MODES] + cases


def roof_case(mode: str, settings: Settings) -> Case:
    """FLOP/s of a large matrix product in this number format, bytes/s of a large copy."""
    run = functools.partial(_roof, mode, settings)
    return Case("kernel", f"kernel/roof/{mode}", run, flags=MODES[mode].flags)


def _roof(mode: str, settings: Settings) -> list[Row]:
    side, values = (8192, 2**29) if settings.on_gpu else (256, 2**20)
    device, dtype = settings.device, DTYPES[MODES[mode].dtype]
    a, b, c = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(3))
    source = torch.zeros(values, device=device, dtype=dtype)
    target = torch.empty_like(source)
    functions = {"product": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}
    amounts = {"product": {"flops": 2 * side**3}, "copy": {"bytes": 2 * source.nbytes}}
    measured = timing.interleaved(functions, device, peak=False, **settings.brief)
    return [
        records.row(
            "kernel",
            "",
            None,
            "",
            m,
            device=device,
            dtype=MODES[mode].dtype,
            part=f"{mode}, {part}",
            extra=amounts[part],
        )
        for part, m in measured.items()
    ]


def roofs_of(rows: Iterable[Row]) -> dict[str, cost.Ceilings]:
    """Mode → what the machine reaches in it, from the newest rows of `roof_case`."""
    found: dict[str, dict[str, Row]] = {}
    for r in rows:
        if r.experiment == "kernel" and not r.algorithm and r.samples:
            mode, _, part = r.part.partition(", ")
            found.setdefault(mode, {})[part] = r
    return {
        mode: cost.Ceilings(
            parts["product"].extra["flops"] / parts["product"].median,
            parts["copy"].extra["bytes"] / parts["copy"].median,
        )
        for mode, parts in found.items()
    }


def kernel_case(problem: ConvProblem, pass_: str, mode: str, settings: Settings) -> Case:
    """All candidates on one problem, one pass and one number format."""
    names = candidates(problem, pass_, mode)
    return Case(
        "kernel",
        f"kernel/{short_name(problem)}/{pass_}/{mode}",
        functools.partial(_compare, problem, pass_, mode, names, settings),
        tuple(name for name, _ in names),
        MODES[mode].flags,
        seconds=4.0,
    )


def _compare(problem, pass_, mode, names, settings) -> list[Row]:
    dtype, device, rows, functions, told = MODES[mode].dtype, settings.device, [], {}, {}
    for name, layout in names:
        key = f"{name}, {layout}"
        status, values, fn = _ready(name, problem, pass_, dtype, layout, settings)
        if fn is not None:
            functions[key] = fn
            values["launches"] = timing.launches(fn) if settings.on_gpu else None
        told[key] = values | {"status": status, "part": f"{mode}, {layout}", "layout": layout}
    measured = timing.interleaved(functions, device, **settings.brief)
    for (name, _), (key, values) in zip(names, told.items(), strict=True):
        values |= {"device": device, "dtype": dtype}
        rows.append(records.row("kernel", name, problem, pass_, measured.get(key), **values))
    return rows


def _ready(
    name: str, problem: ConvProblem, pass_: str, dtype: str, layout: str, settings: Settings
) -> tuple[str, dict, Function | None]:
    """Status, values of the row, and the function to time where it is right."""
    if reason := find(name).supports(problem, settings.device):
        return "unsupported", {"extra": {"reason": reason}}, None
    needed, free = needed_bytes(name, problem, pass_), settings.memory
    if needed > free:
        values = {"predicted_bytes": needed, "free_bytes": int(free)}
        return records.PREDICTED, {"extra": values}, None
    nhwc = layout == "NHWC"
    try:
        whole = problem if name in RIVALS or pass_ == "forward" else checked_part(problem)
        part = whole if pass_ == "train" else whole.replace(batch=min(whole.batch, 2))
        convolution = as_timed(name, whole, nhwc)
        options = {"dtype": dtype, "gradients": pass_ == "train"}
        status, values = outcome(oracle.check(convolution, part, settings.device, **options))
        if status != "ok":
            return status, values, None
        fn = prepared_pass(find(name), problem, pass_, settings.device, dtype, nhwc)
        fn()
    except RuntimeError as error:
        return *memory_error(error), None
    return status, values, fn


def as_timed(name: str, problem: ConvProblem, nhwc: bool) -> Callable[..., Tensor]:
    """`name` for `oracle.check` on two images or on all: it computes the whole batch every time.

    Of two images the first stands in every place but the last, and both outputs are cut out.
    """

    def convolution(x: Tensor, weight: Tensor, bias: Tensor, **sizes) -> Tensor:
        few = len(x) < problem.batch
        if few:
            x = torch.cat([x[:1].expand(problem.batch - 1, -1, -1, -1), x[1:]])
        if nhwc:
            x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        y = find(name)(x, weight, bias, **sizes)
        return torch.cat([y[:1], y[-1:]]) if few else y

    return convolution


# Errors on every problem


def error_cases(s: Settings) -> list[Case]:
    """Every named problem in every number format: no times."""
    problems = dict.fromkeys(checked_part(p) for p in PROBLEMS.values())
    chosen = [*problems][:: 12 if s.quick else 1]
    return [error_case(p, s) for p in chosen]


def error_case(problem: ConvProblem, settings: Settings) -> Case:
    """The rivals' errors on one problem; `extra` holds those of the gradients."""
    name = f"kernel_errors/{short_name(problem)}"
    run = functools.partial(_errors, problem, settings)
    return Case("kernel_errors", name, run, RIVALS * len(MODES), seconds=2.0)


def _errors(problem: ConvProblem, settings: Settings) -> list[Row]:
    rows = []
    for mode, (name, each) in ((m, (n, e)) for m, e in MODES.items() for n in RIVALS):
        with machine.setting(**each.flags):
            values = _error(name, problem, each.dtype, settings)
            values |= {"part": mode, "dtype": each.dtype, "device": settings.device}
            rows.append(records.row("kernel_errors", name, problem, "train", **values))
    return rows


def _error(name: str, problem: ConvProblem, dtype: str, settings: Settings) -> dict:
    if reason := find(name).supports(problem, settings.device):
        return {"status": "unsupported", "extra": {"reason": reason}}
    found = oracle.check(find(name), problem, settings.device, dtype)
    status, values = outcome(found)
    gradients = {k: records.round_digits(v) for k, v in found.grad_errors.items()}
    extra = {**values.get("extra", {}), "gradients": gradients, "repeatable": found.repeatable}
    return values | {"status": status, "extra": extra}
