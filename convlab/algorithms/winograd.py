"""Winograd's F(2×2, 3×3): 16 products for 4 output pixels where the sum takes 36.

Tiles of 4×4 pixels, two apart, and the 3×3 taps are transformed by sums and differences; 16
products over channels, one per place in the tile; sums and differences again give 2×2 pixels.
Multiplications: 4/9 of `unfold`'s. Bytes: 4 times x for the transformed tiles, 4 times y for the
transformed results, all from a cache where a few images are treated at a time. The same serves the
gradient of x, a convolution with the flipped taps; the gradient of the weight is that of
`row_windows`.

Lavin, Gray, "Fast algorithms for convolutional neural networks", CVPR 2016.
"""

import torch
import torch.nn.functional as F

from convlab.algorithms import rows
from convlab.algorithms.base import add_bias, algorithm
from convlab.algorithms.chunked import chunks
from convlab.algorithms.method import METHODS, Method, Sizes, convolve, gradients_by, images_at_once

TILE = 4
# Rows of the transforms: of pixels, of taps, and back.
PIXELS = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
TAPS = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
BACK = ((1, 1, 1, 0), (0, 1, -1, -1))


def _limits(problem, device):
    if (problem.kernel_size, problem.stride, problem.dilation) != ((3, 3), (1, 1), (1, 1)):
        return "winograd computes 3×3 kernels with stride 1 and dilation 1 only."
    return None


@algorithm(
    "Sums of 4×4 tiles, 16 products where 36 would be, sums back.",
    limits=_limits,
    rounding="winograd",
)
def winograd(x, weight, bias, stride, padding, dilation, groups):
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    sizes = Sizes(stride, padding, dilation, groups, 1)
    oh, ow = sizes.output(x, weight)
    values = 4 * (oh + 1) * (ow + 1) * (x.shape[1] + weight.shape[0])
    sizes = sizes._replace(images=images_at_once(x, values))
    y = convolve("winograd", x.to(wide), weight.to(wide), sizes)
    return add_bias(y, None if bias is None else bias.to(wide)).to(dtype)


def combine(parts, matrix):
    """Σⱼ matrix[i][j] · parts[j] for each row i; entries are 0, 1 and -1."""
    results = []
    for row in matrix:
        (first, plus), *others = ((p, s) for p, s in zip(parts, row) if s)
        total = first if plus > 0 else -first
        for part, sign in others:
            total = total + part if sign > 0 else total - part
        results.append(total)
    return results


def transformed_taps(weight, groups, matrix=TAPS):
    """weight (K, C / groups, 3, 3) → (4·4, 1, groups, K / groups, C / groups)."""
    t = weight.new_tensor(matrix)
    w = torch.einsum("ai,bj,kcij->abkc", t, t, weight)
    return w.reshape(16, 1, groups, weight.shape[0] // groups, weight.shape[1])


def transformed_pixels(x, tiles, matrix=PIXELS):
    """Padded x (n, C, 2·th + 2, 2·tw + 2) → (4·4, n, C, th·tw)."""
    th, tw = tiles
    down = combine([x[:, :, i : i + 2 * th - 1 : 2] for i in range(TILE)], matrix)
    places = [
        combine([rows[..., j : j + 2 * tw - 1 : 2] for j in range(TILE)], matrix) for rows in down
    ]
    return torch.stack([p for row in places for p in row]).flatten(3)


def pixels_back(products, tiles, matrix=BACK):
    """products (4·4, n, K, th·tw) → (n, K, 2·th, 2·tw)."""
    n, k = products.shape[1:3]
    rows = products.view(TILE, TILE, n, k, *tiles)
    rows = combine(list(rows), matrix)
    places = [combine(list(row), matrix) for row in rows]
    y = products.new_empty(n, k, tiles[0], 2, tiles[1], 2)
    for i in range(2):
        for j in range(2):
            y[:, :, :, i, :, j] = places[i][j]
    return y.view(n, k, 2 * tiles[0], 2 * tiles[1])


def output(x, weight, sizes, matrices=(PIXELS, TAPS, BACK)):
    (ph, pw), g = sizes.padding, sizes.groups
    n, k, (oh, ow) = x.shape[0], weight.shape[0], sizes.output(x, weight)
    tiles = -(-oh // 2), -(-ow // 2)
    pads = pw, pw + 2 * tiles[1] - ow, ph, ph + 2 * tiles[0] - oh
    w = transformed_taps(weight, g, matrices[1])
    y = x.new_empty(n, k, oh, ow)
    for part in chunks(n, sizes.images):
        m = part.stop - part.start
        pixels = transformed_pixels(F.pad(x[part].contiguous(), pads), tiles, matrices[0])
        products = torch.bmm(
            w.expand(-1, m, -1, -1, -1).reshape(16 * m * g, k // g, -1),
            pixels.view(16 * m * g, x.shape[1] // g, -1),
        )
        back = pixels_back(products.view(16, m, k, -1), tiles, matrices[2])
        y[part] = back[:, :, :oh, :ow]
    return y


def magnitudes(x, weight, padding, groups):
    """The same with every sign dropped: the sum of the sizes of all that is added up."""
    matrices = tuple(tuple(tuple(map(abs, row)) for row in m) for m in (PIXELS, TAPS, BACK))
    sizes = Sizes((1, 1), padding, (1, 1), groups, max(len(x), 1))
    return output(x.abs(), weight.abs(), sizes, matrices)


METHODS["winograd"] = Method(
    output, gradients_by(output, rows.input_gradient, rows.weight_gradient)
)
