"""Convolutions of another kind: `flex_conv2d`, its definition by columns, and `nn.Conv2d`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from convlab import cost, oracle, records, timing
from convlab.experiments.cases import GUESS, Case, Settings, judge, memory_error, short_name
from convlab.flex import examples, flex_conv2d
from convlab.problem import ConvProblem
from convlab.records import Row
from convlab.timing import Function


def product(x: Tensor, w: Tensor) -> Tensor:
    return x * w


COMBINATIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "Σ |x − w|": (examples.absolute_difference, "sum"),
    "max (x + w)": (examples.plus, "max"),
    "logsumexp (x + w)": (examples.plus, "logsumexp"),
    "Σ x · w": (product, "sum"),
}
"""Name → what is combined how, and how that is reduced."""

FLEX, BOTH = ("flex_conv2d",), ("by_definition", "flex_conv2d")
ON_GPU = ("flex_conv2d_triton",)  # beside these
BACKENDS = {"flex_conv2d": "inductor", "flex_conv2d_triton": "triton", "by_definition": "eager"}
CHECKED = 2  # images whose values and gradients are compared with float64
GRID = 2**16  # inputs are multiples of 1 / GRID there: sums exact, different ones far apart
COPIES = {"forward": 3, "train": 6}  # of all terms that the definition holds at a time, at most


def custom_case(
    experiment: str,
    combination: str,
    problem: ConvProblem,
    pass_: str,
    settings: Settings,
    forms: tuple[str, ...] = BOTH,
) -> Case:
    """One of `COMBINATIONS` on one problem and one pass ("forward" or "train"), and `nn.Conv2d`.

    Each form is compared with float64 first; one that fails gets a row with its error and no time.
    The definition takes so long that a case with it has two rounds; one without has as many as any.
    """
    forms = forms + ON_GPU if settings.on_gpu else forms
    name = f"{experiment}/{short_name(problem)}/{combination}/{pass_}"
    name += "/by definition" if "by_definition" in forms else ""
    run = functools.partial(_custom, experiment, combination, problem, pass_, settings, forms)
    slowest = terms(problem) / GUESS.bytes_per_second * 4 * COPIES[pass_]
    slowest *= "by_definition" in forms and needed_bytes("by_definition", problem, pass_) < 16e9
    return Case(experiment, name, run, ("native", *forms), seconds=10 + 4 * slowest)


def terms(problem: ConvProblem) -> int:
    """How many values `combine` yields: one for each product of the convolution."""
    return cost.flops(problem) // 2


def needed_bytes(form: str, problem: ConvProblem, pass_: str) -> int:
    """Bytes that a float32 pass needs, its input included; a guess from above."""
    s = cost.Sizes.of(problem)
    tensors = 4 * 5 * (s.x + s.weight + s.y)
    return tensors + (4 * COPIES[pass_] * terms(problem) if form == "by_definition" else 0)


def _custom(experiment, combination, problem, pass_, settings, forms) -> list[Row]:
    device, options = settings.device, settings.brief
    if "by_definition" in forms:
        options = options | {"min_rounds": 3}  # seconds each, and hundreds of times slower
    told, functions, peaks = {}, {}, {}
    for form in ("native", *forms):
        if form == "native":
            status, values = judge(form, problem, settings, pass_)
        else:
            status, values = _judged(form, combination, problem, pass_, settings)
        if status == "ok":
            functions[form] = custom_pass(form, combination, problem, pass_, device)
            try:
                peaks[form] = timing.peak_bytes(functions[form], device)
            except RuntimeError as error:
                functions.pop(form)
                status, values = memory_error(error)
        told[form] = values | {"status": status, "device": device, "part": combination}
    known = {form: timing.once(fn, device) for form, fn in functions.items()}
    found = timing.interleaved(functions, device, known=known, peak=False, **options)
    rows = []
    for form, values in told.items():
        m = found.get(form)
        if m is not None:
            m = dataclasses.replace(m, peak_bytes=peaks[form])
            values["launches"] = timing.launches(functions[form]) if settings.on_gpu else None
        rows.append(records.row(experiment, form, problem, pass_, m, **values))
    return rows


def custom_pass(form: str, combination: str, problem: ConvProblem, pass_: str, device) -> Function:
    """A function of no arguments that makes one pass of "native" or one of `BACKENDS`."""
    x, weight, _ = problem.inputs(device, requires_grad=True)
    if form == "native":
        forward = functools.partial(torch.nn.functional.conv2d, x, weight, None, **problem.kwargs)
    else:
        forward = functools.partial(combined, form, combination, x, weight, problem)
    if pass_ == "forward":
        return torch.no_grad()(forward)
    grad = torch.ones(problem.output_shape, device=device)
    return lambda: torch.autograd.grad(forward(), (x, weight), grad)


def combined(form: str, combination: str, x: Tensor, weight: Tensor, problem: ConvProblem):
    """x (N, C, H, W), weight (K, C / groups, kh, kw) → (N, K, OH, OW)."""
    combine, reduce = COMBINATIONS[combination]
    return flex_conv2d(x, weight, combine, reduce, **problem.kwargs, backend=BACKENDS[form])


def _judged(form, combination, problem, pass_, settings) -> tuple[str, dict]:
    """The status of a form before it is timed, and what its row says about it."""
    needed, free = needed_bytes(form, problem, pass_), settings.memory
    if needed > free:
        values = {"predicted_bytes": needed, "free_bytes": int(free)}
        return records.PREDICTED, {"extra": values}
    try:
        error, excess = deviation(form, combination, problem, pass_, settings.device)
    except RuntimeError as error:
        return memory_error(error)
    values = {"error": records.round_digits(error) if math.isfinite(error) else None}
    if excess <= 1:
        return "ok", values
    reason = f"the error is {excess:.3g} times what rounding explains"
    return "wrong", values | {"extra": {"reason": reason}}


def deviation(
    form: str, combination: str, problem: ConvProblem, pass_: str = "train", device: str = "cpu"
) -> tuple[float, float]:
    """(error of y against float64, over the largest y; largest error over what rounding explains).

    Output, and for "train" gradients, of the first images; float64 by the definition. What is
    compiled for a size runs on all images, the others with a gradient of zero: it is what will be
    timed. A sum of n terms of at most M is off by at most λ·√n·u·n·M (`convlab.oracle`), and each
    term by some roundoffs; (1 + |x|) (1 + |w|) exceeds all these functions and their derivatives.
    """
    images = min(CHECKED, problem.batch)
    x, weight, _ = ((t * GRID).round() / GRID for t in problem.inputs(device))
    grad = torch.ones(problem.output_shape, device=device)
    grad[images:] = 0
    x.requires_grad_(pass_ == "train")
    if form == "by_definition":
        x, grad = x[:images], grad[:images]
    found = _with_gradients(form, combination, x, weight, grad, problem)
    true = _with_gradients(
        "by_definition",
        combination,
        x[:images].double(),
        weight.double(),
        grad[:images].double(),
        problem,
    )
    largest = float((1 + x.detach().abs().max()) * (1 + weight.abs().max()))
    k = math.prod(problem.kernel_size)
    counts = (
        weight[0].numel(),
        len(weight) // problem.groups * k,
        grad[:images, 0].numel(),
    )
    unit, excess = torch.finfo(torch.float32).eps / 2, 0.0
    for value, exact, n in zip(found, true, counts):  # only y in a forward pass
        limit = (oracle.LAMBDA * math.sqrt(n) + 8) * unit * n * largest
        wrong = (value[: len(exact)].double() - exact).abs().max()
        excess = max(excess, float(wrong.nan_to_num(nan=math.inf)) / limit)
    y, y64 = found[0][:images].double(), true[0]
    return float((y - y64).abs().max() / y64.abs().max()), excess


def _with_gradients(form, combination, x, weight, grad, problem) -> list[Tensor]:
    """y, and if x requires gradients those of x and weight."""
    needed = x.requires_grad
    tensors = [t.detach().requires_grad_(needed) for t in (x, weight)]
    y = combined(form, combination, *tensors, problem)
    return [y.detach(), *(torch.autograd.grad(y, tensors, grad) if needed else ())]
