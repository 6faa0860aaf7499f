"""`diagnose`: everything that is found out about a layer, in the order in which it is found."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from convlab import machine, notebook
from convlab.diagnosing import around, inside  # noqa: F401  (their detectors register themselves)
from convlab.diagnosing.causes import Cause, Facts, find
from convlab.diagnosing.kind import Kind, kind
from convlab.diagnosing.measure import CONV, FAST, LAYER, Times, close, times
from convlab.diagnosing.probe import Behaviour, Probe, behaviour
from convlab.diagnosing.subject import Subject, usable
from convlab.diagnosing.watch import Watched, watch
from convlab.guide import GUIDE, Branch
from convlab.problem import ConvProblem
from convlab.timing import once, ratio_interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Gain:
    """How many times faster: `factor` with its interval; `how`: "measured" or "at most"."""

    what: str
    how: str
    factor: float
    low: float
    high: float


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found. Prints as a report; `save_html` writes it as a page.

    Attributes:
        layer, shape, output_shape, dtype, device: what was diagnosed.
        caption: machine, threads, versions, date.
        causes: known causes, the most important first.
        kind: branch of the decision guide and the reason.
        behaviour: what the layer computes, with `problem`, the sizes of the same `nn.Conv2d`.
        times: measured beside `nn.Conv2d`.
        watched: operators, waits, columns of one call.
        first_seconds: of the first call.
        notes: what limits the diagnosis.
    """

    layer: str
    shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    caption: str
    causes: tuple[Cause, ...]
    kind: Kind
    behaviour: Behaviour
    times: Times
    watched: Watched
    first_seconds: float
    notes: tuple[str, ...] = ()

    @property
    def problem(self) -> ConvProblem | None:
        """The sizes of the `nn.Conv2d` that it is compared with; None if they are unknown."""
        return self.behaviour.problem

    @property
    def branch(self) -> Branch | None:
        """The branch of the decision guide; None if it could not be told."""
        return GUIDE.get(self.kind.branch)

    @property
    def lines(self) -> pd.DataFrame:
        """Forward time by line of the reader's code: line, source, calls, seconds, share."""
        import pandas as pd

        rows: dict[object, list] = {}
        for op in self.watched.ops:
            if op.direction == "forward":
                row = rows.setdefault(op.where, [0, 0.0])
                row[0] += 1
                row[1] += op.seconds
        total = sum(taken for _, taken in rows.values()) or 1.0
        table = [
            {
                "line": str(where) if where else "inside PyTorch",
                "source": where.text if where else "",
                "calls": calls,
                "seconds": taken,
                "share": taken / total,
            }
            for where, (calls, taken) in rows.items()
        ]
        columns = ["line", "source", "calls", "seconds", "share"]
        return pd.DataFrame(table, columns=columns).sort_values("seconds", ascending=False)

    @property
    def gains(self) -> tuple[Gain, ...]:
        """What there is to win, by pass: measured where the fast form was, else a bound."""
        found = []
        error = self.times.fast_error or 0.0
        tables = {"forward": self.times.forward, "train": self.times.train}
        for key, name in (("forward", "forward"), ("train", "training")):
            table = tables[key]
            if table is None or CONV not in table.index:
                continue
            fast = FAST if FAST in table.index else CONV
            equal = self.behaviour.fit and self.behaviour.fit.form == "plain"
            # With unusable parameters the layer was compared in float64 with others in their place.
            checked = self.behaviour.redrawn or error <= close(self.dtype, self.device)
            measured = fast == FAST or (equal and checked and self.kind.branch == "plain")
            samples = self.times.samples[key]
            slow, quick = samples[LAYER], samples[fast]
            interval = ratio_interval(slow.samples, quick.samples)
            how = "measured" if measured else "at most"
            found.append(Gain(name, how, slow.median / quick.median, *interval))
        return tuple(found)

    def __str__(self) -> str:
        from convlab.diagnosing.report import as_text

        return as_text(self)

    def __rich__(self):
        from convlab.diagnosing.report import as_rich

        return as_rich(self)

    def _repr_html_(self) -> str:
        from convlab.diagnosing.page import body

        return body(self)

    def save_html(self, path: str | os.PathLike) -> None:
        """Write the report with its figures as one self-contained page."""
        from convlab.diagnosing.page import save

        save(self, path)


def diagnose(
    layer: nn.Module,
    x: Tensor,
    *,
    quick: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Diagnosis:
    """Find out where the time of `layer` goes, why, and what to try first.

    The layer is called many times, with x and with random images; what it prints is dropped, its
    buffers and the random state are put back.

    Args:
        layer: any module that takes x and returns one tensor; in the mode (train or eval) to be
            diagnosed.
        x: (N, C, H, W), floating point, on the layer's device.
        quick: fewer rounds.
        progress: is told what is done next.

    Raises:
        ValueError: one sentence: x is no image batch, the layer fails (with its error and line),
            returns no tensor, moves its output to another device, or writes to its input.
    """
    progress("first call")
    subject = Subject(layer, x)
    later = _later(subject)
    progress("watching the operators of one call")
    watched = _watch(subject)
    progress("finding out what the layer computes")
    found = behaviour(subject)
    branch = _kind(subject, found, watched)
    found.redrawn = any(not usable(p) for p in subject.watched.parameters())
    progress("timing it beside nn.Conv2d")
    measured = times(subject, found, quick, later)
    facts = _facts(subject, found, watched, later)
    return Diagnosis(
        layer=subject.name,
        shape=tuple(x.shape),
        output_shape=tuple(subject.y.shape),
        dtype=x.dtype,
        device=str(subject.device),
        caption=notebook.caption(str(subject.device)),
        causes=find(facts),
        kind=branch,
        behaviour=found,
        times=measured,
        watched=watched,
        first_seconds=subject.first_seconds,
        notes=tuple(_notes(subject, found, watched, measured)),
    )


def _later(subject: Subject) -> float:
    """Seconds of a second call."""
    with subject.quiet(), torch.no_grad():
        return once(lambda: subject(subject.x), subject.device)


def _watch(subject: Subject) -> Watched:
    """Nothing seen, with the error, where the layer does not work while it is watched."""
    try:
        return watch(subject)
    except (ValueError, RuntimeError) as error:
        return Watched(error=f"the operators could not be watched: {error}")


def _kind(subject: Subject, found: Behaviour, watched: Watched) -> Kind:
    if not found.facts:  # it could not be called as the tests need it
        return Kind("", False, found.unknown)
    try:
        return kind(Probe(subject), found, watched, len(subject.x))
    except (ValueError, RuntimeError) as error:  # fails on some random images only
        return Kind("", False, f"a test could not be made: {error}")


def _facts(subject: Subject, found: Behaviour, watched: Watched, later: float) -> Facts:
    flags = machine.flags()
    parameters = subject.watched.named_parameters()
    frozen = [name for name, p in parameters if not p.requires_grad]
    return Facts(
        watched=watched,
        input_shape=tuple(subject.x.shape),
        input_values=subject.x.numel(),
        itemsize=subject.x.element_size(),
        output_values=subject.y.numel(),
        problem=found.problem,
        device=subject.device.type,
        compiled=subject.compiled,
        first_seconds=subject.first_seconds,
        later_seconds=later,
        threads=torch.get_num_threads(),
        cores=machine.physical_cores(),
        tf32=(flags["cudnn_tf32"], flags["matmul_tf32"]),
        frozen=(*frozen, *watched.unused),
        differentiable=subject.differentiable,
    )


def _notes(subject: Subject, found: Behaviour, watched: Watched, measured: Times) -> list[str]:
    notes = []
    unusable = [n for n, p in subject.watched.named_parameters() if not usable(p)]
    if unusable:
        notes.append(
            f"{', '.join(unusable)} holds no usable numbers (NaN, infinite, huge, or all zero): "
            "uninitialised memory (torch.empty)? What the layer computes was found out with random "
            "values instead"
        )
    if not found.deterministic:
        notes.append(
            "its output changes from call to call (dropout in train mode?): what it computes "
            "cannot be told; call layer.eval() first (--eval)"
        )
    if found.unknown and found.problem is None:
        notes.append(f"no nn.Conv2d to compare with: {found.unknown}")
    if subject.obstacle:
        notes.append(
            f"only inference was diagnosed; with an x that requires a gradient, {subject.obstacle}"
        )
    if subject.compiled:
        notes.append(
            "the layer is compiled: times are of the compiled form, operators and lines of the "
            "code before compilation"
        )
    if watched.error:
        notes.append(watched.error)
    error = measured.fast_error
    if error is not None and error > close(subject.x.dtype, subject.device) and not unusable:
        notes.append(
            f"the fitted convolutions differ from the layer by {error:.0e} in "
            f"{subject.x.dtype}: they are not timed"
        )
    return notes
