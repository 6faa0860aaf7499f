"""Runs the loops of a custom convolution: compiled, or as they are on a few images at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from convlab import machine
from convlab.algorithms.chunked import chunks
from convlab.algorithms.compiled import ONE_EXPRESSION, compiled_function, sums_at_once
from convlab.flex import loops
from convlab.flex.combine import Combine
from convlab.flex.loops import Plan

SLOPES = 2  # registers of a sum over slopes: more of them only compile for longer
EXPENSIVE = 4  # what an exponential takes of the registers
MULTIPLY_ADD = "cpp.enable_floating_point_contract_flag"  # an option of inductor
TERMS = 2**20  # values that the loops, run as they are, hold at a time

_announced = False


class Call(NamedTuple):
    """One problem: what is combined how, on which sizes.

    Attributes:
        pads: (top, left).
        compiled: by inductor; else the loops run as they are.
        size: (OH, OW).
        triton: by the Triton kernels of `launching` instead.
    """

    combine: Combine
    reduce: str
    stride: tuple[int, int]
    pads: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    compiled: bool
    size: tuple[int, int] = (0, 0)
    triton: bool = False

    def plan(self, size: Sequence[int], channels: int, width: int = 1) -> Plan:
        """For outputs of `size`, of which each group has `channels`, `width` sums for each."""
        most = max(1, sums_at_once() // width // self.weight_of_terms()) if self.compiled else 1
        at_once = max(n for n in range(1, most + 1) if channels % n == 0)
        sizes = self.stride, self.dilation, self.groups
        return Plan(self.combine, self.reduce, tuple(size), *sizes, at_once)

    def weight_of_terms(self) -> int:
        """How much longer than a multiplication a term is, roughly: it fills registers too."""
        operations = len(self.combine.value.graph.nodes) - self.combine.arity - 2
        return max(1, operations // 4) * (EXPENSIVE if self.reduce == "logsumexp" else 1)


def forward(call: Call, padded: Tensor, weight: Tensor, aux, captured) -> Tensor:
    """→ y (N, K, OH, OW)."""
    size = _size(call, padded, weight)
    plan = call.plan(size, len(weight) // call.groups)
    if call.compiled and call.reduce == "sum" and call.combine.product_free:
        plan = plan._replace(multiply_add=padded.device.type == "cpu" and _takes_multiply_add())
    one = []
    if plan.multiply_add:
        one = [torch.ones((), dtype=torch.promote_types(padded.dtype, torch.float32))]
    tensors = padded, weight, aux, *captured, *one
    return _per_image(call, loops.forward, tensors, (0, 2), (plan,), weight)


def gradients(call: Call, x, padded, weight, aux, captured, grad, y, needs) -> list:
    """The gradients of x, weight, aux and each captured number, None where `needs` is False."""
    grad, y = grad.contiguous(), (None if call.reduce == "sum" else y)
    size = grad.shape[2:]
    channels = len(weight) // call.groups
    plan = call.plan(size, channels, SLOPES)
    if call.reduce == "max":
        if not (call.combine.exact and y.device.type == "cpu"):  # CUDA may fuse x · w + b
            y = y - loops.TIES * torch.finfo(y.dtype).eps * y.abs().nan_to_num(posinf=0.0)
        tensors = padded, weight, aux, y, *captured
        ties = _per_image(call, loops.sensitivity, tensors, (0, 2, 3), (plan, -1), weight)
        grad = grad / ties.clamp(min=1.0)
    found: list[Tensor | None] = [None] * len(needs)
    if needs[0]:
        found[0] = _input_gradient(call, x, weight, aux, captured, grad, y)
    if needs[1]:
        found[1] = _weight_gradient(call, padded, weight, aux, captured, grad, y)
    first = 2 if aux is None else 3
    wanted = [2] * (aux is not None and needs[2]) + [
        i for i in range(first, first + len(captured)) if needs[i + 3 - first]
    ]
    for which in wanted:
        tensors = padded, weight, aux, y, *captured
        slopes = _per_image(call, loops.sensitivity, tensors, (0, 2, 3), (plan, which), weight)
        product = slopes * grad
        if aux is not None and which == 2:
            found[2] = product.sum(1, keepdim=True) if aux.shape[1] == 1 else product
        else:
            found[which + 3 - first] = product.sum()
    return found


def _input_gradient(call, x, weight, aux, captured, grad, y) -> Tensor:
    scattered = [
        None if t is None else _scatter(call, t, x, weight, fill)
        for t, fill in ((aux, 0.0), (grad, 0.0), (y, torch.inf))
    ]
    width = SLOPES if call.reduce == "sum" else 2 * SLOPES
    plan = call.plan(x.shape[2:], x.shape[1] // call.groups, width)
    tensors = x.contiguous(), weight, *scattered, *captured
    return _per_image(call, loops.input_gradient, tensors, (0, 2, 3, 4), (plan,), weight)


def _weight_gradient(call, padded, weight, aux, captured, grad, y) -> Tensor:
    channels, kw = len(weight) // call.groups, weight.shape[3]
    plan = call.plan(grad.shape[2:], channels, kw if call.reduce == "sum" else SLOPES * kw)
    images = _images(grad, _terms(weight))
    if call.compiled:
        images = _cached(padded, grad, kw) if padded.device.type == "cpu" else len(padded)
    images = -(-len(padded) // max(1, -(-len(padded) // max(1, images))))  # of about equal size
    total = None
    for part in chunks(len(padded), images):
        batch = [None if t is None else t[part] for t in (padded, aux, grad, y)]
        if call.compiled and padded.device.type == "cpu" and call.stride[0] == 1:
            batch[0] = loops.shifted_rows(batch[0], kw, plan)
        tensors = batch[0], weight, *batch[1:], *captured
        found = _function(call, loops.weight_gradient, (plan,), (0, 2, 3, 4))(*tensors)
        total = found if total is None else total.add_(found)
    return (torch.zeros_like(weight) if total is None else total).to(weight.dtype)


def _cached(padded: Tensor, grad: Tensor, copies: int) -> int:
    """Images that stay in a cache while all taps pass over them."""
    per_image = copies * padded[:1].nbytes + grad[:1].nbytes
    return 2 * machine.cache_bytes("cpu") // max(per_image, 1)


def _scatter(call, values: Tensor, x: Tensor, weight: Tensor, fill: float) -> Tensor:
    """Values of outputs (N, K, OH, OW) → (N, K, H + reach, W + reach), each at its last tap."""
    reach = [d * (k - 1) for d, k in zip(call.dilation, weight.shape[2:])]
    result = values.new_full(
        (*values.shape[:2], *(n + r for n, r in zip(x.shape[2:], reach))), fill
    )
    target, source = [], []
    for length, count, step, r, pad in zip(
        result.shape[2:], values.shape[2:], call.stride, reach, call.pads
    ):
        start = r - pad
        first = max(0, -(start // step)) if start < 0 else 0
        last = min(count, (length - 1 - start) // step + 1)
        place = start + first * step
        target.append(slice(place, place + max(0, last - first - 1) * step + 1, step))
        source.append(slice(first, last))
        if last <= first:
            return result
    result[(..., *target)] = values[(..., *source)]
    return result


def _size(call: Call, padded: Tensor, weight: Tensor) -> tuple[int, int]:
    return tuple(
        (n - d * (k - 1) - 1) // s + 1
        for n, d, k, s in zip(padded.shape[2:], call.dilation, weight.shape[2:], call.stride)
    )


def _per_image(call: Call, function: Callable, tensors, batched, arguments, weight) -> Tensor:
    """`function` of all images at once if compiled, else of a few; `batched`: which have images."""
    if call.compiled:
        return _function(call, function, arguments, batched)(*tensors)
    images = _images(tensors[0], _terms(weight))
    parts = []
    for part in chunks(len(tensors[0]), images):
        some = [
            t[part] if place in batched and t is not None else t for place, t in enumerate(tensors)
        ]
        parts.append(function(*some, *arguments))
    return torch.cat(parts)


def _terms(weight: Tensor) -> int:
    """Values per pixel that the loops hold when they run as they are."""
    return weight.numel() // weight.shape[3]


def _images(tensor: Tensor, per_pixel: int) -> int:
    return max(1, TERMS // max(1, per_pixel * tensor[0, 0].numel())) if len(tensor) else 1


def _function(call: Call, function: Callable, arguments, batched) -> Callable:
    """`function` with its last arguments; compiled once for all numbers of images."""
    if not call.compiled:
        return lambda *tensors: function(*tensors, *arguments)

    def run(*tensors):
        _announce()
        given = list(tensors)
        for place in batched:
            if given[place] is not None and len(given[place]) > 1:
                given[place] = given[place].view_as(given[place])  # the mark is not for the caller
                torch._dynamo.mark_dynamic(given[place], 0)
        key = [t if place not in batched or t is None else t[:1] for place, t in enumerate(given)]
        options = ONE_EXPRESSION
        if arguments[0].multiply_add:
            options = *options, (MULTIPLY_ADD, "fast")
        return compiled_function(function, key, arguments, options, dynamic=None)(*given)

    return run


def _takes_multiply_add() -> bool:
    """Whether the installed torch lets the compiler make one operation of a product and a sum."""
    from torch._inductor import config

    return isinstance(getattr(config.cpp, MULTIPLY_ADD.removeprefix("cpp."), None), str)


def _announce() -> None:
    global _announced
    if not _announced:
        _announced = True
        text = "flex_conv2d compiles its loops: some seconds for each new function or size."
        print(text, file=sys.stderr, flush=True)
