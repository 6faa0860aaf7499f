"""How long the layer takes, beside `nn.Conv2d` of the same sizes and beside its own fast form."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convlab import timing
from convlab.algorithms import ALGORITHMS
from convlab.diagnosing import forms
from convlab.diagnosing.probe import Behaviour
from convlab.diagnosing.subject import Subject
from convlab.stages import operators

if TYPE_CHECKING:
    import pandas as pd

LAYER, CONV, OFF, FAST = "this layer", "nn.Conv2d", "nn.Conv2d, library off", "fast form"
CHECKED_IMAGES = 4
OPTIONS = {"seconds": 6.0, "min_rounds": 5}
QUICK_OPTIONS = {"seconds": 0.8, "min_rounds": 3}
LONG_SECONDS = 5.0  # three rounds of such a pass are enough


SCATTER = 0.5  # of the median, between the quartiles: more is a busy machine's


@dataclass
class Times:
    """What was measured.

    Attributes:
        forward, train: tables of `timing.compare`; train is None where there is no gradient.
        operators: "forward" and "train" → table of `stages.operators`.
        launches: kernel launches on CUDA in forward.
        samples: "forward" and "train" → candidate → its samples, round by round.
        fast_error: largest difference of the fast form from the layer, over the largest value;
            None if there is no fast form.
    """

    forward: pd.DataFrame
    train: pd.DataFrame | None
    operators: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    launches: int | None = None
    fast_error: float | None = None
    samples: Mapping[str, Mapping[str, timing.Measurement]] = field(default_factory=dict)

    @property
    def backward(self) -> float | None:
        """Seconds: training less forward, round by round, as a median; None without gradient."""
        if "train" not in self.samples:
            return None
        both = (self.samples[name][LAYER].samples for name in ("train", "forward"))
        return statistics.median(train - forward for train, forward in zip(*both, strict=True))

    @property
    def scattered(self) -> bool:
        """Whether the layer's times scatter as they do on a busy machine."""
        own = [found[LAYER] for found in self.samples.values()]
        return any(m.q75 - m.q25 > SCATTER * m.median for m in own)


def times(subject: Subject, behaviour: Behaviour, quick: bool, seconds: float) -> Times:
    """Forward without and training with gradients; `seconds`: of one pass, roughly."""
    with subject.quiet():
        functions, error = _functions(subject, behaviour)
        options = dict(QUICK_OPTIONS if quick else OPTIONS)
        if seconds > LONG_SECONDS:
            options["min_rounds"] = 3
        passes = {"forward": {n: _forward(f, subject.x) for n, (f, _) in functions.items()}}
        if subject.differentiable:
            grad = torch.randn_like(subject.y)
            passes["train"] = {
                name: _train(f, wanted, subject.x, grad) for name, (f, wanted) in functions.items()
            }
        # All in the same rounds: backward is the difference of two passes.
        candidates = {(p, name): f for p, named in passes.items() for name, f in named.items()}
        found = timing.interleaved(candidates, subject.device, **options)
        samples = {p: {name: found[p, name] for name in named} for p, named in passes.items()}
        seen = {
            name: operators(candidates[LAYER], subject.device)
            for name, candidates in passes.items()
        }
        cuda = subject.device.type == "cuda"
        launches = timing.launches(passes["forward"][LAYER]) if cuda else None
    baseline = CONV if CONV in functions else LAYER
    tables = {name: timing.ratios(each, baseline) for name, each in samples.items()}
    return Times(tables["forward"], tables.get("train"), seen, launches, error, samples)


Layers = dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]]


def _functions(subject: Subject, found: Behaviour) -> tuple[Layers, float | None]:
    """name → (function of x, tensors whose gradients training computes)."""
    parameters = [p for p in subject.layer.parameters() if p.requires_grad]
    chosen: Layers = {LAYER: (subject, parameters)}
    p = found.problem
    if p is None:
        return chosen, None
    dtype, device = subject.x.dtype, subject.device
    _, weight, bias = p.inputs(device, dtype, requires_grad=True)
    for name, algorithm in ((CONV, "native"), (OFF, "native_no_library")):
        function = ALGORITHMS[algorithm]
        chosen[name] = (
            lambda x, f=function: f(x, weight, bias, **p.kwargs),
            [weight, bias],
        )
    error = None
    if found.fit:
        weights, fast = forms.fast_form(found.fit, p, subject.x)
        error = _difference(subject, fast)
        if found.fit.form != "plain" and error <= close(dtype, device):
            chosen[FAST] = (fast, weights)
    return chosen, error


def close(dtype: torch.dtype, device: torch.device | str) -> float:
    """Allowed difference of the fast form, over the largest value: both round in `dtype`."""
    if dtype == torch.float64:
        return 1e-8
    if dtype == torch.float32:
        return 1e-3 if torch.device(device).type == "cpu" else 5e-3  # TF32
    return 5e-2


def _difference(subject: Subject, fast: Callable[[Tensor], Tensor]) -> float:
    """Of the fast form from the layer itself, on the reader's own images."""
    x = subject.x[:CHECKED_IMAGES]
    with torch.no_grad():
        try:
            y = subject(x)
        except ValueError:  # the layer takes only its own batch
            x, y = subject.x, subject(subject.x)
        top = y.abs().amax()
        error = (fast(x) - y).abs().amax() / top
    return float(error) if torch.isfinite(error) else float("inf")


def _forward(function: Callable[[Tensor], Tensor], x: Tensor) -> timing.Function:
    return torch.no_grad()(lambda: function(x))


def _train(
    function: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor, grad: Tensor
) -> timing.Function:
    x = x.clone().requires_grad_()
    wanted = [x, *parameters]
    return lambda: torch.autograd.grad(function(x), wanted, grad, allow_unused=True)
