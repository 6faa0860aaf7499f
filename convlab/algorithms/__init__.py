"""Every way to compute the same convolution; `ALGORITHMS` maps its name to the function."""

from convlab.algorithms.base import Algorithm, algorithm
from convlab.algorithms.chunked import unfold_chunked, unfold_recompute, windows_chunked
from convlab.algorithms.compiled import compiled
from convlab.algorithms.fft import fft
from convlab.algorithms.fused import fused
from convlab.algorithms.implicit_gemm import implicit_gemm
from convlab.algorithms.native import native, native_channels_last, native_no_library
from convlab.algorithms.rows import row_windows
from convlab.algorithms.shifts import shifts
from convlab.algorithms.thread import thread
from convlab.algorithms.unfold import unfold, unfold_batched
from convlab.algorithms.windows import windows
from convlab.algorithms.winograd import winograd

ALGORITHMS: dict[str, Algorithm] = {
    a.name: a
    for a in (
        native,
        native_channels_last,
        native_no_library,
        thread,
        unfold,
        unfold_batched,
        unfold_chunked,
        unfold_recompute,
        windows,
        windows_chunked,
        row_windows,
        shifts,
        fft,
        winograd,
        compiled,
        fused,
        implicit_gemm,
    )
}

__all__ = ["ALGORITHMS", "Algorithm", "algorithm"]
