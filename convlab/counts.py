"""The passes over memory that each algorithm makes, counted on paper.

A row: stage, what, elements read, elements written, FLOPs, launches on CUDA. What a chunk of images
makes and reads again from a cache is no traffic of main memory and counts 0 there; its launches are
those of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from convlab.problem import ConvProblem


@dataclass(frozen=True)
class Sizes:
    """Elements of each tensor of a problem."""

    x: int
    weight: int
    y: int
    columns: int

    @classmethod
    def of(cls, p: ConvProblem) -> Sizes:
        n, k, oh, ow = p.output_shape
        x = n * p.in_channels * p.height * p.width
        taps = p.kernel_size[0] * p.kernel_size[1]
        return cls(x, k * p.taps, n * k * oh * ow, n * p.in_channels * taps * oh * ow)


def flops(p: ConvProblem, direction: str = "forward") -> int:
    """Multiplications and additions: 2 per tap and output value; backward does them twice."""
    forward = 2 * Sizes.of(p).y * p.taps
    return of_direction(direction, forward, 2 * forward)


def of_direction(direction: str, forward: int, backward: int) -> int:
    counts = {"forward": forward, "backward": backward, "train": forward + backward}
    if direction not in counts:
        raise ValueError(f"direction must be one of {', '.join(counts)}, got {direction!r}")
    return counts[direction]


def _native_forward(p: ConvProblem, s: Sizes) -> list[tuple]:
    return [("convolution", "one fused kernel", s.x + s.weight, s.y, flops(p), 1)]


def _native_backward(p: ConvProblem, s: Sizes) -> list[tuple]:
    return [
        ("convolution", "gradient of x", s.y + s.weight, s.x, flops(p), 1),
        ("convolution", "gradient of weight", s.y + s.x, s.weight, flops(p), 1),
    ]


def _unfold_stage(p: ConvProblem, s: Sizes) -> tuple:
    return ("unfold", "im2col: k² copies of x", s.x, s.columns, 0, p.batch)


def _grouped_forward(p: ConvProblem, s: Sizes) -> list[tuple]:
    per_image = p.batch * s.weight
    return [
        _unfold_stage(p, s),
        ("product", "weight repeated for every image", s.weight, per_image, 0, 1),
        ("product", "batched product", s.columns + per_image, s.y, flops(p), 1),
    ]


def _grouped_backward(p: ConvProblem, s: Sizes) -> list[tuple]:
    per_image = p.batch * s.weight
    return [
        ("product", "gradient of weight per image", s.y + s.columns, per_image, flops(p), 1),
        ("product", "gradient of columns", s.y + per_image, s.columns, flops(p), 1),
        ("product", "sum over images", per_image, s.weight, 0, 1),
        ("unfold", "col2im: k² values summed per pixel", s.columns, s.x, 0, 1),
    ]


def _thread_forward(p: ConvProblem, s: Sizes) -> list[tuple]:
    if p.groups > 1:
        return [
            *_grouped_forward(p, s),
            ("product", "transposed product made contiguous", s.y, s.y, 0, 1),
            ("fold", "col2im with kernel 1: a copy", s.y, s.y, 0, 1),
        ]
    return [
        _unfold_stage(p, s),
        ("product", "transposed columns made contiguous", s.columns, s.columns, 0, 1),
        ("product", "matrix product", s.columns + s.weight, s.y, flops(p), 1),
        ("fold", "transposed product made contiguous", s.y, s.y, 0, 1),
        ("fold", "col2im with kernel 1: a copy", s.y, s.y, 0, 1),
    ]


def _thread_backward(p: ConvProblem, s: Sizes) -> list[tuple]:
    if p.groups > 1:
        return [
            ("fold", "im2col with kernel 1: a copy", s.y, s.y, 0, p.batch),
            *(products := _grouped_backward(p, s))[:-1],
            ("unfold", "transposed gradient made contiguous", s.columns, s.columns, 0, 1),
            products[-1],
        ]
    return [
        ("fold", "im2col with kernel 1: a copy", s.y, s.y, 0, p.batch),
        ("product", "gradient made contiguous", s.y, s.y, 0, 1),
        ("product", "gradient of weight", s.y + s.columns, s.weight, flops(p), 1),
        ("product", "gradient of columns", s.y + s.weight, s.columns, flops(p), 1),
        ("unfold", "transposed gradient made contiguous", s.columns, s.columns, 0, 1),
        ("unfold", "col2im: k² values summed per pixel", s.columns, s.x, 0, 1),
    ]


def _unfold_forward(p: ConvProblem, s: Sizes) -> list[tuple]:
    if p.groups > 1:
        return _grouped_forward(p, s)
    return [
        _unfold_stage(p, s),
        ("product", "columns copied for one large product", s.columns, s.columns, 0, 1),
        ("product", "matrix product", s.columns + s.weight, s.y, flops(p), 1),
        ("product", "product made contiguous", s.y, s.y, 0, 1),
    ]


def _unfold_backward(p: ConvProblem, s: Sizes) -> list[tuple]:
    if p.groups > 1:
        return _grouped_backward(p, s)
    return [row for row in _thread_backward(p, s) if row[0] != "fold"]


def _batched_forward(p: ConvProblem, s: Sizes) -> list[tuple]:
    weight, repeated = _weight_of_each_image(p, s)
    return [
        ("unfold", "im2col of the whole batch: k² copies of x", s.x, s.columns, 0, 1),
        *repeated,
        ("product", "batched product", s.columns + weight, s.y, flops(p), 1),
    ]


def _weight_of_each_image(p: ConvProblem, s: Sizes) -> tuple[int, list[tuple]]:
    """Elements that a batched product reads as its weight, and the row that makes them."""
    if p.groups == 1:
        return s.weight, []
    per_image = p.batch * s.weight
    what = "weight repeated for every image"
    return per_image, [("product", what, s.weight, per_image, 0, 1)]


def _columns_backward(p: ConvProblem, s: Sizes) -> list[tuple]:
    weight, repeated = _weight_of_each_image(p, s)
    per_image = p.batch * s.weight
    return [
        ("product", "gradient of weight per image", s.y + s.columns, per_image, flops(p), 1),
        ("product", "sum over images", per_image, s.weight, 0, 1),
        *repeated,
        ("product", "gradient of columns", s.y + weight, s.columns, flops(p), 1),
    ]


def _batched_backward(p: ConvProblem, s: Sizes) -> list[tuple]:
    col2im = ("unfold", "col2im of the whole batch", s.columns, s.x, 0, 1)
    return [*_columns_backward(p, s), col2im]


def _padded(p: ConvProblem, s: Sizes) -> int:
    """Elements of x with its padding; 0 where there is none to add."""
    (top, bottom), (left, right) = p.pads
    if not (top or bottom or left or right):
        return 0
    return s.x // (p.height * p.width) * (p.height + top + bottom) * (p.width + left + right)


def _windows_forward(p: ConvProblem, s: Sizes) -> list[tuple]:
    weight, repeated = _weight_of_each_image(p, s)
    padded = _padded(p, s)
    pad = [("columns", "x padded", s.x, padded, 0, 2)] if padded else []
    return [
        *pad,
        ("columns", "k² planes copied, row by row", padded or s.x, s.columns, 0, 1),
        *repeated,
        ("product", "batched product", s.columns + weight, s.y, flops(p), 1),
    ]


def _windows_backward(p: ConvProblem, s: Sizes) -> list[tuple]:
    taps, padded = _taps(p), _padded(p, s) or s.x
    return [
        *_columns_backward(p, s),
        ("columns", "zeros to add to", 0, padded, 0, 1),
        ("columns", "k² planes added up, row by row", 2 * s.columns, s.columns, 0, taps),
    ]


def _taps(p: ConvProblem) -> int:
    return p.kernel_size[0] * p.kernel_size[1]


def _chunk_of_columns(name: str, copies: int, products: int) -> Callable:
    """Forward of an algorithm that keeps a chunk in a cache, with its launches."""

    def rows(p: ConvProblem, s: Sizes) -> list[tuple]:
        return [
            ("columns", f"{name} of a chunk, into a cache", s.x, 0, 0, copies),
            ("product", "from the cache into its place in y", s.weight, s.y, flops(p), products),
        ]

    return rows


def _chunk_backward(name: str, copies: int, products: int) -> Callable:
    """Backward of the same: the columns made again, nothing kept from forward."""

    def rows(p: ConvProblem, s: Sizes) -> list[tuple]:
        both = s.x + s.y
        return [
            ("columns", f"{name} of a chunk again, into a cache", both, 0, 0, copies),
            ("product", "gradient of weight", 0, s.weight, flops(p), 2 * products),
            ("product", "gradient of x", s.weight, s.x, flops(p), products),
        ]

    return rows


def _by_memory_forward(p: ConvProblem, s: Sizes) -> list[tuple]:
    weight, repeated = _weight_of_each_image(p, s)
    return [
        _unfold_stage(p, s),
        *repeated,
        ("product", "product of a chunk into its place in y", s.columns + weight, s.y, flops(p), 1),
    ]


def _by_memory_backward(p: ConvProblem, s: Sizes) -> list[tuple]:
    col2im = ("unfold", "col2im of a chunk", s.columns, s.x, 0, 1)
    copy = ("unfold", "its place in the gradient of x", s.x, s.x, 0, 1)
    return [_unfold_stage(p, s), *_columns_backward(p, s), col2im, copy]


def _fused_forward(p: ConvProblem, s: Sizes) -> list[tuple]:
    padded = _padded(p, s)
    pad = [("columns", "x padded", s.x, padded, 0, 2)] if padded else []
    return [*pad, ("product", "the whole sum", (padded or s.x) + s.weight, s.y, flops(p), 1)]


def _fused_backward(p: ConvProblem, s: Sizes) -> list[tuple]:
    weight_gradient = _chunk_backward("k copies", p.kernel_size[1], p.kernel_size[0])(p, s)[:2]
    return [
        ("columns", "y's gradient padded", s.y, s.y, 0, 2),
        ("product", "the whole sum for x", s.y + s.weight, s.x, flops(p), 1),
        *weight_gradient,
    ]


def _shifts_forward(p: ConvProblem, s: Sizes) -> list[tuple]:
    long_rows = p.width + sum(p.pads[1])
    products = flops(p) * long_rows // p.output_shape[3] if p.stride == (1, 1) else flops(p)
    return [
        ("columns", "a chunk padded, into a cache", s.x, 0, 0, 2),
        ("product", "k² products added up in a cache", s.weight, 0, products, _taps(p)),
        ("product", "their place in y", 0, s.y, 0, 1),
    ]


def _shifts_backward(p: ConvProblem, s: Sizes) -> list[tuple]:
    _, product, place = _shifts_forward(p, s)
    return [
        ("columns", "chunks of x and y's gradient padded, into a cache", s.x + s.y, 0, 0, 4),
        ("product", "gradient of weight, tap by tap", 0, s.weight, product[4], 2 * product[5]),
        ("product", "gradient of x, tap by tap", s.weight, s.x, product[4], product[5] + place[5]),
    ]


def spectrum(p: ConvProblem) -> int:
    """Pixels of a padded plane; a real spectrum is as large."""
    return (p.height + sum(p.pads[0])) * (p.width + sum(p.pads[1]))


def _transform(what: str, planes: int, p: ConvProblem, read: int, written: int) -> tuple:
    pixels = spectrum(p)
    work = int(2.5 * pixels * math.log2(max(pixels, 2)) * planes)
    return ("transform", what, read, written, work, 1)


def _fft_forward(p: ConvProblem, s: Sizes) -> list[tuple]:
    pixels, n, k = spectrum(p), p.batch, p.out_channels
    x, w, y = (pixels * planes for planes in _planes(p))
    work = 4 * n * k * (p.in_channels // p.groups) * pixels  # 8 per complex product, half of S
    return [
        _transform("spectra of x", n * p.in_channels, p, s.x, x),
        _transform("spectra of the weight", w // pixels, p, s.weight, w),
        ("product", "spectra, frequency by frequency", 2 * (x + w), x + w + y, work, 1),
        ("transform", "spectra of y in their order", y, y, 0, 1),
        _transform("inverse", n * k, p, y, y),
        ("transform", "pixels of y", s.y, s.y, 0, 1),
    ]


def _planes(p: ConvProblem) -> tuple[int, int, int]:
    """Planes of x, weight and y."""
    n, c, k = p.batch, p.in_channels, p.out_channels
    return n * c, k * c // p.groups, n * k


def _fft_backward(p: ConvProblem, s: Sizes) -> list[tuple]:
    pixels, n, k = spectrum(p), p.batch, p.out_channels
    x, w, y = (pixels * planes for planes in _planes(p))
    work = 4 * n * k * (p.in_channels // p.groups) * pixels
    return [
        _transform("spectra of y's gradient", n * k, p, s.y, y),
        ("product", "spectra of x's gradient", y + w, x, work, 1),
        ("product", "spectra of the weight's gradient", y + x, w, work, 1),
        _transform("inverse for x", n * p.in_channels, p, x, s.x),
        _transform("inverse for the weight", w // pixels, p, w, s.weight),
    ]


def _winograd_forward(p: ConvProblem, s: Sizes) -> list[tuple]:
    products = flops(p) * 4 // 9
    return [
        ("transform", "tiles of a chunk, into a cache", s.x, 0, 32 * s.x // 4, 25),
        ("transform", "taps", s.weight, 16 * s.weight // 9, 0, 2),
        ("product", "16 products per tile", 16 * s.weight // 9, 0, products, 1),
        ("transform", "pixels back into y", 0, s.y, 24 * s.y // 4, 30),
    ]


def _winograd_backward(p: ConvProblem, s: Sizes) -> list[tuple]:
    _, taps, product, _ = _winograd_forward(p, s)
    weight_gradient = _chunk_backward("k copies", 2 * p.kernel_size[1], p.kernel_size[0])(p, s)[1]
    return [
        ("transform", "tiles of y's gradient, into a cache", s.y, 0, 32 * s.y // 4, 25),
        taps,
        product,
        ("transform", "pixels back into x's gradient", 0, s.x, 24 * s.x // 4, 30),
        ("columns", "k copies of a chunk of x, into a cache", s.x + s.y, 0, 0, p.kernel_size[1]),
        weight_gradient,
    ]


def _rows_forward(p: ConvProblem, s: Sizes) -> list[tuple]:
    kh, kw = p.kernel_size
    return _chunk_of_columns("k copies", kw * p.stride[0], kh)(p, s)


def _rows_backward(p: ConvProblem, s: Sizes) -> list[tuple]:
    kh, kw = p.kernel_size
    return _chunk_backward("k copies", 2 * kw * p.stride[0], kh)(p, s)


def _implicit_gemm_forward(p: ConvProblem, s: Sizes) -> list[tuple]:
    return [("product", "tile by tile, columns in registers", s.x + s.weight, s.y, flops(p), 1)]


def _implicit_gemm_backward(p: ConvProblem, s: Sizes) -> list[tuple]:
    sums = partial_sums(p) * s.weight
    phases = p.stride[0] * p.stride[1]
    reached = math.prod(
        min(stride // math.gcd(stride, dilation), kernel)
        for stride, dilation, kernel in zip(p.stride, p.dilation, p.kernel_size)
    )
    read = reached * s.y + s.weight  # every phase that taps reach reads y's gradient
    return [
        ("product", "gradient of x, phase by phase", read, s.x, flops(p), phases),
        ("product", "gradient of weight, in parts", s.y + s.x, sums, flops(p), 1),
        ("product", "the parts added up", sums, s.weight, 0, 1),
    ]


PROGRAMS = 528  # that share the weight's gradient: four on each multiprocessor of an H100
PART = 512  # pixels of y at least in a part of it


def partial_sums(p: ConvProblem, programs: int = PROGRAMS) -> int:
    """Parts into which `implicit_gemm` cuts the sum over y's pixels, so that the GPU is full."""
    n, k, oh, ow = p.output_shape
    return parts_of_sum(n * oh * ow, p.taps, k // p.groups, p.groups, programs)


def parts_of_sum(pixels: int, taps: int, filters: int, groups: int, programs: int) -> int:
    """The same from y's pixels and a group's C · kh · kw and output channels."""
    tiles = groups * -(-taps // 128) * -(-filters // 64)
    return max(1, min(programs // tiles, -(-pixels // PART)))


# A single image's matrix, transposed, is what BLAS takes as it is.
NOT_FOR_ONE_IMAGE = (
    "weight repeated for every image",
    "transposed columns made contiguous",
    "columns copied for one large product",
    "gradient made contiguous",
    "transposed gradient made contiguous",
)

STEPS: dict[tuple[str, str], Callable[[ConvProblem, Sizes], list[tuple]]] = {
    ("native", "forward"): _native_forward,
    ("native", "backward"): _native_backward,
    ("thread", "forward"): _thread_forward,
    ("thread", "backward"): _thread_backward,
    ("unfold", "forward"): _unfold_forward,
    ("unfold", "backward"): _unfold_backward,
    ("unfold_batched", "forward"): _batched_forward,
    ("unfold_batched", "backward"): _batched_backward,
    ("unfold_chunked", "forward"): _by_memory_forward,
    ("unfold_chunked", "backward"): _by_memory_backward,
    ("unfold_recompute", "forward"): _chunk_of_columns("columns", 1, 1),
    ("unfold_recompute", "backward"): _chunk_backward("columns", 3, 1),
    ("windows", "forward"): _windows_forward,
    ("windows", "backward"): _windows_backward,
    ("windows_chunked", "forward"): _chunk_of_columns("k² planes", 2, 1),
    ("windows_chunked", "backward"): _chunk_backward("k² planes", 5, 1),
    ("row_windows", "forward"): _rows_forward,
    ("row_windows", "backward"): _rows_backward,
    ("shifts", "forward"): _shifts_forward,
    ("shifts", "backward"): _shifts_backward,
    ("fft", "forward"): _fft_forward,
    ("fft", "backward"): _fft_backward,
    ("winograd", "forward"): _winograd_forward,
    ("winograd", "backward"): _winograd_backward,
    ("fused", "forward"): _fused_forward,
    ("fused", "backward"): _fused_backward,
    ("implicit_gemm", "forward"): _implicit_gemm_forward,
    ("implicit_gemm", "backward"): _implicit_gemm_backward,
    ("compiled", "forward"): _batched_forward,
    ("compiled", "backward"): _batched_backward,
}
