"""Which branch of the decision guide a layer is on, by tests that it passes or fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convlab.diagnosing import forms
from convlab.diagnosing.probe import Behaviour, Probe
from convlab.diagnosing.watch import Watched
from convlab.problem import ConvProblem

VALUES = 6  # of one pixel, to see the function that is applied to it
OUTPUTS = 8  # output values whose gradients are looked at
DEGREE = 4


@dataclass(frozen=True)
class Kind:
    """A branch of `convlab.guide.GUIDE`, or "" if none could be told.

    Attributes:
        sure: it follows from equations that hold; else it is a guess from signs.
        why: the sentence that says so.
    """

    branch: str
    sure: bool
    why: str


def kind(probe: Probe, found: Behaviour, watched: Watched, images: int) -> Kind:
    """The branch, from what `behaviour` found and further tests; adds the fit to `found`."""
    facts, p = found.facts, found.problem
    per_sample = any(
        op.name == "convolution" and images > 1 and op.groups > 1 and op.groups % images == 0
        for op in watched.ops
    ) and (p is None or p.groups == 1)
    if not facts.get("each image on its own", True):
        return Kind("places", False, "the images of a batch do not get the same treatment")
    if facts.get("linear in x"):
        return _linear(probe, found)
    if p is None:
        if per_sample:
            return Kind("places", False, "a grouped convolution has the images as its groups")
        return Kind("", False, found.unknown)
    if not facts.get("the same at every place", True):
        return Kind("places", False, "not linear in x, and moving x does not simply move y")
    for form in ("squares", "distance", "cosine", "local"):
        if fitted := forms.fit(probe, p, form):
            found.fit = fitted
            why = f"it equals {forms.WORDS[form]}, to {fitted.error:.0e} of its largest value"
            return Kind("expands", True, why)
    return _elementwise(probe, found) or _by_gradient(probe, found) or _guess(probe, found)


def _linear(probe: Probe, found: Behaviour) -> Kind:
    p = found.problem
    if p is None:
        return Kind("", False, f"linear in x, but {found.unknown}")
    if not found.facts.get("the same at every place", True):
        why = "linear in x, with weights that differ from place to place"
        return Kind("places", True, why)
    found.fit = forms.fit(probe, p, "plain")
    if found.fit is None:
        return Kind("plain", False, "linear in x and the same at every place")
    found.same_weight = _is_a_parameter(probe, found.fit.weight)
    error = f"to {found.fit.error:.0e} of its largest value"
    if found.same_weight:
        return Kind("plain", True, f"nn.Conv2d with the same weight computes the same, {error}")
    why = f"nn.Conv2d computes the same, {error}, with a weight that is computed from parameters"
    return Kind("weight", True, why)


def _is_a_parameter(probe: Probe, weight: Tensor) -> bool:
    """Whether the layer stores the weight, in whatever order of its values."""
    wanted = weight.flatten().sort().values
    for parameter in (*probe.layer.parameters(), *probe.layer.buffers()):
        if parameter.numel() == wanted.numel():
            values = parameter.detach().double().flatten().sort().values
            if torch.allclose(values, wanted, rtol=1e-4, atol=10 * probe.tolerance):
                return True
    return False


def _elementwise(probe: Probe, found: Behaviour) -> Kind | None:
    """A sum over the patch of functions of single values, perhaps under a root or logarithm."""
    inverses: dict[str, Callable[[Tensor], Tensor]] = {
        "a sum": lambda y: y,
        "the root of a sum": torch.square,
        "a logsumexp": torch.exp,
        "a negative logsumexp": lambda y: torch.exp(-y),
    }
    a, b = probe.random(), probe.random()
    chosen = torch.rand(a.shape, generator=probe.generator).to(a.device) < 0.5
    answers = [probe(x) for x in (a, b, torch.where(chosen, a, b), torch.where(chosen, b, a))]
    if not all(torch.isfinite(y).all() for y in answers):
        return None
    for words, inverse in inverses.items():
        ya, yb, yab, yba = map(inverse, answers)
        if probe.equal(ya + yb, yab + yba):
            found.facts["a sum over the patch of functions of single values"] = True
            if words == "a sum" and _one_function(probe):
                return Kind("input", True, "the sum over the patch of w · g(x), with one g for all")
            return Kind(
                "elementwise", True, f"{words} over the patch of functions of one x and one w each"
            )
    found.facts["a sum over the patch of functions of single values"] = False
    return None


def _one_function(probe: Probe) -> bool:
    """The answers to values of one pixel are multiples of each other, with the same factors."""
    x = probe.random()[:1]
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    values = torch.linspace(-2.5, 3.1, VALUES + 1)
    answers = []
    for channel, row in ((0, rows), (x.shape[1] - 1, rows - 1)):
        changed = x.repeat(VALUES + 1, 1, 1, 1)
        changed[:, channel, row, columns] = values.to(x)
        y = probe.images(changed).flatten(1)
        answers.append(y[1:] - y[:1])
    spectrum = torch.linalg.svdvals(torch.cat(answers, 1).double())
    return bool(spectrum[1] <= 10 * probe.tolerance * spectrum[0])


def _by_gradient(probe: Probe, found: Behaviour) -> Kind | None:
    """What the derivatives of single output values look like: one value, some, or parallel."""
    p = found.problem
    first, second = (_gradients(probe, probe.random()[:1]) for _ in range(2))
    if first is None or second is None or not torch.isfinite(first).all():
        return None
    used = (first != 0).sum(1)
    patch = p.taps if p.groups > 1 else p.kernel_size[0] * p.kernel_size[1] * p.in_channels
    if (used <= 1).all() and used.any() and patch > 1:
        return Kind(
            "elementwise", True, "each output value is a function of one value of its patch"
        )
    norms = first.norm(dim=1), second.norm(dim=1)
    both = (norms[0] > 0) & (norms[1] > 0)
    if both.any():
        cosine = (first * second).sum(1)[both] / (norms[0] * norms[1])[both]
        if ((cosine.abs() - 1).abs() < 1e-6).all():
            return Kind("expands", True, "an elementwise function of one convolution of x")
    if _linear_around_the_middle(probe, p):
        why = "linear in the neighbours of a pixel, with weights that the pixel itself decides"
        return Kind("places", True, why)
    moving = ((first != 0) != (second != 0)).any()
    if (used < 0.9 * patch).all() and used.any() and moving:
        share = float(used.double().mean() / patch)
        return Kind(
            "patch",
            False,
            f"an output value uses {share:.0%} of its patch, which part depends on x",
        )
    return None


def _gradients(probe: Probe, x: Tensor) -> Tensor | None:
    """Of output values at the middle: (outputs, values of x); None if there is no gradient."""
    if probe.batch != 2:
        return None
    x = torch.cat([x, x]).requires_grad_()
    with probe.subject.quiet(), torch.enable_grad():
        y = probe.subject(x, probe.layer)
        if not y.requires_grad:
            return None
        middle = y[0, :OUTPUTS, y.shape[2] // 2, y.shape[3] // 2]
        try:
            found = [torch.autograd.grad(v, x, retain_graph=True)[0][0].flatten() for v in middle]
        except Exception:
            return None
    return torch.stack(found)


def _guess(probe: Probe, found: Behaviour) -> Kind:
    """Not elementwise: divided by a norm, or anything."""
    x = probe.random()
    y, doubled = probe(x), probe(2 * x)
    if probe.equal(y, doubled):
        found.facts["the same for 2x as for x"] = True
        return Kind("expands", False, "the same for 2x as for x: some norm divides it")
    return Kind("patch", False, "no sum of functions of single values gives the same")


def _linear_around_the_middle(probe: Probe, p: ConvProblem) -> bool:
    x, a, b = probe.random(), probe.random(), probe.random()
    out = [size // 2 for size in probe(x).shape[2:]]
    middle = [
        o * s - pads[0] + d * (k - 1) // 2
        for o, s, pads, d, k in zip(out, p.stride, p.pads, p.dilation, p.kernel_size, strict=True)
    ]
    if p.kernel_size == (1, 1):
        return False
    for change in (a, b):
        change[:, :, middle[0], middle[1]] = 0
    values = [probe(v)[:, :, out[0], out[1]] for v in (x, x + a, x + b, x + a + b)]
    y, ya, yb, yab = values
    same = probe.equal(yab + y, ya + yb, scale=torch.stack(values))
    return same and not probe.equal(ya, y)
