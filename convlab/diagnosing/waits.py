"""What prints or makes the host wait for the device, noted while forward runs."""

from __future__ import annotations

import builtins
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from convlab.diagnosing.lines import Where, find_line
from convlab.diagnosing.subject import Sink

WAITS = {
    "item": ".item()",
    "tolist": ".tolist()",
    "numpy": ".numpy()",
    "__array__": "NumPy of a tensor",
    "cpu": ".cpu()",
    "__bool__": "if or bool() of a tensor",
    "__float__": "float() of a tensor",
    "__int__": "int() of a tensor",
    "__index__": "a tensor as an index or range",
    "__format__": "a tensor formatted as text",
    "__repr__": "a tensor formatted as text",
    "nonzero": "nonzero()",
    "masked_select": "masked_select()",
    "unique": "unique()",
}


@dataclass(frozen=True)
class Wait:
    """Something in forward that prints or makes the host wait for the device."""

    what: str
    where: Where | None
    seconds: float


class Silence:
    """Whether what runs now belongs to a print and is not to be noted by itself."""

    on = False


class Waits(TorchFunctionMode):
    """Notes calls that need a tensor's value on the host."""

    def __init__(self, found: list[Wait], silence: Silence) -> None:
        super().__init__()
        self.found, self.silence = found, silence

    def __torch_function__(self, func, types, args=(), kwargs=None):
        what = WAITS.get(getattr(func, "__name__", ""))
        if getattr(func, "__name__", "") == "to" and args and _leaves_gpu(args[0], args, kwargs):
            what = '.to("cpu")'
        if what is None or self.silence.on:
            return func(*args, **(kwargs or {}))
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        place, _ = find_line()
        self.found.append(Wait(what, place, time.perf_counter() - start))
        return result


def _leaves_gpu(tensor: object, args: tuple, kwargs: dict | None) -> bool:
    wanted = [str(value) for value in (*args[1:], *(kwargs or {}).values())]
    return isinstance(tensor, Tensor) and tensor.is_cuda and any(w == "cpu" for w in wanted)


@contextlib.contextmanager
def printing(found: list[Wait], silence: Silence, sink: Sink) -> Iterator[None]:
    """Notes print and whatever else writes to stdout or stderr, and torch.cuda.synchronize."""
    original, synchronize_ = builtins.print, torch.cuda.synchronize

    def noted(what: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            outer, silence.on = silence.on, True
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                silence.on = outer
                if not outer:
                    place, _ = find_line()
                    found.append(Wait(what, place, time.perf_counter() - start))

        return call

    def written() -> None:
        if not silence.on:
            found.append(Wait("writing to stdout or stderr", find_line()[0], 0.0))

    builtins.print = noted("print()", original)
    torch.cuda.synchronize = noted("torch.cuda.synchronize()", synchronize_)
    sink.on_write = written
    try:
        yield
    finally:
        builtins.print, torch.cuda.synchronize, sink.on_write = original, synchronize_, None
