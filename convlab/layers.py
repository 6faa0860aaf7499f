"""`nn.Module`s: the thread's layer as posted, and `Conv2d` with a choice of algorithm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlab.algorithms import ALGORITHMS


class ThreadConv2d(nn.Module):
    """The custom layer as it was posted in the thread, with all its faults.

    Rebuilt from its sequence of operations. Faults kept on purpose: the weight is uninitialised
    memory; `stride` and `dilation` never reach unfold; `dilation` goes to fold instead; the output
    is taken to be as large as the input; there is no bias; `sratio` is never used.

    Input (N, C, H, W) → output (N, K, H, W), right only where padding keeps the size.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        sratio: float = 0,
    ) -> None:
        super().__init__()
        self.kernel_size, self.padding = kernel_size, padding
        self.stride, self.dilation, self.sratio = stride, dilation, sratio
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(x, self.kernel_size, padding=self.padding)
        product = columns.transpose(1, 2).matmul(self.weight.flatten(1).t())
        return F.fold(product.transpose(1, 2), x.shape[2:], kernel_size=1, dilation=self.dilation)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` computed by one of `ALGORITHMS`; same constructor, same `state_dict`.

    Args:
        algorithm: a name in `ALGORITHMS`; the rest as `nn.Conv2d`, `padding_mode` included.

    Raises:
        ValueError: no such algorithm; at the call, a problem that it does not support.
    """

    def __init__(self, *args, algorithm: str = "native", **kwargs) -> None:
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
        super().__init__(*args, **kwargs)
        self.algorithm = algorithm

    def forward(self, x: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return ALGORITHMS[self.algorithm](
            x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, algorithm={self.algorithm!r}"
