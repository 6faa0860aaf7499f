"""Convolution as a matrix product whose left factor is never stored (implicit GEMM).

The columns of `unfold` are a matrix (pixels, channels · taps). A program computes one tile of the
product: it works out where each value of its tile of columns lies in x, and loads it from there.
Bytes: x from the cache once per tile of output channels and tap, from memory about once; y once.

One kernel makes the output and, with a tap moving the other way, the gradient of x; a second one
makes the gradient of the weight, whose sum over all pixels is cut into parts.
"""

import triton
import triton.language as tl

# Offsets along which the lanes of a warp had better run are said to be `max_contiguous(…, PAIRS)`,
# as nearly all of them are: the compiler cannot see it through the divisions. It takes the hint for
# the order of the lanes only; to load two values at once it would have to know their alignment too.
# (Said inside of a function that is called, it is lost.)
PAIRS = tl.constexpr(2)
# Numbers whose value would only make the compiler start anew for every problem.
SIZES = ["pixels", "H", "WIDTH", "OH", "OW", "stride_h", "stride_w", "pad_h", "pad_w"]
NOWHERE = tl.constexpr(-(2**30))  # a row outside of every image


@triton.jit
def to_tf32(x):
    """float32 → the nearest number of TF32: tensor cores would cut the last 13 bits off."""
    return tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def to_tf32_by_bits(x):
    """The same for the interpreter."""
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
def within(values, size):
    """0 ≤ values < size, as one comparison of unsigned numbers."""
    return values.to(tl.uint32, bitcast=True) < size


@triton.jit
def place_of(m, OH, OW):
    """Number of a pixel → image, row, column, by two divisions."""
    rows = m // OW
    image = rows // OH
    return image, rows - image * OH, m - rows * OW


@triton.jit
def moved_on(image, row, column, images, rows, columns, OH, OW):
    """The place of a pixel so many images, rows and columns further on, without a division."""
    column += columns
    row += rows + (column >= OW).to(tl.int32)
    image += images + (row >= OH).to(image.dtype)
    column = tl.where(column >= OW, column - OW, column)
    return image, tl.where(row >= OH, row - OH, row), column


@triton.jit
def taps_inside(
    top, left, H, WIDTH, dilation_h, dilation_w, R: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """Bit r · S + s: whether that tap of a pixel lies inside of x, tested once for all channels."""
    BITS: tl.constexpr = tl.uint32 if R * S < 32 else tl.uint64
    columns = tl.full(left.shape, 0, BITS)
    for s in tl.static_range(S):
        columns |= within(left + s * dilation_w, WIDTH).to(BITS) << s
    found = tl.full(left.shape, 0, BITS)
    for r in tl.static_range(R):
        found |= tl.where(within(top + r * dilation_h, H), columns << r * S, 0)
    return found


@triton.jit(do_not_specialize=SIZES)
def product(
    X, W, B, Y,  # (N, C, H, W), (G, K …, C, R, S), (G·K,), (N, G·K, OH, OW)
    pixels, C: tl.constexpr, K, H, WIDTH, OH, OW,  # C, K of one group; pixels = N · OH · OW
    x_n, x_c, x_h, x_w, w_g, w_k, w_c, w_r, w_s, y_n, y_k, y_h, y_w,  # strides in elements
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    R: tl.constexpr, S: tl.constexpr, NHWC: tl.constexpr, BY_TAP: tl.constexpr,
    ROUND: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of y: `ROWS` output pixels by `CHANNELS` output channels of one group."""
    blocks = (K + CHANNELS - 1) // CHANNELS
    group = tl.program_id(1)
    m = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    image, row, column = place_of(m, OH, OW)
    image = image.to(INDEX)
    top, left = row * stride_h - pad_h, column * stride_w - pad_w
    corner = image * x_n + top * x_h + left * x_w + group * C * x_c
    target = image * y_n + row * y_h + column * y_w
    if not NHWC:
        corner = tl.max_contiguous(corner, PAIRS)
        target = tl.max_contiguous(target, PAIRS)
    filters = group * w_g + k * w_k
    top = tl.where(m < pixels, top, NOWHERE)
    lanes = tl.arange(0, DEPTH)
    if NHWC:
        y = tl.full((ROWS, CHANNELS), 0, SUM)
    else:
        y = tl.full((CHANNELS, ROWS), 0, SUM)
    if DEPTH == 1:  # one value of x by CHANNELS weights: no tile goes through shared memory
        for tap in range(R * S):
            r, s = tap // S, tap % S
            inside = within(top + r * dilation_h, H) & within(left + s * dilation_w, WIDTH)
            at_x = X + (corner + (r * dilation_h * x_h + s * dilation_w * x_w))
            at_w = W + (filters + (r * w_r + s * w_s))
            for c in tl.static_range(C):
                x = tl.load(at_x + c * x_c, mask=inside, other=0.0).to(SUM)
                weight = tl.load(at_w + c * w_c).to(SUM)
                y += pixels_of(x, NHWC) * channels_of(weight, NHWC)
    elif BY_TAP:  # DEPTH channels of one tap at a time
        for step in range((C + DEPTH - 1) // DEPTH * (R * S)):
            tap, c = step % (R * S), step // (R * S) * DEPTH + lanes
            r, s = tap // S, tap % S
            at = c * x_c + (r * dilation_h * x_h + s * dilation_w * x_w)
            at = pixels_of(corner, NHWC) + channels_of(at, NHWC)
            inside = within(top + r * dilation_h, H) & within(left + s * dilation_w, WIDTH)
            there = pixels_of(inside, NHWC) & channels_of(c < C, NHWC)
            columns = tl.load(X + at, mask=there, other=0.0)
            at = channels_of(filters, NHWC) + pixels_of(c * w_c + (r * w_r + s * w_s), NHWC)
            weight = tl.load(
                W + at, mask=channels_of(k < K, NHWC) & pixels_of(c < C, NHWC), other=0.0
            )
            y = add_product(y, columns, weight, NHWC, ROUND, PRECISION, SUM)
    else:  # the next DEPTH taps, whichever channel they are of: nothing is wasted, and written out,
        # so that the compiler knows channel and tap
        inside = taps_inside(top, left, H, WIDTH, dilation_h, dilation_w, R, S)
        inside = pixels_of(inside, NHWC)
        STEPS: tl.constexpr = (C * R * S + DEPTH - 1) // DEPTH
        for step in tl.static_range(STEPS):
            q = step * DEPTH + lanes
            if NHWC:
                tap, c = q // C, q % C
            else:
                tap, c = q % (R * S), q // (R * S)
            real = q < C * R * S
            r, s = tap // S, tap % S
            at = c * x_c + (r * dilation_h * x_h + s * dilation_w * x_w)
            if NHWC:
                at = tl.max_contiguous(at, PAIRS)
            at = pixels_of(corner, NHWC) + channels_of(at, NHWC)
            there = (inside >> channels_of(tl.where(real, tap, R * S), NHWC)) & 1 != 0
            columns = tl.load(X + at, mask=there, other=0.0)
            at = channels_of(filters, NHWC) + pixels_of(c * w_c + (r * w_r + s * w_s), NHWC)
            weight = tl.load(
                W + at, mask=channels_of(k < K, NHWC) & pixels_of(real, NHWC), other=0.0
            )
            y = add_product(y, columns, weight, NHWC, ROUND, PRECISION, SUM)
    if B is not None:
        y += channels_of(tl.load(B + group * K + k, mask=k < K, other=0.0), NHWC)
    at = pixels_of(target, NHWC) + channels_of((group * K + k) * y_k, NHWC)
    tl.store(
        Y + at,
        y.to(Y.dtype.element_ty),
        mask=pixels_of(m < pixels, NHWC) & channels_of(k < K, NHWC),
    )


@triton.jit
def add_product(
    y, columns, weight, NHWC: tl.constexpr, ROUND: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """y + the product of both as they were loaded, whose common axis lies between them."""
    if PRECISION == "tf32":
        columns, weight = ROUND(columns), ROUND(weight)
    if NHWC:
        y = tl.dot(columns, weight, y, input_precision=PRECISION, out_dtype=SUM)
    else:
        y = tl.dot(weight, columns, y, input_precision=PRECISION, out_dtype=SUM)
    return y


@triton.jit(do_not_specialize=SIZES)
def weight_product(
    X, G, P,  # (N, C, H, W), (N, G·K, OH, OW), parts (splits, G, K, C·R·S)
    pixels, part, C, K, H, WIDTH, OH, OW,  # part: pixels that one split adds up
    x_n, x_c, x_h, x_w, g_n, g_k, g_h, g_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    R: tl.constexpr, S: tl.constexpr, NHWC: tl.constexpr, BY_TAP: tl.constexpr,
    ROUND: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr, INDEX: tl.constexpr,
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
    # In plain float32 the products of one step are added up by themselves: a single chain over all
    # pixels is several times less exact. Of total + a · b the compiler makes that chain, of
    # total − a · b it does not.
    APART: tl.constexpr = PRECISION == "ieee" and X.dtype.element_ty == tl.float32
    m = split * part + tl.arange(0, DEPTH)
    image, row, column = place_of(m, OH, OW)
    image = image.to(INDEX)
    images, rows, columns = place_of(DEPTH, OH, OW)  # of one step
    for _ in range(0, part, DEPTH):
        real_m = m < last
        row_x, column_x = row * stride_h, column * stride_w
        at_x = image * x_n + row_x * x_h + column_x * x_w
        at_g = image * g_n + row * g_h + column * g_w
        if not NHWC:
            at_x, at_g = tl.max_contiguous(at_x, PAIRS), tl.max_contiguous(at_g, PAIRS)
        row_x = tl.where(real_m, row_x, NOWHERE)
        inside = within(down + pixels_of(row_x, NHWC), H) & real_q
        inside &= within(right + pixels_of(column_x, NHWC), WIDTH)
        x = tl.load(X + (taps + pixels_of(at_x, NHWC)), mask=inside, other=0.0)
        there = pixels_of(real_m, NHWC) & real_k
        grad = tl.load(G + (filters + pixels_of(at_g, NHWC)), mask=there, other=0.0)
        if PRECISION == "tf32":
            x, grad = ROUND(x), ROUND(grad)
        if NHWC:
            grad = tl.trans(grad)
        else:
            x = tl.trans(x)
        if APART:
            total -= tl.dot(grad, x, input_precision=PRECISION, out_dtype=SUM)
        else:
            total = tl.dot(grad, x, total, input_precision=PRECISION, out_dtype=SUM)
        m += DEPTH
        image, row, column = moved_on(image, row, column, images, rows, columns, OH, OW)
    if APART:
        total = -total
    at = P + ((split * tl.num_programs(1) + group) * K + k)[:, None] * (C * R * S)
    at += (c * (R * S) + tap)[None, :]
    tl.store(at, total, mask=(k < K)[:, None] & (q < C * R * S)[None, :])
