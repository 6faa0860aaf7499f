"""What a convolution must cost, and what each algorithm makes it cost: FLOPs, bytes, launches.

Counted on paper, in elements times `itemsize`. A step's bytes are what passes through main memory
if nothing is reused from a cache between steps; x itself is counted once per pass over it, since
one image with its halo stays in cache while its taps are read.
"""

from __future__ import annotations

from dataclasses import dataclass

from convlab.counts import NOT_FOR_ONE_IMAGE, STEPS, Sizes, flops, of_direction
from convlab.problem import ConvProblem


@dataclass(frozen=True)
class Step:
    """One pass over memory: bytes read and written, FLOPs, kernel launches on CUDA."""

    stage: str
    what: str
    read: int
    written: int
    flops: int = 0
    launches: int = 1

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches: FLOP/s in a large matrix product, bytes/s in a large copy."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, flops: int, moved: int) -> float:
        """The roofline: no faster than arithmetic and no faster than memory."""
        return max(flops / self.flops_per_second, moved / self.bytes_per_second)


def compulsory_bytes(p: ConvProblem, itemsize: int = 4, direction: str = "forward") -> int:
    """Each input read once and each result written once."""
    s = Sizes.of(p)
    forward = s.x + s.weight + s.y
    backward = s.y + s.x + s.weight + s.x + s.weight
    return itemsize * of_direction(direction, forward, backward)


def floor_seconds(
    p: ConvProblem, ceilings: Ceilings, itemsize: int = 4, direction: str = "forward"
) -> float:
    """No direct convolution is faster than this on a machine with these ceilings."""
    return ceilings.seconds(flops(p, direction), compulsory_bytes(p, itemsize, direction))


def intensity(p: ConvProblem, itemsize: int = 4) -> float:
    """FLOPs per compulsory byte, forward."""
    return flops(p) / compulsory_bytes(p, itemsize)


def steps(
    algorithm: str, p: ConvProblem, itemsize: int = 4, direction: str = "forward"
) -> list[Step]:
    """The passes over memory that `algorithm` makes for `p` with a weight that requires a gradient.

    Raises:
        ValueError: an algorithm, a direction or a number of groups that has not been counted.
    """
    if (algorithm, direction) not in STEPS:
        known = ", ".join(sorted({name for name, _ in STEPS}))
        raise ValueError(
            f"algorithm must be one of {known} and direction 'forward' or 'backward', "
            f"got {algorithm!r} and {direction!r}"
        )
    s = Sizes.of(p)
    return [
        Step(stage, what, itemsize * read, itemsize * written, n_flops, launches)
        for stage, what, read, written, n_flops, launches in STEPS[algorithm, direction](p, s)
        if p.batch > 1 or what not in NOT_FOR_ONE_IMAGE
    ]


def predicted_seconds(
    algorithm: str,
    p: ConvProblem,
    ceilings: Ceilings,
    itemsize: int = 4,
    direction: str = "forward",
) -> float:
    """The steps one after the other, each at the machine's ceilings: a lower bound on their sum."""
    taken = steps(algorithm, p, itemsize, direction)
    return sum(ceilings.seconds(step.flops, step.bytes) for step in taken)


def moved_bytes(
    algorithm: str, p: ConvProblem, itemsize: int = 4, direction: str = "forward"
) -> int:
    """Bytes read and written by all steps."""
    return sum(step.bytes for step in steps(algorithm, p, itemsize, direction))


def launches(algorithm: str, p: ConvProblem, direction: str = "forward") -> int:
    """Kernel launches on CUDA by all steps."""
    return sum(step.launches for step in steps(algorithm, p, direction=direction))


def peak_bytes(
    algorithm: str, p: ConvProblem, itemsize: int = 4, direction: str = "forward"
) -> int:
    """Memory above x, weight, bias and the gradient of y at its highest.

    "forward" records no graph; "train" is forward and backward, with the gradients of x, weight
    and bias. The weight requires a gradient in both. `F.unfold` first allocates its output as
    large as x, then resizes it, which only ever enlarges it. Several groups: the weight is
    repeated for every image. A transpose with an axis of length 1 needs no copy and is counted as
    one. The scratch memory of BLAS is not counted. Training is not counted for strides that skip
    so many pixels that the columns are smaller than x.

    Raises:
        ValueError: an algorithm or a direction that has not been counted.
    """
    if algorithm not in ("thread", "unfold") or direction not in ("forward", "train"):
        raise ValueError(
            "algorithm must be one of thread, unfold and direction 'forward' or 'train', "
            f"got {algorithm!r} and {direction!r}"
        )
    s = Sizes.of(p)
    several = p.batch > 1
    columns = max(s.columns, s.x)
    unfolding = s.x + s.columns if s.columns > s.x else s.x
    fold = s.y if algorithm == "thread" else 0  # thread: the product, its copy and fold's output
    weights = p.batch * s.weight if several and p.groups > 1 else 0
    if p.groups > 1:
        forward = columns + s.y + (max(weights, s.y) if fold else weights)
        gradients = 2 * weights if several else s.weight
        train = 2 * columns + 2 * s.y + gradients + p.out_channels
    else:
        copied = s.columns if several else 0
        forward = columns + (max(copied + s.y, 3 * s.y) if fold else copied + 2 * s.y)
        gradients = s.weight + p.out_channels
        if several:  # the copy kept for backward, its gradient, and that gradient's copy
            train = max(2 * columns + (2 + bool(fold)) * s.y, 3 * columns + s.y + gradients)
        else:
            train = max(columns + 3 * s.y, 2 * columns + 2 * s.y + gradients)
    if not fold:
        train = max(train, columns + 4 * s.y + weights + p.out_channels)
    return itemsize * max(unfolding, forward if direction == "forward" else train)
