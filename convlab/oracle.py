"""`check`: output and gradients of an algorithm against float64.

The tolerance is derived, not fitted. A sum of n products in a format of unit roundoff u has, with
probability at least 1 - 2·exp(-λ²/2) per product, an error of at most λ·√n·u·Σ|a·b|, whatever the
order of summation (Higham and Mary, "A new approach to probabilistic rounding error analysis",
SIAM J. Sci. Comput. 41(5), 2019, Theorem 3.1 to first order). Σ|a·b| is the same convolution of
absolute values. λ = 6 leaves one output value in 10⁷ outside; inputs already rounded to the format
are exact, so they add nothing.

Two algorithms add up other things, in float32 at least (`ROUNDING`). Winograd's: the same bound
with the sum of the sizes of all that it adds up, and 13 roundings more on the way of a product:
pixels pass 2 additions, taps 6 at most, results 4, and the product itself is 1. The Fourier
transform's errors spread over the whole plane: a transform of S values is off by at most log₂S·η in
the 2-norm, η = (1 + 4√2)u (Higham, "Accuracy and stability of numerical algorithms", 2nd ed.,
Theorem 24.2). By Cauchy and Schwarz the transforms of a and b move no value of their correlation by
more than 2·log₂S·η·‖a‖₂·‖b‖₂, and the inverse by log₂S·η·‖a‖₂·‖b‖₁; ‖b‖₂ ≤ ‖b‖₁.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from convlab import cost
from convlab.algorithms import ALGORITHMS, Algorithm
from convlab.algorithms.fft import fast_length
from convlab.algorithms.method import flip
from convlab.algorithms.winograd import magnitudes
from convlab.kernels import interpreting
from convlab.problem import ConvProblem, parse_device, parse_dtype

CHECK_BATCH = 16  # at most so many images are checked before an algorithm is timed
CHECK_FLOPS = 2e9  # and at most so many of their products, but always one image
LAMBDA = 6.0
TF32_ROUNDOFF = 2.0**-11
NAMES = ("x", "weight", "bias")


@dataclass(frozen=True)
class Check:
    """What `check` found.

    Attributes:
        ok: every value of the output and of the gradients is within the tolerance.
        max_error: largest |y - y64|, divided by the largest |y64|.
        grad_errors: the same for the gradients of x, weight and bias; empty if not asked for.
        repeatable: two runs gave the same bits.
        reason: why it is not ok, or "".
    """

    ok: bool
    max_error: float
    grad_errors: dict[str, float] = field(default_factory=dict)
    repeatable: bool = True
    reason: str = ""


def check(
    algorithm: str | Algorithm | Callable[..., Tensor],
    problem: ConvProblem,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    seed: int = 0,
    gradients: bool = True,
    arithmetic: str | torch.dtype | None = None,
) -> Check:
    """Compare `algorithm` with the float64 convolution on `problem`.

    Args:
        algorithm: a name, or any function with `F.conv2d`'s arguments; its errors are those of sums
            of products unless it says otherwise (`Algorithm.rounding`).
        arithmetic: the format to which the algorithm itself rounds what it is given, as autocast
            does; `dtype` if None.

    Raises:
        ValueError: no such algorithm, or one that does not support the problem.
    """
    device, dtype = parse_device(device), parse_dtype(dtype)
    if isinstance(algorithm, str):
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
        algorithm = ALGORITHMS[algorithm]
    runs = [_run(algorithm, problem, device, dtype, seed, gradients) for _ in range(2)]
    found = runs[0]
    expected = _reference(problem, dtype, seed, gradients)
    computed = dtype if arithmetic is None else parse_dtype(arithmetic)
    roundoff = _roundoff(device, computed)
    rounds = 0.0 if computed == dtype else 2 * torch.finfo(computed).eps / 2  # both factors
    rounding = getattr(algorithm, "rounding", "sums")
    allowed = _allowed(rounding, problem, dtype, seed, gradients, roundoff, computed, rounds)
    errors, reason = {}, ""
    for name, value, exact in zip(("y", *NAMES), found, expected, strict=False):
        what = name if name == "y" else f"gradient of {name}"
        if value.shape != exact.shape:
            reason = reason or f"{what} has shape {tuple(value.shape)}, not {tuple(exact.shape)}"
            errors[name] = math.inf
            continue
        difference = (value - exact).abs()
        errors[name] = _relative(difference, exact)
        if not bool((difference <= allowed[name]).all()):
            reason = reason or f"{what} differs from float64 by {errors[name]:.1e} of its maximum"
    return Check(
        ok=not reason,
        max_error=errors.pop("y"),
        grad_errors=errors,
        repeatable=all(torch.equal(a, b) for a, b in zip(*runs, strict=True)),
        reason=reason,
    )


def checked_part(problem: ConvProblem) -> ConvProblem:
    """`problem` with as few images as a check needs."""
    per_image = cost.flops(problem) / max(problem.batch, 1)
    images = min(problem.batch, CHECK_BATCH, max(1, int(CHECK_FLOPS / per_image)))
    return problem.replace(batch=images)


def tolerance(count: int, roundoff: float, dtype: torch.dtype) -> float:
    """Allowed error of a sum of `count` products, as a fraction of the sum of absolute products.

    One more roundoff stands for storing the result in `dtype`.
    """
    return LAMBDA * math.sqrt(max(count, 1)) * roundoff + torch.finfo(dtype).eps / 2


def _roundoff(device: torch.device, dtype: torch.dtype) -> float:
    """The unit roundoff of the arithmetic: TF32's where CUDA may use that."""
    if dtype == torch.float64:
        return torch.finfo(dtype).eps / 2
    tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    on_gpu = device.type == "cuda" or interpreting()
    if dtype == torch.float32 and on_gpu and tf32:
        return TF32_ROUNDOFF
    return torch.finfo(dtype).eps / 2


def _relative(difference: Tensor, exact: Tensor) -> float:
    if not exact.numel():
        return 0.0
    top = float(exact.abs().max())
    return float(difference.max()) / top if top else float(difference.max())


def _run(
    algorithm: Algorithm,
    problem: ConvProblem,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    gradients: bool,
) -> list[Tensor]:
    """y, and the gradients of x, weight and bias, in float64 on the CPU."""
    tensors = problem.inputs(device, dtype, seed, requires_grad=gradients)
    y = algorithm(*tensors, **problem.kwargs)
    results = [y.detach()]
    if gradients and y.shape == problem.output_shape:
        grad = _output_gradient(problem, seed).to(device, dtype)
        if y.requires_grad:
            results += torch.autograd.grad(y, tensors, grad, materialize_grads=True)
        else:
            results += [torch.zeros_like(t) for t in tensors]
    return [r.to("cpu", torch.float64) for r in results]


def _output_gradient(problem: ConvProblem, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(problem.output_shape, generator=generator)


@functools.lru_cache(maxsize=2)
def _reference(
    problem: ConvProblem, dtype: torch.dtype, seed: int, gradients: bool
) -> list[Tensor]:
    """The exact output and gradients of x, weight and bias."""
    grad = _output_gradient(problem, seed).to(dtype)
    return _float64(problem, problem.inputs("cpu", dtype, seed), grad, gradients)


@functools.lru_cache(maxsize=2)
def _allowed(
    rounding: str, problem: ConvProblem, dtype: torch.dtype, seed: int, gradients: bool, *formats
) -> dict[str, Tensor]:
    tensors = [t.double() for t in problem.inputs("cpu", dtype, seed)]
    grad = _output_gradient(problem, seed).to(dtype).double() if gradients else None
    return allowed_errors(rounding, problem, tensors, grad, *formats)


def allowed_errors(
    rounding: str,
    problem: ConvProblem,
    tensors: Sequence[Tensor],
    grad: Tensor | None,
    roundoff: float,
    dtype: torch.dtype,
    rounds: float = 0.0,
) -> dict[str, Tensor]:
    """How far each value of "y" and of the gradients of "x", "weight" and "bias" may be off.

    Args:
        rounding: a key of `ROUNDING`, or "auto": the larger of "sums" and, where it computes the
            problem, "winograd".
        tensors: x (N, C, H, W), weight and bias in float64, holding numbers of the format.
        grad: the gradient of y in float64; None: no gradients.
        roundoff, dtype: of the arithmetic, and the format of the results.
        rounds: relative change of each product by rounding the inputs.
    """
    if rounding == "auto":
        kinds = ["sums"] if ALGORITHMS["winograd"].supports(problem) else ["sums", "winograd"]
        formats = roundoff, dtype, rounds
        each = [allowed_errors(kind, problem, tensors, grad, *formats) for kind in kinds]
        return {name: functools.reduce(torch.maximum, [e[name] for e in each]) for name in each[0]}
    gradients = grad is not None
    sizes = grad.abs() if gradients else None
    absolute = _float64(problem, [t.abs() for t in tensors], sizes, gradients)
    n, _, oh, ow = problem.output_shape
    per_group = problem.out_channels // problem.groups
    counts = problem.taps + 1, per_group * problem.taps // tensors[1].shape[1], n * oh * ow
    factors = [tolerance(count, roundoff, dtype) + rounds for count in (*counts, n * oh * ow)]
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2  # half a step
    allowed = {
        name: factor * scale + subnormal
        for name, factor, scale in zip(("y", *NAMES), factors, absolute)
    }
    if rounding != "sums" and min(t.numel() for t in tensors[:2]):
        store = torch.finfo(dtype).eps / 2
        wide = roundoff if dtype.itemsize >= 4 else torch.finfo(torch.float32).eps / 2
        others = ROUNDING[rounding](problem, tensors, grad, wide)
        allowed |= {name: t + store * absolute[("y", *NAMES).index(name)] for name, t in others}
    return allowed


def _sums(problem: ConvProblem, tensors, grad, roundoff: float) -> list:
    return []


def _winograd(problem: ConvProblem, tensors, grad, roundoff: float) -> list[tuple[str, Tensor]]:
    x, weight, bias = tensors
    g = problem.groups
    (top, _), (left, _) = problem.pads

    def factor(channels: int) -> float:
        return LAMBDA * math.sqrt(channels + 13) * roundoff

    sums = magnitudes(x, weight, (top, left), g) + bias.abs()[:, None, None]
    found = [("y", factor(weight.shape[1] + 1) * sums)]
    back = 2 - top, 2 - left  # where negative, another algorithm makes the gradient
    if grad is not None and min(back) >= 0:
        swapped = flip(weight, g)
        found.append(("x", factor(swapped.shape[1]) * magnitudes(grad, swapped, back, g)))
    return found


def _fft(problem: ConvProblem, tensors, grad, roundoff: float) -> list[tuple[str, Tensor]]:
    x, weight, bias = tensors
    sides = [fast_length(n + sum(p)) for n, p in zip(x.shape[2:], problem.pads)]
    transforms = 3 * math.log2(math.prod(sides)) * (1 + 4 * math.sqrt(2)) * roundoff

    def bound(a: Tensor, b: Tensor, shape, groups: int) -> Tensor:
        """a (P, G·M), b (G·Q, M): Σ over M of both norms → (P, G·Q), over whole planes."""
        a = a.unflatten(1, (groups, -1)).transpose(0, 1)
        b = b.unflatten(0, (groups, -1)).transpose(1, 2)
        summed = (a @ b).transpose(0, 1).flatten(1)
        factor = transforms + LAMBDA * math.sqrt(a.shape[2] + 4) * roundoff
        return (factor * summed)[:, :, None, None].expand(shape)

    two = lambda t: t.flatten(2).norm(dim=2)
    one = lambda t: t.flatten(2).abs().sum(dim=2)
    g = problem.groups
    y = bound(two(x), one(weight), problem.output_shape, g)
    found = [("y", y + 2 * roundoff * bias.abs()[:, None, None])]
    if grad is not None:
        swapped = flip(weight, g)
        found.append(("x", bound(two(grad), one(swapped), x.shape, g)))
        a = one(grad).mT.unflatten(0, (g, -1))  # G, K / G, N
        b = two(x).unflatten(1, (g, -1)).permute(1, 0, 2)  # G, N, C / G
        factor = transforms + LAMBDA * math.sqrt(len(x) + 4) * roundoff
        sums = factor * (a @ b).flatten(0, 1)
        found.append(("weight", sums[:, :, None, None].expand(weight.shape)))
    return found


ROUNDING = {"sums": _sums, "winograd": _winograd, "fft": _fft}
"""What bounds an algorithm's errors → (problem, tensors, grad, roundoff) → (name, bound) pairs."""


def _float64(problem: ConvProblem, tensors, grad: Tensor, gradients: bool) -> list[Tensor]:
    tensors = [t.double().requires_grad_(gradients) for t in tensors]
    x, weight, bias = tensors
    (top, bottom), (left, right) = problem.pads
    x = F.pad(x, (left, right, top, bottom))
    y = F.conv2d(x, weight, bias, **{**problem.kwargs, "padding": 0})
    if not gradients:
        return [y]
    return [y.detach(), *torch.autograd.grad(y, tensors, grad.double(), materialize_grads=True)]
