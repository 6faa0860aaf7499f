"""Custom convolutions in their fast forms, each in a few lines: the decision guide's examples.

x (N, C, H, W); weight (K, C, kh, kw) unless said otherwise; y (N, K, OH, OW). `sizes` are the
keyword arguments stride, padding and dilation of `F.conv2d`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from convlab.algorithms import base
from convlab.flex.function import flex_conv2d

# In the weight only: transform the weight


def standardised(x: Tensor, weight: Tensor, eps: float = 1e-5, **sizes) -> Tensor:
    """Weight standardisation (Qiao et al. 2019): every filter with mean 0 and variance 1."""
    variance, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
    return F.conv2d(x, (weight - mean) * torch.rsqrt(variance + eps), **sizes)


def masked(x: Tensor, weight: Tensor, mask: Tensor, **sizes) -> Tensor:
    """The weights where `mask` (broadcastable to weight) is 1; PixelCNN's, a pruned layer's."""
    return F.conv2d(x, weight * mask, **sizes)


# Elementwise in x: transform the input


def linear_light(x: Tensor, weight: Tensor, gamma: float = 2.2, **sizes) -> Tensor:
    """Σ w · max(x, 0)^gamma: pictures are stored in about the 1 / 2.2-th power of the light.

    One power per pixel instead of one per tap. Padding works because 0^gamma is 0.
    """
    return F.conv2d(x.clamp(min=0).pow(gamma), weight, **sizes)


# Expands into convolutions


def l2_distance(x: Tensor, weight: Tensor, **sizes) -> Tensor:
    """Σ (x − w)² = Σ x² − 2 Σ x·w + Σ w²: two convolutions, one of them with a single output.

    Loses digits where x lies close to w, as any difference of large numbers does; never negative.
    """
    squares = F.conv2d(x * x, torch.ones_like(weight[:1]), **sizes)
    norms = weight.square().sum((1, 2, 3))
    return (squares - 2 * F.conv2d(x, weight, **sizes) + norms[:, None, None]).clamp(min=0)


def gaussian(x: Tensor, weight: Tensor, gamma: float, **sizes) -> Tensor:
    """A radial basis function of every patch: exp(−γ Σ (x − w)²)."""
    return torch.exp(-gamma * l2_distance(x, weight, **sizes))


def cosine_similarity(x: Tensor, weight: Tensor, eps: float = 1e-6, **sizes) -> Tensor:
    """Σ x·w / (‖patch‖ ‖w‖), each norm at least `eps`: two convolutions."""
    squares = F.conv2d(x * x, torch.ones_like(weight[:1]), **sizes)
    lengths = squares.clamp(min=eps**2).sqrt()
    directions = weight / weight.square().sum((1, 2, 3), keepdim=True).sqrt().clamp(min=eps)
    return F.conv2d(x, directions, **sizes) / lengths


def correlation(x: Tensor, weight: Tensor, eps: float = 1e-6, **sizes) -> Tensor:
    """Local normalisation: patch and w without their means, over their norms: three convolutions.

    With mean-free w, Σ (x − mean) w = Σ x·w, and Σ (x − mean)² = Σ x² − (Σ x)² / n: a difference
    of large numbers, which loses digits where a patch varies little; a score may exceed 1 by them.
    """
    ones, count = torch.ones_like(weight[:1]), weight[0].numel()
    free = weight - weight.mean((1, 2, 3), keepdim=True)
    sums, squares = F.conv2d(x, ones, **sizes), F.conv2d(x * x, ones, **sizes)
    lengths = (squares - sums.square() / count).clamp(min=eps**2).sqrt()
    directions = free / free.square().sum((1, 2, 3), keepdim=True).sqrt().clamp(min=eps)
    return F.conv2d(x, directions, **sizes) / lengths


def kervolution(x: Tensor, weight: Tensor, offset: float = 1.0, degree: int = 3, **sizes) -> Tensor:
    """A polynomial kernel of patch and w (Wang et al. 2019): (Σ x·w + offset)^degree."""
    return (F.conv2d(x, weight, **sizes) + offset) ** degree


# Elementwise in (x, w): flex_conv2d


def absolute_difference(x: Tensor, w: Tensor) -> Tensor:
    return (x - w).abs()


def squared_difference(x: Tensor, w: Tensor) -> Tensor:
    return (x - w).square()


def plus(x: Tensor, w: Tensor) -> Tensor:
    return x + w


def minus(x: Tensor, w: Tensor) -> Tensor:
    return w - x


def l1_distance(x: Tensor, weight: Tensor, **sizes) -> Tensor:
    """Σ |x − w|; AdderNet's layer (Chen et al. 2020) is its negative. Padding counts as 0."""
    return flex_conv2d(x, weight, absolute_difference, **sizes)


def dilate(x: Tensor, weight: Tensor, **sizes) -> Tensor:
    """Max-plus, max (x + w): grey-scale dilation by −∞-padded x. w = 0 is a flat element.

    As in a convolution the weight is not flipped; the dilation of the textbooks flips it.
    """
    return flex_conv2d(x, weight, plus, "max", pad_value=-torch.inf, **sizes)


def erode(x: Tensor, weight: Tensor, **sizes) -> Tensor:
    """Min-plus, min (x − w) = −max (w − x): grey-scale erosion of +∞-padded x."""
    return -flex_conv2d(x, weight, minus, "max", pad_value=torch.inf, **sizes)


def logsumexp_pool(x: Tensor, kernel_size: int, sharpness: float | Tensor = 1.0, **sizes) -> Tensor:
    """log Σ exp(s · x) / s over each window of each channel: max pooling as s grows.

    x (N, C, H, W) → (N, C, OH, OW).

    Args:
        sharpness: s > 0, a number, or a tensor of one number, which gets a gradient.
    """
    channels = x.shape[1]
    flat = x.new_zeros(channels, 1, kernel_size, kernel_size)
    options = {"groups": channels, "pad_value": -torch.inf, **sizes}
    return flex_conv2d(x * sharpness, flat, plus, "logsumexp", **options) / sharpness


# Depends on the whole patch: two passes


def at_least(x: Tensor, one: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x < threshold, 0.0, one)


def kept_product(x: Tensor, w: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x.abs() < threshold, 0.0, x * w)


def patch_topk(
    x: Tensor, weight: Tensor, ratio: float, backend: str = "inductor", **sizes
) -> Tensor:
    """Σ x·w over the largest |x| of each patch, `ratio` of its C·kh·kw (rounded, ≥ 1).

    All values equal to the smallest one that is kept are kept too: unlike `torch.topk`, which takes
    any of them, that does not depend on their order. Padding counts as zeros of the patch.

    Raises:
        ValueError: ratio is not in 0 < ratio ≤ 1.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be above 0 and at most 1, got {ratio!r}")
    count = max(1, round(ratio * weight[0].numel()))
    threshold = kth_largest(x.detach().abs(), weight.shape[2:], count, backend, **sizes)
    return flex_conv2d(x, weight, kept_product, aux=threshold, backend=backend, **sizes)


def kth_largest(
    x: Tensor, kernel_size: Sequence[int], count: int, backend: str = "inductor", **sizes
) -> Tensor:
    """The count-th largest of each patch of x (N, C, H, W) ≥ 0, exactly → (N, 1, OH, OW).

    Bisection over bit patterns: numbers ≥ 0 are ordered as their bits are, so float32 needs at
    most 31 passes that count, and no columns. NaN counts as larger than any number.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]
    ones = x.new_ones(1, x.shape[1], *kernel_size)
    low = torch.zeros_like(F.conv2d(x[:, :1], ones[:, :1], **sizes)).view(integers)
    largest = x.nan_to_num(nan=torch.inf, posinf=torch.inf).max() if x.numel() else x.new_zeros(())
    high = torch.full_like(low, int(largest.view(integers)) + 1)
    while bool((high - low > 1).any()):  # count values are ≥ low, fewer are ≥ high
        middle = low + (high - low) // 2
        found = flex_conv2d(x, ones, at_least, aux=middle.view(x.dtype), backend=backend, **sizes)
        low, high = (
            torch.where(found >= count, middle, low),
            torch.where(found >= count, high, middle),
        )
    return low.view(x.dtype)


# Different weights per sample or per place


def per_sample(x: Tensor, weights: Tensor, **sizes) -> Tensor:
    """weights (N, K, C, kh, kw), one set per image: the images as groups of one convolution."""
    y = F.conv2d(x.flatten(0, 1)[None], weights.flatten(0, 1), groups=len(x), **sizes)
    return y.unflatten(1, weights.shape[:2])[0]


def locally_connected(x: Tensor, weights: Tensor, **sizes) -> Tensor:
    """weights (OH, OW, K, C, kh, kw), one set per place: one bmm over the places.

    The columns are K / N times smaller than the weights, so they may be written out; what counts is
    that the weights of one place lie together.
    """
    matrices = weights.flatten(0, 1).flatten(2)  # L, K, C·k²
    columns = F.unfold(x, weights.shape[4:], **sizes).permute(2, 0, 1).contiguous()  # L, N, C·k²
    return torch.bmm(columns, matrices.mT).permute(1, 2, 0).unflatten(2, weights.shape[:2])


def involution(x: Tensor, kernels: Tensor, **sizes) -> Tensor:
    """Involution (Li et al. 2021): kernels (N, G, kh, kw, OH, OW), per place, not per channel.

    x (N, C, H, W) → (N, C, OH, OW); the channels of each of the G groups share their kernels. A sum
    of kh · kw shifted products.
    """
    y = 0
    for i, j, pixels in _taps(x, kernels.shape[2:4], **sizes):
        y = y + pixels.unflatten(1, (kernels.shape[1], -1)) * kernels[:, :, None, i, j]
    return y.flatten(1, 2)


def _taps(x: Tensor, kernel, stride=1, padding=0, dilation=1) -> Iterator[tuple[int, int, Tensor]]:
    """(i, j, the values of x that tap i, j meets: a view (N, C, OH, OW))."""
    stride, padding, dilation = map(base.two, (stride, padding, dilation))
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    places = [
        [slice(t * d, n - d * (k - 1 - t), s) for t in range(k)]
        for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation)
    ]
    for i, rows in enumerate(places[0]):
        for j, columns in enumerate(places[1]):
            yield i, j, x[:, :, rows, columns]
