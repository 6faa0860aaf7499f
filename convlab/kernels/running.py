"""Whether a Triton kernel can run on a device: compiled on CUDA, or interpreted on the CPU."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import types
from collections.abc import Iterator

import torch

from convlab import machine

MAJOR = 8  # compute capability from which tensor cores take TF32 and bfloat16

_interpreting = False


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
    """Inside the block kernels run on the CPU, operation by operation in NumPy: for tiny problems.

    The environment variable TRITON_INTERPRET=1, set before Python starts, does so everywhere.

    Raises:
        RuntimeError: the package triton is not installed.
    """
    global _interpreting
    if reason := _no_triton():
        raise RuntimeError(reason)
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


def interpreting() -> bool:
    """Whether kernels are interpreted."""
    return _interpreting or os.environ.get("TRITON_INTERPRET") == "1"


def missing(device: torch.device, what: str) -> str | None:
    """What keeps the kernel `what` from running on `device`, in a sentence; None if nothing."""
    if device.type not in ("cpu", "cuda"):
        return f"{what} runs on a CUDA GPU, not on {device.type}."
    if reason := _no_triton():
        return reason
    if device.type == "cpu" and not interpreting():
        return (
            f"{what} runs on a CUDA GPU; on the CPU only in Triton's interpreter "
            "(convlab.kernels.interpreter), for tiny problems."
        )
    if device.type == "cuda" and interpreting():
        return f"{what} is being interpreted, which takes tensors on the CPU."
    if device.type == "cuda" and _major(device.index) < MAJOR:
        return f"{what} needs a GPU of compute capability {MAJOR}.0 or more (NVIDIA Ampere)."
    return None


def runnable(kernel):
    """A `triton.jit` kernel as it runs now: itself, or interpreted."""
    return _interpreted(kernel) if interpreting() else kernel


@functools.cache
def _interpreted(kernel):
    """The kernel for the interpreter, with the functions that it calls as plain Python."""
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(functools.update_wrapper(plain(kernel), kernel.fn))


@functools.cache
def plain(function):
    """A `triton.jit` function, and those that it calls, as the Python that the interpreter runs."""
    from triton.language import core

    python = function.fn
    known = {**python.__globals__, "triton.language.core": core}  # tl.sum, tl.zeros inside too
    called = {name: known.get(name) for name in python.__code__.co_names}
    known |= {name: plain(value) for name, value in called.items() if _jitted(value)}
    return types.FunctionType(python.__code__, known, python.__name__, python.__defaults__)


def _jitted(value) -> bool:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    return isinstance(value, JITFunction | InterpretedFunction)


@machine.constant_in_graphs
def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "The package triton is not installed (it exists for Linux: pip install triton)."
    return None


@machine.constant_in_graphs
def _major(index: int | None) -> int:
    return torch.cuda.get_device_capability(index)[0]
