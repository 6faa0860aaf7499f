"""The convolution and its gradients as launches of the kernels in `implicit_gemm`.

The gradient of x is the same product read backwards: there a tap moves the other way, so that
padding and dilation change sign. With a stride, the pixels of x that are a stride apart see the
same taps of the weight, and are one convolution (`Phase`). The parts of the weight's gradient are
added up always in the same order.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from convlab import counts
from convlab.kernels import tiles
from convlab.kernels.implicit_gemm import product, to_tf32, to_tf32_by_bits, weight_product
from convlab.kernels.running import interpreting, plain, runnable
from convlab.kernels.starting import start

INT32 = 2**31 - 1
PROGRAMS = 4  # per multiprocessor, so that none waits for the others at the end


def output(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, sizes) -> Tensor:
    """x (N, C, H, W), weight (K, C / groups, R, S), bias (K,) or None → y (N, K, OH, OW), filled.

    Args:
        sizes: with pairs `stride`, `padding`, `dilation` and the number `groups`.
    """
    weight = weight.unflatten(0, (sizes.groups, -1))
    _product(x, weight, bias, y, sizes.stride, sizes.padding, sizes.dilation)
    return y


def input_gradient(grad: Tensor, weight: Tensor, gx: Tensor, sizes) -> Tensor:
    """y's gradient (N, K, OH, OW), weight (K, C / groups, R, S) → gx (N, C, H, W), filled."""
    weight = weight.unflatten(0, (sizes.groups, -1)).transpose(1, 2)  # G, C, K, R, S
    (down, right), kernel = sizes.stride, weight.shape[3:]
    for i, j in itertools.product(range(down), range(right)):
        rows, columns = (
            Phase.of(first, *size)
            for first, *size in zip((i, j), sizes.stride, sizes.padding, sizes.dilation, kernel)
        )
        pixels = gx[:, :, i::down, j::right]
        if rows is None or columns is None:
            pixels.zero_()
        else:
            padding, dilation = zip(rows[1:], columns[1:])
            taps = weight[:, :, :, rows.taps, columns.taps]
            _product(grad, taps, None, pixels, (1, 1), padding, dilation)
    return gx


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, sizes) -> Tensor:
    """y's gradient (N, K, OH, OW), x (N, C, H, W) → (K, C / groups, R, S)."""
    (_, c, r, s), g = weight.shape, sizes.groups
    n, k, (oh, ow) = len(x), len(weight) // g, grad.shape[2:]
    pixels = n * oh * ow
    if not pixels:
        return torch.zeros_like(weight)
    splits = counts.parts_of_sum(pixels, c * r * s, k, g, programs(x))
    splits = splits if x.is_cuda else min(splits, 2)
    parts = torch.empty(splits, g, k, c * r * s, dtype=sum_type(x), device=x.device)
    sizes_ = pixels, triton.cdiv(pixels, splits), c, k, *x.shape[2:], oh, ow
    steps = *sizes.stride, *sizes.padding, *sizes.dilation
    arguments = x, grad, parts, *sizes_, *x.stride(), *grad.stride(), *steps

    def grid(tile):
        across = triton.cdiv(c * r * s, tile["ROWS"]) * triton.cdiv(k, tile["CHANNELS"])
        return across, g, splits

    _launch(weight_product, grid, arguments, (r, s), x, grad)
    return parts.sum(0).view(weight.shape).to(weight.dtype)


class Phase(NamedTuple):
    """The convolution whose outputs are the pixels first, first + stride, … of x's gradient.

    Attributes:
        taps: those that reach these pixels.
        padding, dilation: in pixels of y; a tap that moves right in x moves left in y.
    """

    taps: slice
    padding: int
    dilation: int

    @classmethod
    def of(cls, first: int, stride: int, padding: int, dilation: int, kernel: int):
        """None where no tap reaches them."""
        step = stride // math.gcd(stride, dilation)
        for tap in range(min(step, kernel)):
            if (distance := first + padding - tap * dilation) % stride == 0:
                return cls(slice(tap, None, step), -distance // stride, -step * dilation // stride)
        return None


def _product(x, weight, bias, y, stride, padding, dilation) -> None:
    """y (N, G·K, OH, OW) filled from x (N, G·C, H, W) and weight (G, K, C, R, S), all views."""
    if not y.numel():
        return
    g, k, c, r, s = weight.shape
    weight = _laid_out(weight)
    n, _, oh, ow = y.shape
    pixels = n * oh * ow
    steps = *stride, *padding, *dilation
    strides = *x.stride(), *weight.stride(), *y.stride()
    arguments = x, weight, bias, y, pixels, c, k, *x.shape[2:], oh, ow, *strides, *steps

    def grid(tile):
        return triton.cdiv(pixels, tile["ROWS"]) * triton.cdiv(k, tile["CHANNELS"]), g

    _launch(product, grid, arguments, (r, s), x, y)


def _laid_out(weight: Tensor) -> Tensor:
    """weight (G, K, C, R, S) in the order in which the lanes of a warp load it.

    Of a few channels K is innermost, filled up to whole tiles; of many C is.
    """
    _, k, c, r, s = weight.shape
    if tiles.flattened(c, r * s):
        filters = weight.permute(0, 3, 4, 2, 1)  # G, R, S, C, K
        return F.pad(filters, (0, -k % tiles.NARROW)).contiguous().permute(0, 4, 3, 1, 2)
    return weight.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


class Launch(NamedTuple):
    """A call of a kernel, all but its tile.

    Attributes:
        grid: the tile's constants → programs along each axis.
        constants: what the kernel is compiled for, beside the tile.
    """

    kernel: triton.runtime.KernelInterface
    grid: Callable[[dict], tuple[int, ...]]
    arguments: tuple
    constants: dict


_noted: list[Launch] | None = None


@contextlib.contextmanager
def noting() -> Iterator[list[Launch]]:
    """Inside the block launches are noted and not made: tensors may be on the device "meta"."""
    global _noted
    before, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = before


def _launch(kernel, grid, arguments, taps, x, y) -> None:
    tf32 = x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32  # the flag of F.conv2d
    constants = {
        "R": taps[0],
        "S": taps[1],
        "NHWC": is_nhwc(x),
        "ROUND": plain(to_tf32_by_bits) if interpreting() else to_tf32,
        "PRECISION": "tf32" if tf32 else "ieee",
        "SUM": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "INDEX": index_type(x, y),
    }
    if _noted is not None:
        _noted.append(Launch(kernel, grid, arguments, constants))
    elif interpreting():
        tile = tiles.INTERPRETED
        if constants["R"] * constants["S"] > tiles.BITS:
            tile = tile._replace(by_tap=True)
        runnable(kernel)[grid](*arguments, **constants, **tile.constants())
    else:
        start(tiles.tuned(kernel), kernel, grid, arguments, constants)


def is_nhwc(x: Tensor) -> bool:
    """Whether channels of one pixel lie together in memory."""
    return x.shape[1] > 1 and x.stride(1) == 1


def sum_type(x: Tensor) -> torch.dtype:
    """In which sums are made: float32 for short floats too."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def index_type(*tensors: Tensor) -> tl.dtype:
    """Integers that count the elements from each tensor's first to its last."""
    extents = [sum((n - 1) * step for n, step in zip(t.shape, t.stride())) + 1 for t in tensors]
    return tl.int64 if max(extents) > INT32 else tl.int32


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def programs(x: Tensor) -> int:
    """How many share a sum over pixels; without a GPU as many as on an H100 or H200."""
    if not x.is_cuda:
        return counts.PROGRAMS
    return PROGRAMS * _multiprocessors(x.device.index)
