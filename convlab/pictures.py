"""Figures of pixels: photographs, windows, columns, products, memory. Nothing here is measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import matplotlib.patheffects as effects
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARK = "#D55E00"
DPI = 90
VERDICT_COLOURS = {"right": "#009E73", "wrong, no error": "#D55E00", "error": "#999999"}


def show(pictures: Mapping[str, Tensor], numbers: Iterable[str] = (), width: float = 9) -> Figure:
    """Pictures in a row, all with pixels of the same size.

    Args:
        pictures: title → (3, H, W) in 0..1, or (H, W) in any range; where it holds negative
            values, 0 is mid-grey.
        numbers: titles of the (H, W) pictures whose values are written into the pixels.
        width: inches.
    """
    widths = [picture.shape[-1] for picture in pictures.values()]
    tallest = max(picture.shape[-2] for picture in pictures.values())
    figure, axes = plt.subplots(
        1,
        len(widths),
        figsize=(width, width / 1.05 * tallest / sum(widths) + 0.4),
        width_ratios=widths,
        squeeze=False,
        dpi=DPI,
    )
    for ax, (title, picture) in zip(axes[0], pictures.items()):
        _draw(ax, picture)
        ax.set_title(title, fontsize=10)
        ax.set_anchor("N")
        if title in numbers:
            _write(ax, picture)
    return _finish(figure)


def window(picture: Tensor, row: int, column: int, kernel_size: int = 3) -> Figure:
    """A window of `picture` (3, H, W): where it is, its channels, and as one column of 3·k²."""
    k = kernel_size
    figure, axes = plt.subplot_mosaic(
        [["photo", "0", "column"], ["photo", "1", "column"], ["photo", "2", "column"]],
        figsize=(9, 4.8),
        width_ratios=[5, 1.6, 0.7],
        dpi=DPI,
    )
    _draw(axes["photo"], picture)
    _outline(axes["photo"], row, column, k, k)
    axes["photo"].set_title("photograph (C, H, W) with one window", fontsize=10)
    values = picture[:, row : row + k, column : column + k]
    for channel, tint in enumerate(("Reds", "Greens", "Blues")):
        ax = axes[str(channel)]
        _draw(ax, values[channel], cmap=tint, limits=(0, 1.3))
        _write(ax, values[channel], ".2f")
        ax.set_title(f"channel {channel}", fontsize=10)
        part = torch.full((3 * k * k, 1), torch.nan)
        part[channel * k * k : (channel + 1) * k * k, 0] = values[channel].flatten()
        _draw(axes["column"], part, cmap=tint, limits=(0, 1.3))
    _write(axes["column"], values.reshape(-1, 1), ".2f")
    axes["column"].set_aspect("auto")
    axes["column"].set_title("its column", fontsize=10)
    return _finish(figure)


def columns(picture: Tensor, row: int, column: int, kernel_size: int = 3) -> Figure:
    """`picture` (H, W) and its columns (k², L), with every place of one pixel outlined."""
    k = kernel_size
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.7), width_ratios=[1.5, 8], dpi=DPI)
    unfolded = _unfold(picture, k)
    _draw(axes[0], picture)
    _outline(axes[0], row, column)
    axes[0].set_title("one pixel …", fontsize=10)
    _draw(axes[1], unfolded, limits=(0, float(picture.max())))
    axes[1].set_aspect(2)
    for tap, place in _places(picture, row, column, k).nonzero().tolist():
        _outline(axes[1], tap, place, line=1.3)
    axes[1].set_title("… and where the columns hold it", fontsize=10)
    axes[1].set(xlabel=f"one column per window ({unfolded.shape[1]})", ylabel="one row per tap")
    axes[1].set_yticks(range(k * k), [f"{i}, {j}" for i in range(k) for j in range(k)], fontsize=7)
    return _finish(figure)


def rows(picture: Tensor, row: int, column: int, kernel_size: int = 3) -> Figure:
    """The k² rows of the columns of `picture` (H, W), each as a picture, one pixel outlined."""
    k = kernel_size
    out = [size - k + 1 for size in picture.shape]
    figure, axes = plt.subplots(k, k, figsize=(5.4, 5.8), dpi=DPI)
    unfolded = _unfold(picture, k).view(k * k, *out)
    marks = _places(picture, row, column, k).view(k * k, *out)
    for tap, ax in enumerate(axes.flat):
        _draw(ax, unfolded[tap], limits=(0, float(picture.max())))
        for place in marks[tap].nonzero().tolist():
            _outline(ax, *place)
        ax.set_title(f"tap {tap // k}, {tap % k}", fontsize=10)
    return _finish(figure)


def product(weight: Tensor, unfolded: Tensor, place: int, kernel: int = 0) -> Figure:
    """weight (K, C, kh, kw) as a matrix, times columns (C·kh·kw, L), is (K, L); drawn to scale.

    Args:
        place: the column that is outlined, with the value it leads to.
        kernel: the row of the weight that is outlined.
    """
    matrix = weight.flatten(1)
    result = matrix @ unfolded
    taps, length = unfolded.shape
    figure, axes = plt.subplots(
        1, 3, figsize=(9.5, 2.2), width_ratios=[taps, length, length], dpi=DPI
    )
    for ax, values in zip(axes, (matrix, unfolded, result)):
        _draw(ax, values)
        ax.set_aspect(2.5)
        ax.set_xlabel("{} × {}".format(*values.shape))
    axes[0].set_title("weight", fontsize=10)
    axes[1].set_title("@ columns", fontsize=10)
    axes[2].set_title("= product", fontsize=10)
    _outline(axes[0], kernel, 0, 1, taps, line=1.3)
    _outline(axes[1], 0, place, taps, 1, line=1.3)
    _outline(axes[2], kernel, place, line=1.3)
    return _finish(figure)


def memory(picture: Tensor, row: int, column: int, kernel_size: int = 3) -> Figure:
    """A window of `picture` (H, W), and where its pixels lie in memory."""
    k, width = kernel_size, picture.shape[1]
    figure, axes = plt.subplots(1, 2, figsize=(9, 1.9), width_ratios=[1.3, 8], dpi=DPI)
    _draw(axes[0], picture)
    _outline(axes[0], row, column, k, k)
    axes[0].set_title("a window", fontsize=10)
    _draw(axes[1], picture.reshape(1, -1))
    axes[1].set_aspect(3)
    for i in range(k):
        _outline(axes[1], 0, (row + i) * width + column, 1, k)
    axes[1].set_title("the same pixels in memory, row after row", fontsize=10)
    axes[1].set_xticks(range(0, picture.numel(), width))
    axes[1].set_xlabel("offset from the first pixel, in values")
    return _finish(figure)


def touched(
    maps: Mapping[str, Tensor], outputs: Iterable[tuple[int, int]], width: float = 9
) -> Figure:
    """How often each pixel is loaded, written into it; the pixels in `outputs` are outlined.

    Args:
        maps: title → counts (H, W).
        outputs: (row, column) of the pixels of y that are computed, where they lie in x.
    """
    outputs = set(outputs)
    tallest = max(len(counts) for counts in maps.values())
    widest = sum(counts.shape[1] for counts in maps.values())
    size = width, width * tallest / widest + 0.4
    figure, axes = plt.subplots(1, len(maps), figsize=size, squeeze=False, dpi=DPI)
    top = max(1.0, max(float(counts.max()) for counts in maps.values()))
    for ax, (title, counts) in zip(axes[0], maps.items()):
        _draw(ax, counts, cmap="Blues", limits=(0, 1.6 * top))
        _write(ax, counts)
        for row, column in sorted(outputs):
            _edges(ax, row, column, outputs)
        ax.set_title(title, fontsize=10)
    return _finish(figure)


def reduction(channels: int, taps: int, depth: int, by_tap_depth: int) -> Figure:
    """The products of one output value, chunk by chunk, in both orders; empty lanes are white.

    Args:
        depth, by_tap_depth: lanes of a chunk when the taps of all channels are in one row, and
            when a chunk holds channels of one tap.
    """
    flattened = torch.full((-(-channels * taps // depth), depth), torch.nan)
    flattened.view(-1)[: channels * taps] = torch.arange(channels * taps) // taps
    blocks = -(-channels // by_tap_depth)
    by_tap = torch.full((blocks, by_tap_depth), torch.nan)
    by_tap.view(-1)[:channels] = torch.arange(channels)
    by_tap = by_tap.repeat_interleave(taps, 0)
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 0.28 * len(by_tap) + 1), dpi=DPI)
    for ax, lanes, what in (
        (axes[0], flattened, "taps of all channels in a row"),
        (axes[1], by_tap, "channels of one tap"),
    ):
        ax.imshow(lanes.numpy(), cmap="viridis", aspect="auto", interpolation="nearest")
        for row, column in lanes.isnan().nonzero().tolist():
            ax.text(column, row, "×", ha="center", va="center", fontsize=8, color="#888888")
        ax.set_xticks([i - 0.5 for i in range(lanes.shape[1])], [], minor=True)
        ax.set_yticks([i - 0.5 for i in range(len(lanes))], [], minor=True)
        ax.grid(which="minor", color="white", linewidth=0.8)
        ax.tick_params(which="both", length=0)
        ax.set_yticks(range(len(lanes)))
        ax.set(ylabel="chunk", xlabel=f"lane; colour: channel; ×: empty ({lanes.isnan().sum()})")
        ax.set_title(f"{what}: {lanes.numel()} for {channels * taps}", fontsize=10)
    return _finish(figure)


def verdicts(frame: pd.DataFrame) -> Figure:
    """A table of the words in `VERDICT_COLOURS` as coloured cells."""
    height, width = frame.shape
    figure, ax = plt.subplots(figsize=(1.5 + 1.7 * width, 0.8 + 0.5 * height), dpi=DPI)
    for i, (_, line) in enumerate(frame.iterrows()):
        for j, word in enumerate(line):
            colour = VERDICT_COLOURS[word]
            ax.add_patch(Rectangle((j, i), 1, 1, facecolor=colour, edgecolor="white", linewidth=3))
            ax.text(j + 0.5, i + 0.5, word, ha="center", va="center", color="white", weight="bold")
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.set_xticks([j + 0.5 for j in range(width)], frame.columns)
    ax.set_yticks([i + 0.5 for i in range(height)], frame.index)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return _finish(figure)


def _unfold(picture: Tensor, k: int) -> Tensor:
    """(H, W) → (k², L)."""
    return F.unfold(picture[None, None], k)[0]


def _places(picture: Tensor, row: int, column: int, k: int) -> Tensor:
    """1 where the columns of `picture` hold the pixel (row, column), else 0: (k², L)."""
    marked = torch.zeros_like(picture)
    marked[row, column] = 1
    return _unfold(marked, k)


def _draw(ax: Axes, picture: Tensor, cmap: str = "gray", limits=None) -> None:
    """(3, H, W) in its colours, (H, W) between `limits`, without ticks."""
    picture = picture.detach()
    if picture.dim() == 3:
        ax.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    else:
        largest = float(picture.abs().max()) or 1.0
        low, high = limits or (-largest if bool((picture < 0).any()) else 0.0, largest)
        ax.imshow(picture.numpy(), cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])


def _write(ax: Axes, values: Tensor, spec: str = "g") -> None:
    """Every value of (H, W) into its pixel, readable on light and on dark."""
    for i, line in enumerate(values.tolist()):
        for j, value in enumerate(line):
            text = ax.text(j, i, format(value, spec), ha="center", va="center", fontsize=8)
            text.set_path_effects([effects.withStroke(linewidth=2, foreground="white")])


def _outline(
    ax: Axes, row: int, column: int, height: int = 1, width: int = 1, line: float = 2
) -> None:
    box = Rectangle(
        (column - 0.5, row - 0.5), width, height, fill=False, edgecolor=MARK, linewidth=line
    )
    box.set_path_effects([effects.withStroke(linewidth=1.75 * line, foreground="white")])
    ax.add_patch(box)


def _edges(ax: Axes, row: int, column: int, region: set[tuple[int, int]]) -> None:
    """The sides of a pixel beyond which `region` ends."""
    for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        if (row + down, column + right) not in region:
            y, x = row + down / 2, column + right / 2
            across, along = 0.5 * abs(down), 0.5 * abs(right)
            ax.plot([x - across, x + across], [y - along, y + along], color=MARK, lw=2.5)


def _finish(figure: Figure) -> Figure:
    """Lay out and close, so that a notebook shows it once: as the value of its cell."""
    figure.tight_layout()
    plt.close(figure)
    return figure
