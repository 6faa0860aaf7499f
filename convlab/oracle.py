"""`check`: output and gradients of an algorithm against float64.

The tolerance is derived, not fitted. A sum of n products in a format of unit roundoff u has, with
probability at least 1 - 2·exp(-λ²/2) per product, an error of at most λ·√n·u·Σ|a·b|, whatever the
order of summation (Higham and Mary, "A new approach to probabilistic rounding error analysis",
SIAM J. Sci. Comput. 41(5), 2019, Theorem 3.1 to first order). Σ|a·b| is the same convolution of
absolute values. λ = 6 leaves one output value in 10⁷ outside; inputs already rounded to the format
are exact, so they add nothing.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from convlab.algorithms import ALGORITHMS, Algorithm
from convlab.problem import ConvProblem, parse_device, parse_dtype

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
    algorithm: str | Algorithm,
    problem: ConvProblem,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    seed: int = 0,
    gradients: bool = True,
    arithmetic: str | torch.dtype | None = None,
) -> Check:
    """Compare `algorithm` with the float64 convolution on `problem`.

    Args:
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
    expected, scales, counts = _reference(problem, dtype, seed, gradients)
    computed = dtype if arithmetic is None else parse_dtype(arithmetic)
    roundoff = _roundoff(device, computed)
    rounding = 0.0 if computed == dtype else 2 * torch.finfo(computed).eps / 2  # both factors
    errors, reason = {}, ""
    for name, value, exact, scale in zip(("y", *NAMES), found, expected, scales, strict=False):
        what = name if name == "y" else f"gradient of {name}"
        if value.shape != exact.shape:
            reason = reason or f"{what} has shape {tuple(value.shape)}, not {tuple(exact.shape)}"
            errors[name] = math.inf
            continue
        difference = (value - exact).abs()
        errors[name] = _relative(difference, exact)
        allowed = (tolerance(counts[name], roundoff, computed) + rounding) * scale
        if not bool((difference <= allowed).all()):
            reason = reason or f"{what} differs from float64 by {errors[name]:.1e} of its maximum"
    return Check(
        ok=not reason,
        max_error=errors.pop("y"),
        grad_errors=errors,
        repeatable=all(torch.equal(a, b) for a, b in zip(*runs, strict=True)),
        reason=reason,
    )


def tolerance(count: int, roundoff: float, dtype: torch.dtype) -> float:
    """Allowed error of a sum of `count` products, as a fraction of the sum of absolute products.

    One more roundoff stands for storing the result in `dtype`.
    """
    return LAMBDA * math.sqrt(max(count, 1)) * roundoff + torch.finfo(dtype).eps / 2


def _roundoff(device: torch.device, dtype: torch.dtype) -> float:
    """The unit roundoff of the arithmetic: that of TF32 where CUDA may use it."""
    if dtype == torch.float64:
        return torch.finfo(dtype).eps / 2
    tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    if dtype == torch.float32 and device.type == "cuda" and tf32:
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
def _reference(problem: ConvProblem, dtype: torch.dtype, seed: int, gradients: bool):
    """Exact results, the same of absolute values, and the products summed into each."""
    tensors = problem.inputs("cpu", dtype, seed)
    grad = _output_gradient(problem, seed).to(dtype)
    exact = _float64(problem, tensors, grad, gradients)
    absolute = _float64(problem, [t.abs() for t in tensors], grad.abs(), gradients)
    n, _, oh, ow = problem.output_shape
    per_group = problem.out_channels // problem.groups
    counts = {
        "y": problem.taps + 1,
        "x": per_group * problem.kernel_size[0] * problem.kernel_size[1],
        "weight": n * oh * ow,
        "bias": n * oh * ow,
    }
    return exact, absolute, counts


def _float64(problem: ConvProblem, tensors, grad: Tensor, gradients: bool) -> list[Tensor]:
    tensors = [t.double().requires_grad_(gradients) for t in tensors]
    x, weight, bias = tensors
    (top, bottom), (left, right) = problem.pads
    x = F.pad(x, (left, right, top, bottom))
    y = F.conv2d(x, weight, bias, **{**problem.kwargs, "padding": 0})
    if not gradients:
        return [y]
    return [y.detach(), *torch.autograd.grad(y, tensors, grad.double())]
