"""The sums of a custom convolution as loop nests: what the compiler is given.

Every function is the plain definition on strided views, one per tap, with the sum over channels
(or pixels) as the innermost loop. Inductor keeps the running sums in registers and writes nothing
but the result; run as they are, they hold C · K values per output pixel. Several output channels
are written as alike sums, which become one loop, so that a value is loaded once for all of them.

Shapes: x padded (N, C, H, W); weight (K, C / groups, kh, kw); aux (N, 1 or K, OH, OW) or None;
y and its gradient (N, K, OH, OW); captured numbers of shape ().
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from convlab.flex.combine import Combine

UNROLLED = 9  # taps that are written out one by one; of a larger kernel those of one row
TIES = 8  # roundoffs by which a term may miss the maximum and still count as one


class Plan(NamedTuple):
    """What the loops of one problem are made for.

    Attributes:
        size: (OH, OW).
        at_once: sums that share a loop.
    """

    combine: Combine
    reduce: str
    size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    at_once: int


def forward(x, weight, aux, *rest) -> Tensor:
    """→ y (N, K, OH, OW)."""
    *captured, plan = rest
    window, filters, aux = _by_groups(x, weight, aux, plan)
    kernel = weight.shape[2:]
    dims = _summed(kernel)

    def output(channels: slice) -> Tensor:
        def terms() -> Iterator[Tensor]:
            for pixels, i, j in _taps(window, kernel, plan):
                w = _filters(filters[:, channels], i, j)
                yield _value(plan, pixels, w, *_aux(aux, channels, i), *captured)

        return _reduced(terms, plan.reduce, dims)

    return _interleave(output, filters.shape[1], plan).to(x.dtype)


def input_gradient(x, weight, aux, grad, y, *rest) -> Tensor:
    """→ x's gradient (N, C, H, W).

    Args:
        x: not padded.
        aux, grad, y: scattered, so that an output lies where its last tap does, with zeros
            between (y: infinity) and a margin of all taps but one.
    """
    *captured, plan = rest
    g, kernel = plan.groups, weight.shape[2:]
    x = _wide(x).unflatten(1, (g, -1, 1))  # N, G, C / G, 1, H, W
    w = _wide(weight).unflatten(0, (g, -1)).transpose(1, 2).flip(3, 4)  # G, C / G, K / G, kh, kw
    sources = [None if t is None else _wide(t) for t in (grad, y, aux)]
    sources = [None if t is None else t.unflatten(1, _split(t, g)).unsqueeze(2) for t in sources]
    step = plan._replace(size=x.shape[-2:], stride=(1, 1))
    dims = _summed(kernel)

    def output(channels: slice) -> Tensor:
        total = None
        for views in zip(*(_taps(s, kernel, step) for s in sources if s is not None)):
            (go, i, j), *others = views
            found = iter(view for view, _, _ in others)
            yo = None if y is None else next(found)
            extra = () if aux is None else (next(found),)
            pixels = x[:, :, channels]
            pixels = pixels if isinstance(i, int) else pixels.unsqueeze(4)
            inputs = pixels, _filters(w[:, channels], i, j), *extra, *captured
            term = go * _partial(plan, 0, *inputs)
            if yo is not None:
                term = term * _share(plan, inputs, yo)
            total = term if total is None else total + term
        return total.sum(dims)

    return _interleave(output, w.shape[1], plan).to(grad.dtype)


def weight_gradient(x, weight, aux, grad, y, *rest) -> Tensor:
    """→ weight's gradient (K, C / groups, kh, kw), summed over these images."""
    *captured, plan = rest
    window, filters, aux = _by_groups(x, weight, aux, plan)
    g, kernel = plan.groups, weight.shape[2:]
    grad, y = (
        None if t is None else _wide(t).unflatten(1, (g, -1))[:, :, :, None, None]
        for t in (grad, y)
    )  # N, G, K / G, 1, 1, OH, OW
    blocks = []
    for first in range(plan.at_once):
        channels = slice(first, None, plan.at_once)
        columns = []
        for pixels, i, j in _rows(window, kernel, plan):
            extra = _aux(aux, channels, i)
            inputs = pixels, _filters(filters[:, channels], i, j), *extra, *captured
            term = grad[:, :, channels] * _partial(plan, 1, *inputs)
            if y is not None:
                term = term * _share(plan, inputs, y[:, :, channels])
            columns.append(term.sum((0, 5, 6)))  # G, K / G, C / G, kh
        blocks.append(torch.stack(columns, 4))
    return torch.stack(blocks, 2).flatten(0, 2)


def sensitivity(x, weight, aux, y, *rest) -> Tensor:
    """Σ over taps of y's derivative by argument number `which` → (N, K, OH, OW).

    `which` is the last of the arguments: 2 is aux, if there is one, and then the captured ones;
    -1 is no argument but the number of terms that reach the maximum.
    """
    *captured, plan, which = rest
    window, filters, aux = _by_groups(x, weight, aux, plan)
    kernel = weight.shape[2:]
    y = None if y is None else _wide(y).unflatten(1, (plan.groups, -1)).unsqueeze(3)
    dims = _summed(kernel)

    def output(channels: slice) -> Tensor:
        total = None
        for pixels, i, j in _taps(window, kernel, plan):
            w = _filters(filters[:, channels], i, j)
            inputs = pixels, w, *_aux(aux, channels, i), *captured
            term = None if which < 0 else _partial(plan, which, *inputs)
            if y is not None:
                there = y[:, :, channels]
                share = _share(plan, inputs, there if isinstance(i, int) else there.unsqueeze(4))
                term = share if term is None else term * share
            total = term if total is None else total + term
        return total.sum(dims)

    return _interleave(output, filters.shape[1], plan)


def _value(plan, *inputs: Tensor) -> Tensor:
    return plan.combine.value(*inputs).expand(_together(inputs))


def _partial(plan, which: int, *inputs: Tensor) -> Tensor:
    return plan.combine.partials(*inputs)[which].expand(_together(inputs))


def _together(inputs) -> torch.Size:
    return torch.broadcast_shapes(*(t.shape for t in inputs))


def _wide(tensor: Tensor) -> Tensor:
    """Short floats as float32: sums are made in it."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _split(tensor: Tensor, groups: int) -> tuple[int, int]:
    return (groups, -1) if tensor.shape[1] % groups == 0 and tensor.shape[1] > 1 else (1, -1)


def _by_groups(x, weight, aux, plan):
    """x → (N, G, 1, C / G, H, W), weight → (G, K / G, C / G, kh, kw), aux → (N, G, K / G, 1, …)."""
    x = _wide(x).unflatten(1, (plan.groups, 1, -1))
    weight = _wide(weight).unflatten(0, (plan.groups, -1))
    if aux is not None:
        aux = _wide(aux).unflatten(1, _split(aux, plan.groups)).unsqueeze(3)
    return x, weight, aux


def _taps(t: Tensor, kernel, plan) -> Iterator[tuple]:
    """(view of t per tap, row, column); the row is a slice where rows are an axis of the view."""
    if kernel[0] * kernel[1] > UNROLLED:
        yield from _rows(t, kernel, plan)
        return
    for j in range(kernel[1]):
        for i in range(kernel[0]):
            yield _shifted(_shifted(t, -2, i, plan), -1, j, plan), i, j


def _rows(t: Tensor, kernel, plan) -> Iterator[tuple]:
    """The same with all rows of taps as an axis (…, kh, OH, OW)."""
    reach = plan.dilation[0] * (kernel[0] - 1) + 1
    t = t.narrow(-2, 0, plan.stride[0] * (plan.size[0] - 1) + reach)
    t = t.unfold(-2, reach, plan.stride[0])[..., :: plan.dilation[0]].movedim(-1, -3)
    for j in range(kernel[1]):
        yield _shifted(t, -1, j, plan), slice(None), j


def _shifted(t: Tensor, dim: int, tap: int, plan) -> Tensor:
    first, step = tap * plan.dilation[dim], plan.stride[dim]
    t = t.narrow(dim, first, step * (plan.size[dim] - 1) + 1)
    return t if step == 1 else (t[..., ::step] if dim == -1 else t[..., ::step, :])


def _filters(weight: Tensor, i, j: int) -> Tensor:
    """weight (G, K, C, kh, kw) → (G, K, C, [kh,] 1, 1)."""
    return weight[..., i, j, None, None]


def _aux(aux: Tensor | None, channels: slice, i) -> tuple[Tensor, ...]:
    if aux is None:
        return ()
    aux = aux if aux.shape[2] == 1 else aux[:, :, channels]
    return (aux if isinstance(i, int) else aux.unsqueeze(4),)


def _summed(kernel) -> tuple[int, ...]:
    return (3, 4) if kernel[0] * kernel[1] > UNROLLED else (3,)


def _reduced(terms, reduce: str, dims) -> Tensor:
    if reduce == "sum":
        return functools.reduce(torch.add, terms()).sum(dims)
    top = functools.reduce(torch.maximum, terms()).amax(dims)
    if reduce == "max":
        return top
    finite = torch.where(top.abs() == torch.inf, 0.0, top)
    shift = finite[(slice(None),) * 3 + (None,) * len(dims)]
    shares = (torch.exp(term - shift) for term in terms())
    return functools.reduce(torch.add, shares).sum(dims).log() + finite


def _share(plan, inputs, y: Tensor) -> Tensor:
    """The derivative of the reduction by one term; for "max" y is what a term has to reach."""
    value = _value(plan, *inputs)
    if plan.reduce == "max":
        return (value >= y).to(value.dtype)
    return torch.exp(value - y)


def _interleave(output, channels: int, plan) -> Tensor:
    """`output` of every at_once-th channel, put back in order → (N, G · channels, H, W)."""
    parts = [output(slice(first, None, plan.at_once)) for first in range(plan.at_once)]
    return torch.stack(parts, 3).flatten(1, 3)
