"""`flex_conv2d` and its gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from convlab.algorithms import base
from convlab.algorithms.compiled import missing_compiler
from convlab.flex import running
from convlab.flex.combine import parse
from convlab.flex.forms import REDUCTIONS, by_definition
from convlab.problem import same_padding

BACKENDS = ("inductor", "triton", "eager", "loops")


def flex_conv2d(
    x: Tensor,
    weight: Tensor,
    combine: Callable[..., Tensor],
    reduce: str = "sum",
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    pad_value: float = 0.0,
    aux: Tensor | None = None,
    backend: str = "inductor",
) -> Tensor:
    """A convolution with `combine(x, w)` in place of x · w and `reduce` in place of the sum.

    y[n, k, i, j] = reduce over c, r, s of combine(x[n, c, i + r, j + s], weight[k, c, r, s]),
    with stride, padding, dilation and groups as in `F.conv2d`.

    x (N, C, H, W) or (C, H, W), weight (K, C / groups, kh, kw) → (N, K, OH, OW).

    Args:
        combine: a function of two tensors of equal shape (three with `aux`), made of elementwise
            PyTorch operations. It may close over floating-point tensors of one number, which get
            gradients too.
        reduce: "sum", "max" or "logsumexp". Where several terms share the maximum, each gets an
            equal part of the gradient, as in `torch.amax`; where `combine` holds an exponential or
            the like, or on CUDA, terms within 8 roundoffs of the maximum count as equal to it.
        pad_value: what lies outside x. The terms of the padding count: with "max" and a combine
            x + w, -inf leaves them out; with "logsumexp" too.
        aux: (N, 1 or K, OH, OW), a value per output pixel: the third argument of combine.
        backend: "inductor": fused loops, compiled at the first call of each size; "eager": columns
            and broadcasting, the definition; "loops": the fused loops uncompiled, a few images at
            a time, which "inductor" falls back to where there is no C++ compiler; "triton":
            kernels for CUDA that need no padded copy of x (`triton_source` shows their
            functions), which on the CPU run in `convlab.kernels.interpreter` only.

    Differentiable; a second time through the eager form, with its memory.

    Raises:
        ValueError, TypeError: an argument that is not as above; the errors of `F.conv2d`.
    """
    x, weight, sizes = _checked(x, weight, stride, padding, dilation, groups)
    if x.dim() == 3:
        aux = aux[None] if isinstance(aux, Tensor) and aux.dim() == 3 else aux
        return flex_conv2d(x[None], weight, combine, reduce, *sizes, pad_value, aux, backend)[0]
    stride, padding, dilation, groups = sizes
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if isinstance(pad_value, bool) or not isinstance(pad_value, int | float):
        raise ValueError(f"pad_value must be a number, got {pad_value!r}")
    pads = _pads(padding, weight, dilation)
    size = tuple(
        (n + sum(p) - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], pads, dilation, weight.shape[2:], stride)
    )
    _check_aux(aux, x, (len(x), len(weight), *size))
    (top, bottom), (left, right) = pads
    surround = (left, right, top, bottom), float(pad_value)
    if backend == "eager" or not x.numel() or torch.compiler.is_compiling():
        padded = _pad(x, *surround)
        return by_definition(padded, weight, aux, combine, reduce, stride, dilation, groups)
    parsed = parse(combine, torch.float32 if x.dtype.itemsize < 4 else x.dtype, aux is not None)
    compiled = backend == "inductor" and _can_compile(x.device.type)
    call = running.Call(parsed, reduce, stride, (top, left), dilation, groups, compiled)
    call = call._replace(size=size, triton=backend == "triton")
    return _Flex.apply(x, weight, aux, call, combine, surround, *parsed.captured)


class _Flex(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, aux, call, combine, surround, *captured):
        ctx.call, ctx.combine, ctx.surround = call, combine, surround
        if call.triton:
            from convlab.flex import launching

            y = launching.forward(call, x, weight, aux, captured, surround[1])
        else:
            y = running.forward(call, _pad(x, *surround), weight.contiguous(), aux, captured)
        kept = None if call.reduce == "sum" else y
        ctx.save_for_backward(x, weight, aux, kept, *captured)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, aux, y, *captured = ctx.saved_tensors
        call, nothing = ctx.call, (None, None, None)
        needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[6:]]
        if torch.is_grad_enabled():  # backward itself is to be differentiated
            padded = _pad(x, *ctx.surround)
            wanted = [t for t, need in zip((x, weight, aux, *captured), needs) if need]
            sizes = call.stride, call.dilation, call.groups
            again = by_definition(padded, weight, aux, ctx.combine, call.reduce, *sizes)
            some = torch.autograd.grad(again, wanted, grad, create_graph=True, allow_unused=True)
            found = iter(some)
            results = [next(found) if need else None for need in needs]
        else:
            tensors = aux, captured, grad, y, needs
            if call.triton:
                from convlab.flex import launching

                results = launching.gradients(call, x, weight, *tensors, ctx.surround[1])
            else:
                padded = _pad(x, *ctx.surround)
                results = running.gradients(call, x, padded, weight.contiguous(), *tensors)
            shapes = [None, None, None, *(t.shape for t in captured)]
            results = [
                r if r is None or shape is None else r.reshape(shape)
                for r, shape in zip(results, shapes)
            ]
        return *results[:3], *nothing, *results[3:]


def _checked(x, weight, stride, padding, dilation, groups):
    """Tensors, and (stride, padding, dilation, groups) as pairs; the errors of `F.conv2d`."""
    try:
        pad = padding if isinstance(padding, str) else base.two(padding)
        sizes = base.two(stride), pad, base.two(dilation), groups
        valid = base.takes(x, weight, None, *sizes)
    except (TypeError, AttributeError):
        valid = False
    if not valid:
        F.conv2d(x, weight, None, stride, padding, dilation, groups)
        raise ValueError(f"flex_conv2d needs floating-point tensors, got {x.dtype}")
    return x, weight, sizes


def _pads(padding, weight, dilation):
    """((top, bottom), (left, right))."""
    if padding == "same":
        return tuple(map(same_padding, weight.shape[2:], dilation))
    return tuple((p, p) for p in ((0, 0) if padding == "valid" else padding))


def _pad(x: Tensor, pads, value: float) -> Tensor:
    return F.pad(x, pads, value=value) if any(pads) else x.contiguous()


def _check_aux(aux, x: Tensor, shape) -> None:
    if aux is None:
        return
    if not isinstance(aux, Tensor):
        raise TypeError(f"aux must be a tensor or None, got {aux!r}")
    n, k, *size = shape
    if aux.dim() != 4 or len(aux) != n or aux.shape[1] not in (1, k) or [*aux.shape[2:]] != size:
        expected = f"({n}, 1 or {k}, {size[0]}, {size[1]})"
        raise ValueError(f"aux must have shape {expected}, got {tuple(aux.shape)}")
    if aux.dtype != x.dtype or aux.device != x.device:
        raise ValueError(
            f"aux must be {x.dtype} on {x.device} as x is, got {aux.dtype} on {aux.device}"
        )


_warned = False


def _can_compile(device: str) -> bool:
    """Whether there is a compiler; says once if not."""
    global _warned
    reason = missing_compiler(device)
    if reason and not _warned:
        _warned = True
        warnings.warn(f"{reason} flex_conv2d loops over the taps instead.", stacklevel=3)
    return reason is None
