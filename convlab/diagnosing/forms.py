"""Convolutions that compute the same as a layer: solved for on some images, checked on others.

Five forms, with the sums over the patch of one output pixel (s values, mean m):

- "plain":     y = Σwx + b
- "squares":   y = Σ(wx + vx²) + b              the squared L2 distance
- "distance":  y = ±√(Σ(wx + vx²) + b)          the L2 distance
- "cosine":    y = Σwx / √Σx² + b               cosine similarity
- "local":     y = Σwx / √Σ(x − m)² + b         local normalisation
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from convlab.diagnosing.probe import UNKNOWNS, Fit, Probe
from convlab.problem import ConvProblem

ROWS = 3  # equations per unknown
CHECKED = 2  # images
WORDS = {
    "plain": "a convolution of x",
    "squares": "the sum of a convolution of x and one of x²",
    "distance": "the root of the sum of a convolution of x and one of x²",
    "cosine": "a convolution of x over the norm of each patch",
    "local": "a convolution of x over the spread of each patch",
}


def fit(probe: Probe, p: ConvProblem, form: str) -> Fit | None:
    """The convolution of this form that answers like the layer; None if none does."""
    unknowns = p.taps * (2 if form in ("squares", "distance") else 1) + 1
    if unknowns > UNKNOWNS:
        return None
    x = probe.random()
    y = probe.images(x)
    pixels = y.shape[2] * y.shape[3]
    count = math.ceil(ROWS * unknowns / pixels) + CHECKED
    x = probe.random(count + count % 2)
    x[:CHECKED] *= -2  # other sizes and signs than those that are fitted
    y = torch.cat([probe.images(x[:CHECKED]), probe.images(x[CHECKED:])])
    if not torch.isfinite(y).all():
        return None
    sign = -1.0 if form == "distance" and y.mean() < 0 else 1.0
    inputs, scale = _columns(p, x, form)
    target = y.double().flatten(2).unflatten(1, (p.groups, -1))  # (M, G, K / G, L)
    known = target.square() if form == "distance" else target * scale
    solved = []
    for group in range(p.groups):
        a = inputs[CHECKED:, group].transpose(1, 2).flatten(0, 1)  # (M · L, unknowns)
        b = known[CHECKED:, group].transpose(1, 2).flatten(0, 1)  # (M · L, K / G)
        try:
            solved.append(torch.linalg.solve(a.T @ a, a.T @ b))
        except torch.linalg.LinAlgError:
            return None
    weights = torch.stack(solved)  # (G, unknowns, K / G)
    got = torch.einsum("mgul,guk->mgkl", inputs[:CHECKED], weights)
    got = sign * got.clamp(min=0).sqrt() if form == "distance" else got / scale[:CHECKED]
    top = target.abs().amax()
    error = float((got - target[:CHECKED]).abs().amax() / top) if top > 0 else 0.0
    if not error <= 10 * probe.tolerance:
        return None
    weight = weights[:, :-1].transpose(1, 2).flatten(0, 1)  # (K, unknowns - 1)
    weight = weight.unflatten(1, (-1, *p.kernel_size))
    return Fit(form, weight, weights[:, -1].flatten(), error, sign)


def _columns(p: ConvProblem, x: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """What y is linear in (M, G, unknowns, L), and what y is multiplied with (M, G, 1, L)."""
    (top, bottom), (left, right) = p.pads
    padded = F.pad(x.double(), (left, right, top, bottom)).unflatten(1, (p.groups, -1))
    if form in ("squares", "distance"):
        padded = torch.cat([padded, padded.square()], 2)
    columns = F.unfold(padded.flatten(1, 2), p.kernel_size, p.dilation, 0, p.stride)
    columns = columns.unflatten(1, (p.groups, -1))
    scale = torch.ones_like(columns[:, :, :1])
    if form == "cosine":
        scale = columns.square().sum(2, keepdim=True).sqrt()
    if form == "local":
        scale = (columns - columns.mean(2, keepdim=True)).square().sum(2, keepdim=True).sqrt()
    return torch.cat([columns, scale], 2), scale


def fast_form(
    found: Fit, p: ConvProblem, like: Tensor
) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """Weight and bias, and x → y by calls of F.conv2d; dtype and device of `like`."""
    weight = found.weight.to(like).requires_grad_()
    bias = found.bias.to(like).requires_grad_()
    ones = torch.ones(p.groups, 1, *p.kernel_size).to(like)
    form, per_group = found.form, p.out_channels // p.groups
    options = {**p.kwargs, "groups": 1}

    def plain(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, **p.kwargs)

    def squares(x: Tensor) -> Tensor:
        channels = weight.shape[1] // 2
        y = F.conv2d(x, weight[:, :channels], bias, **p.kwargs)
        y = y + F.conv2d(x * x, weight[:, channels:], None, **p.kwargs)
        return y if form == "squares" else found.sign * y.clamp(min=1e-12).sqrt()

    def normalised(x: Tensor) -> Tensor:
        y = F.conv2d(x, weight, None, **p.kwargs)
        grouped = x.unflatten(1, (p.groups, -1))
        options["groups"] = p.groups
        total = F.conv2d(grouped.square().sum(2), ones, None, **options)  # (N, G, OH, OW)
        if form == "local":
            total = total - F.conv2d(grouped.sum(2), ones, None, **options).square() / p.taps
        scale = total.clamp(min=1e-12).rsqrt().repeat_interleave(per_group, 1)
        return y * scale + bias[:, None, None]

    functions = {"plain": plain, "squares": squares, "distance": squares}
    return [weight, bias], functions.get(form, normalised)
