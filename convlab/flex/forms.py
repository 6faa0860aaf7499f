"""A custom convolution by its definition: columns, broadcasting, a reduction."""

from __future__ import annotations

import torch
from torch import Tensor

from convlab.algorithms.thread import output_size
from convlab.algorithms.windows import planes

REDUCTIONS = {
    "sum": torch.sum,
    "max": torch.amax,
    "logsumexp": torch.logsumexp,
}


def by_definition(x, weight, aux, combine, reduce, stride, dilation, groups) -> Tensor:
    """Padded x (N, C, H, W), weight (K, C / groups, kh, kw) → (N, K, OH, OW): the specification.

    Memory: K · C / groups · k² values per output pixel, several times over. Differentiable as
    often as `combine` is; where several terms share a maximum, each gets an equal part of the
    gradient (`torch.amax`).
    """
    size = output_size(x, weight, stride, (0, 0), dilation)
    columns = planes(x, weight.shape[2:], size, stride, dilation)  # N, C, kh, kw, OH, OW
    columns = columns.unflatten(1, (groups, 1, -1))
    filters = weight.unflatten(0, (groups, -1))[..., None, None]  # G, K / G, C / G, kh, kw, 1, 1
    inputs = [columns, filters]
    if aux is not None:
        shared = aux.shape[1] == 1
        inputs.append(
            aux.unflatten(1, (1, 1) if shared else (groups, -1))[:, :, :, None, None, None]
        )
    terms = combine(*inputs)
    full = torch.broadcast_shapes(*(t.shape for t in inputs))
    return REDUCTIONS[reduce](terms.expand(full), (3, 4, 5)).flatten(1, 2)
