"""Convolution as a matrix product whose left factor is never stored (implicit GEMM).

The columns of `unfold` are a matrix (pixels, channels · taps). A program computes one tile of the
product: it works out where each value of its tile of columns lies in x, and loads it from there.
Bytes: x from the cache once per tile of output channels and tap, from memory about once; y once.

One kernel makes the output and, read backwards, the gradient of x: there a tap moves the other way,
so that padding and dilation change sign. With a stride, the pixels of x that are a stride apart
see the same taps of the weight, and are one convolution (`Phase`). A second kernel makes the
gradient of the weight: the sum over all pixels is cut into parts, which are added up afterwards
always in the same order.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from convlab.kernels.running import interpreting, runnable


@triton.jit
def product(
    X, W, B, Y,  # (N, C, H, W), (G, K, C, R, S), (G·K,), (N, G·K, OH, OW)
    pixels, C, K, H, WIDTH, OH, OW,  # C and K of one group; pixels = N · OH · OW
    x_n, x_c, x_h, x_w, w_g, w_k, w_c, w_r, w_s, y_n, y_k, y_h, y_w,  # strides in elements
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    R: tl.constexpr, S: tl.constexpr, BY_TAP: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of y: `ROWS` output pixels by `CHANNELS` output channels of one group."""
    across = (K + CHANNELS - 1) // CHANNELS
    group = tl.program_id(1)
    m = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)
    real_m, real_k = m < pixels, k < K
    image, row, column = (m // (OH * OW)).to(tl.int64), m // OW % OH, m % OW
    top, left = row * stride_h - pad_h, column * stride_w - pad_w
    from_x = X + image * x_n + group * C * x_c
    from_w = W + group * w_g + k * w_k
    lanes = tl.arange(0, DEPTH)
    steps = (C + DEPTH - 1) // DEPTH * (R * S) if BY_TAP else (C * R * S + DEPTH - 1) // DEPTH
    y = tl.full((ROWS, CHANNELS), 0, SUM)
    for step in range(steps):
        if BY_TAP:  # DEPTH channels of one tap: bounds are checked per pixel
            tap, c = step % (R * S), step // (R * S) * DEPTH + lanes
            real = c < C
            h, w = (top + tap // S * dilation_h)[:, None], (left + tap % S * dilation_w)[:, None]
        else:  # DEPTH taps in a row, whichever channel they are of: nothing is wasted
            q = step * DEPTH + lanes
            c, tap = q // (R * S), q % (R * S)
            real = c < C
            h = top[:, None] + (tap // S * dilation_h)[None, :]
            w = left[:, None] + (tap % S * dilation_w)[None, :]
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < WIDTH) & real_m[:, None] & real[None, :]
        at = from_x[:, None] + (c * x_c)[None, :] + h * x_h + w * x_w
        columns = tl.load(at, mask=inside, other=0.0)
        at = from_w[None, :] + (c * w_c + tap // S * w_r + tap % S * w_s)[:, None]
        weight = tl.load(at, mask=real[:, None] & real_k[None, :], other=0.0)
        y = tl.dot(columns, weight, y, input_precision=PRECISION, out_dtype=SUM)
    if B is not None:
        y += tl.load(B + group * K + k, mask=real_k, other=0.0)[None, :]
    to_y = Y + (image * y_n + row * y_h + column * y_w)[:, None] + ((group * K + k) * y_k)[None, :]
    tl.store(to_y, y.to(Y.dtype.element_ty), mask=real_m[:, None] & real_k[None, :])


@triton.jit
def weight_product(
    X, G, P,  # (N, C, H, W), (N, G·K, OH, OW), parts (splits, G, K, C·R·S)
    pixels, part, C, K, H, WIDTH, OH, OW,  # part: pixels that one split adds up
    x_n, x_c, x_h, x_w, g_n, g_k, g_h, g_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    R: tl.constexpr, S: tl.constexpr, BY_TAP: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of one part of the weight's gradient: `ROWS` of C·R·S by `CHANNELS` of K."""
    across = (K + CHANNELS - 1) // CHANNELS
    group, split = tl.program_id(1), tl.program_id(2)
    q = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)
    real_q, real_k = q < C * R * S, k < K
    if BY_TAP:
        tap, c = q // C, q % C
    else:
        tap, c = q % (R * S), q // (R * S)
    down, right = tap // S * dilation_h - pad_h, tap % S * dilation_w - pad_w
    from_x = X + (group * C + c) * x_c
    from_g = G + (group * K + k) * g_k
    first = split * part
    last = tl.minimum(first + part, pixels)
    total = tl.full((ROWS, CHANNELS), 0, SUM)
    for start in range(0, part, DEPTH):
        m = first + start + tl.arange(0, DEPTH)
        real_m = m < last
        image, row, column = (m // (OH * OW)).to(tl.int64), m // OW % OH, m % OW
        h = down[:, None] + (row * stride_h)[None, :]
        w = right[:, None] + (column * stride_w)[None, :]
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < WIDTH) & real_q[:, None] & real_m[None, :]
        at = from_x[:, None] + (image * x_n)[None, :] + h * x_h + w * x_w
        columns = tl.load(at, mask=inside, other=0.0)
        at = from_g[None, :] + (image * g_n + row * g_h + column * g_w)[:, None]
        grad = tl.load(at, mask=real_m[:, None] & real_k[None, :], other=0.0)
        total = tl.dot(columns, grad, total, input_precision=PRECISION, out_dtype=SUM)
    at = P + ((split * tl.num_programs(1) + group) * K + k)[None, :] * (C * R * S)
    at += (c * (R * S) + tap)[:, None]
    tl.store(at, total, mask=real_q[:, None] & real_k[None, :])


class Tile(NamedTuple):
    """What one program computes: `rows` by `channels`, `depth` products at a time."""

    rows: int
    channels: int
    depth: int
    by_tap: bool
    warps: int
    stages: int

    def constants(self) -> dict:
        """What the kernels are compiled for."""
        return {
            "ROWS": self.rows,
            "CHANNELS": self.channels,
            "DEPTH": self.depth,
            "BY_TAP": self.by_tap,
        }


# Few channels: a narrow tile, with the taps of all channels in a row or channels of one tap.
# Many channels: a wide tile, whose values are each used 64 or 128 times.
OUTPUT = (
    Tile(128, 16, 32, False, 4, 3),
    Tile(256, 16, 16, True, 4, 3),
    Tile(128, 32, 32, False, 4, 3),
    Tile(128, 32, 32, True, 4, 3),
    Tile(128, 64, 32, False, 4, 3),
    Tile(128, 64, 32, True, 4, 4),
    Tile(128, 128, 32, True, 8, 4),
)
WEIGHT = (
    Tile(64, 16, 64, False, 4, 3),
    Tile(128, 16, 64, False, 4, 3),
    Tile(64, 64, 32, False, 4, 3),
    Tile(128, 64, 32, True, 4, 3),
    Tile(128, 128, 32, True, 8, 3),
)
INTERPRETED = Tile(512, 16, 128, False, 4, 1)  # an operation costs the same, however large
PROGRAMS = 4  # per multiprocessor, so that none waits for the others at the end


def output(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, sizes) -> Tensor:
    """x (N, C, H, W), weight (K, C / groups, R, S), bias (K,) or None → y (N, K, OH, OW), filled.

    Args:
        sizes: with pairs `stride`, `padding`, `dilation` and the number `groups`.
    """
    weight = weight.unflatten(0, (sizes.groups, -1))
    _product(x, weight, bias, y, sizes.stride, sizes.padding, sizes.dilation)
    return y


def input_gradient(grad: Tensor, weight: Tensor, gx: Tensor, sizes) -> Tensor:
    """y's gradient (N, K, OH, OW), weight (K, C / groups, R, S) → gx (N, C, H, W), filled."""
    weight = weight.unflatten(0, (sizes.groups, -1)).transpose(1, 2)  # G, C, K, R, S
    (down, right), kernel = sizes.stride, weight.shape[3:]
    for i, j in itertools.product(range(down), range(right)):
        rows, columns = (
            Phase.of(first, *size)
            for first, *size in zip((i, j), sizes.stride, sizes.padding, sizes.dilation, kernel)
        )
        pixels = gx[:, :, i::down, j::right]
        if rows is None or columns is None:
            pixels.zero_()
        else:
            padding, dilation = zip(rows[1:], columns[1:])
            taps = weight[:, :, :, rows.taps, columns.taps]
            _product(grad, taps, None, pixels, (1, 1), padding, dilation)
    return gx


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, sizes) -> Tensor:
    """y's gradient (N, K, OH, OW), x (N, C, H, W) → (K, C / groups, R, S)."""
    (_, c, r, s), g = weight.shape, sizes.groups
    n, k, (oh, ow) = len(x), len(weight) // g, grad.shape[2:]
    pixels = n * oh * ow
    if not pixels:
        return torch.zeros_like(weight)
    tiles = g * triton.cdiv(c * r * s, 128) * triton.cdiv(k, 64)
    splits = max(1, min(_programs(x) // tiles if x.is_cuda else 2, triton.cdiv(pixels, 512)))
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = torch.empty(splits, g, k, c * r * s, dtype=sums, device=x.device)
    sizes_ = pixels, triton.cdiv(pixels, splits), c, k, *x.shape[2:], oh, ow
    steps = *sizes.stride, *sizes.padding, *sizes.dilation
    arguments = x, grad, parts, *sizes_, *x.stride(), *grad.stride(), *steps

    def grid(tile):
        across = triton.cdiv(c * r * s, tile["ROWS"]) * triton.cdiv(k, tile["CHANNELS"])
        return across, g, splits

    _launch(weight_product, grid, arguments, (r, s), x)
    return parts.sum(0).view(weight.shape).to(weight.dtype)


class Phase(NamedTuple):
    """The convolution whose outputs are the pixels first, first + stride, … of x's gradient.

    Attributes:
        taps: those that reach these pixels.
        padding, dilation: in pixels of y; a tap that moves right in x moves left in y.
    """

    taps: slice
    padding: int
    dilation: int

    @classmethod
    def of(cls, first: int, stride: int, padding: int, dilation: int, kernel: int):
        """None where no tap reaches them."""
        step = stride // math.gcd(stride, dilation)
        for tap in range(min(step, kernel)):
            if (distance := first + padding - tap * dilation) % stride == 0:
                return cls(slice(tap, None, step), -distance // stride, -step * dilation // stride)
        return None


def _product(x, weight, bias, y, stride, padding, dilation) -> None:
    """y (N, G·K, OH, OW) filled from x (N, G·C, H, W) and weight (G, K, C, R, S), all views."""
    if not y.numel():
        return
    g, k, c, r, s = weight.shape
    n, _, oh, ow = y.shape
    pixels = n * oh * ow
    steps = *stride, *padding, *dilation
    strides = *x.stride(), *weight.stride(), *y.stride()
    arguments = x, weight, bias, y, pixels, c, k, *x.shape[2:], oh, ow, *strides, *steps

    def grid(tile):
        return triton.cdiv(pixels, tile["ROWS"]) * triton.cdiv(k, tile["CHANNELS"]), g

    _launch(product, grid, arguments, (r, s), x)


def _launch(kernel, grid, arguments, taps, x) -> None:
    exact = x.dtype == torch.float64
    tf32 = x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32  # the flag of F.conv2d
    constants = {
        "R": taps[0],
        "S": taps[1],
        "PRECISION": "tf32" if tf32 else "ieee",
        "SUM": tl.float64 if exact else tl.float32,
    }
    if interpreting():
        runnable(kernel)[grid](*arguments, **constants, **INTERPRETED.constants())
        return
    with torch.cuda.device(x.device):
        _tuned(kernel)[grid](*arguments, **constants)


@functools.cache
def _tuned(kernel):
    """The kernel with the fastest tile per problem, found at its first call."""
    tiles = OUTPUT if kernel is product else WEIGHT
    configs = [triton.Config(t.constants(), t.warps, t.stages) for t in tiles]
    sizes = "pixels", "C", "K", "H", "WIDTH", "OH", "OW", "R", "S", "PRECISION"
    steps = "x_c", "x_w", "stride_h", "stride_w"  # x_c is 1 in NHWC
    return triton.autotune(
        configs,
        key=[*sizes, *steps],
        prune_configs_by={"early_config_prune": fitting},
        do_bench=functools.partial(triton.testing.do_bench, warmup=5, rep=20),
    )(kernel)


def fitting(configs: list, sizes: dict, **constants) -> list:
    """The tiles that waste little on these sizes."""
    c, k, taps = sizes["C"], sizes["K"], constants["R"] * constants["S"]
    wide = triton.next_power_of_2(k)

    def fits(tile: dict) -> bool:
        narrow = min(wide, 128) // 2 <= tile["CHANNELS"] <= max(wide, 16)
        if tile["BY_TAP"]:
            return narrow and c >= tile["DEPTH"] // 2
        return narrow and taps > 1 and c % 32 != 0

    return [config for config in configs if fits(config.kwargs)] or configs[:1]


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _programs(x: Tensor) -> int:
    return PROGRAMS * _multiprocessors(x.device.index)
