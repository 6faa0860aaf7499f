"""A custom convolution and its gradients as launches of the kernels in `convlab.flex.kernels`.

The gradient of x is a convolution read backwards, one per phase of the stride
(`convlab.kernels.launching.Phase`). The parts of the weight's gradient are added up always in the
same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from convlab.flex import generating, interpreting, tiles
from convlab.flex.kernels import input_gradients, outputs, weight_gradients
from convlab.flex.loops import TIES
from convlab.flex.running import Call
from convlab.kernels import interpreting as is_interpreting
from convlab.kernels import missing
from convlab.kernels.launching import (
    INT32,
    Launch,
    Phase,
    index_type,
    is_nhwc,
    programs,
    sum_type,
)
from convlab.kernels.running import runnable
from convlab.kernels.starting import start

NAME = 'flex_conv2d with backend="triton"'
LARGEST = 2**30  # output pixels: 32 bits count them


def forward(call: Call, x: Tensor, weight: Tensor, aux, captured, pad_value: float) -> Tensor:
    """x (N, C, H, W), weight (K, C / groups, R, S) → y (N, K, OH, OW), in NHWC where x is.

    Of short floats y is float32 where the gradients need it (all but "sum"): rounded, it would
    not tell which term is the largest, nor what the share of each is.

    Raises:
        ValueError: the device or the size is none for these kernels.
    """
    y = _empty_output(call, x, weight)
    _check(x, y)
    numbers = _numbers(x, captured, pad_value)
    return _start(output_launch(call, x, weight, aux, None, y, numbers, None))


def gradients(
    call: Call, x: Tensor, weight: Tensor, aux, captured, grad: Tensor, y, needs, pad_value: float
) -> list[Tensor | None]:
    """The gradients of x, weight, aux and each captured number, None where `needs` is False."""
    numbers = _numbers(x, captured, pad_value)
    grad, limit = _laid_out(grad, x), (None if call.reduce == "sum" else _laid_out(y, x))
    if call.reduce == "max":
        limit = limit - TIES * torch.finfo(y.dtype).eps * limit.abs().nan_to_num(posinf=0.0)

    def sensitivity(which: str) -> Tensor:
        slopes = torch.empty_like(grad, dtype=sum_type(x))
        return _start(output_launch(call, x, weight, aux, limit, slopes, numbers, which))

    if call.reduce == "max":
        grad = grad / sensitivity("one")
    found: list[Tensor | None] = [None] * len(needs)
    if needs[0]:
        found[0] = torch.zeros_like(x, memory_format=_format(x))
        for launch in input_launches(call, x, weight, aux, limit, grad, found[0], numbers):
            _start(launch)
    if needs[1]:
        launch = weight_launch(call, x, weight, aux, limit, grad, numbers)
        parts = _start(launch) if launch else weight.new_zeros(1, *weight.shape)
        found[1] = parts.sum(0).view(weight.shape).to(weight.dtype)
    names = generating.partials(call.combine)
    places = [2, *range(3, len(needs))] if aux is not None else range(3, len(needs))
    for place, name in zip(places, names[2:]):
        if needs[place]:
            product = sensitivity(name) * grad
            shared = place == 2 and aux.shape[1] == 1
            product = product.sum(1, keepdim=True) if shared else product
            found[place] = product.to(aux.dtype) if place == 2 else product.sum()
    return found


def output_launch(call: Call, x, weight, aux, limit, y, numbers, partial: str | None) -> Launch:
    """y filled with the reduction or, with the name of a derivative, with its sum of slopes."""
    g, k, c, r, s = _sizes(call, weight)
    n, _, oh, ow = y.shape
    pixels = n * oh * ow
    filters = _filled(weight.unflatten(0, (g, -1)).permute(0, 3, 4, 2, 1))  # G, R, S, C, K …
    sizes = pixels, c, k, *x.shape[2:], oh, ow, filters.shape[4]
    strides = *x.stride(), *_strides(aux, y), *y.stride()
    steps = *call.stride, *call.pads, *call.dilation
    arguments = x, filters, aux, limit, y, numbers, *sizes, *strides, *steps

    def grid(tile):
        return triton.cdiv(pixels, tile["ROWS"]) * triton.cdiv(k, tile["CHANNELS"]), g

    constants = _constants(call, x, (r, s), partial, (x, y))
    constants["LARGEST"] = torch.finfo(sum_type(x)).max
    return Launch(outputs, grid, arguments, constants)


def input_launches(call: Call, x, weight, aux, limit, grad, gx, numbers) -> list[Launch]:
    """gx, which holds zeros, filled."""
    (down, right), (g, _, c, *kernel) = call.stride, _sizes(call, weight)
    filters = weight.unflatten(0, (g, -1))
    found = []
    for i, j in itertools.product(range(down), range(right)):
        rows, columns = (
            Phase.of(first, *size)
            for first, *size in zip((i, j), call.stride, call.pads, call.dilation, kernel)
        )
        pixels = x[:, :, i::down, j::right]
        if rows is None or columns is None or not pixels.numel():
            continue
        taps = _filled(filters[..., rows.taps, columns.taps].permute(0, 3, 4, 1, 2))
        target = gx[:, :, i::down, j::right]
        count = pixels[:, 0].numel()
        sizes = count, c, taps.shape[3], *pixels.shape[2:], *grad.shape[2:], taps.shape[4]
        strides = *pixels.stride(), *_strides(aux, grad), *grad.stride(), *target.stride()
        steps = rows.padding, columns.padding, rows.dilation, columns.dilation
        tensors = pixels, taps, aux, limit, grad, target, numbers

        def grid(tile, count=count):
            return triton.cdiv(count, tile["ROWS"]) * triton.cdiv(c, tile["CHANNELS"]), g

        constants = _constants(call, x, taps.shape[1:3], "by_x", (x, grad))
        constants["GUARD"] = not generating.finite(call.combine, 0)
        found.append(Launch(input_gradients, grid, (*tensors, *sizes, *strides, *steps), constants))
    return found


def weight_launch(call: Call, x, weight, aux, limit, grad, numbers) -> Launch | None:
    """Parts (splits, groups, K, C·R·S) of the weight's gradient; None if there are no pixels."""
    g, k, c, r, s = _sizes(call, weight)
    n, _, oh, ow = grad.shape
    pixels = n * oh * ow
    if not pixels:
        return None
    blocks = g * triton.cdiv(c * r * s, 8) * triton.cdiv(k, 8)
    wanted = 2 if is_interpreting() else triton.cdiv(programs(x), blocks)
    splits = max(1, min(wanted, triton.cdiv(pixels, 512), INT32 // 2**16))
    parts = torch.empty(splits, g, k, c * r * s, dtype=sum_type(x), device=x.device)
    sizes = pixels, triton.cdiv(pixels, splits), c, k, *x.shape[2:], oh, ow
    strides = *x.stride(), *_strides(aux, grad), *grad.stride()
    steps = *call.stride, *call.pads, *call.dilation
    tensors = x, weight.contiguous(), aux, limit, grad, parts, numbers

    def grid(tile):
        across = triton.cdiv(c * r * s, tile["ROWS"]) * triton.cdiv(k, tile["CHANNELS"])
        return across, g, splits

    constants = _constants(call, x, (r, s), "by_w", (x, grad))
    constants["GUARD"] = not generating.finite(call.combine, 1)
    constants["ADDED"] = tl.sum
    return Launch(weight_gradients, grid, (*tensors, *sizes, *strides, *steps), constants)


def _constants(call: Call, x: Tensor, taps, partial: str | None, tensors) -> dict:
    functions = generating.module(call.combine)
    return {
        "R": taps[0],
        "S": taps[1],
        "NHWC": is_nhwc(x),
        "REDUCE": call.reduce,
        "VALUE": functions.value,
        "PARTIAL": partial and getattr(functions, partial),
        "UNPACK": functions.numbers,
        "EXP": functions.exponential,
        "SUM": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "INDEX": index_type(*tensors),
    }


FUNCTIONS = ("VALUE", "PARTIAL", "UNPACK", "EXP", "ADDED")


def _start(launch: Launch) -> Tensor:
    """Runs the kernel; the tensor that it fills."""
    kernel, grid, arguments, constants = launch
    filled = arguments[kernel.arg_names.index("NUMBERS") - 1]
    if not filled.numel():
        return filled
    if is_interpreting():
        tile = tiles.INTERPRETED_WEIGHT if "ADDED" in constants else tiles.INTERPRETED
        python = {n: interpreting.plain(f) for n, f in constants.items() if n in FUNCTIONS}
        runnable(kernel)[grid](*arguments, **constants | python, **tile.constants())
    else:
        # Multiplications fused with additions here, not there, would lose ties of a maximum.
        options = {"enable_fp_fusion": False} if constants["REDUCE"] == "max" else {}
        start(tiles.tuned(kernel), kernel, grid, arguments, constants, **options)
    return filled


def _check(x: Tensor, y: Tensor) -> None:
    if reason := missing(x.device, NAME):
        raise ValueError(f'{reason} backend="inductor" runs on any device.')
    per_image = max(x[0].numel() if len(x) else 0, y[0].numel() if len(y) else 0)
    if y.shape[0] * y.shape[2] * y.shape[3] > LARGEST or per_image > LARGEST:
        raise ValueError(
            f"{NAME} counts output pixels and the values of one image up to 2³⁰, got "
            f"x of shape {tuple(x.shape)} and y of shape {tuple(y.shape)}"
        )


def _filled(filters: Tensor) -> Tensor:
    """Filters with channels up to a whole number of tiles, which are then loaded unmasked."""
    return F.pad(filters, (0, -filters.shape[-1] % tiles.WIDEST)).contiguous()


def _numbers(x: Tensor, captured: Sequence[Tensor], pad_value: float) -> Tensor:
    """pad_value and the captured numbers, in the type of the sums."""
    made = {"dtype": sum_type(x), "device": x.device}
    pad = torch.full((1,), pad_value, **made)
    return torch.cat([pad, *(t.detach().reshape(1).to(**made) for t in captured)])


def _sizes(call: Call, weight: Tensor) -> tuple[int, int, int, int, int]:
    """(groups, K of one, C of one, R, S)."""
    return call.groups, len(weight) // call.groups, *weight.shape[1:]


def _empty_output(call: Call, x: Tensor, weight: Tensor) -> Tensor:
    made = {"dtype": x.dtype if call.reduce == "sum" else sum_type(x), "device": x.device}
    return torch.empty(len(x), len(weight), *call.size, **made, memory_format=_format(x))


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_nhwc(x) else torch.contiguous_format


def _laid_out(values: Tensor, x: Tensor) -> Tensor:
    """Values of outputs, in memory as `_empty_output` is."""
    return values.contiguous(memory_format=_format(x))


def _strides(aux: Tensor | None, y: Tensor) -> tuple[int, ...]:
    """Of aux, one and the same for all output channels if it has one."""
    return (0, 0, 0, 0) if aux is None else aux.expand(y.shape).stride()
