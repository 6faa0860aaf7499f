"""The sizes of a layer that nobody declares: kernel, stride, padding, dilation, groups.

One row, column or channel of the input is changed at a time; the output pixels that answer tell
which offsets the layer reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from convlab.problem import ConvProblem

Images = Callable[[Tensor], Tensor]  # (M, C, h, w) → (M, K, oh, ow), images on their own

AT_ONCE = 8  # neighbouring rows changed, so strides up to this are seen
PUSH = 10.0  # standard deviations: wins a maximum, loses a minimum
LARGEST_STRIDE = 8


class Unknown(ValueError):
    """The sizes cannot be told; the message says why."""


def infer(
    layer: nn.Module, images: Images, x: Tensor, shape: tuple[int, ...], full: tuple[int, ...]
) -> tuple[ConvProblem, bool]:
    """The convolution with the reach of `images`, and whether that was seen, not only declared.

    Args:
        x: (1, C, h, w): a probe, not smaller than three kernels.
        shape: of the layer's output for the whole batch; full: of its input.

    Raises:
        Unknown: the layer reads the whole image, or no convolution has these sizes.
    """
    declared = _declared(layer, shape, full)
    try:
        axes = [_axis(images, x, axis) for axis in (2, 3)]
    except Unknown:
        if declared:
            return declared, False
        raise
    kernel, stride, padding, dilation = zip(*axes, strict=True)
    groups = _groups(images, x, shape[1])
    sizes = dict(zip(("batch", "in_channels", "height", "width"), full, strict=True))
    for pads in (padding, "same"):
        try:
            problem = ConvProblem(
                **sizes,
                out_channels=shape[1],
                kernel_size=kernel,
                stride=stride,
                padding=pads,
                dilation=dilation,
                groups=groups,
            )
        except ValueError:
            continue
        if problem.output_shape == shape:
            return problem, True
    if declared:
        return declared, False
    raise Unknown(f"no convolution of kernel {kernel[0]}×{kernel[1]} has this output size")


def _axis(images: Images, x: Tensor, axis: int) -> tuple[int, int, int, int]:
    """(kernel, stride, padding, dilation) along one axis."""
    size = x.shape[axis]
    first = max(size // 2 - AT_ONCE // 2, 0)
    pixels = range(first, min(first + AT_ONCE, size))
    push = _push(x.shape[1], x.shape[5 - axis]).to(x)
    changed, signs = [], (1, -1)
    for pixel, sign in itertools.product(pixels, signs):
        image = x[0].clone()
        image.select(axis - 1, pixel).copy_(sign * push)
        changed.append(image)
    y = images(torch.stack([x[0], *changed]))
    if y.dim() != 4:
        raise Unknown(f"the output has {y.dim()} dimensions, not 4")
    moved = (y[1:] - y[:1]).abs().nan_to_num(1.0)
    top = moved.amax()
    if not top > 0:
        raise Unknown("the output does not depend on x")
    noise = 1e-9 if x.dtype == torch.float64 else 1e-4
    answers = (moved > noise * top).any(1).any(4 - axis)  # (2 · pixels, outputs along the axis)
    answers = answers.unflatten(0, (len(pixels), 2)).any(1)
    if not answers.any() or (answers.shape[1] > 2 and answers.all()):
        raise Unknown("an output pixel depends on the whole image")
    found = _fit(answers, pixels, size)
    if found is None:
        raise Unknown("no kernel, stride and padding lead to the output pixels that a pixel moves")
    return found


def _push(*shape: int) -> Tensor:
    """Large positive values, all different."""
    return PUSH * (1 + torch.rand(shape, generator=torch.Generator().manual_seed(1)))


def _fit(answers: Tensor, pixels: Sequence[int], size: int) -> tuple[int, int, int, int] | None:
    """The smallest kernel that explains which outputs (columns) which pixels (rows) move."""
    outputs = answers.shape[1]
    pairs = [(pixels[row], out) for row, out in answers.nonzero().tolist()]
    best = None
    for stride in range(1, LARGEST_STRIDE + 1):
        offsets = sorted({pixel - stride * out for pixel, out in pairs})
        gaps = {b - a for a, b in itertools.pairwise(offsets)}
        dilation = min(gaps, default=1)
        kernel = (offsets[-1] - offsets[0]) // dilation + 1
        reach = dilation * (kernel - 1) + 1
        padding = max(-offsets[0], 0)
        fits = padding <= reach and any(
            (size + padding + after - reach) // stride + 1 == outputs
            for after in {padding, max(reach - 1 - padding, 0)}
        )
        taps = {dilation * tap - padding for tap in range(kernel)}
        explained = [[p - stride * o in taps for o in range(outputs)] for p in pixels]
        if fits and explained == answers.tolist() and (best is None or kernel < best[0]):
            best = kernel, stride, padding, dilation
    return best


def _groups(images: Images, x: Tensor, out_channels: int) -> int:
    """Blocks of channels that do not see each other, as the first and last channel answer."""
    channels = x.shape[1]
    push = _push(*x.shape[2:]).to(x)
    changed = []
    for channel, sign in itertools.product((0, channels - 1), (1, -1)):
        image = x[0].clone()
        image[channel] = sign * push
        changed.append(image)
    y = images(torch.stack([x[0], *changed]))
    moved = (y[1:] - y[:1]).abs().nan_to_num(1.0).amax((2, 3))
    answers = (moved > 1e-9 * moved.amax()).unflatten(0, (2, 2)).any(1)  # (2, K)
    block = int(answers[0].sum())
    if not block or out_channels % block or block != int(answers[1].sum()):
        return 1
    groups = out_channels // block
    ends = answers[0, :block].all() and answers[1, -block:].all()
    return groups if ends and channels % groups == 0 else 1


def _declared(layer: nn.Module, shape: tuple[int, ...], full: tuple[int, ...]):
    """The sizes by the names of `nn.Conv2d`'s attributes and the shape of a weight."""
    wanted = {name: getattr(layer, name, None) for name in ("stride", "padding", "dilation")}
    wanted["groups"] = getattr(layer, "groups", None)
    given = {name: value for name, value in wanted.items() if value is not None}
    n, c, h, w = full
    for parameter in layer.parameters():
        if parameter.dim() == 4 and parameter.shape[0] == shape[1] and len(shape) == 4:
            kernel = tuple(parameter.shape[2:])
            same = {"padding": tuple(k // 2 for k in kernel)}
            for options in (given, {**same, **given}, same):
                try:
                    problem = ConvProblem(n, c, shape[1], h, w, kernel, **options)
                except (ValueError, TypeError):
                    continue
                if problem.output_shape == shape and problem.weight_shape == parameter.shape:
                    return problem
    return None
