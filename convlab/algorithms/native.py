"""`F.conv2d` itself: as called, in NHWC, and with the library behind it switched off.

On the CPU the library is oneDNN, on CUDA it is cuDNN. FLOPs: 2·N·K·OH·OW·taps. Bytes: at best
each of x, weight and y once.
"""

import torch
import torch.nn.functional as F

from convlab.algorithms.base import algorithm
from convlab.machine import library_off


@algorithm("F.conv2d as called: oneDNN on the CPU, cuDNN on CUDA.", library=True)
def native(x, weight, bias, stride, padding, dilation, groups):
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


@algorithm("F.conv2d with x and weight in NHWC (channels_last).", library=True)
def native_channels_last(x, weight, bias, stride, padding, dilation, groups):
    nhwc = torch.channels_last
    x = x.contiguous(memory_format=nhwc)  # no copy if x is NHWC already
    weight = weight.contiguous(memory_format=nhwc)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


@algorithm("F.conv2d with cuDNN and oneDNN switched off, forward and backward.", library=True)
def native_no_library(x, weight, bias, stride, padding, dilation, groups):
    return _NoLibrary.apply(x, weight, bias, stride, padding, dilation, groups)


class _NoLibrary(torch.autograd.Function):
    """PyTorch picks the backend anew in backward, so the flag must be off there too."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups):
        ctx.save_for_backward(x, weight)
        ctx.sizes = stride, padding, dilation, groups
        ctx.bias = None if bias is None else bias.shape
        with library_off():
            return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, grad):
        x, weight = (t.to(grad.dtype) for t in ctx.saved_tensors)  # they differ under autocast
        stride, padding, dilation, groups = ctx.sizes
        needs = list(ctx.needs_input_grad[:3])
        with library_off():
            grads = torch.ops.aten.convolution_backward(
                grad, x, weight, ctx.bias, stride, padding, dilation, False, (0, 0), groups, needs
            )
        return *grads, None, None, None, None
