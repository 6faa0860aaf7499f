"""Why a convolution written by hand is slower than `nn.Conv2d`, measured."""

from convlab.algorithms import ALGORITHMS
from convlab.auto import explain
from convlab.flex import FlexConv2d, flex_conv2d
from convlab.layers import Conv2d, ThreadConv2d
from convlab.oracle import check
from convlab.problem import ConvProblem
from convlab.problems import PROBLEMS
from convlab.timing import compare, measure

__version__ = "0.1.0"
__all__ = [
    "ALGORITHMS",
    "PROBLEMS",
    "Conv2d",
    "ConvProblem",
    "FlexConv2d",
    "ThreadConv2d",
    "check",
    "compare",
    "explain",
    "flex_conv2d",
    "measure",
]
