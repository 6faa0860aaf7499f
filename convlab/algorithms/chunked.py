"""Columns for a few images at a time, forward and backward; none are kept in between.

The product of one chunk is written straight into its place in y. Backward makes the columns again:
one more im2col in place of k² times the input in memory. FLOPs as `unfold`. Bytes: where the
columns of a chunk stay in a cache, main memory sees only x, weight and y; launches on CUDA: as
many rounds as chunks.
"""

import torch
import torch.nn.functional as F

from convlab.algorithms.base import add_bias, algorithm
from convlab.algorithms.method import METHODS, Method, Sizes, convolve, images_at_once
from convlab.algorithms.windows import planes

MEMORY_LIMIT = 64 * 2**20  # bytes


@algorithm("Unfold and product for as many images at a time as a memory limit allows.")
def unfold_chunked(
    x, weight, bias, stride, padding, dilation, groups, *, memory_limit: int = MEMORY_LIMIT
):
    """`memory_limit`: bytes for what is neither input nor result, in either direction.

    One image is treated at a time where even that needs more.
    """
    if type(memory_limit) is not int or memory_limit < 1:
        raise ValueError(f"memory_limit must be a positive number of bytes, got {memory_limit!r}")
    sizes = Sizes(stride, padding, dilation, groups, 1)
    columns = values_of_columns(x, weight, sizes)
    fold = max(columns, x[:1].numel())  # F.fold's output begins as large as its input
    per_image = x.element_size() * (columns + fold + 2 * weight.numel())
    sizes = sizes._replace(images=max(1, memory_limit // max(per_image, 1)))
    return add_bias(convolve("unfold", x, weight, sizes), bias)


@algorithm("Unfold and product a few images at a time; backward makes the columns again.")
def unfold_recompute(x, weight, bias, stride, padding, dilation, groups):
    sizes = Sizes(stride, padding, dilation, groups, 1)
    sizes = sizes._replace(images=images_at_once(x, values_of_columns(x, weight, sizes)))
    return add_bias(convolve("unfold", x, weight, sizes), bias)


@algorithm("As windows, for as many images at a time as a cache holds.")
def windows_chunked(x, weight, bias, stride, padding, dilation, groups):
    sizes = Sizes(stride, padding, dilation, groups, 1)
    sizes = sizes._replace(images=images_at_once(x, values_of_columns(x, weight, sizes)))
    return add_bias(convolve("windows", x, weight, sizes), bias)


def values_of_columns(x, weight, sizes):
    """Values in the columns of one image: C·kh·kw·OH·OW."""
    oh, ow = sizes.output(x, weight)
    return x.shape[1] * weight[0, 0].numel() * oh * ow


def chunks(batch, images):
    """Slices of at most `images` images."""
    return [slice(i, min(i + images, batch)) for i in range(0, batch, images)]


def unfold_columns(x, weight, sizes):
    """A function: images (n, C, H, W) → columns (n, C·kh·kw, L)."""
    return lambda images: F.unfold(images, weight.shape[2:], **_unfold_options(sizes))


def unfold_sums(x, weight, sizes):
    """Its transpose, a function: columns (n, C·kh·kw, L) → images, written to `into`."""

    def sums(columns, into):
        into.copy_(F.fold(columns, into.shape[2:], weight.shape[2:], **_unfold_options(sizes)))

    return sums


def _unfold_options(sizes):
    return {"dilation": sizes.dilation, "padding": sizes.padding, "stride": sizes.stride}


def window_columns(x, weight, sizes):
    """As `unfold_columns`, through the view of `windows`, in memory that is used again."""
    _, inner, view = _padded_planes(x, weight, sizes)
    kept = x.new_empty(view.shape)

    def columns(images):
        n = len(images)
        inner[:n].copy_(images)
        return kept[:n].copy_(view[:n]).flatten(4).flatten(1, 3)

    return columns


def window_sums(x, weight, sizes):
    """The transpose of `window_columns`."""
    padded, inner, view = _padded_planes(x, weight, sizes)

    def sums(columns, into):
        n = len(into)
        parts = columns.view(n, *view.shape[1:])
        padded[:n].zero_()
        for i in range(view.shape[2]):
            for j in range(view.shape[3]):
                view[:n, :, i, j] += parts[:, :, i, j]
        into.copy_(inner[:n])

    return sums


def _padded_planes(x, weight, sizes):
    """Memory for a chunk of padded images, the images in it, and its output planes per tap."""
    (ph, pw), (c, h, w) = sizes.padding, x.shape[1:]
    images = min(sizes.images, x.shape[0])
    padded = x.new_zeros(images, c, h + 2 * ph, w + 2 * pw)
    size = sizes.output(x, weight)
    view = planes(padded, weight.shape[2:], size, sizes.stride, sizes.dilation)
    return padded, padded[:, :, ph : ph + h, pw : pw + w], view


def chunked_output(make_columns):
    """`Method.output` by columns made for one chunk after the other."""

    def output(x, weight, sizes):
        n, k, g = x.shape[0], weight.shape[0], sizes.groups
        oh, ow = sizes.output(x, weight)
        y = x.new_empty(n, k, oh, ow)
        w = weight.reshape(1, g, k // g, -1)
        columns = make_columns(x, weight, sizes)
        for part in chunks(n, sizes.images):
            m = part.stop - part.start
            torch.bmm(
                w.expand(m, -1, -1, -1).reshape(m * g, k // g, -1),
                columns(x[part]).view(m * g, -1, oh * ow),
                out=y[part].view(m * g, k // g, oh * ow),
            )
        return y

    return output


def chunked_gradients(make_columns, make_sums):
    """`Method.gradients` by columns made again, one chunk after the other."""

    def gradients(grad, x, weight, sizes, needs):
        n, k, g = x.shape[0], weight.shape[0], sizes.groups
        pixels = grad.shape[2] * grad.shape[3]
        w = weight.reshape(1, g, k // g, -1).mT
        gx = gw = None
        if needs[0]:
            gx, sums = x.new_empty(x.shape), make_sums(x, weight, sizes)
        if needs[1]:
            gw, columns = zeros_to_add_to(weight, g), make_columns(x, weight, sizes)
        for part in chunks(n, sizes.images):
            m = part.stop - part.start
            gy = grad[part].reshape(m * g, k // g, pixels)
            if needs[1]:
                products = torch.bmm(gy, columns(x[part]).view(m * g, -1, pixels).mT)
                gw += products.view(m, g, k // g, -1).sum(0)
            if needs[0]:
                per_image = w.expand(m, -1, -1, -1).reshape(m * g, -1, k // g)
                sums(torch.bmm(per_image, gy).view(m, -1, pixels), into=gx[part])
        return gx, None if gw is None else gw.to(weight.dtype).view(weight.shape)

    return gradients


def zeros_to_add_to(weight, groups):
    """Zeros (groups, K / groups, taps), in float32 at least: many chunks are added up."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.new_zeros(groups, weight.shape[0] // groups, weight[0].numel(), dtype=dtype)


METHODS["unfold"] = Method(
    chunked_output(unfold_columns), chunked_gradients(unfold_columns, unfold_sums)
)
METHODS["windows"] = Method(
    chunked_output(window_columns), chunked_gradients(window_columns, window_sums)
)
