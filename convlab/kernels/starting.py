"""Launches of tuned Triton kernels from Python.

Triton works out anew at every launch which tile it chose for these sizes and for which arguments
the kernel was compiled: of a small convolution that is most of the time. Here the answer is
remembered under the arguments' own values, and the compiled kernel is launched at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import triton
from torch import Tensor

REMEMBERED = 4096  # launches; more than that, and all are forgotten
ALIGNED = 16  # bytes: a kernel is compiled for pointers that are multiples of it, or are not

_ready: dict[tuple, tuple[Callable, tuple]] = {}
_lock = threading.RLock()
# How a compiled kernel is launched is no documented interface; these versions were looked at.
_known = tuple(map(int, triton.__version__.split(".")[:2])) in ((3, 6), (3, 7))


def start(tuner, kernel, grid: Callable, arguments: tuple, constants: dict, **options) -> None:
    """`tuner[grid](*arguments, **constants, **options)`; `kernel` is what it tunes.

    Args:
        arguments: positional, from the first parameter on; tensors on one device, numbers, None.
        constants: the other parameters, but for those that the tuner chooses.
        options: of the compiler.
    """
    device = next(a for a in arguments if isinstance(a, Tensor)).device
    with torch.cuda.device(device):
        values = tuple(map(_value, arguments))
        key = (kernel.fn, device.index, values, *constants.values(), *options.items())
        if found := _ready.get(key):
            launch, rest = found
            launch(*arguments, *rest)
            return
        with _lock:
            compiled = tuner[grid](*arguments, **constants, **options)
            tile = tuner.best_config.kwargs
        if _known:
            rest = kernel.arg_names[len(arguments) :]
            named, size = constants | tile, (*grid(tile), 1, 1)[:3]
            if len(_ready) >= REMEMBERED:
                _ready.clear()
            _ready[key] = compiled[size], tuple(named[name] for name in rest)


def _value(argument):
    """What a kernel is compiled and tuned for: type and alignment of a tensor, a number itself."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % ALIGNED == 0
    return argument
