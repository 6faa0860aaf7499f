"""Every way to compute the same convolution; `ALGORITHMS` maps its name to the function."""

from convlab.algorithms.base import Algorithm, algorithm
from convlab.algorithms.native import native, native_channels_last, native_no_library
from convlab.algorithms.thread import thread
from convlab.algorithms.unfold import unfold
from convlab.algorithms.windows import windows

ALGORITHMS: dict[str, Algorithm] = {
    a.name: a for a in (native, native_channels_last, native_no_library, thread, unfold, windows)
}

__all__ = ["ALGORITHMS", "Algorithm", "algorithm"]
