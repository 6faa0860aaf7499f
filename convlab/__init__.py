"""Why a convolution written by hand is slower than `nn.Conv2d`, measured."""

import importlib

from convlab.algorithms import ALGORITHMS
from convlab.auto import explain
from convlab.flex import FlexConv2d, flex_conv2d
from convlab.layers import Conv2d, ThreadConv2d
from convlab.oracle import check
from convlab.problem import ConvProblem
from convlab.problems import PROBLEMS
from convlab.swap import swap_convolutions
from convlab.timing import compare, measure

__version__ = "0.1.0"
LATER = {"diagnose": "convlab.diagnosing"}  # imported at the first use: it draws and prints
__all__ = [
    "ALGORITHMS",
    "PROBLEMS",
    "Conv2d",
    "ConvProblem",
    "FlexConv2d",
    "ThreadConv2d",
    "check",
    "compare",
    "diagnose",
    "explain",
    "flex_conv2d",
    "measure",
    "swap_convolutions",
]


def __getattr__(name: str) -> object:
    if name in LATER:
        return getattr(importlib.import_module(LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
