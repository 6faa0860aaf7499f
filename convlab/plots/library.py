"""The figures of the library's switches and of its advantage on real layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from convlab.pitfalls import factor_text
from convlab.plots.basics import COLOURS, OTHER, finish, theme
from convlab.timing import seconds

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {"k×k": ("s", "full"), "1×1": ("o", "none"), "depthwise": ("^", "full")}
"""Kind of layer → its marker and how that is filled."""

NAMES = {"native_no_library": "library off", "thread": "the thread's layer"}


def switches(
    panels: Mapping[str, pd.DataFrame],
    errors: pd.Series,
    title: str,
    note: str,
    missing: Mapping[str, str] | None = None,
) -> Figure:
    """Time beside error: one row per variant, one panel per table of `timing.ratios`, log axes.

    Bars start at 1, the baseline's time: to the left is faster, to the right slower. A variant
    without a time shows why.

    Args:
        panels: name → table with ratio, ratio_low, ratio_high and median by variant.
        errors: variant → largest error against float64; its order is that of the rows.
        missing: variant → what stands in place of a time.
    """
    names = [str(name) for name in errors.index]
    with theme():
        figure, axes = plt.subplots(
            1,
            len(panels) + 1,
            figsize=(10, 0.38 * len(names) + 1.7),
            sharey=True,
            width_ratios=[3] * len(panels) + [2],
        )
        for axis, (name, frame) in zip(axes[:-1], panels.items(), strict=True):
            _time_bars(axis, names, frame, missing or {})
            axis.set(title=name, xlabel="time / as called")
        _error_dots(axes[-1], names, errors)
        axes[0].set_ylim(len(names) - 0.4, -0.6)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        return finish(figure, note)


def _time_bars(
    axis: Axes, names: list[str], frame: pd.DataFrame, missing: Mapping[str, str]
) -> None:
    axis.set_xscale("log")
    top, left = max(frame["ratio_high"].max(), 1.5), min(frame["ratio_low"].min(), 0.8) / 1.3
    axis.set_xlim(left, top * top / left)  # half of the panel for the last bar's label
    for y, name in enumerate(names):
        if name not in frame.index:
            _beside(axis, 1, y, missing.get(name, "no time"))
            continue
        row = frame.loc[name]
        axis.barh(y, row["ratio"] - 1, left=1, color=variant_colour(name), height=0.65)
        axis.hlines(y, row["ratio_low"], row["ratio_high"], color="black", lw=1.5)
        text = f"{factor_text(row['ratio'])}×  {seconds(row['median'])}"
        _beside(axis, max(row["ratio_high"], 1), y, text)
    axis.axvline(1, color="black", lw=1)
    axis.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names])
    axis.grid(False, axis="y")
    _factor_axis(axis.xaxis)


def _error_dots(axis: Axes, names: list[str], errors: pd.Series) -> None:
    axis.set_xscale("log")
    known = errors[errors > 0]
    if len(known):
        left = known.min() / 4
        axis.set_xlim(left, known.max() * max((known.max() / left) ** 0.6, 100))
    for y, name in enumerate(names):
        value = errors.iloc[y]
        if value > 0:
            axis.plot(value, y, "o", color=variant_colour(name))
            _beside(axis, value, y, f"{value:.0e}")
    axis.xaxis.set_major_locator(LogLocator(base=10, numticks=4))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(False, axis="y")
    axis.set(title="error", xlabel="largest error / largest |y|")


def _beside(axis: Axes, x: float, y: float, text: str) -> None:
    axis.annotate(text, (x, y), (6, 0), textcoords="offset points", va="center", fontsize=9)


def variant_colour(name: str) -> str:
    """The colour of the algorithm that the variant named `name` is a form of."""
    if name.startswith("thread"):
        return COLOURS["thread"]
    if "library off" in name:
        return COLOURS["native_no_library"]
    return COLOURS["native_channels_last" if "channels last" in name else "native"]


def layer_map(
    frame: pd.DataFrame, x: str, x_label: str, title: str, note: str, one: str = "as called"
) -> Figure:
    """Every layer of every network: time over the baseline's, by one of its sizes; log axes.

    Args:
        frame: one row per layer and algorithm, with the columns network, kind (of `KINDS`), `x`,
            algorithm, ratio, ratio_low, ratio_high.
        one: what the ratio 1 is, for the label of the axis.
    """
    networks = list(dict.fromkeys(frame["network"]))
    rows = -(-len(networks) // 2)
    with theme():
        figure, axes = plt.subplots(
            rows, 2, figsize=(9.5, 3.0 * rows + 1), sharex=True, sharey=True, squeeze=False
        )
        for axis in axes.flat[len(networks) :]:
            axis.set_axis_off()
        for axis, network in zip(axes.flat, networks, strict=False):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.axhline(1, color="black", lw=1)
            axis.set_title(network)
            groups = frame[frame["network"] == network].groupby(["algorithm", "kind"], sort=False)
            for (algorithm, kind), group in groups:
                _points(axis, group, x, COLOURS.get(algorithm, OTHER), KINDS[kind])
            _factor_axis(axis.yaxis)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for axis in axes[:, 0]:
            axis.set_ylabel(f"time / {one}")
        for axis in axes[-1]:
            axis.set_xlabel(x_label)
        figure.legend(
            handles=_map_legend(frame),
            loc="upper left",
            bbox_to_anchor=(0, 0.955),
            ncols=5,
            frameon=False,
        )
        figure.suptitle(f"{title}\n", x=0.01, ha="left", fontweight="bold")
        return finish(figure, note)


def _points(axis: Axes, group: pd.DataFrame, x: str, colour: str, marker: tuple[str, str]) -> None:
    spread = [group["ratio"] - group["ratio_low"], group["ratio_high"] - group["ratio"]]
    axis.errorbar(
        group[x],
        group["ratio"],
        yerr=np.clip(spread, 0, None),
        fmt=marker[0],
        fillstyle=marker[1],
        ms=7,
        color=colour,
        elinewidth=0.8,
        alpha=0.8,
    )


def _map_legend(frame: pd.DataFrame) -> list:
    style = {"ls": "", "ms": 8, "color": OTHER}
    shapes = [
        Line2D([], [], marker=marker, fillstyle=fill, label=kind, **style)
        for kind, (marker, fill) in KINDS.items()
        if kind in set(frame["kind"])
    ]
    algorithms = dict.fromkeys(frame["algorithm"])
    colours = [Patch(color=COLOURS.get(a, OTHER), label=NAMES.get(a, a)) for a in algorithms]
    return [*colours, *shapes]


def network_bars(frame: pd.DataFrame, title: str, note: str, one: str = "as called") -> Figure:
    """Whole networks: time over the baseline's, one panel per pass, one bar per algorithm.

    Args:
        frame: the columns pass, network, algorithm, median (seconds), ratio, ratio_low, ratio_high.
    """
    passes = list(dict.fromkeys(frame["pass"]))
    networks = list(dict.fromkeys(frame["network"]))
    algorithms = list(dict.fromkeys(frame["algorithm"]))
    height = 0.8 / len(algorithms)
    with theme():
        figure, axes = plt.subplots(
            1,
            len(passes),
            figsize=(10, 0.36 * len(networks) * len(algorithms) + 2),
            sharey=True,
            squeeze=False,
        )
        for axis, pass_ in zip(axes[0], passes, strict=True):
            mine = frame[frame["pass"] == pass_]
            axis.set_xscale("log")
            low, high = min(mine["ratio_low"].min(), 1), max(mine["ratio_high"].max(), 2)
            axis.set_xlim(low / 1.2, high * max(high / low, 4) ** 0.6)
            for _, row in mine.iterrows():
                place = algorithms.index(row["algorithm"]) - (len(algorithms) - 1) / 2
                y = networks.index(row["network"]) + place * height
                colour = COLOURS.get(row["algorithm"], OTHER)
                axis.barh(y, row["ratio"] - 1, left=1, height=0.9 * height, color=colour)
                axis.hlines(y, row["ratio_low"], row["ratio_high"], color="black", lw=1.5)
                text = f"{factor_text(row['ratio'])}×  {seconds(row['median'])}"
                _beside(axis, max(row["ratio_high"], 1), y, text)
            axis.axvline(1, color="black", lw=1)
            axis.set(title=pass_, xlabel=f"time / {one}")
            axis.grid(False, axis="y")
            _factor_axis(axis.xaxis)
        axes[0, 0].set_yticks(range(len(networks)), networks)
        axes[0, 0].set_ylim(len(networks) - 0.5, -0.5)
        handles = [Patch(color=COLOURS.get(a, OTHER), label=NAMES.get(a, a)) for a in algorithms]
        axes[0, 0].legend(
            handles=handles, ncols=3, loc="upper left", bbox_to_anchor=(-0.3, -0.16), frameon=False
        )
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        return finish(figure, note)


def _factor_axis(axis) -> None:
    """Ticks of a logarithmic axis of ratios as 0.5, 1, 20, …"""
    axis.set_major_formatter(FuncFormatter(lambda value, _: factor_text(value)))
    axis.set_minor_formatter(NullFormatter())
