"""`flex_conv2d`: the reader's own `combine(x, w)` in place of the product, fused."""

from convlab.flex.function import flex_conv2d

__all__ = ["flex_conv2d"]
