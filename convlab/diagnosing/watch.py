"""One call of a layer watched from inside: every operator, its time, its line, its memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from convlab.diagnosing.lineage import Lineage, shown, tensors
from convlab.diagnosing.lines import Where, find_line
from convlab.diagnosing.subject import Sink, Subject, describe
from convlab.diagnosing.waits import Silence, Wait, Waits, printing
from convlab.stages import stopwatch
from convlab.timing import synchronize

PASSES = 5
LONG_SECONDS = 2.0  # a pass as long as this is watched once after the first


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
    # What the layer compiles runs as it was written: compiled code shows no operators, and while
    # it is watched the compiler gives up on it for good.
    with torch.compiler.set_stance("force_eager"), subject.quiet() as sink:
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
        noted = found.waits, recorder.silence
        with printing(*noted, sink), Waits(*noted), recorder:
            y = call_layer(subject, x)
        named = {n: p for n, p in subject.watched.named_parameters() if p.requires_grad}
        if y.requires_grad:
            recorder.direction = "backward"
            wanted, ones = [x, *named.values()], torch.ones_like(y)
            try:
                with recorder:
                    grads = run_backward(y, wanted, ones)
                pairs = zip(named, grads[1:], strict=True)
                found.unused = tuple(name for name, grad in pairs if grad is None)
            except Exception as error:
                found.error = f"the backward pass failed: {describe(error)}"
    synchronize(subject.device)
    recorder.finish()
    found.columns = lineage.largest
    return found


def call_layer(subject: Subject, x: Tensor) -> Tensor:
    """The frame at which the search for the reader's line ends (`lines.ENDS`)."""
    return subject(x, subject.watched)


def run_backward(y: Tensor, wanted: list[Tensor], grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same for the backward pass."""
    return torch.autograd.grad(y, wanted, grad, allow_unused=True)


class _Recorder(TorchDispatchMode):
    def __init__(self, found: Watched, lineage: Lineage, subject: Subject) -> None:
        super().__init__()
        self.found, self.lineage = found, lineage
        self.direction, self.silence = "forward", Silence()
        self.mark, self.elapsed = stopwatch(subject.device)
        self.times: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        start = self.mark()
        result = func(*args, **kwargs)
        end = self.mark()
        if self.silence.on:  # inside a print
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
