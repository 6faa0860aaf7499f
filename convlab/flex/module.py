"""`FlexConv2d`: the layer around `flex_conv2d`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlab.flex.combine import parse
from convlab.flex.forms import REDUCTIONS
from convlab.flex.function import BACKENDS, flex_conv2d
from convlab.problem import same_padding

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class FlexConv2d(nn.Module):
    """A layer with `combine(x, w)` in place of x · w and `reduce` in place of the sum.

    x (N, C, H, W) or (C, H, W) → (N, K, OH, OW), plus a bias (K). No `nn.Conv2d`: what treats
    those as linear (fusing with batch norm, counting FLOPs) would be wrong about it.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as `nn.Conv2d`.
        combine: as for `flex_conv2d`; with three arguments, `forward` takes aux. If it has
            parameters, write it as an `nn.Module`, which becomes a part of this one. Parameters of
            one number that a plain function closes over are registered too, under their own names
            as far as these can be told; but such a layer cannot be copied or pickled.
        reduce, backend: as for `flex_conv2d`. The bias is added after the reduction.
        pad_value: what lies outside x; needs padding_mode "zeros".

    Raises:
        ValueError, TypeError: an argument that is not as above.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        combine: Callable[..., Tensor],
        reduce: str = "sum",
        pad_value: float = 0.0,
        backend: str = "inductor",
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("reduce", reduce, REDUCTIONS),
            ("backend", backend, BACKENDS),
            ("padding_mode", padding_mode, PADDING_MODES),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if padding_mode != "zeros" and pad_value:
            raise ValueError(f"pad_value must be 0 with padding_mode {padding_mode!r}")
        sizes = stride, padding, dilation, groups, bool(bias), padding_mode, device, dtype
        model = nn.Conv2d(in_channels, out_channels, kernel_size, *sizes)  # its checks, its tensors
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = model.kernel_size, model.stride, model.padding
        self.dilation, self.groups, self.padding_mode = model.dilation, groups, padding_mode
        self.reduce, self.pad_value, self.backend = reduce, pad_value, backend
        self.weight = model.weight
        self.register_parameter("bias", model.bias)
        self.combine = combine
        self.takes_aux = _takes_aux(combine)
        self._closed_over = self._register_captured()

    def reset_parameters(self) -> None:
        """Weight and bias uniform in ±1 / √(C / groups · kh · kw), as `nn.Conv2d` draws them.

        That keeps the variance of a sum of *products*. Other combinations may want others: a
        maximum of x + w starts as a plain maximum from zeros, a distance from weights that are
        spread like x.
        """
        bound = 1 / math.sqrt(self.weight[0].numel() or 1)
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, aux: Tensor | None = None) -> Tensor:
        """x, and for a combine of three arguments aux (N, 1 or K, OH, OW) → (N, K, OH, OW)."""
        if self.takes_aux != (aux is not None):
            wanted = "needs aux, a value per output pixel" if self.takes_aux else "takes no aux"
            raise TypeError(f"combine {_name(self.combine)} {wanted}")
        if self._closed_over:
            self._check_captured()
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._margins(), mode=self.padding_mode), 0
        y = flex_conv2d(
            *(x, self.weight, _callable(self.combine), self.reduce, self.stride, padding),
            *(self.dilation, self.groups, self.pad_value, aux, self.backend),
        )
        return y if self.bias is None else y + self.bias[:, None, None]

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        text += f", stride={self.stride}"
        usual = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        usual |= {"pad_value": 0.0, "backend": "inductor"}
        for name, value in usual.items():
            if (own := getattr(self, name)) != value:
                text += f", {name}={own!r}"
        text += "" if self.bias is not None else ", bias=False"
        if not isinstance(self.combine, nn.Module):
            text += f", combine={_name(self.combine)}"
        return f"{text}, reduce={self.reduce!r}"

    def __getstate__(self) -> dict:
        if self._closed_over:
            names = ", ".join(self._closed_over)
            raise TypeError(
                f"a copy would go on using {names} of the original, which {_name(self.combine)} "
                "closes over: write combine as an nn.Module that holds it"
            )
        return self.__dict__

    def _register_captured(self) -> list[str]:
        """Names of the parameters that a plain function closes over, now registered here."""
        names = []
        for tensor, name in self._captured():
            taken = not name.isidentifier() or hasattr(self, name)
            names.append(f"captured_{len(names)}" if taken else name)
            self.register_parameter(names[-1], tensor)
        return names

    def _captured(self) -> list[tuple[Tensor, str]]:
        parsed = parse(_callable(self.combine), torch.float32, self.takes_aux)
        if isinstance(self.combine, nn.Module):
            return []
        pairs = zip(parsed.captured, parsed.names)
        return [(tensor, name) for tensor, name in pairs if isinstance(tensor, nn.Parameter)]

    def _check_captured(self) -> None:
        for (tensor, _), name in zip(self._captured(), self._closed_over):
            if getattr(self, name) is not tensor:
                raise RuntimeError(
                    f"{name} was replaced, but {_name(self.combine)} closes over the earlier one: "
                    "write combine as an nn.Module that holds it"
                )

    def _margins(self) -> tuple[int, ...]:
        """(left, right, top, bottom), as `F.pad` takes them."""
        if self.padding == "same":
            top, left = map(same_padding, self.kernel_size, self.dilation)
            return *left, *top
        top, left = (0, 0) if self.padding == "valid" else self.padding
        return left, left, top, top


def _callable(combine: Callable) -> Callable:
    """A module's `forward`, whose reads can be followed; a function itself."""
    return combine.forward if isinstance(combine, nn.Module) else combine


def _takes_aux(combine: Callable) -> bool:
    """Whether combine has to be called with three arguments."""
    fits = []
    for count in (2, 3):
        try:
            inspect.signature(_callable(combine)).bind(*range(count))
        except (TypeError, ValueError):  # other arguments; a builtin without a signature
            continue
        fits.append(count)
    return fits == [3]


def _name(combine: Callable) -> str:
    return getattr(combine, "__name__", None) or type(combine).__name__
