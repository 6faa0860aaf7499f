"""The sums of a custom convolution as loop nests: what the compiler is given.

Every function is the plain definition on strided views, one per tap of a row, with the sum over
channels and rows (or pixels) as the innermost loop. Inductor keeps the running sums in registers
and writes nothing but the result; run as they are, the loops hold C · K · kh values per output
pixel. Several output channels are written as alike sums, which become one loop, so that a value is
loaded once for all of them. (Writing all taps out, not those of a row, is no faster and compiles
three times as long.)

Shapes: x padded (N, C, H, W); weight (K, C / groups, kh, kw); aux (N, 1 or K, OH, OW) or None;
y and its gradient (N, K, OH, OW); captured numbers of shape ().
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from convlab.flex.combine import Combine

TIES = 8  # roundoffs by which a term may miss the maximum and still count as one


class Plan(NamedTuple):
    """What the loops of one problem are made for.

    Attributes:
        size: (OH, OW).
        at_once: sums that share a loop.
        multiply_add: the last of the captured numbers is 1, and terms are added times it: the
            compiler, which does not know that number, makes one multiply-add of it. The sum is
            the same bit for bit. Processors that add in two units and multiply-add in two others
            (AMD's Zen) get both to work.
    """

    combine: Combine
    reduce: str
    size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    at_once: int
    multiply_add: bool = False


def forward(x, weight, aux, *rest) -> Tensor:
    """→ y (N, K, OH, OW), of short floats in float32."""
    *captured, plan = rest
    one = None
    if plan.multiply_add:
        *captured, one = captured
    window, filters, aux = _by_groups(x, weight, aux, plan)

    def output(channels: slice) -> Tensor:
        def terms() -> Iterator[Tensor]:
            for j, pixels in enumerate(_taps(window, weight, plan)):
                w = _filters(filters[:, channels], j)
                yield _value(plan, pixels, w, *_aux(aux, channels), *captured)

        return _reduced(terms, plan.reduce, one)

    return _interleave(output, filters.shape[1], plan)


def input_gradient(x, weight, aux, grad, y, *rest) -> Tensor:
    """→ x's gradient (N, C, H, W).

    Args:
        x: not padded.
        aux, grad, y: scattered, so that an output lies where its last tap does, with zeros
            between (y: infinity) and a margin of all taps but one.
    """
    *captured, plan = rest
    g = plan.groups
    x = _wide(x).unflatten(1, (g, -1, 1))[:, :, :, :, None]  # N, G, C / G, 1, 1, H, W
    w = _wide(weight).unflatten(0, (g, -1)).transpose(1, 2).flip(3, 4)  # G, C / G, K / G, kh, kw
    sources = [t if t is None else _wide(t) for t in (grad, y, aux)]
    sources = [t if t is None else t.unflatten(1, _split(t, g)).unsqueeze(2) for t in sources]
    step = plan._replace(size=x.shape[-2:], stride=(1, 1))
    given = [_taps(t, weight, step) for t in sources if t is not None]

    def output(channels: slice) -> Tensor:
        terms = []
        for j, (go, *others) in enumerate(zip(*given)):
            extra = () if aux is None else (others[-1],)
            inputs = x[:, :, channels], _filters(w[:, channels], j), *extra, *captured
            term = go * _partial(plan, 0, *inputs)
            if plan.combine.unbounded:  # no output there: nothing, were the slope infinite
                term = torch.where(go == 0, 0.0, term)
            terms.append(term if y is None else term * _share(plan, inputs, others[0]))
        return functools.reduce(torch.add, terms).sum((3, 4))

    return _interleave(output, w.shape[1], plan).to(grad.dtype)


def weight_gradient(x, weight, aux, grad, y, *rest) -> Tensor:
    """→ weight's gradient (K, C / groups, kh, kw), summed over these images.

    Args:
        x: padded (N, C, H, W); or its `shifted_rows`, whose pixels form one long axis: vectors
            are full then, however narrow the image is.
    """
    *captured, plan = rest
    flat = x.dim() == 5
    split = (plan.groups, -1)
    filters = _wide(weight).unflatten(0, split)
    aux = (
        None
        if aux is None
        else _wide(aux).unflatten(1, _split(aux, plan.groups))[:, :, :, None, None]
    )
    grad, y = (
        t if t is None else _wide(t).unflatten(1, split)[:, :, :, None, None] for t in (grad, y)
    )  # N, G, K / G, 1, 1, OH, OW
    if flat:
        aux, grad, y = (t if t is None else t.flatten(-2) for t in (aux, grad, y))
        given = _flat_taps(_wide(x).unflatten(1, (plan.groups, 1, -1)), weight, plan)
    else:
        given = _taps(_wide(x).unflatten(1, (plan.groups, 1, -1)), weight, plan)
    blocks = []
    for first in range(plan.at_once):
        channels = slice(first, None, plan.at_once)
        columns = []
        for j, pixels in enumerate(given):
            w = _filters(filters[:, channels], j)
            w = w[..., 0] if flat else w
            inputs = pixels, w, *_aux(aux, channels), *captured
            term = grad[:, :, channels] * _partial(plan, 1, *inputs)
            if y is not None:
                term = term * _share(plan, inputs, y[:, :, channels])
            columns.append(term.sum((0, 5) if flat else (0, 5, 6)))  # G, K / G, C / G, kh
        blocks.append(torch.stack(columns, 4))
    return torch.stack(blocks, 2).flatten(0, 2)


def shifted_rows(padded: Tensor, kernel: int, plan) -> Tensor:
    """Padded x (N, C, H, W) → (N, C, kw, H, OW): each row as every one of `kernel` taps sees it."""
    step, last = plan.stride[1], plan.stride[1] * (plan.size[1] - 1) + 1
    firsts = [j * plan.dilation[1] for j in range(kernel)]
    return torch.stack([padded[..., j : j + last : step] for j in firsts], 2)


def _flat_taps(rows: Tensor, weight: Tensor, plan) -> list[Tensor]:
    """Rows (…, kw, H, OW), stride 1 downwards → kw views (…, kh, OH · OW)."""
    (oh, ow), down = plan.size, plan.dilation[0]
    kh, kw = weight.shape[2:]
    rows = rows[..., : oh + down * (kh - 1), :].flatten(-2)
    return [rows[..., j, :].unfold(-1, oh * ow, down * ow) for j in range(kw)]


def sensitivity(x, weight, aux, y, *rest) -> Tensor:
    """Σ over taps of y's derivative by argument number `which` → (N, K, OH, OW).

    `which` is the last of the arguments: 2 is aux, if there is one, and then the captured ones;
    -1 is no argument but the number of terms that reach the maximum.
    """
    *captured, plan, which = rest
    window, filters, aux = _by_groups(x, weight, aux, plan)
    y = y if y is None else _wide(y).unflatten(1, (plan.groups, -1))[:, :, :, None, None]

    def output(channels: slice) -> Tensor:
        terms = []
        for j, pixels in enumerate(_taps(window, weight, plan)):
            inputs = pixels, _filters(filters[:, channels], j), *_aux(aux, channels), *captured
            share = None if y is None else _share(plan, inputs, y[:, :, channels])
            slope = share if which < 0 else _partial(plan, which, *inputs)
            terms.append(slope if share is None or which < 0 else slope * share)
        return functools.reduce(torch.add, terms).sum((3, 4))

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
    """Groups as an axis, and axes of length 1 where another tensor has channels or taps.

    → x (N, G, 1, C / G, H, W), weight (G, K / G, C / G, kh, kw), aux (N, G, K / G, 1, 1, OH, OW).
    """
    x = _wide(x).unflatten(1, (plan.groups, 1, -1))
    weight = _wide(weight).unflatten(0, (plan.groups, -1))
    if aux is not None:
        aux = _wide(aux).unflatten(1, _split(aux, plan.groups))[:, :, :, None, None]
    return x, weight, aux


def _taps(t: Tensor, weight: Tensor, plan) -> list[Tensor]:
    """What each tap of a row sees of t (…, H, W), for all rows: kw views (…, kh, OH, OW)."""
    (kh, kw), (dh, dw), (sh, sw) = weight.shape[2:], plan.dilation, plan.stride
    reach, last = dh * (kh - 1) + 1, sw * (plan.size[1] - 1) + 1
    t = t.narrow(-2, 0, sh * (plan.size[0] - 1) + reach)
    t = t.unfold(-2, reach, sh)[..., ::dh].movedim(-1, -3)
    taps = [t.narrow(-1, j * dw, last) for j in range(kw)]
    return taps if sw == 1 else [tap[..., ::sw] for tap in taps]


def _filters(weight: Tensor, j: int) -> Tensor:
    """weight (G, K, C, kh, kw) → its column (G, K, C, kh, 1, 1)."""
    return weight[..., j, None, None]


def _aux(aux: Tensor | None, channels: slice) -> tuple[Tensor, ...]:
    if aux is None:
        return ()
    return (aux if aux.shape[2] == 1 else aux[:, :, channels],)


def _reduced(
    terms: Callable[[], Iterator[Tensor]], reduce: str, one: Tensor | None = None
) -> Tensor:
    """Terms (N, G, K, C, kh, OH, OW), several of them → (N, G, K, OH, OW)."""
    if reduce == "sum":
        add = torch.add if one is None else lambda total, term: total + term * one
        return functools.reduce(add, terms()).sum((3, 4))
    top = functools.reduce(torch.maximum, terms()).amax((3, 4))
    if reduce == "max":
        return top
    finite = torch.where(top.abs() == torch.inf, 0.0, top)
    shift = finite[:, :, :, None, None]
    shares = (torch.exp(term - shift) for term in terms())
    return functools.reduce(torch.add, shares).sum((3, 4)).log() + finite


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
