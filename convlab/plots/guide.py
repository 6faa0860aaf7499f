"""Figures of the decision guide: its tree, and what its fast forms bring."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, NullFormatter

from convlab.plots.basics import COLOURS, OTHER, finish, theme

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUESTION, ANSWER = "#FFF4D6", "#E3F1FA"
LEFT, RIGHT, WIDTH = 0.0, 5.2, 10.4  # in inches of the axes


def tree(steps: Sequence[tuple[str, str, str, str]], last: tuple[str, str, str], note: str):
    """A decision guide: questions from top to bottom, "yes" to the right, "no" down.

    Args:
        steps: (question, kind, what to do, examples).
        last: (kind, what to do, examples) where every answer was no.
    """
    height = 1.28
    total = height * (len(steps) + 1)
    figure, axes = plt.subplots(figsize=(WIDTH, total + 0.2), dpi=80)
    for i, (question, *answer) in enumerate(steps):
        top = total - i * height
        _box(axes, LEFT, top, 4.4, textwrap.fill(question, 46), QUESTION)
        _answer(axes, RIGHT, top, *answer)
        _arrow(axes, (LEFT + 4.42, top - 0.5), (RIGHT - 0.02, top - 0.5), "yes")
        _arrow(axes, (LEFT + 2.2, top - 1.02), (LEFT + 2.2, top - height - 0.01), "no")
    _answer(axes, LEFT, height, *last)
    axes.set(xlim=(-0.05, WIDTH + 0.05), ylim=(0.15, total + 0.05))
    axes.axis("off")
    return finish(figure, note)


def _box(axes: Axes, x: float, top: float, width: float, text: str, colour: str) -> None:
    patch = FancyBboxPatch(
        (x + 0.05, top - 0.95), width - 0.1, 0.9, "round,pad=0.05", fc=colour, ec="#777777"
    )
    axes.add_patch(patch)
    axes.text(x + 0.1, top - 0.5, text, va="center", fontsize=10)


def _answer(axes: Axes, x: float, top: float, kind: str, action: str, examples: str) -> None:
    _box(axes, x, top, 5.2, "", ANSWER)
    axes.text(x + 0.1, top - 0.17, kind, va="center", fontsize=10, weight="bold")
    body = textwrap.fill(action, 66)
    axes.text(x + 0.1, top - 0.29, body, va="top", fontsize=8.5, linespacing=1.05)
    axes.text(
        x + 0.1,
        top - 0.86,
        textwrap.shorten(examples, 78, placeholder=" …"),
        va="center",
        fontsize=8,
        style="italic",
    )


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], word: str) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#444444"})
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    across = start[1] == end[1]
    axes.text(
        x + (0 if across else 0.08),
        y + (0.08 if across else 0),
        word,
        fontsize=9,
        ha="center" if across else "left",
        va="bottom" if across else "center",
    )


def gains(panels: Mapping[str, pd.DataFrame], title: str, note: str, floor: float = 0.1) -> Figure:
    """One panel per table: how many times the fast form is better, as bars from 1; log axes.

    Args:
        panels: name → table with the columns ratio, and for whiskers ratio_low and ratio_high;
            NaN where nothing was measured.
        floor: bars below 1 end at this factor.
    """
    names = list(next(iter(panels.values())).index)
    with theme():
        figure, grid = plt.subplots(
            1, len(panels), figsize=(9.6, 0.36 * len(names) + 1.5), sharey=True, squeeze=False
        )
        for axis, (name, table) in zip(grid[0], panels.items()):
            axis.set_xscale("log")
            ends = table["ratio_high"] if "ratio_high" in table else table["ratio"]
            top = max(2.0, float(np.nanmax(ends)))
            low = min(1.0, max(floor, float(np.nanmin(table["ratio"]))))
            axis.set_xlim(low / 1.3, top * (top / low) ** 0.3)
            for y, row in enumerate(table.reindex(names).itertuples()):
                _gain(axis, y, row, floor)
            axis.axvline(1, color="black", lw=1)
            axis.grid(False, axis="y")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_title(name, fontsize=10)
        grid[0, 0].set_yticks(range(len(names)), names)
        grid[0, 0].set_ylim(len(names) - 0.4, -0.6)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        return finish(figure, note)


def _gain(axis: Axes, y: int, row, floor: float) -> None:
    if np.isnan(row.ratio):
        axis.text(1.05, y, "not measured", va="center", color=OTHER)
        return
    end = max(row.ratio, floor)
    colour = COLOURS["windows"] if row.ratio > 1 else COLOURS["thread"]
    axis.barh(y, end - 1, left=1, color=colour, height=0.6)
    high = end
    if hasattr(row, "ratio_low"):
        high = max(row.ratio_high, end)
        axis.hlines(y, max(row.ratio_low, floor), high, color="black", lw=1.5)
    axis.text(max(high, 1) * 1.08, y, f"{row.ratio:.3g}×", va="center", fontsize=9)
