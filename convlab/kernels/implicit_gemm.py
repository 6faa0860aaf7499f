"""Convolution as a matrix product whose left factor is never stored (implicit GEMM).

The columns of `unfold` are a matrix (pixels, channels · taps). A program computes one tile of the
product: it works out where each value of its tile of columns lies in x, and loads it from there.
Bytes: x from the cache once per tile of output channels and tap, from memory about once; y once.

One kernel makes the output and, with a tap moving the other way, the gradient of x; a second one
makes the gradient of the weight, whose sum over all pixels is cut into parts.
"""

import triton
import triton.language as tl


@triton.jit
def to_tf32(x):
    """float32 → the nearest number of TF32: tensor cores would cut the last 13 bits off."""
    bits = x.to(tl.uint32, bitcast=True) + 0x1000
    return tl.where(x == x, (bits & 0xFFFFE000).to(tl.float32, bitcast=True), x)


@triton.jit
def pixels_of(values, NHWC: tl.constexpr):
    """Values of pixels, spread along a tile: down it in NHWC, across it in NCHW.

    The lanes of a warp follow the tile's last axis, and should read neighbours: channels of one
    pixel in NHWC, pixels of one channel in NCHW.
    """
    return values[:, None] if NHWC else values[None, :]


@triton.jit
def channels_of(values, NHWC: tl.constexpr):
    """Values of channels or taps, along the other axis."""
    return values[None, :] if NHWC else values[:, None]


@triton.jit
def product(
    X, W, B, Y,  # (N, C, H, W), (G, K, C, R, S), (G·K,), (N, G·K, OH, OW)
    pixels, C, K, H, WIDTH, OH, OW,  # C and K of one group; pixels = N · OH · OW
    x_n, x_c, x_h, x_w, w_g, w_k, w_c, w_r, w_s, y_n, y_k, y_h, y_w,  # strides in elements
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    R: tl.constexpr, S: tl.constexpr, NHWC: tl.constexpr, BY_TAP: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of y: `ROWS` output pixels by `CHANNELS` output channels of one group."""
    blocks = (K + CHANNELS - 1) // CHANNELS
    group = tl.program_id(1)
    m = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    image, row, column = (m // (OH * OW)).to(INDEX), m // OW % OH, m % OW
    top, left = row * stride_h - pad_h, column * stride_w - pad_w
    corner = pixels_of(image * x_n + top * x_h + left * x_w + group * C * x_c, NHWC)
    filters = channels_of(group * w_g + k * w_k, NHWC)
    top, left = pixels_of(top, NHWC), pixels_of(left, NHWC)
    real_m, real_k = pixels_of(m < pixels, NHWC), channels_of(k < K, NHWC)
    lanes = tl.arange(0, DEPTH)
    steps = (C + DEPTH - 1) // DEPTH * (R * S) if BY_TAP else (C * R * S + DEPTH - 1) // DEPTH
    y = tl.full((CHANNELS, ROWS), 0, SUM)
    for step in range(steps):
        if BY_TAP:  # DEPTH channels of one tap: bounds are checked once per pixel
            tap, c = step % (R * S), step // (R * S) * DEPTH + lanes
            r, s = tap // S, tap % S
            h, w = top + r * dilation_h, left + s * dilation_w
        else:  # the next DEPTH taps, whichever channel they are of: nothing is wasted
            q = step * DEPTH + lanes
            c, tap = q // (R * S), q % (R * S)
            r, s = tap // S, tap % S
            h = top + channels_of(r * dilation_h, NHWC)
            w = left + channels_of(s * dilation_w, NHWC)
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < WIDTH) & real_m & channels_of(c < C, NHWC)
        at = corner + channels_of(c * x_c + r * dilation_h * x_h + s * dilation_w * x_w, NHWC)
        columns = tl.load(X + at, mask=inside, other=0.0)
        at = filters + pixels_of(c * w_c + r * w_r + s * w_s, NHWC)
        weight = tl.load(W + at, mask=real_k & pixels_of(c < C, NHWC), other=0.0)
        if PRECISION == "tf32":
            columns, weight = to_tf32(columns), to_tf32(weight)
        if NHWC:
            columns, weight = tl.trans(columns), tl.trans(weight)
        y = tl.dot(weight, columns, y, input_precision=PRECISION, out_dtype=SUM)
    if NHWC:
        y = tl.trans(y)
    if B is not None:
        y += channels_of(tl.load(B + group * K + k, mask=k < K, other=0.0), NHWC)
    at = pixels_of(image * y_n + row * y_h + column * y_w, NHWC)
    at += channels_of((group * K + k) * y_k, NHWC)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=real_m & real_k)


@triton.jit
def weight_product(
    X, G, P,  # (N, C, H, W), (N, G·K, OH, OW), parts (splits, G, K, C·R·S)
    pixels, part, C, K, H, WIDTH, OH, OW,  # part: pixels that one split adds up
    x_n, x_c, x_h, x_w, g_n, g_k, g_h, g_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    R: tl.constexpr, S: tl.constexpr, NHWC: tl.constexpr, BY_TAP: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of one part of the weight's gradient: `ROWS` of C·R·S by `CHANNELS` of K."""
    blocks = (K + CHANNELS - 1) // CHANNELS
    group, split = tl.program_id(1), tl.program_id(2)
    q = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    if BY_TAP:  # taps of one channel lie R · S apart: neighbours are channels
        tap, c = q // C, q % C
    else:
        tap, c = q % (R * S), q // (R * S)
    down, right = tap // S * dilation_h - pad_h, tap % S * dilation_w - pad_w
    taps = channels_of((group * C + c) * x_c + down * x_h + right * x_w, NHWC)
    filters = channels_of((group * K + k) * g_k, NHWC)
    down, right = channels_of(down, NHWC), channels_of(right, NHWC)
    real_q, real_k = channels_of(q < C * R * S, NHWC), channels_of(k < K, NHWC)
    last = tl.minimum((split + 1) * part, pixels)
    total = tl.full((CHANNELS, ROWS), 0, SUM)
    for start in range(0, part, DEPTH):
        m = split * part + start + tl.arange(0, DEPTH)
        image, row, column = (m // (OH * OW)).to(INDEX), m // OW % OH, m % OW
        real_m = pixels_of(m < last, NHWC)
        row_x, column_x = row * stride_h, column * stride_w
        h, w = down + pixels_of(row_x, NHWC), right + pixels_of(column_x, NHWC)
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < WIDTH) & real_m & real_q
        at = taps + pixels_of(image * x_n + row_x * x_h + column_x * x_w, NHWC)
        columns = tl.load(X + at, mask=inside, other=0.0)
        at = filters + pixels_of(image * g_n + row * g_h + column * g_w, NHWC)
        grad = tl.load(G + at, mask=real_m & real_k, other=0.0)
        if PRECISION == "tf32":
            columns, grad = to_tf32(columns), to_tf32(grad)
        if NHWC:
            grad = tl.trans(grad)
        else:
            columns = tl.trans(columns)
        total = tl.dot(grad, columns, total, input_precision=PRECISION, out_dtype=SUM)
    at = P + ((split * tl.num_programs(1) + group) * K + k)[:, None] * (C * R * S)
    at += (c * (R * S) + tap)[None, :]
    tl.store(at, total, mask=(k < K)[:, None] & (q < C * R * S)[None, :])
