"""`jit` and `tl` for the kernels of a notebook, which can be read without triton too."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence

from convlab.kernels.running import interpreter, runnable

try:
    import triton.language as tl
    from triton import jit
except ImportError:
    tl = types.SimpleNamespace(constexpr=object)

    def jit(function: Callable) -> Callable:
        """The function as it is; it cannot be run."""
        return function


def interpret(kernel, grid: Sequence[int], *arguments, **constants) -> None:
    """Run `kernel` (made by `jit`) on tensors on the CPU, one program after another.

    Raises:
        RuntimeError: the package triton is not installed.
    """
    with interpreter():
        runnable(kernel)[tuple(grid)](*arguments, **constants)
