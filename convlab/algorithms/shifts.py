"""One small product per tap, each on a shifted image, added up: no columns (kn2row).

With stride 1 a shift is an offset: in a padded image written row after row, the pixels that one
tap sees begin a few places later and are otherwise the same. So every tap is a 1×1 convolution of
a view, and y comes out with rows as long as the padded ones; what is too much at their ends is
dropped. Bytes: x padded once, then x read and y read and written k² times, from a cache where a
few images are treated at a time. FLOPs as `unfold`, and W′/OW times that for the long rows.
With a stride, each tap's pixels are copied: 1/s² of x, one tap at a time.

Anderson, Vasudevan, Keane, Gregg, "Low-memory GEMM-based convolution algorithms for deep neural
networks", 2017.
"""

import torch
import torch.nn.functional as F

from convlab.algorithms.base import add_bias, algorithm
from convlab.algorithms.chunked import chunks, zeros_to_add_to
from convlab.algorithms.method import METHODS, Method, Sizes, convolve, gradients_by, images_at_once
from convlab.algorithms.windows import planes


@algorithm("The k² taps as shifted 1×1 products, added up in y; no columns.")
def shifts(x, weight, bias, stride, padding, dilation, groups):
    sizes = Sizes(stride, padding, dilation, groups, 1)
    pixels = (x.shape[2] + 2 * padding[0]) * (x.shape[3] + 2 * padding[1])
    values = pixels * (x.shape[1] + weight.shape[0])
    sizes = sizes._replace(images=images_at_once(x, values))
    return add_bias(convolve("shifts", x, weight, sizes), bias)


class Shifted:
    """What each tap sees of a chunk of images, as a matrix per image and group."""

    def __init__(self, x, weight, sizes):
        self.kernel, self.sizes = weight.shape[2:], sizes
        self.oh, self.ow = sizes.output(x, weight)
        self.views = sizes.stride == (1, 1)
        self.width = x.shape[3] + 2 * sizes.padding[1] if self.views else self.ow

    def padded(self, images):
        """images (n, C, H, W) → padded, with a row of zeros more for the last long row."""
        (ph, pw), more = self.sizes.padding, int(self.views)
        found = F.pad(images, (pw, pw, ph, ph + more))
        return found if self.sizes.groups == 1 else found.contiguous()  # not NHWC: n·groups axis

    def tap(self, x, i, j):
        """Padded x → (n·groups, C / groups, OH · width): a view if the stride is 1."""
        (dh, dw), n, g = self.sizes.dilation, len(x), self.sizes.groups
        if self.views:
            start = i * dh * self.width + j * dw
            rows = x.view(n * g, x.shape[1] // g, -1)
            return rows[:, :, start : start + self.oh * self.width]
        view = planes(x, self.kernel, (self.oh, self.ow), self.sizes.stride, self.sizes.dilation)
        return view[:, :, i, j].reshape(n * g, x.shape[1] // g, -1)

    def taps(self):
        return [(i, j) for i in range(self.kernel[0]) for j in range(self.kernel[1])]

    def long_rows(self, grad):
        """grad (n, K, OH, OW) → (n·groups, K / groups, OH · width), zeros where rows are longer."""
        n, k = grad.shape[:2]
        grad = F.pad(grad, (0, self.width - self.ow))
        return grad.reshape(n * self.sizes.groups, k // self.sizes.groups, -1)


def by_taps(weight, groups):
    """weight (K, C / groups, kh, kw) → (kh, kw, 1, groups, K / groups, C / groups)."""
    k, c, kh, kw = weight.shape
    return weight.permute(2, 3, 0, 1).reshape(kh, kw, 1, groups, k // groups, c)


def output(x, weight, sizes):
    n, k, g = x.shape[0], weight.shape[0], sizes.groups
    shifted, w = Shifted(x, weight, sizes), by_taps(weight, g)
    y = x.new_empty(n, k, shifted.oh, shifted.ow)
    for part in chunks(n, sizes.images):
        m = part.stop - part.start
        images = shifted.padded(x[part])
        rows = x.new_empty(m * g, k // g, shifted.oh * shifted.width)
        per_image = w.expand(-1, -1, m, -1, -1, -1).flatten(2, 3)
        for i, j in shifted.taps():
            first = (i, j) == (0, 0)  # what lies in `rows` then is not read
            rows.baddbmm_(per_image[i, j], shifted.tap(images, i, j), beta=0 if first else 1)
        y[part].copy_(rows.view(m, k, shifted.oh, shifted.width)[..., : shifted.ow])
    return y


def input_gradient(grad, x, weight, sizes):
    """Any stride: every tap's pixels get their share."""
    (ph, pw), n, k, g = sizes.padding, x.shape[0], weight.shape[0], sizes.groups
    shifted, w = Shifted(x, weight, sizes), by_taps(weight, g).mT
    size = shifted.oh, shifted.ow
    gx = x.new_empty(x.shape)
    for part in chunks(n, sizes.images):
        m = part.stop - part.start
        padded = torch.zeros_like(F.pad(x[part], (pw, pw, ph, ph)))
        view = planes(padded, shifted.kernel, size, sizes.stride, sizes.dilation)
        gy = grad[part].reshape(m * g, k // g, -1)
        per_image = w.expand(-1, -1, m, -1, -1, -1).flatten(2, 3)
        for i, j in shifted.taps():
            view[:, :, i, j] += torch.bmm(per_image[i, j], gy).view(m, x.shape[1], *size)
        gx[part].copy_(padded[:, :, ph : ph + x.shape[2], pw : pw + x.shape[3]])
    return gx


def weight_gradient(grad, x, weight, sizes):
    (k, c, kh, kw), g = weight.shape, sizes.groups
    shifted = Shifted(x, weight, sizes)
    gw = zeros_to_add_to(weight, g).view(kh, kw, g, k // g, c)
    for part in chunks(x.shape[0], sizes.images):
        m = part.stop - part.start
        images, gy = shifted.padded(x[part]), shifted.long_rows(grad[part])
        for i, j in shifted.taps():
            products = torch.bmm(gy, shifted.tap(images, i, j).mT)
            gw[i, j] += products.view(m, g, k // g, c).sum(0)
    gw = gw.permute(2, 3, 4, 0, 1).reshape(weight.shape)
    return gw.to(weight.dtype)


METHODS["shifts"] = Method(output, gradients_by(output, input_gradient, weight_gradient))
