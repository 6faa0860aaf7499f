"""Networks to train: a small CNN whose layer is a parameter, and ResNet-18 for 32×32 pixels.

Two layers that are no convolution, as unfold and broadcasting write them: `l1_by_unfold` and
`top_k_by_unfold`, and by `flex_conv2d`: `l1_fused` and `top_k_fused`. Each is the `function` of a
`PatchLayer`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlab.flex import flex_conv2d
from convlab.flex.examples import patch_topk
from convlab.vision import torchvision

Layer = Callable[..., nn.Module]
"""(in_channels, out_channels, kernel_size, padding=…, bias=…) → a module; `nn.Conv2d` is one."""


class SmallCNN(nn.Module):
    """Three 3×3 layers, each with batch norm and ReLU, a mean over pixels, a linear layer.

    Input (N, `channels`, H, W) → logits (N, `classes`). The first layer keeps the image's size,
    the others have half of it each way.

    Args:
        layer: makes the three layers from sizes, as `nn.Conv2d` does.
        widths: their output channels.
    """

    def __init__(
        self,
        classes: int = 10,
        channels: int = 1,
        layer: Layer = nn.Conv2d,
        widths: tuple[int, ...] = (16, 32, 64),
    ) -> None:
        super().__init__()
        blocks = []
        for index, (before, width) in enumerate(zip((channels, *widths), widths)):
            halved = [nn.MaxPool2d(2)] if index == 1 else []
            made = layer(before, width, 3, padding=1, bias=False)
            blocks.append(nn.Sequential(*halved, made, nn.BatchNorm2d(width), nn.ReLU()))
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def resnet18_32(classes: int = 10) -> nn.Module:
    """torchvision's ResNet-18 for 32×32 pixels: first convolution 3×3, stride 1, no max-pool.

    Input (N, 3, 32, 32) → logits (N, `classes`). He and others, "Deep residual learning for image
    recognition", CVPR 2016, section 4.2, is where the smaller beginning comes from.
    """
    model = torchvision().models.resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def seeded(make: Callable[..., nn.Module], seed: int, *arguments, **options) -> nn.Module:
    """`make(*arguments, **options)` with weights drawn from `seed`; other random numbers stay."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*arguments, **options)


def settled(model: nn.Module, images: Tensor) -> nn.Module:
    """`model` in evaluation mode, the means and variances of its batch norms those of `images`.

    With the usual first ones, 0 and 1, a deep network of random weights may lose its signal on the
    way: its output then hardly depends on what its layers compute.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    usual = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, usual):
        norm.momentum = momentum
    return model.eval()


class PatchLayer(nn.Module):
    """A layer with a convolution's weight, and a function of its own of every patch and filter.

    Input (N, C, H, W) → (N, K, OH, OW). Called like `nn.Conv2d`, without dilation and groups.

    Args:
        function: (x, weight, stride=…, padding=…) → y.
        std: of the normal distribution that the weight is drawn from; as `nn.Conv2d` if None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        *,
        function: Callable[..., Tensor],
        std: float | None = None,
    ) -> None:
        super().__init__()
        self.function, self.stride, self.padding = function, stride, padding
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *[kernel_size] * 2))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        if std is None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        else:
            nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(x, self.weight, stride=self.stride, padding=self.padding)
        return y if self.bias is None else y + self.bias[:, None, None]

    def extra_repr(self) -> str:
        name = getattr(self.function, "__name__", self.function)
        return f"{', '.join(map(str, self.weight.shape))}, {name}"


def l1_by_unfold(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """−Σ|patch − filter|: x (N, C, H, W), weight (K, C, kh, kw) → (N, K, OH, OW).

    The larger the more alike, as a product is. Chen and others, "AdderNet: Do we really need
    multiplications in deep learning?", CVPR 2020. Writes N·K·C·kh·kw·OH·OW differences.
    """
    columns = F.unfold(x, weight.shape[2:], padding=padding, stride=stride)  # N, C·kh·kw, L
    differences = columns[:, None] - weight.flatten(1)[None, :, :, None]  # N, K, C·kh·kw, L
    return _planes(-differences.abs().sum(2), x, weight, stride, padding)


def minus_distance(x: Tensor, w: Tensor) -> Tensor:
    """What `l1_by_unfold` adds up, for `flex_conv2d`."""
    return -(x - w).abs()


def l1_fused(
    x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0, *, backend: str = "inductor"
) -> Tensor:
    """`l1_by_unfold` by `flex_conv2d`: writes y and nothing else."""
    options = {"stride": stride, "padding": padding, "backend": backend}
    return flex_conv2d(x, weight, minus_distance, **options)


def top_k_by_unfold(
    x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0, *, keep: float = 0.5
) -> Tensor:
    """A convolution in which every patch keeps only its largest inputs, by magnitude.

    x (N, C, H, W), weight (K, C, kh, kw) → (N, K, OH, OW).

    Args:
        keep: the share of C·kh·kw inputs that is kept, rounded up.
    """
    columns = F.unfold(x, weight.shape[2:], padding=padding, stride=stride)  # N, C·kh·kw, L
    taps = columns.shape[1]
    sizes = columns.detach().abs()
    least = sizes.kthvalue(taps - math.ceil(keep * taps) + 1, dim=1, keepdim=True).values
    y = weight.flatten(1) @ (columns * (sizes >= least))
    return _planes(y, x, weight, stride, padding)


def top_k_fused(
    x: Tensor,
    weight: Tensor,
    stride: int = 1,
    padding: int = 0,
    *,
    keep: float = 0.5,
    backend: str = "inductor",
) -> Tensor:
    """`top_k_by_unfold` by `flex_conv2d`, without columns: x is passed over some thirty times.

    First the smallest size that each patch keeps is found by bisection, counting what is at least
    as large; then the products of what reaches it are added up.
    """
    taps = weight[0].numel()
    ratio = math.ceil(keep * taps) / taps  # of whole taps: `patch_topk` would round, not round up
    return patch_topk(x, weight, ratio, backend, stride=stride, padding=padding)


def _planes(y: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """y (N, K, OH·OW) → (N, K, OH, OW)."""
    size = [(n + 2 * padding - k) // stride + 1 for n, k in zip(x.shape[2:], weight.shape[2:])]
    return y.unflatten(2, size)


L1_LAYER: Layer = functools.partial(PatchLayer, function=l1_by_unfold, std=1.0)  # as its inputs
L1_FUSED_LAYER: Layer = functools.partial(PatchLayer, function=l1_fused, std=1.0)
TOP_K_LAYER: Layer = functools.partial(PatchLayer, function=top_k_by_unfold)
