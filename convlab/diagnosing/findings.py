"""What was found out about a layer, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from convlab.diagnosing.causes import Cause
from convlab.diagnosing.kind import Kind
from convlab.diagnosing.measure import CONV, FAST, LAYER, Times, close
from convlab.diagnosing.probe import Behaviour
from convlab.diagnosing.watch import Watched
from convlab.guide import GUIDE, Branch
from convlab.problem import ConvProblem
from convlab.timing import ratio_interval

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
class Findings:
    """What `diagnose` found.

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
