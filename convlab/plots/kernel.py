"""The figures of the notebook on the kernel: traffic, wasted lanes, the roofline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from convlab.pitfalls import factor_text
from convlab.plots.basics import COLOURS, OTHER, finish, inner_labels, theme

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from convlab.cost import Ceilings

ORDERS = {"flattened": COLOURS["implicit_gemm"], "by tap": COLOURS["windows"]}
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")


def traffic(frame: pd.DataFrame, title: str, note: str, x_label: str) -> Figure:
    """One row of bars per form of a kernel, one panel per column, each with its own axis from 0.

    Args:
        frame: index: names of the forms; columns: titles of the panels.
        x_label: what the values are counted for, under every panel.
    """
    with theme():
        figure, axes = plt.subplots(
            1, len(frame.columns), figsize=(10, 0.42 * len(frame) + 1.5), sharey=True, squeeze=False
        )
        for axis, (name, values) in zip(axes[0], frame.items(), strict=True):
            axis.barh(frame.index, values, color=COLOURS["implicit_gemm"], height=0.65)
            axis.set_xlim(0, 1.3 * values.max())
            for y, value in enumerate(values):
                axis.annotate(
                    f"{value:.3g}", (value, y), (4, 0), textcoords="offset points", va="center"
                )
            axis.set_title(name, fontsize=11)
            axis.set_xlabel(x_label)
            axis.xaxis.set_major_locator(MaxNLocator(4))
            inner_labels(axis)
            axis.grid(False, axis="y")
        axes[0, 0].set_ylim(len(frame) - 0.5, -0.5)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        return finish(figure, note)


def waste(frame: pd.DataFrame, counted: pd.DataFrame, title: str, note: str) -> Figure:
    """Share of a tile's lanes that hold no product, over the channels, for each order.

    Args:
        frame: index: channels; one column per order of `ORDERS`, a share; drawn as lines.
        counted: the same for some channels, counted while the kernel ran; drawn as dots.
    """
    with theme():
        figure, axes = plt.subplots(figsize=(8, 3.8))
        for name in frame.columns:
            axes.plot(frame.index, frame[name], color=ORDERS[name], label=f"{name}, computed")
        for name in counted.columns if len(counted) else ():
            axes.plot(
                counted.index,
                counted[name],
                "o",
                color=ORDERS[name],
                label=f"{name}, counted in the interpreter",
            )
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.set(xlabel="channels of x", ylabel="empty lanes", title=title)
        axes.legend(frameon=True)
        return finish(figure, note)


def roofline(ceilings: Mapping[str, Ceilings], points: pd.DataFrame, title: str, note: str):
    """FLOP/s over FLOPs per byte, log axes: a roof per number format, a mark per algorithm.

    Args:
        ceilings: number format → what the machine reaches.
        points: the columns algorithm, format (a key of `ceilings`), intensity (FLOPs per byte
            moved) and flops_per_second.
    """
    with theme():
        figure, axes = plt.subplots(figsize=(8.5, 4.6))
        axes.set_xscale("log")
        axes.set_yscale("log")
        left, right = points["intensity"].min() / 3, points["intensity"].max() * 8
        x = np.geomspace(left, right, 200)
        for style, (name, c) in zip(STYLES, ceilings.items()):
            roof = np.minimum(c.flops_per_second, x * c.bytes_per_second)
            axes.plot(x, roof, color="black", ls=style, lw=1.2, label=f"roof, {name}")
        names = list(dict.fromkeys(points["algorithm"]))
        formats = list(ceilings)
        for _, p in points.iterrows():
            axes.plot(
                p["intensity"],
                p["flops_per_second"],
                MARKERS[formats.index(p["format"])],
                color=_colour(p["algorithm"]),
                ms=14 - 3 * formats.index(p["format"]),
                mec="white",
            )
        handles, _ = axes.get_legend_handles_labels()
        handles += [
            Line2D([], [], marker=m, color=OTHER, ls="", ms=8, label=f)
            for m, f in zip(MARKERS, formats)
        ]
        handles += [
            Line2D([], [], marker="o", color=COLOURS.get(n, OTHER), ls="", ms=8, label=n)
            for n in names
        ]
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        axes.set_xlim(left, right)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e12:g} TFLOP/s"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="FLOPs per byte through main memory", ylabel="FLOP/s", title=title)
        return finish(figure, note)


def above_floor(panels: Mapping[str, pd.DataFrame], title: str, note: str) -> Figure:
    """Times over the roofline's floor: one panel per table, a row per problem; log axis.

    In a row every algorithm has a height of its own, the same in every panel.

    Args:
        panels: title → table; index: names of problems; columns: algorithms; NaN: no time.
    """
    problems = list(dict.fromkeys(name for frame in panels.values() for name in frame.index))
    names = list(dict.fromkeys(name for frame in panels.values() for name in frame.columns))
    steps = (1,) if max(frame.max().max() for frame in panels.values()) > 30 else (1, 2, 5)
    with theme():
        figure, axes = plt.subplots(
            1,
            len(panels),
            figsize=(10, (0.2 + 0.1 * len(names)) * len(problems) + 1.9),
            sharey=True,
            sharex=True,
            squeeze=False,
        )
        for axis, (name, frame) in zip(axes[0], panels.items(), strict=True):
            axis.set_xscale("log")
            axis.axvline(1, color="black", ls=":")
            for problem, row in frame.iterrows():
                for column, value in row.dropna().items():
                    place = names.index(column)
                    y = problems.index(problem) + 0.8 * ((place + 0.5) / len(names) - 0.5)
                    marker = MARKERS[place % len(MARKERS)]
                    axis.plot(value, y, marker, color=_colour(column), ms=8, mec="white")
            for y in range(1, len(problems)):
                axis.axhline(y - 0.5, color="#CCCCCC", lw=0.8)
            axis.set(title=name, xlabel="time / floor")
            axis.grid(False, axis="y")
            axis.xaxis.set_major_locator(LogLocator(subs=steps))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: factor_text(value)))
            axis.xaxis.set_minor_formatter(NullFormatter())
        axes[0, 0].set_yticks(range(len(problems)), problems)
        axes[0, 0].set_ylim(len(problems) - 0.5, -0.5)
        handles = [
            Line2D([], [], marker=m, color=_colour(n), ls="", ms=8, label=n)
            for m, n in zip(MARKERS * 3, names)
        ]
        figure.legend(
            handles=handles, ncols=4, loc="upper left", bbox_to_anchor=(0.01, 0), frameon=False
        )
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        return _below(figure, note, len(names))


def _below(figure: Figure, note: str, entries: int) -> Figure:
    """`finish`, with the note under the lines of the legend."""
    finished = finish(figure, note)
    text = finished.texts[-1]
    text.set_y(-0.08 - 0.28 * (1 + (entries - 1) // 4) / finished.get_figheight())
    return finished


def _colour(name: str) -> str:
    """The colour of the algorithm named at the beginning of `name`; NHWC of the library its own."""
    algorithm, _, layout = name.partition(", ")
    if algorithm == "native" and layout == "NHWC":
        algorithm = "native_channels_last"
    return COLOURS.get(algorithm, OTHER)
