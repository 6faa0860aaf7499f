"""A convolution that keeps only x and weight between forward and backward.

What an algorithm of this kind does is a `Method`: two plain functions, one for the output and one
for the gradients. `convolve` makes them differentiable, twice too, and opaque to `torch.compile`:
the loops over images inside would otherwise be unrolled into thousands of operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from convlab import machine
from convlab.algorithms.thread import output_size
from convlab.algorithms.windows import windows

CACHES = 3


class Sizes(NamedTuple):
    """The arguments of a convolution as pairs, and how many images are treated at a time."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    images: int

    def output(self, x: Tensor, weight: Tensor) -> tuple[int, int]:
        """(OH, OW)."""
        return output_size(x, weight, self.stride, self.padding, self.dilation)

    def flipped(self, weight: Tensor) -> Sizes | None:
        """Sizes of the convolution that turns y's gradient into x's; None where there is none.

        A stride would need zeros between the gradients, a large padding a cut.
        """
        kernel = weight.shape[2:]
        pads = (d * (k - 1) - p for d, k, p in zip(self.dilation, kernel, self.padding))
        padding = tuple(pads)
        if self.stride != (1, 1) or min(padding) < 0:
            return None
        return self._replace(padding=padding)


def flip(weight: Tensor, groups: int) -> Tensor:
    """weight (K, C / groups, kh, kw) → (C, K / groups, kh, kw), taps in reverse order."""
    k, c, kh, kw = weight.shape
    w = weight.reshape(groups, k // groups, c, kh, kw).flip(3, 4).transpose(1, 2)
    return w.reshape(groups * c, k // groups, kh, kw)


class Method(NamedTuple):
    """How to compute a convolution, without a graph.

    Attributes:
        output: (x, weight, sizes) → y, contiguous.
        gradients: (grad of y, x, weight, sizes, (x wanted, weight wanted)) → both, or None.
        nhwc: whether y and the gradient of x lie in NHWC where x does.
    """

    output: Callable[[Tensor, Tensor, Sizes], Tensor]
    gradients: Callable[..., tuple[Tensor | None, Tensor | None]]
    nhwc: bool = False


METHODS: dict[str, Method] = {}


def gradients_by(output: Callable, scatter: Callable, weight_gradient: Callable) -> Callable:
    """`Method.gradients`: x's by `output` with the flipped taps, where there are such sizes.

    Args:
        scatter: x's gradient for any sizes; both it and `weight_gradient` take (grad, x, weight,
            sizes).
    """

    def gradients(grad, x, weight, sizes, needs):
        gx = gw = None
        back = sizes.flipped(weight)
        if needs[0] and back is not None:
            gx = output(grad, flip(weight, sizes.groups), back)
        elif needs[0]:
            gx = scatter(grad, x, weight, sizes)
        if needs[1]:
            gw = weight_gradient(grad, x, weight, sizes)
        return gx, gw

    return gradients


def empty_output(x: Tensor, weight: Tensor, sizes: Sizes, nhwc: bool = False) -> Tensor:
    """(N, K, OH, OW), not filled; in NHWC where x is, if that is wanted."""
    shape = len(x), len(weight), *sizes.output(x, weight)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x, nhwc))


def like_input(x: Tensor, nhwc: bool = False) -> Tensor:
    """(N, C, H, W), not filled; in NHWC where x is, if that is wanted."""
    return torch.empty(
        x.shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x, nhwc)
    )


def _memory_format(x: Tensor, nhwc: bool) -> torch.memory_format:
    lies = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if nhwc and lies else torch.contiguous_format


def convolve(method: str, x: Tensor, weight: Tensor, sizes: Sizes) -> Tensor:
    """x (N, C, H, W), weight (K, C / groups, kh, kw) → (N, K, OH, OW)."""
    if torch.compiler.is_compiling():
        return _output(x, weight, method, *sizes)
    return _Convolution.apply(x, weight, method, sizes)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, method, sizes):
        ctx.save_for_backward(x, weight)
        ctx.method, ctx.sizes = method, sizes
        return METHODS[method].output(x, weight, sizes)

    @staticmethod
    def backward(ctx, grad):
        return *gradients_of(ctx.method, ctx, grad), None, None


def gradients_of(method: str, ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight, which `ctx` has saved, or None where they are not wanted."""
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    if torch.is_grad_enabled():  # backward itself is to be differentiated
        return _differentiable(grad, x, weight, ctx.sizes, needs)
    with torch.autocast(x.device.type, enabled=False):  # it may be on around backward
        return METHODS[method].gradients(grad, x, weight, ctx.sizes, needs)


def _differentiable(grad, x, weight, sizes, needs):
    """The gradients as a graph, made with `windows`."""
    wanted = [t for t, need in zip((x, weight), needs) if need]
    y = windows.function(x, weight, None, *sizes[:4])
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needs)


@torch.library.custom_op("convlab::convolution", mutates_args=())
def _output(
    x: Tensor,
    weight: Tensor,
    method: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    images: int,
) -> Tensor:
    sizes = Sizes(tuple(stride), tuple(padding), tuple(dilation), groups, images)
    return METHODS[method].output(x, weight, sizes)


@torch.library.custom_op("convlab::convolution_gradients", mutates_args=())
def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    method: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    images: int,
) -> tuple[Tensor, Tensor]:
    sizes = Sizes(tuple(stride), tuple(padding), tuple(dilation), groups, images)
    return METHODS[method].gradients(grad, x, weight, sizes, (True, True))


@_output.register_fake
def _(x, weight, method, stride, padding, dilation, groups, images):
    sizes = Sizes(stride, padding, dilation, groups, images)
    return empty_output(x, weight, sizes, METHODS[method].nhwc)


@_gradients.register_fake
def _(grad, x, weight, method, *arguments):
    return like_input(x, METHODS[method].nhwc), weight.new_empty(weight.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.arguments = inputs[2:]


def _backward(ctx, grad):
    gradients = _gradients(grad, *ctx.saved_tensors, *ctx.arguments)
    return *gradients, *[None] * len(ctx.arguments)


_output.register_autograd(_backward, setup_context=_keep)


def images_at_once(x: Tensor, per_image: int) -> int:
    """How many images to treat at a time if each needs `per_image` values.

    On the CPU at least one per thread, and `CACHES` times what L2 holds: the next cache catches
    what is too much, and fewer chunks pay fewer fixed costs. On CUDA half of L2.
    """
    per_image = max(per_image * x.element_size(), 1)
    if x.is_cuda:
        return max(1, _caches("cuda")[1] // 2 // per_image)
    threads, size = _caches("cpu")
    return threads * max(1, CACHES * size // per_image)


@machine.constant_in_graphs
def _caches(device: str) -> tuple[int, int]:
    """Threads, and bytes of L2."""
    return torch.get_num_threads(), machine.cache_bytes(device)
