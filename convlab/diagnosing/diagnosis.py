"""`diagnose`: everything that is found out about a layer, in the order in which it is found."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from convlab import machine, notebook
from convlab.diagnosing import around, geometry, inside, page, report  # noqa: F401
from convlab.diagnosing.causes import Facts, find
from convlab.diagnosing.findings import Findings
from convlab.diagnosing.kind import Kind, kind
from convlab.diagnosing.measure import Times, close, times
from convlab.diagnosing.probe import Behaviour, Probe, behaviour
from convlab.diagnosing.subject import Subject, usable
from convlab.diagnosing.watch import Watched, watch
from convlab.timing import once

if TYPE_CHECKING:
    from rich.console import Group


class Diagnosis(Findings):
    """What `diagnose` found; prints as a report, and in a notebook as a page."""

    def __str__(self) -> str:
        return report.as_text(self)

    def __rich__(self) -> Group:
        return report.as_rich(self)

    def _repr_html_(self) -> str:
        return page.body(self)

    def save_html(self, path: str | os.PathLike) -> None:
        """Write the report with its figures as one self-contained page.

        Raises:
            ValueError: `path` cannot be written.
        """
        page.save(self, path)


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
    try:
        return kind(Probe(subject), found, watched, len(subject.x))
    except geometry.Unknown:
        return Kind("", False, found.unknown)
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
    if found.problem and not found.local:
        notes.append(
            "the sizes of nn.Conv2d are those that the layer declares; its answers do not show them"
        )
    if found.unknown and found.problem is None:
        notes.append(f"no nn.Conv2d to compare with: {found.unknown}")
    if measured.scattered:
        notes.append("the times scatter: something else was running; measure again when it is not")
    if subject.obstacle:
        notes.append(
            f"only inference was diagnosed; with an x that requires a gradient, {subject.obstacle}"
        )
    if subject.compiled:
        notes.append(
            "the layer is compiled, or parts of it: times are of the compiled form; operators, "
            "lines and causes are of the code before compilation, which may store what the "
            "compiled form does not"
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
