"""`auto`: times the other algorithms at the first call of a kind and remembers the fastest.

A kind is a problem on a device in a dtype, with or without bias, its pass ("forward" where no
gradient will be needed, else "train": forward and backward), which tensors need gradients, the
memory layouts of x and weight, and every flag of `machine.flags`. A new kind costs up to about a
second per candidate, more where one call takes longer than 20 ms: not for data whose sizes change
with every call.

Choices are kept in memory and in `auto.json` (`convlab.auto.memory`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from convlab import algorithms, machine, oracle
from convlab.algorithms import ALGORITHMS, algorithm
from convlab.algorithms.base import problem_of
from convlab.auto import measuring, memory
from convlab.auto.memory import Choice
from convlab.problem import ConvProblem, parse_device, parse_dtype
from convlab.timing import seconds

# Left out: `compiled` and `fused` compile for seconds at every size; `unfold_chunked` and
# `unfold_recompute` pay time for memory; `fft` and `thread` are never the fastest. On the CPU
# `unfold_batched` does what `unfold` does.
CANDIDATES = (
    *("native", "native_channels_last", "native_no_library", "unfold", "windows"),
    *("windows_chunked", "row_windows", "shifts", "winograd"),
)
ON_CUDA = ("implicit_gemm", "unfold_batched")
WAIT_SECONDS = 120.0  # for another thread that measures

_transformed = getattr(torch._C, "_are_functorch_transforms_active", bool)  # torch.func is at work
_functions: dict[tuple, Callable[..., Tensor]] = {}  # by `_key`: what a call needs to know
_lock = threading.Lock()  # held while measuring
_here = threading.local()  # .measuring: this thread holds it


@algorithm(
    "Times the others at the first call of a kind, then calls the fastest.",
    library=True,
    rounding="auto",
)
def auto(x, weight, bias, stride, padding, dilation, groups):
    """y is laid out in memory as `native` does it.

    `native` itself, unmeasured: for an empty batch; under torch.compile, export, tracing and
    torch.func; where TF32 was set by `fp32_precision`, after which the flags cannot be read.
    """
    sizes = stride, padding, dilation, groups
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or _transformed()
    key = None if traced or not x.shape[0] else _key(x, weight, bias, sizes)
    if key is None:
        return ALGORITHMS["native"].function(x, weight, bias, *sizes)
    function = _functions.get(key) or _choose(key, (x, weight, bias), sizes)
    return function(x, weight, bias, *sizes)


ALGORITHMS["auto"] = auto


def explain(
    problem: ConvProblem,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    pass_: str = "train",
) -> str:
    """What `auto` uses for contiguous tensors of `problem` and why; measures it if not known.

    Args:
        pass_: "forward", or "train": with the gradients of x, weight and bias.

    Raises:
        ValueError: a bad argument; names it, its value and what was expected.
    """
    if not isinstance(problem, ConvProblem):
        raise ValueError(f"problem must be a ConvProblem, got {problem!r}")
    if pass_ not in ("forward", "train"):
        raise ValueError(f"pass_ must be 'forward' or 'train', got {pass_!r}")
    device, dtype, train = parse_device(device), parse_dtype(dtype), pass_ == "train"
    if not problem.batch:
        return f"native: {problem}\nnothing is measured for an empty batch"
    (top, bottom), (left, right) = problem.pads
    height, width = problem.height + bottom - top, problem.width + right - left
    plain = problem.replace(height=height, width=width, padding=(top, left))  # as a call gets it
    with torch.inference_mode(False), torch.set_grad_enabled(train), _lock:
        tensors = plain.inputs(device, dtype, requires_grad=train)
        choice = _choice(tensors, tuple(plain.kwargs.values()))
    return _report(problem, choice)


def _report(problem: ConvProblem, choice: Choice) -> str:
    kind, base = choice.kind, measuring.baseline(choice.seconds)
    threads = f"{(n := kind['flags']['threads'])} thread{'s' if n > 1 else ''}"
    source = f"read from {choice.file}" if choice.file else "in this process"
    lines = [
        f"{choice.algorithm}: {problem}",
        ", ".join([kind["machine"], kind["device"], kind["dtype"], kind["pass"], threads]),
        f"measured {choice.time}, {source}; medians, 95 % intervals of the ratio to {base}'s",
    ]
    for name in sorted(choice.seconds, key=choice.seconds.get):
        low, high = choice.ratios[name]
        interval = "" if name == base else f"[{low:.3g} … {high:.3g}]"
        taken, rounds = seconds(choice.seconds[name]), choice.rounds[name]
        lines.append(f"  {name:22}{taken:>8}  {interval:16}  {rounds} rounds")
    lines += [f"  {name:22}skipped: {why}" for name, why in choice.skipped.items()]
    return "\n".join(lines)


def forget() -> None:
    """Drop every choice, from memory and from the file; OSError if that cannot be deleted."""
    with _lock:
        _functions.clear()
        memory.forget()


def _key(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple) -> tuple | None:
    """The kind in a form that takes a few microseconds to make; None: flags cannot be read."""
    backends = torch.backends
    cudnn = backends.cudnn
    try:
        flags = (
            *(torch.get_num_threads(), backends.mkldnn.enabled, machine.keeps_freed_memory()),
            *(torch.are_deterministic_algorithms_enabled(), cudnn.enabled, cudnn.benchmark),
            *(cudnn.deterministic, cudnn.allow_tf32, backends.cuda.matmul.allow_tf32),
            torch.get_float32_matmul_precision(),
        )
    except RuntimeError:  # PyTorch's newer switches for TF32 were used; the older then refuse
        return None
    shapes = x.shape, weight.shape, bias is None, sizes, x.dtype, x.device
    return *shapes, _layout(x), _layout(weight), _needs(x, weight, bias), flags


def _layout(tensor: Tensor) -> str:
    if tensor.is_contiguous():
        return "NCHW"
    nhwc = tensor.is_contiguous(memory_format=torch.channels_last)
    return "channels_last" if nhwc else "strided"


def _needs(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which of x, weight and bias will want a gradient."""
    on = torch.is_grad_enabled()
    return tuple([on and t is not None and t.requires_grad for t in tensors])


def _kind(tensors: tuple, sizes: tuple) -> dict:
    """All that a choice depends on, as JSON holds it."""
    x, weight, bias = tensors
    needs = _needs(*tensors)
    names = dict.fromkeys(CANDIDATES + (ON_CUDA if x.is_cuda else ()))
    deterministic = torch.are_deterministic_algorithms_enabled()
    return {
        "problem": problem_of(x, weight, *sizes).as_dict(),
        "bias": bias is not None,
        "device": x.device.type,
        "machine": machine.name(x.device),
        "dtype": str(x.dtype).removeprefix("torch."),
        "pass": "train" if any(needs) else "forward",
        "gradients": [name for name, need in zip(oracle.NAMES, needs) if need],
        "layout": [_layout(x), _layout(weight)],
        "flags": machine.flags() | {"deterministic": deterministic},
        "versions": machine.versions() | {"convlab": _version()},
        "candidates": [n for n in names if n in ALGORITHMS and n != "auto"],
    }


@functools.cache
def _version() -> str:
    """Of convlab, with a digest of its algorithms: edited ones are measured anew."""
    found = "not installed"
    with contextlib.suppress(Exception):
        from importlib.metadata import version

        found = version("convlab")
    sources = sorted(Path(algorithms.__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    return f"{found}, algorithms {digest.hexdigest()[:12]}"


def _choose(key: tuple, tensors: tuple, sizes: tuple) -> Callable[..., Tensor]:
    """The function to call, from now on too; `native`, this time only, where no time counts."""
    native = ALGORITHMS["native"].function
    if getattr(_here, "measuring", False) or not _real(tensors[0]):
        return native
    if not _lock.acquire(timeout=WAIT_SECONDS):  # its holder may even wait for this thread
        return native
    try:
        if key not in _functions:
            choice = _choice(tensors, sizes)
            _functions[key] = measuring.called(choice.algorithm, choice.kind)
        return _functions[key]
    finally:
        _lock.release()


def _real(x: Tensor) -> bool:
    """Whether a clock tells anything: not of fake tensors, nor while a CUDA graph is recorded."""
    if x.device.type not in ("cpu", "cuda") or type(torch.empty(0)) is not Tensor:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _choice(tensors: tuple, sizes: tuple) -> Choice:
    """From memory, else from the file, else measured."""
    kind = _kind(tensors, sizes)
    known = memory.recall(kind)
    if known is None or known.algorithm not in ("native", *kind["candidates"]):
        _here.measuring = True
        try:
            known = measuring.measured(kind, tensors, sizes)
        finally:
            _here.measuring = False
        memory.remember(known)
    return known
