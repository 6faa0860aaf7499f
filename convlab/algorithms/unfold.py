"""Unfold, weight-first product, `view` in place of fold.

Bytes: as `thread` without fold's two copies of the product. Where the weight requires a gradient,
`weight @ columns` still copies the columns and then the product: `matmul` folds the batch into the
rows of one large product (`should_fold` in ATen's LinearAlgebra.cpp).
"""

import torch

from convlab.algorithms.base import add_bias, algorithm
from convlab.algorithms.thread import output_size, unfold_stage


@algorithm("Unfold into columns, weight times columns, view in place of fold.")
def unfold(x, weight, bias, stride, padding, dilation, groups):
    columns = unfold_stage(x, weight, stride, padding, dilation)
    product = weight_first_product(columns, weight, groups)
    y = product.view(
        x.shape[0], weight.shape[0], *output_size(x, weight, stride, padding, dilation)
    )
    return add_bias(y, bias)


def weight_first_product(columns, weight, groups):
    """columns (N, C·kh·kw, L), weight (K, C / groups, kh, kw) → (N, K, L)."""
    if groups == 1:
        return weight.flatten(1) @ columns
    w = weight.flatten(1).unflatten(0, (groups, -1))  # G, K / G, taps
    return (w @ columns.unflatten(1, (groups, -1))).flatten(1, 2)


@algorithm("All images in one im2col, batch folded into channels; columns not copied after.")
def unfold_batched(x, weight, bias, stride, padding, dilation, groups):
    if not x.numel():  # im2col takes no image without channels
        return unfold.function(x, weight, bias, stride, padding, dilation, groups)
    n, c, h, w = x.shape
    one_image = x.reshape(1, n * c, h, w)
    columns = unfold_stage(one_image, weight, stride, padding, dilation)  # one launch on CUDA
    product = grouped_bmm(columns.view(n, -1, columns.shape[-1]), weight, groups)
    size = output_size(x, weight, stride, padding, dilation)
    return add_bias(product.view(n, weight.shape[0], *size), bias)


def grouped_bmm(columns, weight, groups):
    """columns (N, C·kh·kw, L), weight (K, C / groups, kh, kw) → (N, K, L), columns not copied."""
    n, rows, pixels = columns.shape
    k = weight.shape[0]
    taps = rows // groups
    w = weight.reshape(1, groups, k // groups, taps).expand(n, -1, -1, -1)
    y = torch.bmm(w.reshape(n * groups, k // groups, taps), columns.view(n * groups, taps, pixels))
    return y.view(n, k, pixels)
