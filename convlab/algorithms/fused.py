"""The sum itself, compiled: products added up in registers, no columns and no matrix product.

What `torch.compile` is given is the definition of a convolution: strided views of x, one per tap
(of a large kernel, one per tap of a row), times the weight, summed over the channels. Inductor
makes one loop nest of it, with the sum innermost and a vector of pixels in each register. Bytes: x
padded once; then x, from a cache, once for as many output channels as have registers; y once.
FLOPs as `unfold`. It compiles for seconds per problem, and does not depend on how well the matrix
library fits the processor. The gradient of x is the same with the flipped taps (with a stride:
`row_windows`' transpose), that of the weight is `row_windows`'.
"""

import functools

import torch
import torch.nn.functional as F

from convlab.algorithms import rows
from convlab.algorithms.base import add_bias, algorithm
from convlab.algorithms.compiled import (
    ONE_EXPRESSION,
    compiled_function,
    limits,
    sums_at_once,
)
from convlab.algorithms.method import METHODS, Method, Sizes, convolve, gradients_by

UNROLLED = 9  # taps that are written out one by one; of a larger kernel those of one row


@algorithm("The sum over taps compiled as it is written: no columns, no product.", limits=limits)
def fused(x, weight, bias, stride, padding, dilation, groups):
    sizes = Sizes(stride, padding, dilation, groups, 1)
    sizes = sizes._replace(images=rows.chunk(x, weight, sizes))  # for the gradient of the weight
    return add_bias(convolve("fused", x, weight, sizes), bias)


def sum_of_taps(x, weight, size, stride, dilation, groups, at_once):
    """Padded x (N, C, H, W), weight (K, C / groups, kh, kw) → (N, K, OH, OW).

    Every `at_once`-th output channel belongs to one sum. The loops of these sums are alike, so
    inductor makes one of them, in which a value of x is read once for all.
    """
    kh, kw = weight.shape[2:]
    x = x.unflatten(1, (groups, 1, -1))  # N, G, 1, C / G, H, W
    w = weight.unflatten(0, (groups, -1))[..., None, None]  # G, K / G, C / G, kh, kw, 1, 1
    window = x.unfold(4, dilation[0] * (kh - 1) + 1, stride[0])[..., :: dilation[0]]
    rows = window.movedim(6, 4)  # N, G, 1, C / G, kh, OH, W
    last = stride[1] * (size[1] - 1) + 1
    taps = [
        (rows[..., j * dilation[1] :][..., : last : stride[1]], w[:, :, :, :, j]) for j in range(kw)
    ]
    dims = (3, 4)
    if kh * kw <= UNROLLED:
        taps = [(t[:, :, :, :, i], v[:, :, :, i]) for t, v in taps for i in range(kh)]
        dims = (3,)
    at_once = max(n for n in range(1, at_once + 1) if w.shape[1] % n == 0)
    sums = []
    for first in range(at_once):
        terms = (tap * values[:, first::at_once] for tap, values in taps)
        sums.append(functools.reduce(torch.add, terms).sum(dims))
    return torch.stack(sums, 3).flatten(1, 3)


def output(x, weight, sizes):
    (ph, pw), size = sizes.padding, sizes.output(x, weight)
    if not x.numel():
        return x.new_zeros(len(x), len(weight), *size)
    padded = F.pad(x, (pw, pw, ph, ph)) if ph or pw else x.contiguous()
    arguments = size, sizes.stride, sizes.dilation, sizes.groups, sums_at_once()
    function = compiled_function(sum_of_taps, (padded, weight), arguments, ONE_EXPRESSION)
    y = function(padded, weight.contiguous())
    return x.new_empty(0).set_(y)  # the same memory, and no view: it may be written to


METHODS["fused"] = Method(output, gradients_by(output, rows.input_gradient, rows.weight_gradient))
