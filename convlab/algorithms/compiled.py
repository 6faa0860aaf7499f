"""`torch.compile` of the unfold form.

Inductor fuses im2col into whatever reads the columns element by element, and writes them out
before a matrix product. So bytes are those of `unfold` without its hidden copies, and the launches
on CUDA are one for the columns, whatever the batch. The first call of every shape compiles, for
seconds; so does the first one that needs gradients.
"""

import functools
import hashlib
import importlib.util
import os
import shutil

import torch

from convlab import machine
from convlab.algorithms.base import algorithm
from convlab.algorithms.unfold import unfold

COMPILERS = ("g++", "clang++", "c++", "cl")
BACKEND = "inductor"
REMEMBERED = 256  # problems whose code is kept in memory

# For sums that are to stay in registers. How far inductor may put off writing a value to memory:
# the taps of a row are one expression.
ONE_EXPRESSION = (
    ("realize_acc_reads_threshold", 256),
    ("realize_opcount_threshold", 4096),
    ("realize_reads_threshold", 256),
)
SUMS = {"AVX512": 16}  # at a time: half of the vector registers
FEWER_SUMS = 8


def sums_at_once() -> int:
    """How many running sums this processor's vector registers hold beside what is added."""
    return SUMS.get(torch.backends.cpu.get_cpu_capability(), FEWER_SUMS)


def limits(problem, device):
    return missing_compiler(device.type)


@machine.constant_in_graphs
def missing_compiler(device: str) -> str | None:
    """What `torch.compile` lacks on this machine, in a sentence."""
    if device == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "torch.compile needs the package triton on CUDA."
    elif not shutil.which(os.environ.get("CXX", "")) and not any(map(shutil.which, COMPILERS)):
        return f"torch.compile needs a C++ compiler on the CPU ({', '.join(COMPILERS)})."
    return None


@algorithm("torch.compile of the unfold form.", limits=limits)
def compiled(x, weight, bias, stride, padding, dilation, groups):
    """Differentiable once: `torch.compile` refuses to differentiate its backward pass."""
    if torch.compiler.is_compiling():
        return unfold.function(x, weight, bias, stride, padding, dilation, groups)
    return specialised(unfold, x, weight, bias, stride, padding, dilation, groups)


def specialised(form, x, weight, bias, *sizes, options=()):
    """`form` (an algorithm), compiled for one problem, of these tensors; options: inductor's."""
    arguments = form, bias is None, *sizes
    return compiled_function(_with_bias, (x, weight), arguments, options)(x, weight, bias)


def _with_bias(x, weight, bias, form, no_bias, *sizes):
    return form.function(x, weight, bias, *sizes)


@functools.lru_cache(maxsize=REMEMBERED)
def _compile(function, shapes, dtype, device, arguments, options, dynamic):
    """The compiled function of tensors alone, with `arguments` behind them.

    PyTorch allows one code object only so many versions, so each problem has its own.
    """

    def problem(*tensors):
        return function(*tensors, *arguments)

    words = function.__name__, dtype, device, shapes, arguments
    name = "problem_" + hashlib.sha256(repr(words).encode()).hexdigest()[:16]
    problem.__code__ = problem.__code__.replace(co_name=name)
    return torch.compile(
        problem, backend=BACKEND, fullgraph=True, dynamic=dynamic, options=dict(options) or None
    )


def compiled_function(function, tensors, arguments, options=(), dynamic=False):
    """`function(*tensors, *arguments)` compiled for tensors like these; options: inductor's.

    Args:
        tensors: some or all of those that it will be called with; they tell problems apart.
        dynamic: `torch.compile`'s; None where the caller marks what may change.
    """
    options = options if BACKEND == "inductor" else ()
    shapes = tuple(None if t is None else t.shape for t in tensors)
    return _compile(
        function, shapes, tensors[0].dtype, tensors[0].device, arguments, options, dynamic
    )
