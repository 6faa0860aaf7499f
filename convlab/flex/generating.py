"""Triton source of the reader's function and its partial derivatives, as a module."""

from __future__ import annotations

import functools
import hashlib
import linecache
import types
from collections.abc import Callable

import torch
from torch.fx import GraphModule

from convlab.flex.combine import Combine, parse
from convlab.flex.spelling import TYPES, device_function, is_finite, simplified

REMEMBERED = 256  # functions whose modules are kept
HEAD = '''"""{title}"""

import triton
import triton.language as tl
from triton.language.extra import libdevice
'''
TAIL = '''@triton.jit
def one(x, w, aux, numbers):
    """Counts."""
    return tl.full((), 1.0, {type})


@triton.jit
def exponential(x):
    """exp for logsumexp."""
    return {exp}(x)
'''
FAST = "libdevice.fast_expf"  # of float32: what is below 1e-38 is zero, with half the instructions


def triton_source(
    combine: Callable[..., torch.Tensor], dtype: torch.dtype = torch.float32, aux: bool = False
) -> str:
    """What `backend="triton"` makes of `combine`: its value and derivatives in Triton.

    Args:
        dtype: in which it computes: float64, or float32 for shorter types too.
        aux: whether combine takes a third argument.

    Raises:
        ValueError: an operation has no spelling in Triton; the errors of `flex_conv2d`.
    """
    return source(parse(combine, dtype, aux))


@functools.lru_cache(maxsize=REMEMBERED)
def source(combine: Combine) -> str:
    """Text of a module with `numbers`, `value`, `by_x`, `by_w`, `by_aux`, `by_c1`, …, `one`,
    `exponential`."""
    names = arguments(combine)
    captured = names[combine.arity :]
    value, slopes = _graphs(combine)
    functions = [_numbers(len(captured)), device_function(value, None, "value", names)]
    for which, name in enumerate(partials(combine)):
        functions.append(device_function(slopes, which, name, names))
    dtype = next(iter(value.graph.nodes)).meta["val"].dtype
    exp = FAST if dtype == torch.float32 else "tl.exp"
    functions.append(TAIL.format(type=TYPES[dtype], exp=exp))
    title = "combine and its derivatives, as generated for Triton."
    return "\n\n".join([HEAD.format(title=title), *functions])


@functools.lru_cache(maxsize=REMEMBERED)
def _graphs(combine: Combine) -> tuple[GraphModule, GraphModule]:
    return simplified(combine.value), simplified(combine.partials)


def arguments(combine: Combine) -> list[str]:
    """What x, w, aux and the captured numbers are called in the source."""
    inputs = [n for n in combine.value.graph.nodes if n.op == "placeholder"]
    captured = range(1, 1 + len(inputs) - combine.arity)
    return [*("x", "w", "aux")[: combine.arity], *(f"c{i}" for i in captured)]


def partials(combine: Combine) -> list[str]:
    """Names of the derivatives, in the order of the arguments."""
    return [f"by_{name}" for name in arguments(combine)]


def finite(combine: Combine, which: int) -> bool:
    """Whether the value and the derivative by argument `which` are finite at finite arguments."""
    value, slopes = _graphs(combine)
    return is_finite(value, 0) and is_finite(slopes, which)


@functools.lru_cache(maxsize=REMEMBERED)
def module(combine: Combine) -> types.ModuleType:
    """The module of `source`, with its lines where Triton and tracebacks look for them."""
    text = source(combine)
    name = f"convlab_combine_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    file = f"<{name}>"
    lines = text.splitlines(keepends=True)
    linecache.cache[file] = (len(text), None, lines, file)
    made = types.ModuleType(name)
    exec(compile(text, file, "exec"), made.__dict__)
    return made


def _numbers(captured: int) -> str:
    loads = ", ".join(f"tl.load(NUMBERS + {i})" for i in range(captured + 1))
    text = '"""pad_value and what combine closes over."""'
    return f"@triton.jit\ndef numbers(NUMBERS):\n    {text}\n    return ({loads},)\n"
