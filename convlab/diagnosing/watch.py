"""One call of a layer watched from inside: every operator, its time, its line, its memory."""

from __future__ import annotations

import builtins
import contextlib
import linecache
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from convlab.diagnosing.lineage import Lineage, shown, tensors
from convlab.diagnosing.subject import HERE, TORCH, Sink, Subject, describe
from convlab.stages import stopwatch
from convlab.timing import synchronize

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
PASSES = 5
LONG_SECONDS = 2.0  # a pass as long as this is watched once after the first


@dataclass(frozen=True)
class Where:
    """A line of the reader's code."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}"


@dataclass(frozen=True)
class Op:
    """An operator as the dispatcher ran it.

    Attributes:
        seconds: of the operator alone, by a clock around it.
        shape: of its largest result; written: values that it put into new memory.
        mark, copied: what `Lineage` says of it.
        where: the reader's line that led to it, if Python was there.
        recomputed: a forward operator that ran again in the backward pass.
    """

    name: str
    direction: str
    seconds: float
    shape: tuple[int, ...]
    read: int
    written: int
    mark: str
    copied: bool
    where: Where | None
    recomputed: bool = False
    groups: int = 1


@dataclass(frozen=True)
class Wait:
    """Something in forward that prints or makes the host wait for the device."""

    what: str
    where: Where | None
    seconds: float


@dataclass
class Watched:
    """What was seen in one call, times as medians over some."""

    ops: list[Op] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    columns: int = 0  # values of the largest tensor of columns
    passes: int = 0
    error: str = ""  # of the backward pass
    unused: tuple[str, ...] = ()  # parameters that got no gradient

    def seconds(self, keep: Callable[[Op], bool] = lambda op: True) -> float:
        """Time of the operators that `keep` chooses."""
        return sum(op.seconds for op in self.ops if keep(op))


def watch(subject: Subject) -> Watched:
    """Forward and, where the output has a gradient, backward, a few times."""
    runs: list[Watched] = []
    with subject.quiet() as sink:
        _one_pass(subject, sink)  # first calls cost more than later ones
        start = time.perf_counter()
        for _ in range(PASSES):
            runs.append(_one_pass(subject, sink))
            if time.perf_counter() - start > LONG_SECONDS:
                break
    last = runs[-1]
    alike = [run for run in runs if _names(run) == _names(last)]
    times = zip(*([op.seconds for op in run.ops] for run in alike), strict=True)
    last.ops = [replace(op, seconds=statistics.median(t)) for op, t in zip(last.ops, times)]
    last.passes = len(alike)
    return last


def _names(run: Watched) -> list:
    return [(op.name, op.shape) for op in run.ops] + [wait.what for wait in run.waits]


def _one_pass(subject: Subject, sink: Sink) -> Watched:
    found = Watched()
    lineage = Lineage(subject.x, subject.y)
    recorder = _Recorder(found, lineage, subject)
    recording = not subject.obstacle
    x = subject.x.clone().requires_grad_(recording)
    lineage.from_x.add(x.untyped_storage()._cdata)
    with torch.set_grad_enabled(recording):
        with _printing(found, recorder, sink), _Waits(found, recorder), recorder:
            y = _call(subject, x)
        named = {n: p for n, p in subject.watched.named_parameters() if p.requires_grad}
        if y.requires_grad:
            recorder.direction = "backward"
            wanted, ones = [x, *named.values()], torch.ones_like(y)
            try:
                with recorder:
                    grads = torch.autograd.grad(y, wanted, ones, allow_unused=True)
                pairs = zip(named, grads[1:], strict=True)
                found.unused = tuple(name for name, grad in pairs if grad is None)
            except Exception as error:
                found.error = f"the backward pass failed: {describe(error)}"
    synchronize(subject.device)
    recorder.finish()
    found.columns = lineage.largest
    return found


def _call(subject: Subject, x: Tensor) -> Tensor:
    """The frame at which the search for the reader's line ends."""
    return subject(x, subject.watched)


class _Recorder(TorchDispatchMode):
    def __init__(self, found: Watched, lineage: Lineage, subject: Subject) -> None:
        super().__init__()
        self.found, self.lineage = found, lineage
        self.direction, self.silent = "forward", False
        self.mark, self.elapsed = stopwatch(subject.device)
        self.times: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        start = self.mark()
        result = func(*args, **kwargs)
        end = self.mark()
        if self.silent:  # inside a print
            return result
        forward = self.direction == "forward"
        classify = self.lineage.classify if forward else self.lineage.backward
        mark, copied = classify(func, (*args, *kwargs.values()), result)
        inputs, outputs = tensors((args, kwargs)), tensors(result)
        owned = {t.untyped_storage()._cdata for t in inputs}
        new = [t.numel() for t in outputs if t.untyped_storage()._cdata not in owned]
        largest = max(outputs, key=Tensor.numel, default=None)
        place, again = find_line()
        name = func._schema.name.partition("::")[2]
        op = Op(
            name=name,
            direction=self.direction,
            seconds=0.0,
            shape=() if largest is None else tuple(largest.shape),
            read=sum(map(shown, inputs)),
            written=sum(new),
            mark=mark,
            copied=copied,
            where=place,
            recomputed=not forward and (again or (name == "im2col" and mark == "columns")),
            groups=args[8] if name == "convolution" and len(args) > 8 else 1,
        )
        self.found.ops.append(op)
        self.times.append((start, end))
        return result

    def finish(self) -> None:
        """Turn the marks of the clock into seconds, once the device is done."""
        seconds = [self.elapsed(start, end) for start, end in self.times]
        pairs = zip(self.found.ops, seconds, strict=True)
        self.found.ops = [replace(op, seconds=taken) for op, taken in pairs]


class _Waits(TorchFunctionMode):
    """Notes calls that need a tensor's value on the host."""

    def __init__(self, found: Watched, recorder: _Recorder) -> None:
        super().__init__()
        self.found, self.recorder = found, recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        what = WAITS.get(getattr(func, "__name__", ""))
        if getattr(func, "__name__", "") == "to" and args and _leaves_gpu(args[0], args, kwargs):
            what = '.to("cpu")'
        if what is None or self.recorder.silent:
            return func(*args, **(kwargs or {}))
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        place, _ = find_line()
        self.found.waits.append(Wait(what, place, time.perf_counter() - start))
        return result


def _leaves_gpu(tensor: object, args: tuple, kwargs: dict | None) -> bool:
    wanted = [str(value) for value in (*args[1:], *(kwargs or {}).values())]
    return isinstance(tensor, Tensor) and tensor.is_cuda and any(w == "cpu" for w in wanted)


@contextlib.contextmanager
def _printing(found: Watched, recorder: _Recorder, sink: Sink) -> Iterator[None]:
    """Notes print and whatever else writes to stdout or stderr, and torch.cuda.synchronize."""
    original, synchronize_ = builtins.print, torch.cuda.synchronize

    def noted(what: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            outer, recorder.silent = recorder.silent, True
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                recorder.silent = outer
                if not outer:
                    place, _ = find_line()
                    found.waits.append(Wait(what, place, time.perf_counter() - start))

        return call

    def written() -> None:
        if not recorder.silent:
            found.waits.append(Wait("writing to stdout or stderr", find_line()[0], 0.0))

    builtins.print = noted("print()", original)
    torch.cuda.synchronize = noted("torch.cuda.synchronize()", synchronize_)
    sink.on_write = written
    try:
        yield
    finally:
        builtins.print, torch.cuda.synchronize, sink.on_write = original, synchronize_, None


def find_line() -> tuple[Where | None, bool]:
    """The innermost line on the stack that is the reader's, and whether a checkpoint runs again.

    A library that the reader calls counts only where no frame of their own is left.
    """
    frame, library, again = sys._getframe(2), None, False
    while frame is not None and frame.f_code is not _call.__code__:
        file = frame.f_code.co_filename
        again = again or file.endswith("checkpoint.py")
        if not file.startswith((TORCH, HERE, "<frozen")):
            installed = file.startswith((sys.prefix, sys.base_prefix)) or file.startswith("<")
            where = _where(file, frame.f_lineno)
            if not installed:
                return where, again
            library = library or where
        if frame.f_code is _one_pass.__code__:
            break
        frame = frame.f_back
    return library, again


def _where(file: str, line: int) -> Where:
    return Where(file, line, linecache.getline(file, line).strip())
