"""Figures of one diagnosed layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from convlab.plots.basics import COLOURS, OTHER, bars, finish, theme
from convlab.timing import size

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

BESIDE = {
    "this layer": "#D55E00",
    "nn.Conv2d": COLOURS["native"],
    "nn.Conv2d, library off": COLOURS["native_no_library"],
    "fast form": "#009E73",
}
LABEL = 44  # characters of a line of code beside its bar


def beside(table: pd.DataFrame, title: str, note: str) -> Figure:
    """Median times with quartiles and ratios to nn.Conv2d."""
    return bars(table, title, note, colours=BESIDE)


def shares(parts: Mapping[str, float], title: str, note: str) -> Figure:
    """Horizontal bars: label → share of the time, 0 … 1."""
    labels = [text if len(text) <= LABEL else f"{text[: LABEL - 2]} …" for text in parts]
    return _bars(labels, list(parts.values()), [f"{v:.0%}" for v in parts.values()], title, note)


def memory(parts: Mapping[str, float], title: str, note: str) -> Figure:
    """Horizontal bars: label → bytes."""
    colours = [BESIDE.get(label, OTHER) for label in parts]
    values = list(parts.values())
    return _bars(list(parts), values, [size(v) for v in values], title, note, colours)


def _bars(labels, values, texts, title: str, note: str, colours=COLOURS["native"]) -> Figure:
    with theme():
        figure, axes = plt.subplots(figsize=(8, 0.42 * len(labels) + 1.2))
        places = np.arange(len(labels))
        axes.barh(places, values, color=colours)
        axes.set_yticks(places, labels, parse_math=False)
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_xticks([])
        axes.set_xlim(0, 1.15 * max([*values, 1e-12]))
        for place, value, text in zip(places, values, texts, strict=True):
            axes.text(value + 0.01 * axes.get_xlim()[1], place, text, va="center")
        axes.set_title(title)
        return finish(figure, note)
