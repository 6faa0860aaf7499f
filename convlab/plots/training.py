"""Figures of whole networks: loss curves and what lies between them, accuracy, parts of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from convlab.plots.basics import COLOURS, OTHER, finish, theme, time_axis
from convlab.timing import seconds

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PART_COLOURS = {
    "data": "#BBBBBB",
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "optimiser": "#CC79A7",
}
LEAST = 1e-9  # a distance of zero on a logarithmic axis


def loss_curves(
    losses: Mapping[str, Sequence[float]],
    distances: pd.DataFrame,
    title: str,
    note: str,
    noise: Sequence[str] = (),
    colours: Mapping[str, str] = COLOURS,
) -> Figure:
    """Left the curves, one over the other; right how far each has been from the reference so far.

    Args:
        losses: name → loss per step; drawn in this order, ever thinner, so that all are seen.
        distances: of `sameness.distances`: a column per name but the reference.
        noise: names whose distance is the yardstick: the area under the largest of them is grey.
    """
    with theme():
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9))
        widths = np.linspace(6, 1, len(losses)) if len(losses) > 1 else [2]
        for (name, values), width in zip(losses.items(), widths):
            left.plot(values, color=colours.get(name, OTHER), lw=width, label=name)
        left.set(xlabel="step", ylabel="cross-entropy", yscale="log")
        left.legend(frameon=False, fontsize=8)
        if noise:
            edge = distances[list(noise)].max(axis=1).clip(lower=LEAST)
            right.fill_between(distances.index, LEAST, edge, color="#DDDDDD", lw=0, label="noise")
        for name in distances:
            values = distances[name].clip(lower=LEAST)
            style = "--" if name in noise else "-"
            right.plot(values, style, color=colours.get(name, OTHER), lw=1.6, label=name)
        right.set(xlabel="step", ylabel="largest difference so far", yscale="log")
        right.set_ylim(LEAST, max(1e-6, 3 * float(distances.to_numpy().max())))
        right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        left.set_title(title)
        return finish(figure, note)


def accuracy_dots(
    intervals: Mapping[str, tuple[float, float, float]],
    runs: Mapping[str, Sequence[float]],
    title: str,
    note: str,
    least: float | None = None,
    colours: Mapping[str, str] = COLOURS,
) -> Figure:
    """Every run a small dot, the mean with its interval a large one, a row per name.

    Args:
        intervals: name → (mean, low, high).
        runs: name → accuracies.
        least: what every mean should exceed: a line, or a word at the edge where it lies far
            below all the runs.
    """
    with theme():
        figure, axes = plt.subplots(figsize=(8, 0.36 * len(intervals) + 1.3))
        for y, (name, (mean, low, high)) in enumerate(intervals.items()):
            colour = colours.get(name, OTHER)
            count = len(runs[name])
            spread = np.linspace(-0.2, 0.2, count) if count > 1 else [0]
            axes.plot(runs[name], y + np.asarray(spread), "o", color=colour, ms=3, alpha=0.5)
            if np.isfinite([low, high]).all():
                axes.plot([low, min(high, 1)], [y, y], color=colour, lw=3, solid_capstyle="butt")
            axes.plot(mean, y, "o", color=colour, ms=8, mec="white")
        ends = [v for name, interval in intervals.items() for v in (*interval, *runs[name])]
        ends = np.clip([v for v in ends if np.isfinite(v)], None, 1)
        margin = 0.08 * max(ends.max() - ends.min(), 0.005)
        left = ends.min() - margin
        axes.set_xlim(left, ends.max() + margin)
        if least is not None and least > left:
            axes.axvline(least, color="black", ls=":")
        elif least is not None:
            where = {"xycoords": "axes fraction", "ha": "left", "va": "bottom", "fontsize": 9}
            axes.annotate(f"← {least:.0%}", (0.005, 0.005), **where)
        axes.set_yticks(range(len(intervals)), list(intervals))
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        axes.set_title(title)
        return finish(figure, note)


def step_parts(
    parts: Mapping[str, pd.DataFrame], wholes: Mapping[str, pd.DataFrame], title: str, note: str
) -> Figure:
    """One panel per network: a stacked bar per algorithm; a line marks the step without marks.

    Args:
        parts: panel's title → seconds, rows algorithms, columns parts.
        wholes: panel's title → rows algorithms, columns `seconds` of the step measured as a whole
            and `ratio` to that of `nn.Conv2d`.
    """
    with theme():
        rows = max(len(frame) for frame in parts.values())
        size = (5.2 * len(parts), 0.42 * rows + 1.9)
        figure, panels = plt.subplots(1, len(parts), figsize=size, squeeze=False)
        for axes, (name, frame) in zip(panels[0], parts.items()):
            left = np.zeros(len(frame))
            for part in frame:
                axes.barh(
                    frame.index,
                    frame[part],
                    left=left,
                    color=PART_COLOURS.get(part, OTHER),
                    label=part,
                )
                left += frame[part].to_numpy()
            for y, (algorithm, end) in enumerate(zip(frame.index, left)):
                whole, ratio = wholes[name].loc[algorithm, ["seconds", "ratio"]]
                axes.plot([whole] * 2, [y - 0.45, y + 0.45], color="black", lw=2)
                text = f" {seconds(whole)}  {ratio:.3g}×"
                axes.text(max(end, whole), y, text, va="center", fontsize=9)
            axes.set_xlim(0, 1.45 * max(left.max(), wholes[name]["seconds"].max()))
            axes.invert_yaxis()
            axes.grid(False, axis="y")
            axes.locator_params(axis="x", nbins=4)
            time_axis(axes.xaxis)
            axes.set_title(name, fontsize=10, fontweight="normal")
        handles, labels = panels[0][0].get_legend_handles_labels()
        handles.append(plt.Line2D([], [], color="black", lw=2))
        labels.append("measured as a whole")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.legend(
            handles, labels, ncols=5, loc="lower left", frameon=False, bbox_to_anchor=(0, -0.01)
        )
        figure.tight_layout(rect=(0, 0.07, 1, 1))
        figure.text(0.01, -0.02, note, fontsize=8, color="#555555", va="top", wrap=True)
        plt.close(figure)
        return figure
