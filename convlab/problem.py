"""`ConvProblem`: the sizes of one convolution, its output shape and its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

Pair = tuple[int, int]
Padding = Pair | str

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def pair(name: str, value: int | Sequence[int], smallest: int) -> Pair:
    """`value` as (height, width); both numbers are integers of at least `smallest`."""
    values = (value, value) if isinstance(value, int) else value
    valid = (
        isinstance(values, Sequence)
        and not isinstance(values, str)
        and len(values) == 2
        and all(isinstance(v, int) and not isinstance(v, bool) and v >= smallest for v in values)
    )
    if not valid:
        raise ValueError(
            f"{name} must be an integer of at least {smallest} or a pair of them, got {value!r}"
        )
    return tuple(values)


def output_size(size: int, kernel: int, stride: int, pad: int, dilation: int) -> int:
    """Pixels of one output axis; `pad` is the sum of both sides."""
    return (size + pad - dilation * (kernel - 1) - 1) // stride + 1


def same_padding(kernel: int, dilation: int) -> Pair:
    """Pixels (before, after) one axis that `padding="same"` adds, as PyTorch splits them."""
    total = dilation * (kernel - 1)
    return total // 2, total - total // 2


def parse_device(device: str | torch.device) -> torch.device:
    """A CPU or CUDA device that is present; ValueError otherwise."""
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}") from None
    if parsed.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if parsed.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {str(device)!r} is not there: this PyTorch sees no CUDA GPU")
        count = torch.cuda.device_count()
        if (parsed.index or 0) >= count:
            raise ValueError(f"device {str(device)!r} is not there: this PyTorch sees {count} GPU")
    return parsed


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """One of float64, float32, bfloat16, float16; ValueError otherwise."""
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return found


@dataclass(frozen=True)
class ConvProblem:
    """The sizes of one 2-D convolution, in the words of `torch.nn.functional.conv2d`.

    Args:
        batch: images N, may be 0.
        in_channels, out_channels: C and K; both are multiples of `groups`.
        height, width: input pixels H and W.
        kernel_size, stride, dilation: an integer or (height, width).
        padding: an integer, (height, width), "same" (stride 1 only) or "valid".

    Raises:
        ValueError: names the argument, its value and what was expected.
    """

    batch: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel_size: int | Pair
    stride: int | Pair = 1
    padding: int | Padding = 0
    dilation: int | Pair = 1
    groups: int = 1

    def __post_init__(self) -> None:
        for name, smallest in (
            ("batch", 0),
            ("in_channels", 1),
            ("out_channels", 1),
            ("height", 1),
            ("width", 1),
            ("groups", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                raise ValueError(f"{name} must be an integer of at least {smallest}, got {value!r}")
        for name in ("kernel_size", "stride", "dilation"):
            object.__setattr__(self, name, pair(name, getattr(self, name), 1))
        self._check_padding()
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % self.groups:
                raise ValueError(
                    f"{name} must be a multiple of groups={self.groups}, got {getattr(self, name)}"
                )
        for axis, size, out, kernel in zip(
            ("height", "width"),
            (self.height, self.width),
            self.output_shape[2:],
            self.kernel_size,
            strict=True,
        ):
            if out < 1:
                raise ValueError(
                    f"kernel_size must fit into the padded image, got {kernel} along {axis} "
                    f"{size} with padding {self.padding!r} and dilation {self.dilation}"
                )

    def _check_padding(self) -> None:
        if isinstance(self.padding, str):
            if self.padding not in ("same", "valid"):
                raise ValueError(
                    f"padding must be 'same', 'valid', an integer or a pair, got {self.padding!r}"
                )
            if self.padding == "same" and self.stride != (1, 1):
                raise ValueError(f"padding 'same' needs stride 1, got stride {self.stride}")
        else:
            object.__setattr__(self, "padding", pair("padding", self.padding, 0))

    @property
    def pads(self) -> tuple[Pair, Pair]:
        """Zeros added ((top, bottom), (left, right))."""
        if self.padding == "valid":
            return (0, 0), (0, 0)
        if self.padding == "same":
            return tuple(map(same_padding, self.kernel_size, self.dilation))
        return (self.padding[0],) * 2, (self.padding[1],) * 2

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return self.batch, self.in_channels, self.height, self.width

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(K, C / groups, kh, kw)."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, K, OH, OW)."""
        out = (
            output_size(size, kernel, stride, sum(pads), dilation)
            for size, kernel, stride, pads, dilation in zip(
                (self.height, self.width),
                self.kernel_size,
                self.stride,
                self.pads,
                self.dilation,
                strict=True,
            )
        )
        return self.batch, self.out_channels, *out

    @property
    def taps(self) -> int:
        """Products summed into one output value: C / groups · kh · kw."""
        return self.weight_shape[1] * self.kernel_size[0] * self.kernel_size[1]

    @property
    def kwargs(self) -> dict:
        """Keyword arguments for `F.conv2d` and every algorithm."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def inputs(
        self,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = torch.float32,
        seed: int = 0,
        requires_grad: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (N, C, H, W), weight (K, C / groups, kh, kw) and bias (K,).

        Drawn on the CPU in float32 from `seed`, then converted, so that every device and dtype
        gets the same numbers up to rounding. The weight is scaled by 1 / sqrt(taps), so that the
        output has about unit variance.
        """
        device, dtype = parse_device(device), parse_dtype(dtype)
        generator = torch.Generator().manual_seed(seed)
        shapes = self.input_shape, self.weight_shape, (self.out_channels,)
        x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
        tensors = x, weight / self.taps**0.5, bias
        return tuple(t.to(device, dtype).requires_grad_(requires_grad) for t in tensors)

    def replace(self, **changes) -> ConvProblem:
        """The same problem with some sizes changed."""
        return replace(self, **changes)

    def as_dict(self) -> dict:
        """Every field, as JSON holds it (pairs become lists)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: dict) -> ConvProblem:
        """The inverse of `as_dict`."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})

    def __str__(self) -> str:
        n, c, h, w = self.input_shape
        text = f"{n} image{'s' if n != 1 else ''}, {c}→{self.out_channels} channels, {h}×{w}"
        text += ", kernel {}×{}".format(*self.kernel_size)
        for name, usual in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1))):
            value = getattr(self, name)
            if value != usual:
                text += f", {name} {value if isinstance(value, str) else '×'.join(map(str, value))}"
        return text if self.groups == 1 else f"{text}, {self.groups} groups"
