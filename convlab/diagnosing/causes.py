"""The known causes of a slow layer, each found by a detector of its own.

They are ranked by what they cost in a fixed model (`MODEL_BYTES_PER_SECOND`, `MODEL_CALL_SECONDS`)
of the memory traffic and the calls that were counted: a count is the same in every run, a time on
a busy machine is not. The measured time stands beside it. What prints or waits in `forward` comes
first of all, since every other measurement contains it; circumstances (threads, the first call, a
tiny problem) come last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from convlab.diagnosing.watch import Op, Watched
from convlab.problem import ConvProblem

MODEL_BYTES_PER_SECOND = 1e10
MODEL_CALL_SECONDS = 5e-6
SPOILS, WORK, CIRCUMSTANCE = 0, 1, 2


@dataclass(frozen=True)
class Cause:
    """One reason for the time a layer takes.

    Attributes:
        name: what it is, the same words for every layer.
        evidence: what was seen, with numbers and the reader's line.
        advice: what to do about it.
        seconds: measured time of the operators that it explains, forward and backward together.
        share: of the time of all operators.
        gain: how many times faster all of it gets at most if this time vanishes; None: not bounded
            by it.
        rank: orders causes, smallest first.
    """

    name: str
    evidence: str
    advice: str
    seconds: float = 0.0
    share: float = 0.0
    gain: float | None = None
    rank: tuple[float, ...] = (WORK, 0.0)


@dataclass(frozen=True)
class Facts:
    """What the detectors look at."""

    watched: Watched
    input_shape: tuple[int, ...]
    input_values: int
    itemsize: int
    output_values: int
    problem: ConvProblem | None = None
    device: str = "cpu"
    compiled: bool = False
    first_seconds: float = 0.0
    later_seconds: float = 0.0
    threads: int = 1
    cores: int = 1
    tf32: tuple[bool, bool] = (False, False)  # convolutions, matrix products
    frozen: tuple[str, ...] = ()  # parameters that get no gradient
    differentiable: bool = True


Detector = Callable[[Facts], "Cause | None"]
DETECTORS: list[Detector] = []


def detector(function: Detector) -> Detector:
    """Adds `function` to the known causes."""
    DETECTORS.append(function)
    return function


def find(facts: Facts) -> tuple[Cause, ...]:
    """All causes that `facts` show, the most important first."""
    found = (detect(facts) for detect in DETECTORS)
    return tuple(sorted(filter(None, found), key=lambda cause: cause.rank))


def explained(facts: Facts, ops: Sequence[Op], tier: int = WORK) -> dict:
    """seconds, share, gain and rank of a cause that these operators make up."""
    total, part = facts.watched.seconds(), sum(op.seconds for op in ops)
    moved = sum(op.read + op.written for op in ops) * facts.itemsize
    model = moved / MODEL_BYTES_PER_SECOND + len(ops) * MODEL_CALL_SECONDS
    return {
        "seconds": part,
        "share": part / total if total else 0.0,
        "gain": total / (total - part) if total > part else None,
        "rank": (tier, -model),
    }


def model_seconds(facts: Facts) -> float:
    """Modelled cost of all operators."""
    return -explained(facts, facts.watched.ops)["rank"][1]


def places(ops: Iterable[Op], most: int = 3) -> str:
    """ "layer.py:12 (x = F.unfold(x))", the costliest lines first."""
    cost: Counter = Counter()
    for op in ops:
        if op.where:
            cost[op.where] += op.read + op.written
    places = [f"{where} `{where.text}`" for where, _ in cost.most_common(most)]
    return f" at {'; '.join(places)}" if places else ""
