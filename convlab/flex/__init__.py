"""`flex_conv2d`: the reader's own `combine(x, w)` in place of the product, fused."""

from convlab.flex.function import flex_conv2d
from convlab.flex.generating import triton_source
from convlab.flex.module import FlexConv2d

__all__ = ["FlexConv2d", "flex_conv2d", "triton_source"]
