"""What a layer computes, found out by calling it: is it linear, local, the same at every place?

Every test uses random values in float64 where the layer allows it, so that an equation that holds
on all of them does not hold by chance. A layer whose output is a convolution of x, of (x, x²), or
one of these over the local norm, is fitted: the weights are solved for on some images and the
difference is measured on others.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from convlab.diagnosing import geometry
from convlab.diagnosing.subject import Subject
from convlab.problem import ConvProblem

SIDE = 18  # pixels of a probe, where the layer takes images of any size
EXACT, ROUGH = 1e-6, 1e-3  # relative, for float64 and float32
UNKNOWNS = 5000  # at most, of a fit: a product of this size takes a second
CHUNK = 8
AT_LEAST = 1e-30


@dataclass
class Fit:
    """y = the convolution `weight`, `bias` of `features`(x), over `norm`(x), `root` of it.

    Attributes:
        form: "plain", "cosine", "local" (zero mean), "squares" or "distance".
        error: largest difference on images that were not fitted, over the largest value.
        sign: of a distance.
    """

    form: str
    weight: Tensor
    bias: Tensor
    error: float
    sign: float = 1.0


@dataclass
class Behaviour:
    """What calls showed. A value is None where it could not be told.

    Attributes:
        local: an output pixel depends on its patch alone, as large as `problem` says; else the
            sizes are only declared by the layer's attributes and weight.
        facts: name of a test → its answer, in the order in which they were made.
        fit: the convolutions that compute the same, if they were found.
        same_weight: the layer stores the weight of the fit.
        redrawn: some parameter held no usable numbers and was replaced for the tests.
    """

    problem: ConvProblem | None = None
    local: bool = False
    unknown: str = ""
    facts: dict[str, bool | str] = field(default_factory=dict)
    fit: Fit | None = None
    deterministic: bool = True
    same_weight: bool = False
    redrawn: bool = False


class Probe:
    """Calls a copy of the layer on small random images.

    Args:
        subject: the layer and the input whose sizes count.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.layer, self.dtype = subject.in_float64()
        self.tolerance = EXACT if self.dtype == torch.float64 else ROUGH
        self.generator = torch.Generator().manual_seed(0)
        self.batch = 2
        self.side: tuple[int, int] = tuple(subject.x.shape[2:])
        self._choose_size()

    def _choose_size(self) -> None:
        """Small images if the layer takes them, else its own; its own batch if it needs that."""
        full = self.side
        small = tuple(min(SIDE, size) for size in full)
        batches = (2, self.subject.x.shape[0])
        for self.side, self.batch in itertools.product(dict.fromkeys((small, full)), batches):
            try:
                y = self(self.random())
            except ValueError:
                continue
            if y.shape[0] == self.batch:
                return
        raise geometry.Unknown("the layer takes no images but those it was given")

    def __call__(self, x: Tensor) -> Tensor:
        with self.subject.quiet(), torch.no_grad():
            return self.subject(x, self.layer).detach()

    def random(self, count: int | None = None) -> Tensor:
        """(count, C, h, w) of standard normal values; one batch if None."""
        shape = count or self.batch, self.subject.x.shape[1], *self.side
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return drawn.to(self.subject.device, self.dtype)

    def images(self, x: Tensor) -> Tensor:
        """(M, C, h, w) → (M, K, oh, ow), however many."""
        if self.batch == 2:
            return torch.cat([self(part) for part in _pairs(x)])[: len(x)]
        rest = self.random()[1:]
        return torch.cat([self(torch.cat([image[None], rest]))[:1] for image in x])

    def equal(self, a: Tensor, b: Tensor, scale: Tensor | None = None) -> bool:
        """Equal but for rounding, against the size of `scale` (else of the two)."""
        top = torch.maximum(a.abs().amax(), b.abs().amax()) if scale is None else scale.abs().amax()
        difference = (a - b).abs().amax()
        return bool(torch.isfinite(difference) and difference <= self.tolerance * top + AT_LEAST)


def _pairs(x: Tensor) -> list[Tensor]:
    """Even chunks; an odd last image comes twice."""
    if len(x) % 2:
        x = torch.cat([x, x[-1:]])
    return list(x.split(CHUNK))


def behaviour(subject: Subject) -> Behaviour:
    """All that can be told about the layer from its answers."""
    found = Behaviour()
    try:
        probe = Probe(subject)
    except geometry.Unknown as error:
        found.unknown = str(error)
        return found
    x = probe.random()
    y = probe(x)
    found.deterministic = _same_again(subject, x.to(subject.x.dtype), probe)
    if y.dim() != 4:
        found.unknown = f"the output has shape {tuple(y.shape)}, not (N, K, OH, OW)"
        return found
    if not y.is_floating_point() or not torch.isfinite(y).all():
        held = "NaN or infinite values" if y.is_floating_point() else f"values of {y.dtype}"
        found.unknown = f"the output holds {held}"
        return found
    if not found.deterministic:
        found.unknown = "its output changes from call to call (dropout in train mode?)"
        return found
    others = torch.cat([x[:1], probe.random()[1:]])
    alone = probe.equal(probe(others)[:1], y[:1])
    found.facts["each image on its own"] = alone
    found.facts["the same at every place of the batch"] = probe.equal(probe(x.flip(0)), y.flip(0))
    if not alone:
        found.unknown = "the images of a batch are mixed (BatchNorm in train mode?)"
    elif not found.facts["the same at every place of the batch"]:
        found.unknown = "each place of the batch has a computation of its own"
    else:
        found.problem, found.local, found.unknown = _sizes(probe)
    found.facts["linear in x"] = _linear(probe)
    if found.local:
        found.facts["the same at every place"] = _equivariant(probe, found.problem)
    return found


def _sizes(probe: Probe) -> tuple[ConvProblem | None, bool, str]:
    """The sizes by small images, else by whole ones, or why there are none; whether seen."""
    subject = probe.subject
    shapes = tuple(subject.y.shape), tuple(subject.x.shape)
    sides = dict.fromkeys((probe.side, shapes[1][2:]))
    problem, reason = None, ""
    for probe.side in sides:
        try:
            image = probe.random()[:1]
            problem, seen = geometry.infer(subject.watched, probe.images, image, *shapes)
        except ValueError as error:
            reason = str(error)
            continue
        if seen:
            return problem, True, ""
    probe.side = next(iter(sides))
    return problem, False, reason


def _same_again(subject: Subject, x: Tensor, probe: Probe) -> bool:
    """Two calls with different random states give the same bits."""
    with subject.quiet(), torch.no_grad():
        torch.manual_seed(1)
        first = subject(x, subject.watched)
        torch.manual_seed(2)
        second = subject(x, subject.watched)
    return torch.equal(first.nan_to_num(), second.nan_to_num())


def _linear(probe: Probe) -> bool:
    """f(x₁ + x₂) + f(0) = f(x₁) + f(x₂), and f(−2x) likewise."""
    a, b = probe.random(), probe.random()
    zero, ya, yb = probe(torch.zeros_like(a)), probe(a), probe(b)
    added = probe.equal(probe(a + b) + zero, ya + yb)
    return added and probe.equal(probe(-2 * a) - zero, -2 * (ya - zero))


def _equivariant(probe: Probe, p: ConvProblem) -> bool:
    """x moved by one stride moves y by one pixel, away from the edges."""
    x = probe.random()
    y, moved = probe(x), probe(x.roll(p.stride, (2, 3)))
    reach = [d * (k - 1) // s + 2 for d, k, s in zip(p.dilation, p.kernel_size, p.stride)]
    inner = y[:, :, reach[0] : -reach[0] - 1, reach[1] : -reach[1] - 1]
    if not inner.numel():
        return True
    shifted = moved[:, :, reach[0] + 1 : -reach[0], reach[1] + 1 : -reach[1]]
    return probe.equal(inner, shifted)
