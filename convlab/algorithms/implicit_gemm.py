"""A Triton kernel: the columns exist only as index arithmetic in its loads (implicit GEMM).

Bytes: x, weight and y about once each; FLOPs as `unfold`, on tensor cores where float32 may be
rounded to TF32 (cuDNN's own flag decides). The kernels are in `convlab.kernels.implicit_gemm`.
The first call of a problem compiles and tries several tiles, for seconds. y lies in NHWC where x
does.
"""

import torch

from convlab.algorithms.base import add_bias, algorithm
from convlab.algorithms.method import (
    METHODS,
    Method,
    Sizes,
    convolve,
    empty_output,
    gradients_of,
    like_input,
)
from convlab.kernels import missing

LARGEST = 2**30  # output pixels, and elements of one image: 32 bits count them


def limits(problem, device):
    n, k, oh, ow = problem.output_shape
    per_image = max(problem.in_channels * problem.height * problem.width, k * oh * ow)
    if n * oh * ow > LARGEST or per_image > LARGEST:
        return "implicit_gemm counts output pixels and the values of one image up to 2³⁰."
    return missing(device, "implicit_gemm")


@algorithm("A Triton kernel whose columns are index arithmetic, never memory.", limits=limits)
def implicit_gemm(x, weight, bias, stride, padding, dilation, groups):
    sizes = Sizes(stride, padding, dilation, groups, 1)
    if bias is None or torch.compiler.is_compiling():
        return add_bias(convolve("implicit_gemm", x, weight, sizes), bias)
    return _WithBias.apply(x, weight, bias, sizes)


class _WithBias(torch.autograd.Function):
    """The kernel adds the bias before it stores a value: no second pass over y."""

    @staticmethod
    def forward(ctx, x, weight, bias, sizes):
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        return output(x, weight, sizes, bias)

    @staticmethod
    def backward(ctx, grad):
        gx, gw = gradients_of("implicit_gemm", ctx, grad)
        return gx, gw, grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None


def output(x, weight, sizes, bias=None):
    from convlab.kernels import launching

    return launching.output(x, weight, bias, empty_output(x, weight, sizes, True), sizes)


def gradients(grad, x, weight, sizes, needs):
    from convlab.kernels import launching

    gx = gw = None
    if needs[0]:
        gx = launching.input_gradient(grad, weight, like_input(x, True), sizes)
    if needs[1]:
        gw = launching.weight_gradient(grad, x, weight, sizes)
    return gx, gw


METHODS["implicit_gemm"] = Method(output, gradients, nhwc=True)
