"""Custom convolutions as Triton kernels, for any `combine` and its derivatives.

A program computes a tile of results: some pixels by some channels. It goes through the terms of all
of them one tap and one channel after the other; x, the weight and what else a term needs are loaded
once for the whole tile, and the sums stay in registers. No kernel adds into memory that another
program writes to, so results are the same each time.

VALUE and PARTIAL are functions of (x, w, aux, numbers) made from the reader's own
(`convlab.flex.generating`); NUMBERS in memory are pad_value and the captured numbers, unpacked by
UNPACK.
"""

import triton
import triton.language as tl

from convlab.kernels.implicit_gemm import (
    NOWHERE,
    PAIRS,
    channels_of,
    moved_on,
    pixels_of,
    place_of,
    within,
)


@triton.jit
def slope(
    x, w, aux, numbers, limit,
    REDUCE: tl.constexpr, VALUE: tl.constexpr, PARTIAL: tl.constexpr, EXP: tl.constexpr,
):  # fmt: skip
    """The reduction's derivative by an argument of one term; limit: what the terms came to."""
    found = PARTIAL(x, w, aux, numbers)
    if REDUCE == "max":
        found = tl.where(VALUE(x, w, aux, numbers) >= limit, found, 0.0)
    if REDUCE == "logsumexp":
        found = EXP(VALUE(x, w, aux, numbers) - limit) * found
    return found


@triton.jit
def outputs(
    X, W, AUX, LIMIT, Y, NUMBERS,  # (N, G·C, H, W), (G, R, S, C, w_c), 3 × (N, G·K, OH, OW)
    pixels, C, K, H, WIDTH, OH, OW,  # C and K of one group; pixels = N · OH · OW
    w_c,  # K and what fills up the last tile
    x_n, x_c, x_h, x_w, a_n, a_k, a_h, a_w, y_n, y_k, y_h, y_w,  # strides in elements
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    R: tl.constexpr, S: tl.constexpr, NHWC: tl.constexpr, REDUCE: tl.constexpr,
    VALUE: tl.constexpr, PARTIAL: tl.constexpr, UNPACK: tl.constexpr, EXP: tl.constexpr,
    LARGEST: tl.constexpr, SUM: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`ROWS` output pixels by `CHANNELS` output channels of Y.

    Y is the reduction or, with a PARTIAL, its derivative: the sum of `slope`; LIMIT is then the
    reduction. LARGEST: the largest finite sum. Loads per term: 1 / CHANNELS of x, 1 / ROWS of
    the weight.
    """
    blocks = (K + CHANNELS - 1) // CHANNELS
    group = tl.program_id(1)
    m = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    real_m = m < pixels
    real = pixels_of(real_m, NHWC) & channels_of(k < K, NHWC)
    image, row, column = place_of(m, OH, OW)
    image = image.to(INDEX)
    numbers = UNPACK(NUMBERS)
    pad = numbers[0].to(X.dtype.element_ty)
    if NHWC:
        total = tl.full((ROWS, CHANNELS), 0, SUM)
    else:
        total = tl.full((CHANNELS, ROWS), 0, SUM)
    at = image * y_n + row * y_h + column * y_w
    if not NHWC:
        at = tl.max_contiguous(at, PAIRS)
    at = pixels_of(at, NHWC) + channels_of((group * K + k) * y_k, NHWC)
    limit = total
    if PARTIAL is None:
        if REDUCE == "max":
            limit = total - float("inf")
        if REDUCE == "logsumexp":
            limit = total - LARGEST
    elif REDUCE != "sum":
        limit = tl.load(LIMIT + at, mask=real, other=float("inf")).to(SUM)
    aux = total
    if AUX is not None:
        at_aux = image * a_n + row * a_h + column * a_w
        if not NHWC:
            at_aux = tl.max_contiguous(at_aux, PAIRS)
        at_aux = pixels_of(at_aux, NHWC) + channels_of((group * K + k) * a_k, NHWC)
        aux = tl.load(AUX + at_aux, mask=real, other=0.0).to(SUM)
    top, left = row * stride_h - pad_h, column * stride_w - pad_w
    corner = image * x_n + top * x_h + left * x_w + group * C * x_c
    top = tl.where(real_m, top, NOWHERE)
    filters = W + group * (R * S * C * w_c) + k
    for tap in range(R * S):
        r, s = tap // S, tap % S
        h, w = top + r * dilation_h, left + s * dilation_w
        inside = within(h, H) & within(w, WIDTH)
        at_x = corner + (r * dilation_h * x_h + s * dilation_w * x_w)
        for c in range(C):
            pixel = tl.load(X + at_x + c * x_c, mask=inside, other=pad).to(SUM)
            weight = tl.load(filters + (tap * C + c) * w_c).to(SUM)
            pixel, weight = pixels_of(pixel, NHWC), channels_of(weight, NHWC)
            if PARTIAL is not None:
                found = slope(pixel, weight, aux, numbers, limit, REDUCE, VALUE, PARTIAL, EXP)
                total += found
            else:
                term = VALUE(pixel, weight, aux, numbers)
                if REDUCE == "sum":
                    total += term
                elif REDUCE == "max":
                    limit = tl.maximum(limit, term, propagate_nan=tl.PropagateNan.ALL)
                else:  # relative to the largest term so far: one exponential per term
                    higher = tl.maximum(limit, term)
                    lower = tl.minimum(limit, term, propagate_nan=tl.PropagateNan.ALL)
                    share = EXP(lower - tl.minimum(higher, LARGEST))
                    total = tl.where(term > limit, total * share + 1.0, total + share)
                    limit = higher
    if PARTIAL is None:
        if REDUCE == "max":
            total = limit
        if REDUCE == "logsumexp":
            total = tl.log(total) + limit
    tl.store(Y + at, total.to(Y.dtype.element_ty), mask=real)


@triton.jit
def input_gradients(
    X, W, AUX, LIMIT, GRAD, GX, NUMBERS,  # x, (G, R, S, K, w_k), 3 × (N, G·K, OH, OW), x's
    pixels, C, K, H, WIDTH, OH, OW,  # pixels = N · H · WIDTH
    w_k,  # C and what fills up the last tile
    x_n, x_c, x_h, x_w, a_n, a_k, a_h, a_w, y_n, y_k, y_h, y_w, gx_n, gx_c, gx_h, gx_w,
    pad_h, pad_w, dilation_h, dilation_w,  # of the convolution read backwards
    R: tl.constexpr, S: tl.constexpr, NHWC: tl.constexpr, REDUCE: tl.constexpr,
    VALUE: tl.constexpr, PARTIAL: tl.constexpr, UNPACK: tl.constexpr, EXP: tl.constexpr,
    GUARD: tl.constexpr, SUM: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`ROWS` pixels of x by `CHANNELS` input channels of GX, from all outputs that they reach.

    GUARD: PARTIAL may be infinite at a tap that reaches no output, where the gradient is zero.
    """
    blocks = (C + CHANNELS - 1) // CHANNELS
    group = tl.program_id(1)
    m = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    real_m = m < pixels
    real = pixels_of(real_m, NHWC) & channels_of(c < C, NHWC)
    image, row, column = place_of(m, H, WIDTH)
    image = image.to(INDEX)
    numbers = UNPACK(NUMBERS)
    at = image * x_n + row * x_h + column * x_w
    target = image * gx_n + row * gx_h + column * gx_w
    if not NHWC:
        at, target = tl.max_contiguous(at, PAIRS), tl.max_contiguous(target, PAIRS)
    at = pixels_of(at, NHWC) + channels_of((group * C + c) * x_c, NHWC)
    pixel = tl.load(X + at, mask=real, other=0.0).to(SUM)
    top, left = row - pad_h, column - pad_w
    corner = image * y_n + top * y_h + left * y_w + group * K * y_k
    corner_aux = image * a_n + top * a_h + left * a_w + group * K * a_k
    top = tl.where(real_m, top, NOWHERE)
    filters = W + group * (R * S * K * w_k) + c
    if NHWC:
        total = tl.full((ROWS, CHANNELS), 0, SUM)
    else:
        total = tl.full((CHANNELS, ROWS), 0, SUM)
    for tap in range(R * S):
        r, s = tap // S, tap % S
        h, w = top + r * dilation_h, left + s * dilation_w
        inside = within(h, OH) & within(w, OW)
        at_y = corner + (r * dilation_h * y_h + s * dilation_w * y_w)
        at_aux = corner_aux + (r * dilation_h * a_h + s * dilation_w * a_w)
        for k in range(K):
            grad = tl.load(GRAD + at_y + k * y_k, mask=inside, other=0.0).to(SUM)
            weight = tl.load(filters + (tap * K + k) * w_k).to(SUM)
            grad, weight = pixels_of(grad, NHWC), channels_of(weight, NHWC)
            limit, aux = grad, grad
            if REDUCE != "sum":
                limit = tl.load(LIMIT + at_y + k * y_k, mask=inside, other=float("inf"))
                limit = pixels_of(limit.to(SUM), NHWC)
            if AUX is not None:
                aux = tl.load(AUX + at_aux + k * a_k, mask=inside, other=0.0)
                aux = pixels_of(aux.to(SUM), NHWC)
            term = slope(pixel, weight, aux, numbers, limit, REDUCE, VALUE, PARTIAL, EXP)
            term *= grad
            if GUARD:
                term = tl.where(pixels_of(inside, NHWC), term, 0.0)
            total += term
    at = pixels_of(target, NHWC) + channels_of((group * C + c) * gx_c, NHWC)
    tl.store(GX + at, total.to(GX.dtype.element_ty), mask=real)


@triton.jit
def weight_gradients(
    X, W, AUX, LIMIT, GRAD, PARTS, NUMBERS,  # W (G, K, C·R·S), PARTS (splits, G, K, C·R·S)
    pixels, part, C, K, H, WIDTH, OH, OW,  # part: pixels that one split adds up
    x_n, x_c, x_h, x_w, a_n, a_k, a_h, a_w, y_n, y_k, y_h, y_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    R: tl.constexpr, S: tl.constexpr, NHWC: tl.constexpr, REDUCE: tl.constexpr,
    VALUE: tl.constexpr, PARTIAL: tl.constexpr, UNPACK: tl.constexpr, EXP: tl.constexpr,
    GUARD: tl.constexpr, ADDED: tl.constexpr, SUM: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One part of the weight's gradient: `ROWS` of C·R·S by `CHANNELS` of K, `DEPTH` pixels a step.

    Each pixel of a step has its own sums, which ADDED (`tl.sum`) brings together at the end.
    """
    blocks = (K + CHANNELS - 1) // CHANNELS
    group, split = tl.program_id(1), tl.program_id(2)
    q = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    real = (k < K)[:, None] & (q < C * R * S)[None, :]
    q, k = tl.minimum(q, C * R * S - 1), tl.minimum(k, K - 1)  # loads need no mask for them
    if NHWC:
        tap, c = q // C, q % C  # neighbours are channels
    else:
        tap, c = q % (R * S), q // (R * S)
    numbers = UNPACK(NUMBERS)
    pad = numbers[0].to(X.dtype.element_ty)
    down, right = tap // S * dilation_h - pad_h, tap % S * dilation_w - pad_w
    taps = channels_of((group * C + c) * x_c + down * x_h + right * x_w, NHWC)
    filters, filters_aux = (group * K + k)[:, None] * y_k, (group * K + k)[:, None] * a_k
    down, right = channels_of(down, NHWC), channels_of(right, NHWC)
    at_w = (group * K + k)[:, None] * (C * R * S) + (c * (R * S) + tap)[None, :]
    weight = tl.load(W + at_w).to(SUM)
    weight = weight[:, None, :] if NHWC else weight[:, :, None]
    if NHWC:
        total = tl.full((CHANNELS, DEPTH, ROWS), 0, SUM)
    else:
        total = tl.full((CHANNELS, ROWS, DEPTH), 0, SUM)
    m = split * part + tl.arange(0, DEPTH)
    image, row, column = place_of(m, OH, OW)
    image = image.to(INDEX)
    images, rows, columns = place_of(DEPTH, OH, OW)  # of one step
    last = tl.minimum((split + 1) * part, pixels)
    for _ in range(0, part, DEPTH):
        real_m = m < last
        row_x, column_x = row * stride_h, column * stride_w
        at_x = image * x_n + row_x * x_h + column_x * x_w
        if not NHWC:
            at_x = tl.max_contiguous(at_x, PAIRS)
        at_x = taps + pixels_of(at_x, NHWC)
        row_x = tl.where(real_m, row_x, NOWHERE)
        inside = within(down + pixels_of(row_x, NHWC), H)
        inside &= within(right + pixels_of(column_x, NHWC), WIDTH)
        pixel = tl.load(X + at_x, mask=inside, other=pad).to(SUM)[None, :, :]
        at_y = filters + (image * y_n + row * y_h + column * y_w)[None, :]
        there = real_m[None, :]
        grad = tl.load(GRAD + at_y, mask=there, other=0.0).to(SUM)
        grad = grad[:, :, None] if NHWC else grad[:, None, :]
        limit, aux = grad, grad
        if REDUCE != "sum":
            limit = tl.load(LIMIT + at_y, mask=there, other=float("inf")).to(SUM)
            limit = limit[:, :, None] if NHWC else limit[:, None, :]
        if AUX is not None:
            at_aux = filters_aux + (image * a_n + row * a_h + column * a_w)[None, :]
            aux = tl.load(AUX + at_aux, mask=there, other=0.0).to(SUM)
            aux = aux[:, :, None] if NHWC else aux[:, None, :]
        term = slope(pixel, weight, aux, numbers, limit, REDUCE, VALUE, PARTIAL, EXP) * grad
        if GUARD:
            term = tl.where(real_m[None, :, None] if NHWC else real_m[None, None, :], term, 0.0)
        total += term
        m += DEPTH
        image, row, column = moved_on(image, row, column, images, rows, columns, OH, OW)
    found = ADDED(total, 1 if NHWC else 2)
    tl.store(PARTS + split * tl.num_programs(1) * K * (C * R * S) + at_w, found, mask=real)
