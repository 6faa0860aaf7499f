"""The decision guide: what kind of customisation a layer is, and the fast form of each kind."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Branch:
    """One way through the guide.

    Attributes:
        title: the kind of customisation.
        when: what is true of a layer of this kind.
        action: the fast form, in one sentence.
        code: the fast form, as one writes it.
        examples: layers of this kind.
    """

    title: str
    when: str
    action: str
    code: str
    examples: str


GUIDE = {
    "plain": Branch(
        "a plain convolution",
        "linear in x, the same weights at every place, the weight used as it is",
        "call F.conv2d (or nn.Conv2d) with the same weight",
        "F.conv2d(x, weight, bias, stride, padding, dilation, groups)",
        "unfold → matmul → fold, a sum of shifted products",
    ),
    "weight": Branch(
        "in the weight only",
        "linear in x, the same weights at every place, the weight computed from parameters",
        "transform the weight, which is small, then call F.conv2d",
        "F.conv2d(x, transform(weight), bias, stride, padding)",
        "weight standardisation, masks, quantised or low-rank weights",
    ),
    "input": Branch(
        "elementwise in x",
        "a sum over the patch of w · g(x), with one function g of a single value",
        "transform the input once, k² times fewer values than the columns, then call F.conv2d",
        "F.conv2d(g(x), weight, bias, stride, padding)",
        "a convolution of clipped, squared or logarithmic values",
    ),
    "expands": Branch(
        "expands into convolutions",
        "an elementwise formula of a few sums over the patch, each linear in x or in x²",
        "compute each sum by its own F.conv2d, then apply the formula to the results",
        "F.conv2d(x, w) / F.conv2d(x * x, ones).sqrt()",
        "cosine similarity, L2 distance, local normalisation, a power of a convolution",
    ),
    "elementwise": Branch(
        "elementwise in (x, w)",
        "a sum, maximum or logsumexp over the patch of f(x, w), with f of two single values",
        "hand f and the reduction to flex_conv2d, which never stores the columns",
        'convlab.flex_conv2d(x, weight, combine=lambda x, w: (x - w).abs(), reduce="sum")',
        "L1 distance (AdderNet), max-plus (dilation, erosion), logsumexp pooling",
    ),
    "patch": Branch(
        "depends on the whole patch",
        "what one value of the patch contributes depends on the others",
        "two passes: first one number per patch (a threshold, a norm), then a sum that uses it",
        "flex_conv2d(x, weight, combine=lambda x, w, t: x * w * (x.abs() >= t), aux=threshold)",
        "the largest k values of a patch, a median, sorting",
    ),
    "places": Branch(
        "different weights per place or per sample",
        "linear in the patch, with weights that differ between pixels or between images",
        "per image: a grouped F.conv2d with the images as groups, or bmm; per place: add up the k² "
        "taps, each a shifted x times that tap's weights, or one bmm over the places",
        "F.conv2d(x.flatten(0, 1)[None], weights.flatten(0, 1), groups=N)",
        "locally connected layers, involution, weights computed for each image",
    ),
}
