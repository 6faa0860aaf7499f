"""`jit` and `tl` for the kernels of a notebook, which can be read without triton too."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from convlab import machine
from convlab.kernels.running import interpreter, runnable

if TYPE_CHECKING:
    from convlab.kernels.launching import Launch
    from convlab.kernels.tiles import Tile
    from convlab.kernels.watching import Access
    from convlab.problem import ConvProblem

try:
    import triton.language as tl
    from triton import __version__ as VERSION
    from triton import jit
except ImportError:
    VERSION = None
    tl = types.SimpleNamespace(constexpr=object)

    def jit(function: Callable) -> Callable:
        """The function as it is; it cannot be run."""
        return function


def interpret(kernel, grid: Sequence[int], *arguments, **constants) -> None:
    """Run `kernel` (made by `jit`) on tensors on the CPU, one program after another.

    Raises:
        RuntimeError: the package triton is not installed.
    """
    with interpreter(), _library_interpreted():
        runnable(kernel)[tuple(grid)](*arguments, **constants)


@contextlib.contextmanager
def _library_interpreted() -> Iterator[None]:
    """Inside the block `tl.zeros`, `tl.sum` and others that are kernels too run as plain Python."""
    from triton.runtime.jit import JITFunction

    with contextlib.ExitStack() as undo:
        for name, value in list(vars(tl).items()):
            if isinstance(value, JITFunction):
                undo.callback(setattr, tl, name, value)
                setattr(tl, name, value.fn)
        yield


def launches(
    problem: ConvProblem,
    pass_: str = "forward",
    nhwc: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Launch]:
    """The launches of `implicit_gemm`, noted and not made; its tensors have shapes and no values.

    Args:
        pass_: "forward", "gradient of x" or "gradient of weight".
    """
    x, weight, y = (
        torch.empty(shape, dtype=dtype, device="meta").to(memory_format=_layout(nhwc))
        for shape in (problem.input_shape, problem.weight_shape, problem.output_shape)
    )
    return _launches(problem, pass_, x, weight, y)


def _launches(problem, pass_, x, weight, y) -> list[Launch]:
    from convlab.kernels import launching

    sizes = types.SimpleNamespace(**problem.kwargs)
    sizes.padding = tuple(before for before, _ in problem.pads)
    with launching.noting() as noted:
        if pass_ == "forward":
            launching.output(x, weight, None, y, sizes)
        elif pass_ == "gradient of x":
            launching.input_gradient(y, weight, x, sizes)
        else:
            launching.weight_gradient(y, x, weight, sizes)
    return noted


def _layout(nhwc: bool) -> torch.memory_format:
    return torch.channels_last if nhwc else torch.contiguous_format


def watch(
    problem: ConvProblem, tile: Tile, nhwc: bool = False
) -> tuple[dict[str, Tensor], list[Access]]:
    """A forward pass of `implicit_gemm` with this tile, interpreted in plain float32.

    Returns:
        x, the weight as the kernel reads it (K …, C, R, S) and y by name; all loads and stores.

    Raises:
        AssertionError: y is not that of `F.conv2d`.
    """
    from convlab.kernels.watching import watching

    x, weight = (t.contiguous(memory_format=_layout(nhwc)) for t in problem.inputs()[:2])
    y = torch.empty(problem.output_shape).to(memory_format=_layout(nhwc))
    with machine.setting(cudnn_tf32=False):
        (launch,) = _launches(problem, "forward", x, weight, y)
        with watching() as seen:
            grid = launch.grid(tile.constants())
            interpret(
                launch.kernel, grid, *launch.arguments, **launch.constants, **tile.constants()
            )
    torch.testing.assert_close(y, F.conv2d(x, weight, **problem.kwargs))
    return {"x": x, "weight": launch.arguments[1][0], "y": y}, seen
