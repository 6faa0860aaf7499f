"""Which branch of the decision guide a layer is on, by tests that it passes or fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convlab.diagnosing import forms
from convlab.diagnosing.probe import EXACT, Behaviour, Probe
from convlab.diagnosing.watch import Watched
from convlab.problem import ConvProblem

VALUES = 6  # of one pixel, to see the function that is applied to it
OUTPUTS = 8  # output values whose gradients are looked at
DRAWS = 6
LARGE = 1e4


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
    if not facts:
        return Kind("", False, found.unknown)
    per_sample = any(
        op.name == "convolution" and images > 1 and op.groups > 1 and op.groups % images == 0
        for op in watched.ops
    ) and (p is None or p.groups == 1)
    if not facts["each image on its own"]:
        return Kind("", False, found.unknown)
    if not facts["the same at every place of the batch"]:
        return Kind("places", True, f"{found.unknown}: its own weights")
    if facts.get("linear in x"):
        return _linear(probe, found)
    if not found.local:
        if per_sample:
            return Kind("places", False, "a grouped convolution has the images as its groups")
        return Kind("", False, found.unknown or "an output pixel depends on the whole image")
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
    if not found.local:
        return Kind("", False, f"linear in x, but {found.unknown or 'it reads the whole image'}")
    if not found.facts.get("the same at every place", True):
        why = "linear in x, with weights that differ from place to place"
        return Kind("places", True, why)
    found.fit = forms.fit(probe, p, "plain")
    if found.fit is None:
        why = "linear in x and the same at every place, but no zero padding explains its edges"
        return Kind("plain", False, why)
    found.same_weight = _is_a_parameter(probe, found.fit.weight)
    error = f"to {found.fit.error:.0e} of its largest value"
    if found.same_weight:
        return Kind("plain", True, f"nn.Conv2d with the same weight computes the same, {error}")
    why = f"nn.Conv2d computes the same, {error}, with a weight that it does not store as such"
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
    draws = [_gradients(probe, probe.random()[:1]) for _ in range(DRAWS)]
    if any(draw is None or not torch.isfinite(draw).all() for draw in draws):
        return None
    gradients = torch.stack(draws)  # (draws, outputs, values of x)
    used = (gradients != 0).sum(2)
    patch = p.taps if p.groups > 1 else p.kernel_size[0] * p.kernel_size[1] * p.in_channels
    if (used <= 1).all() and used.any() and patch > 1:
        if _follows_the_largest(probe, p):
            return Kind("elementwise", True, "a maximum or minimum over the patch of f(x, w)")
        return Kind("patch", False, "each output value is one value of its patch, by its rank")
    if _parallel(gradients):
        why = "its derivatives point where those of one convolution do: a function of that"
        return Kind("expands", False, why)
    if _linear_around_the_middle(probe, p):
        why = "linear in the neighbours of a pixel, with weights that the pixel itself decides"
        return Kind("places", True, why)
    moving = ((gradients[0] != 0) != (gradients[1] != 0)).any()
    if (used < 0.9 * patch).all() and used.any() and moving:
        share = float(used.double().mean() / patch)
        why = f"an output value uses {share:.0%} of its patch, which part depends on x"
        return Kind("patch", False, why)
    return None


def _parallel(gradients: Tensor) -> bool:
    """Whether those of each output that are not zero have one direction, at least two of one."""
    seen = 0
    for draws in gradients.transpose(0, 1):
        lengths = draws.norm(dim=1)
        there = draws[lengths > 0] / lengths[lengths > 0, None]
        seen += max(len(there) - 1, 0)
        if len(there) and not ((there @ there[0]).abs() > 1 - EXACT).all():
            return False
    return seen > 0


def _follows_the_largest(probe: Probe, p: ConvProblem) -> bool:
    """Any pixel of the patch, made large enough, decides the output: a maximum (or a minimum)."""
    x = probe.random()[:1]
    rows, columns = _patch(probe, p, x)
    for push in (LARGE, -LARGE):
        changed = []
        for row, column in ((rows[0], columns[0]), (rows[-1], columns[-1])):
            image = x[0].clone()
            image[:, row, column] += push
            changed.append(image)
        y = probe.images(torch.stack([x[0], *changed]))
        middle = y[:, :, y.shape[2] // 2, y.shape[3] // 2]
        if ((middle[1:] - middle[:1]).abs() > LARGE / 2).all():
            return True
    return False


def _patch(probe: Probe, p: ConvProblem, x: Tensor) -> list[list[int]]:
    """Rows and columns of x that the output pixel in the middle reads."""
    size = probe.images(x).shape[2:]
    return [
        [o // 2 * s - pads[0] + d * tap for tap in range(k)]
        for o, s, pads, d, k in zip(size, p.stride, p.pads, p.dilation, p.kernel_size, strict=True)
    ]


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
    """Second differences vanish for changes that leave the pixel in the middle as it is."""
    if p.kernel_size == (1, 1):
        return False
    x, a, b = probe.random(), probe.random(), probe.random()
    rows, columns = _patch(probe, p, x[:1])
    middle = rows[len(rows) // 2], columns[len(columns) // 2]
    for change in (a, b):
        change[:, :, middle[0], middle[1]] = 0
    values = [probe(v) for v in (x, x + a, x + b, x + a + b)]
    y, ya, yb, yab = (v[:, :, v.shape[2] // 2, v.shape[3] // 2] for v in values)
    same = probe.equal(yab + y, ya + yb, scale=torch.stack([y, ya, yb, yab]))
    return same and not probe.equal(ya, y)
