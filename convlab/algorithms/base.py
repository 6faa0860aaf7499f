"""`@algorithm` gives a convolution written for plain arguments the signature of `F.conv2d`."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from convlab.problem import ConvProblem, same_padding


class Algorithm:
    """One way to compute a convolution, called like `torch.nn.functional.conv2d`.

    Attributes:
        name: its key in `ALGORITHMS`.
        idea: one sentence on the mechanism.
        library: True where the arithmetic is a library's own convolution.
        rounding: what its errors are bounded by, a key of `convlab.oracle.ROUNDING`.
        options: names of keyword arguments beyond those of `conv2d`.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        idea: str,
        library: bool,
        limits: Callable[[ConvProblem, torch.device], str | None],
        rounding: str,
    ) -> None:
        self.function = function
        self.name = function.__name__
        self.idea = idea
        self.library = library
        self.rounding = rounding
        parameters = inspect.signature(function).parameters.values()
        self.options = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        self._limits = limits
        self.__doc__ = function.__doc__
        self.__wrapped__ = function

    def supports(self, problem: ConvProblem, device: str | torch.device = "cpu") -> str | None:
        """None, or one sentence that says why this algorithm cannot compute `problem`."""
        return self._limits(problem, torch.device(device))

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        **options,
    ) -> Tensor:
        """x (N, C, H, W) or (C, H, W), weight (K, C / groups, kh, kw) → (N, K, OH, OW).

        Same meaning and same errors as `torch.nn.functional.conv2d`; ValueError where
        `supports` gives a reason, or where only the library takes the arguments (integer and
        complex numbers).

        Args:
            options: what this algorithm takes beyond `conv2d`'s arguments (`self.options`).
        """
        if unknown := options.keys() - set(self.options):
            known = ", ".join(self.options) or "none"
            raise TypeError(f"{self.name} has no option {min(unknown)!r}; its options: {known}")
        try:
            x, weight, bias = _autocast(x, weight, bias)
            pad = padding if isinstance(padding, str) else two(padding)
            sizes = two(stride), pad, two(dilation), groups
            valid = takes(x, weight, bias, *sizes)
        except (TypeError, AttributeError):
            valid = False
        if not valid:
            # The reference is asked, so that a bad call fails here exactly as it fails there.
            y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
            if not self.library:
                raise ValueError(f"{self.name} needs floating-point tensors, got {x.dtype}")
            return y
        if x.dim() == 3:
            return self(x[None], weight, bias, *sizes, **options)[0]
        stride, padding, dilation, groups = sizes
        if padding == "valid":
            padding = (0, 0)
        elif padding == "same":
            x, padding = _pad_same(x, weight, dilation)
        reason = self._limits is not anything and self._limits(
            problem_of(x, weight, stride, padding, dilation, groups), x.device
        )
        if reason:
            raise ValueError(reason)
        arguments = x, weight, bias, stride, padding, dilation, groups
        if not _autocasts(x.device.type):
            return self.function(*arguments, **options)
        with torch.autocast(x.device.type, enabled=False):  # what it would cast has been cast
            return self.function(*arguments, **options)

    def __repr__(self) -> str:
        return f"<convlab algorithm {self.name}: {self.idea}>"


def anything(problem: ConvProblem, device: torch.device) -> str | None:
    """The limits of an algorithm that computes every problem on every device."""
    return None


def algorithm(idea: str, *, library: bool = False, limits=anything, rounding: str = "sums"):
    """Decorator: `f(x, weight, bias, stride, padding, dilation, groups)` → `Algorithm`.

    The function gets a batch (N, C, H, W), pairs for stride, padding and dilation, and
    arguments that fit together.
    """
    return lambda function: Algorithm(function, idea, library, limits, rounding)


def problem_of(x: Tensor, weight: Tensor, stride, padding, dilation, groups) -> ConvProblem:
    """The `ConvProblem` of x (N, C, H, W) and weight (K, C / groups, kh, kw)."""
    n, c, h, w = x.shape
    k, _, *kernel = weight.shape
    return ConvProblem(n, c, k, h, w, tuple(kernel), stride, padding, dilation, groups)


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """y (N, K, OH, OW) + bias (K,), in place: y must be the caller's own."""
    return y if bias is None else y.add_(bias[:, None, None])


def _autocasts(kind: str) -> bool:
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on, as it treats `F.conv2d`."""
    kind = tensors[0].device.type
    if not _autocasts(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in tensors)


def two(value: int | Sequence[int]) -> tuple[int, ...]:
    """`value` as a pair, one number doubled; TypeError where `F.conv2d` takes it for no number."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if any(isinstance(v, bool) for v in values):
        raise TypeError("a bool is no size")
    values = tuple(operator.index(v) for v in values)
    return values * 2 if len(values) == 1 else values


def takes(x, weight, bias, stride, padding, dilation, groups) -> bool:
    """Whether `F.conv2d` takes these arguments."""
    if not (x.dim() in (3, 4) and weight.dim() == 4 and len(stride) == len(dilation) == 2):
        return False
    if isinstance(groups, bool) or operator.index(groups) < 1:
        return False
    channels, out_channels = x.shape[-3], weight.shape[0]
    if isinstance(padding, str):
        if padding not in ("same", "valid") or (padding == "same" and stride != (1, 1)):
            return False
        pads = [d * (k - 1) for k, d in zip(weight.shape[2:], dilation, strict=True)]
        pads = pads if padding == "same" else (0, 0)
    else:
        pads = [2 * p for p in padding]
    return (
        len(pads) == 2
        and min(*stride, *dilation) >= 1
        and min(pads) >= 0
        and out_channels >= 1
        and channels >= 1
        and out_channels % groups == 0
        and weight.shape[1] * groups == channels
        and all(
            k >= 1 and size + p >= d * (k - 1) + 1
            for size, p, k, d in zip(x.shape[-2:], pads, weight.shape[2:], dilation, strict=True)
        )
        and min(x.shape[-2:]) >= 1
        and x.dtype == weight.dtype
        and x.is_floating_point()
        and x.device == weight.device
        and (bias is None or (bias.shape == (out_channels,) and bias.dtype == x.dtype))
    )


def _pad_same(x: Tensor, weight: Tensor, dilation: tuple[int, int]) -> tuple[Tensor, tuple]:
    """x padded where "same" is lopsided (even kernels), and what is left as a symmetric pair."""
    (top, bottom), (left, right) = map(same_padding, weight.shape[2:], dilation)
    if (top, left) != (bottom, right):
        x = F.pad(x, (0, right - left, 0, bottom - top))
    return x, (top, left)
