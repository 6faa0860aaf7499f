"""Columns along one axis only: k times the input in place of k², then k products.

A kernel of k rows is k one-row kernels whose outputs are added up. The columns of a one-row
kernel are k shifted copies of x; the same copies serve every row of the kernel, read from another
line on. So the k² copies of `unfold` shrink to k, and what was copied is read k times by products,
from a cache, since a few images are treated at a time. FLOPs as `unfold`; rows are padded in the
columns, never in x.
"""

import torch

from convlab.algorithms.base import add_bias, algorithm
from convlab.algorithms.chunked import chunks, zeros_to_add_to
from convlab.algorithms.method import METHODS, Method, Sizes, convolve, gradients_by, images_at_once


@algorithm("Columns along the width only, one product per row of the kernel, added up in y.")
def row_windows(x, weight, bias, stride, padding, dilation, groups):
    sizes = Sizes(stride, padding, dilation, groups, 1)
    sizes = sizes._replace(images=chunk(x, weight, sizes))
    return add_bias(convolve("rows", x, weight, sizes), bias)


def chunk(x, weight, sizes):
    """Images whose copies, x and y a cache holds."""
    oh, ow = sizes.output(x, weight)
    values = x.shape[1] * (x.shape[2] + 2 * sizes.padding[0]) * weight.shape[3] * ow
    return images_at_once(x, values + x[:1].numel() + weight.shape[0] * oh * ow)


class RowColumns:
    """Columns (sh, n, C·kw, rows · OW) of up to `sizes.images` padded images, in one memory.

    With a vertical stride sh the padded rows lie apart by their number modulo sh, so that the OH
    rows that one row of the kernel reads always follow each other.
    """

    def __init__(self, x, weight, sizes):
        (sh, sw), (ph, pw), (dh, dw), groups, images = sizes
        c, h, w = x.shape[1:]
        kh, kw = weight.shape[2:]
        self.oh, self.ow = sizes.output(x, weight)
        self.groups, self.starts = groups, [divmod(i * dh, sh)[::-1] for i in range(kh)]
        rows = -(-(h + 2 * ph) // sh)
        shape = sh, min(images, x.shape[0]), c, kw, rows, self.ow
        self.whole = (kh, kw, sh, sw, ph, pw) == (1, 1, 1, 1, 0, 0)
        self.memory = x.new_zeros(shape)
        self.copies = []  # (part of x, part of the memory): what lies outside of x stays zero
        for phase in range(sh):
            first = -(-max(ph - phase, 0) // sh)  # row number `first` of this phase lies in x
            y = phase + first * sh - ph
            count = max(0, -(-(h - y) // sh))
            for j in range(kw):
                left = min(-(-max(pw - j * dw, 0) // sw), self.ow)
                x0 = left * sw + j * dw - pw
                right = min(max(left, -(-(w + pw - j * dw) // sw)), self.ow)
                source = (..., slice(y, None, sh), slice(x0, x0 + (right - left - 1) * sw + 1, sw))
                target = (..., j, slice(first, first + count), slice(left, right))
                if count and right > left:
                    self.copies.append((phase, source, target))

    def fill(self, images):
        """Copy images (n, C, H, W); kernel 1 takes them as they are."""
        if self.whole:
            self.memory = images.contiguous()[None, :, :, None]
            return
        for phase, source, target in self.copies:
            self.memory[phase, : len(images)][target].copy_(images[source])

    def drain(self, into):
        """The transpose of `fill`: add every value up where it was taken from."""
        into.zero_()
        for phase, source, target in self.copies:
            into[source] += self.memory[phase, : len(into)][target]

    def row(self, i, n):
        """What row i of the kernel sees of n images: (n·groups, C / groups·kw, OH·OW), a view."""
        phase, start = self.starts[i]
        rows = self.memory[phase, :n].view(n * self.groups, -1, self.memory[0, 0, 0, 0].numel())
        return rows[:, :, start * self.ow : (start + self.oh) * self.ow]


def by_rows(weight, groups):
    """weight (K, C / groups, kh, kw) → (kh, 1, groups, K / groups, C / groups·kw)."""
    k, c, kh, kw = weight.shape
    return weight.permute(2, 0, 1, 3).reshape(kh, 1, groups, k // groups, c * kw)


def output(x, weight, sizes):
    n, k, g = x.shape[0], weight.shape[0], sizes.groups
    columns = RowColumns(x, weight, sizes)
    pixels = columns.oh * columns.ow
    y = x.new_empty(n, k, columns.oh, columns.ow)
    w = by_rows(weight, g)
    for part in chunks(n, sizes.images):
        m = part.stop - part.start
        columns.fill(x[part])
        target = y[part].view(m * g, k // g, pixels)
        for i, row in enumerate(w.expand(-1, m, -1, -1, -1).flatten(1, 2)):
            if i == 0:
                torch.bmm(row, columns.row(0, m), out=target)
            else:
                target.baddbmm_(row, columns.row(i, m))
    return y


def input_gradient(grad, x, weight, sizes):
    """Any stride: the transpose of `output`, step by step."""
    k, g = weight.shape[0], sizes.groups
    columns = RowColumns(x, weight, sizes)
    gx = x.new_empty(x.shape)
    w = by_rows(weight, g).mT
    for part in chunks(x.shape[0], sizes.images):
        m = part.stop - part.start
        gy = grad[part].reshape(m * g, k // g, -1)
        columns.memory.zero_()
        for i, row in enumerate(w.expand(-1, m, -1, -1, -1).flatten(1, 2)):
            columns.row(i, m).add_(torch.bmm(row, gy))
        columns.drain(gx[part])
    return gx


def weight_gradient(grad, x, weight, sizes):
    (k, c, kh, kw), g = weight.shape, sizes.groups
    columns = RowColumns(x, weight, sizes)
    gw = zeros_to_add_to(weight, g).view(g, k // g, kh, c * kw)
    for part in chunks(x.shape[0], sizes.images):
        m = part.stop - part.start
        gy = grad[part].reshape(m * g, k // g, -1)
        columns.fill(x[part])
        for i in range(kh):
            products = torch.bmm(gy, columns.row(i, m).mT)
            gw[:, :, i] += products.view(m, g, k // g, c * kw).sum(0)
    gw = gw.view(k, kh, c, kw).transpose(1, 2)
    return gw.to(weight.dtype, memory_format=torch.contiguous_format)


METHODS["rows"] = Method(output, gradients_by(output, input_gradient, weight_gradient))
