"""`PROBLEMS`: the thread's convolution, two wider ones, and every layer of four real networks."""

from __future__ import annotations

from convlab.problem import ConvProblem


def thread_problem(batch: int) -> ConvProblem:
    """The convolution of the thread's scripts: 10→15 channels, 50×50 pixels, kernel 3."""
    return ConvProblem(batch, 10, 15, 50, 50, kernel_size=3, padding=1)


NETWORK_BATCH = 2

# The distinct convolutions of torchvision's models for 224×224 pixels, in the order of a forward
# pass: input and output channels, pixels per side, kernel, stride, groups, times in the network.
_LAYERS: dict[str, tuple[tuple[int, ...], ...]] = {
    "resnet50": (
        (3, 64, 224, 7, 2, 1, 1),
        (64, 64, 56, 1, 1, 1, 1),
        (64, 64, 56, 3, 1, 1, 3),
        (64, 256, 56, 1, 1, 1, 4),
        (256, 64, 56, 1, 1, 1, 2),
        (256, 128, 56, 1, 1, 1, 1),
        (128, 128, 56, 3, 2, 1, 1),
        (128, 512, 28, 1, 1, 1, 4),
        (256, 512, 56, 1, 2, 1, 1),
        (512, 128, 28, 1, 1, 1, 3),
        (128, 128, 28, 3, 1, 1, 3),
        (512, 256, 28, 1, 1, 1, 1),
        (256, 256, 28, 3, 2, 1, 1),
        (256, 1024, 14, 1, 1, 1, 6),
        (512, 1024, 28, 1, 2, 1, 1),
        (1024, 256, 14, 1, 1, 1, 5),
        (256, 256, 14, 3, 1, 1, 5),
        (1024, 512, 14, 1, 1, 1, 1),
        (512, 512, 14, 3, 2, 1, 1),
        (512, 2048, 7, 1, 1, 1, 3),
        (1024, 2048, 14, 1, 2, 1, 1),
        (2048, 512, 7, 1, 1, 1, 2),
        (512, 512, 7, 3, 1, 1, 2),
    ),
    "vgg16": (
        (3, 64, 224, 3, 1, 1, 1),
        (64, 64, 224, 3, 1, 1, 1),
        (64, 128, 112, 3, 1, 1, 1),
        (128, 128, 112, 3, 1, 1, 1),
        (128, 256, 56, 3, 1, 1, 1),
        (256, 256, 56, 3, 1, 1, 2),
        (256, 512, 28, 3, 1, 1, 1),
        (512, 512, 28, 3, 1, 1, 2),
        (512, 512, 14, 3, 1, 1, 3),
    ),
    "mobilenet_v3_large": (
        (3, 16, 224, 3, 2, 1, 1),
        (16, 16, 112, 3, 1, 16, 1),
        (16, 16, 112, 1, 1, 1, 1),
        (16, 64, 112, 1, 1, 1, 1),
        (64, 64, 112, 3, 2, 64, 1),
        (64, 24, 56, 1, 1, 1, 1),
        (24, 72, 56, 1, 1, 1, 2),
        (72, 72, 56, 3, 1, 72, 1),
        (72, 24, 56, 1, 1, 1, 1),
        (72, 72, 56, 5, 2, 72, 1),
        (72, 24, 1, 1, 1, 1, 1),
        (24, 72, 1, 1, 1, 1, 1),
        (72, 40, 28, 1, 1, 1, 1),
        (40, 120, 28, 1, 1, 1, 2),
        (120, 120, 28, 5, 1, 120, 2),
        (120, 32, 1, 1, 1, 1, 2),
        (32, 120, 1, 1, 1, 1, 2),
        (120, 40, 28, 1, 1, 1, 2),
        (40, 240, 28, 1, 1, 1, 1),
        (240, 240, 28, 3, 2, 240, 1),
        (240, 80, 14, 1, 1, 1, 1),
        (80, 200, 14, 1, 1, 1, 1),
        (200, 200, 14, 3, 1, 200, 1),
        (200, 80, 14, 1, 1, 1, 1),
        (80, 184, 14, 1, 1, 1, 2),
        (184, 184, 14, 3, 1, 184, 2),
        (184, 80, 14, 1, 1, 1, 2),
        (80, 480, 14, 1, 1, 1, 1),
        (480, 480, 14, 3, 1, 480, 1),
        (480, 120, 1, 1, 1, 1, 1),
        (120, 480, 1, 1, 1, 1, 1),
        (480, 112, 14, 1, 1, 1, 1),
        (112, 672, 14, 1, 1, 1, 2),
        (672, 672, 14, 3, 1, 672, 1),
        (672, 168, 1, 1, 1, 1, 2),
        (168, 672, 1, 1, 1, 1, 2),
        (672, 112, 14, 1, 1, 1, 1),
        (672, 672, 14, 5, 2, 672, 1),
        (672, 160, 7, 1, 1, 1, 1),
        (160, 960, 7, 1, 1, 1, 3),
        (960, 960, 7, 5, 1, 960, 2),
        (960, 240, 1, 1, 1, 1, 2),
        (240, 960, 1, 1, 1, 1, 2),
        (960, 160, 7, 1, 1, 1, 2),
    ),
    "convnext_tiny": (
        (3, 96, 224, 4, 4, 1, 1),
        (96, 96, 56, 7, 1, 96, 3),
        (96, 192, 56, 2, 2, 1, 1),
        (192, 192, 28, 7, 1, 192, 3),
        (192, 384, 28, 2, 2, 1, 1),
        (384, 384, 14, 7, 1, 384, 9),
        (384, 768, 14, 2, 2, 1, 1),
        (768, 768, 7, 7, 1, 768, 3),
    ),
}


def _layer_name(network: str, c: int, k: int, size: int, kernel: int, stride: int, g: int) -> str:
    name = f"{network}_{c}to{k}_{size}px_k{kernel}"
    return name + (f"_s{stride}" if stride > 1 else "") + ("_depthwise" if g == c > 1 else "")


def _layer(c: int, k: int, size: int, kernel: int, stride: int, groups: int) -> ConvProblem:
    padding = 0 if stride == kernel else kernel // 2  # patches that touch need none
    return ConvProblem(NETWORK_BATCH, c, k, size, size, kernel, stride, padding, groups=groups)


NETWORKS: dict[str, dict[str, int]] = {
    network: {_layer_name(network, *sizes): times for *sizes, times in layers}
    for network, layers in _LAYERS.items()
}
"""Network → name of a problem → how many of its layers are that convolution."""

PROBLEMS: dict[str, ConvProblem] = {
    **{f"thread_b{batch}": thread_problem(batch) for batch in (2, 64, 256, 512)},
    "wide_64": ConvProblem(64, 64, 64, 28, 28, kernel_size=3, padding=1),
    "wide_32": ConvProblem(64, 32, 32, 28, 28, kernel_size=3, padding=1),
    **{
        _layer_name(network, *sizes): _layer(*sizes)
        for network, layers in _LAYERS.items()
        for *sizes, _ in layers
    },
}
