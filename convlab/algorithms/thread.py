"""The thread's sequence: unfold, transposed product, fold with kernel 1.

Bytes: unfold reads x once per tap and writes the columns, taps·L values per image (L = OH·OW);
the transposed product copies the columns before it multiplies; fold copies the product twice,
once to make it contiguous and once into its output. On CUDA `F.unfold` launches one kernel per
image. The three stages are functions of their own, so that `convlab.stages` can time each.
"""

import torch.nn.functional as F

from convlab.algorithms.base import add_bias, algorithm


@algorithm(
    "Unfold into columns, columns^T times weight^T, fold with kernel 1 (the thread's layer)."
)
def thread(x, weight, bias, stride, padding, dilation, groups):
    columns = unfold_stage(x, weight, stride, padding, dilation)
    product = product_stage(columns, weight, groups)
    y = fold_stage(product, output_size(x, weight, stride, padding, dilation))
    return add_bias(y, bias)


def unfold_stage(x, weight, stride, padding, dilation):
    """x (N, C, H, W) → columns (N, C·kh·kw, L)."""
    return F.unfold(x, weight.shape[2:], dilation=dilation, padding=padding, stride=stride)


def product_stage(columns, weight, groups):
    """columns (N, C·kh·kw, L), weight (K, C / groups, kh, kw) → (N, K, L), a transposed view."""
    if groups == 1:
        return columns.transpose(1, 2).matmul(weight.flatten(1).t()).transpose(1, 2)
    rows = columns.unflatten(1, (groups, -1)).transpose(2, 3)  # N, G, L, taps
    w = weight.flatten(1).unflatten(0, (groups, -1))  # G, K / G, taps
    return rows.matmul(w.transpose(1, 2)).transpose(2, 3).flatten(1, 2)


def fold_stage(product, size):
    """product (N, K, OH·OW) → (N, K, OH, OW)."""
    return F.fold(product, output_size=size, kernel_size=1)


def output_size(x, weight, stride, padding, dilation):
    """(OH, OW)."""
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
