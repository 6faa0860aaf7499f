"""The columns as a strided view with the roles swapped: the window is the output plane.

`F.unfold` asks, for every output pixel, for its k² taps. Asked the other way round, there are k²
taps, and each sees one shifted copy of the whole plane: that is a view of x, and making it
contiguous copies long rows instead of single pixels. Same bytes and FLOPs as `unfold`, without
the hidden copies: `bmm` takes the columns as they lie and writes y as it is to lie. Backward adds
k² planes, each row by row again.
"""

import torch
import torch.nn.functional as F

from convlab.algorithms.base import add_bias, algorithm
from convlab.algorithms.thread import output_size
from convlab.algorithms.unfold import grouped_bmm


@algorithm("Columns copied from a view whose window is the output plane, then one bmm.")
def windows(x, weight, bias, stride, padding, dilation, groups):
    size = output_size(x, weight, stride, padding, dilation)
    if any(padding):
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    columns = _Columns.apply(x, weight.shape[2:], size, stride, dilation)
    y = grouped_bmm(columns, weight, groups)
    return add_bias(y.view(x.shape[0], weight.shape[0], *size), bias)


def planes(x, kernel, size, stride, dilation):
    """Padded x (N, C, H, W) → its view (N, C, kh, kw, OH, OW): one output plane per tap."""
    n, c, h, w = x.stride()
    steps = (n, c, dilation[0] * h, dilation[1] * w, stride[0] * h, stride[1] * w)
    return x.as_strided((*x.shape[:2], *kernel, *size), steps)


class _Columns(torch.autograd.Function):
    """Padded x (N, C, H, W) → columns (N, C·kh·kw, OH·OW); its transpose is `_Sum`."""

    @staticmethod
    def forward(ctx, x, *sizes):
        ctx.shape, ctx.sizes = x.shape, sizes
        n, c, kh, kw, oh, ow = (view := planes(x, *sizes)).shape
        return view.reshape(n, c * kh * kw, oh * ow).contiguous()  # kernel 1 may give a view

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad, ctx.shape, *ctx.sizes), None, None, None, None


class _Sum(torch.autograd.Function):
    """columns (N, C·kh·kw, OH·OW) → (N, C, H, W): every value added where it was taken from."""

    @staticmethod
    def forward(ctx, columns, shape, *sizes):
        ctx.sizes = sizes
        x = columns.new_zeros(shape)
        view = planes(x, *sizes)
        parts = columns.reshape(view.shape)
        for i in range(view.shape[2]):
            for j in range(view.shape[3]):
                view[:, :, i, j] += parts[:, :, i, j]
        return x

    @staticmethod
    def backward(ctx, grad):
        return _Columns.apply(grad, *ctx.sizes), None, None, None, None, None
