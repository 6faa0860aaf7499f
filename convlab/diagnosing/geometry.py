"""The sizes of a layer that nobody declares: kernel, stride, padding, dilation, groups.

One input pixel is changed at a time; the output pixels that answer tell which offsets the layer
reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from convlab.problem import ConvProblem

Images = Callable[[Tensor], Tensor]  # (M, C, h, w) → (M, K, oh, ow), images on their own

AT_ONCE = 8  # neighbouring pixels changed, so strides up to this are seen
PUSH = 10.0  # standard deviations: wins a maximum, loses a minimum
LARGEST_STRIDE = 8


class Unknown(ValueError):
    """The sizes cannot be told; the message says why."""


def infer(
    layer: nn.Module, images: Images, x: Tensor, shape: tuple[int, ...], full: tuple[int, ...]
) -> ConvProblem:
    """The convolution with the reach of `images`.

    Args:
        x: (1, C, h, w): a probe, not smaller than three kernels.
        shape: of the layer's output for the whole batch; full: of its input.

    Raises:
        Unknown: the layer reads the whole image, or no convolution has these sizes.
    """
    declared = _declared(layer, shape, full)
    axes = [_axis(images, x, axis) for axis in (2, 3)]
    if None in axes:
        if declared:
            return declared
        raise Unknown("an output pixel depends on the whole image")
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
            return problem
    if declared:
        return declared
    raise Unknown(f"no convolution of kernel {kernel[0]}×{kernel[1]} has this output size")


def _axis(images: Images, x: Tensor, axis: int) -> tuple[int, int, int, int] | None:
    """(kernel, stride, padding, dilation) along one axis; None if every pixel matters."""
    size = x.shape[axis]
    first = max(size // 2 - AT_ONCE // 2, 0)
    pixels = range(first, min(first + AT_ONCE, size))
    other = x.shape[5 - axis] // 2
    generator = torch.Generator().manual_seed(1)
    push = PUSH * (1 + torch.rand(x.shape[1], generator=generator)).to(x)
    changed, signs = [], (1, -1)
    for pixel, sign in itertools.product(pixels, signs):
        image = x[0].clone()
        place = (slice(None), pixel, other) if axis == 2 else (slice(None), other, pixel)
        image[place] = sign * push
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
    pairs = [
        (pixel, out)
        for pixel, row in zip(pixels, answers, strict=True)
        for out in row.nonzero().flatten().tolist()
    ]
    outputs = answers.shape[1]
    if size > 1 and (not pairs or (outputs > 2 and answers.all())):
        return None
    found = _fit(pairs, size, outputs)
    if found is None:
        raise Unknown("no kernel, stride and padding lead to the output pixels that a pixel moves")
    return found


def _fit(pairs: Iterable[tuple[int, int]], size: int, outputs: int) -> tuple | None:
    """The smallest kernel whose offsets pixel − stride · output are all those seen."""
    best = None
    for stride in range(1, LARGEST_STRIDE + 1):
        offsets = sorted({pixel - stride * out for pixel, out in pairs})
        gaps = {b - a for a, b in itertools.pairwise(offsets)}
        dilation = min(gaps, default=1)
        kernel = (offsets[-1] - offsets[0]) // dilation + 1
        reach = dilation * (kernel - 1) + 1
        padding = max(-offsets[0], 0)
        fits = any(
            (size + padding + after - reach) // stride + 1 == outputs
            for after in {padding, max(reach - 1 - padding, 0)}
        )
        if fits and padding <= reach and (best is None or kernel < best[0]):
            best = kernel, stride, padding, dilation
    return best


def _groups(images: Images, x: Tensor, out_channels: int) -> int:
    """Blocks of channels that do not see each other, as the first and last channel answer."""
    channels = x.shape[1]
    h, w = x.shape[2] // 2, x.shape[3] // 2
    changed = []
    for channel, dh, dw in itertools.product((0, channels - 1), (0, 1), (0, 1)):
        for sign in (1, -1):
            image = x[0].clone()
            image[channel, min(h + dh, x.shape[2] - 1), min(w + dw, x.shape[3] - 1)] = sign * PUSH
            changed.append(image)
    y = images(torch.stack([x[0], *changed]))
    moved = (y[1:] - y[:1]).abs().nan_to_num(1.0).amax((2, 3))
    answers = (moved > 1e-9 * moved.amax()).unflatten(0, (2, 8)).any(1)  # (2, K)
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
