"""How time, ratio and memory grow with one size; heat maps; predicted against measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from convlab.plots.basics import COLOURS, OTHER, finish, theme
from convlab.timing import seconds, size

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNITS = {"time": seconds, "memory": size}  # how the values of a quantity so named are written
PASS_MARKERS = {"forward": "o", "train": "^"}
PASS_WORDS = {"train": "training"}
SETTING_STYLES = (":", "--", "-.")


class PaletteCanvas(FigureCanvasAgg):
    """Writes PNG files with 256 colours: a third of the bytes, for notebooks with many lines."""

    def print_png(self, filename_or_obj, **_) -> None:
        FigureCanvasAgg.draw(self)
        image = PIL.Image.fromarray(np.asarray(self.buffer_rgba())).convert("RGB")
        image.quantize(256).save(filename_or_obj, format="png", optimize=True)


def _small(figure: Figure, note: str) -> Figure:
    """`finish`, then a `PaletteCanvas`."""
    return PaletteCanvas(finish(figure, note)).figure


def slope(x: Collection[float], y: Collection[float]) -> float:
    """The exponent s of y ∝ xˢ: least squares on logarithms, over the upper half of the points.

    Points whose y is not known are left out. nan if fewer than two are left.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    known = np.flatnonzero(np.isfinite(y) & (y > 0) & (x > 0))
    upper = known[np.argsort(x[known])][len(known) // 2 :] if len(known) > 2 else known
    if len(upper) < 2:
        return float("nan")
    return float(np.polyfit(np.log(x[upper]), np.log(y[upper]), 1)[0])


def scaling(
    frames: Mapping[str, pd.DataFrame],
    x: str,
    quantities: Mapping[str, str],
    title: str,
    note: str,
    *,
    x_label: str | None = None,
    slopes: Collection[str] = (),
    bands: Mapping[str, tuple[float, float, str]] | None = None,
) -> Figure:
    """Small multiples on log axes: a column per frame, a row per quantity, a line per algorithm.

    A single frame has its quantities side by side.

    Args:
        frames: title → long form with the columns algorithm, `x` and every quantity y. Where there
            are columns y_low and y_high they are drawn as a band, y_predicted as a dotted line.
            "thread, one thread" is drawn like "thread", with dashes.
        quantities: column → its axis label; "time…" is in seconds, "memory…" in bytes.
        x_label: None: each frame's title.
        slopes: quantities whose panels state the slope of each line and, in brackets, of its
            prediction.
        bands: quantity → (from, to, label), a range of y to shade.
    """
    rows, columns = len(quantities), len(frames)
    if columns == 1:
        rows, columns = 1, rows
    with theme():
        figure, grid = plt.subplots(
            rows,
            columns,
            figsize=(1 + min(3.9, 9 / columns) * columns, 0.8 + 2.3 * rows),
            sharex="col",
            sharey="row" if len(frames) > 1 else False,
            squeeze=False,
        )
        for i, (y, label) in enumerate(quantities.items()):
            row = grid[i] if len(frames) > 1 else grid[0, i : i + 1]
            for axis, frame in zip(row, frames.values()):
                _panel(axis, frame, x, y, y in slopes, (bands or {}).get(y))
            top = row[0].get_ylim()[1]
            if y in slopes or (i == 0 and not slopes):
                predicted = any(f"{y}_predicted" in frame for frame in frames.values())
                title_ = "slope: measured (predicted)" if predicted else "slope"
                _legends(row, title_ if y in slopes else None)
            _log_ticks(row[0], UNITS.get(y.split("_")[0], "{:g}".format), top)
            row[0].set_ylabel(label)
        titles = list(frames) * columns if len(frames) == 1 else list(frames)
        for name, top, bottom in zip(titles, grid[0], grid[-1]):
            top.set_title(name, fontsize=10)
            bottom.set_xlabel(name if x_label is None else x_label)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        return _small(figure, note)


def _panel(axis: Axes, frame: pd.DataFrame, x: str, y: str, slopes: bool, band) -> None:
    if band:
        low, high, text = band
        axis.axhspan(low, high, color="#F0E442", alpha=0.35, lw=0)
        where = axis.get_yaxis_transform()
        axis.text(0.98, (low * high) ** 0.5, text, transform=where, ha="right", va="center")
    styles = iter(SETTING_STYLES * len(frame))
    style_of: dict[str, str] = {"": "-"}
    for name, group in frame.groupby("algorithm", sort=False):
        group = group.dropna(subset=[y]).sort_values(x)
        algorithm, _, setting = name.partition(", ")
        if setting not in style_of:
            style_of[setting] = "--" if len(style_of) == 1 else next(styles)
        colour, label = COLOURS.get(algorithm, OTHER), name
        if slopes:
            label += f" {_slope_text(group[x], group[y])}"
        if f"{y}_predicted" in group and group[f"{y}_predicted"].notna().any():
            axis.plot(group[x], group[f"{y}_predicted"], ":", color=colour, lw=1.5)
            if slopes:
                label += f" ({_slope_text(group[x], group[f'{y}_predicted'])})"
        axis.plot(
            group[x], group[y], marker="o", ms=4, ls=style_of[setting], color=colour, label=label
        )
        if f"{y}_low" in group:
            spread = group[f"{y}_low"], group[f"{y}_high"]
            axis.fill_between(group[x], *spread, color=colour, alpha=0.2, lw=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted(frame[x].unique())
    axis.xaxis.set_major_locator(FixedLocator(ticks if len(ticks) < 8 else ticks[::2]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def _slope_text(x: Collection[float], y: Collection[float]) -> str:
    return f"{round(slope(x, y), 2) + 0.0:.2f}"  # + 0.0: no "-0.00"


def _legends(row: Collection[Axes], title: str | None) -> None:
    """In each panel of a row the lines' names in their colours, in room made above them."""
    names = max(len(axis.get_legend_handles_labels()[1]) for axis in row) + bool(title)
    low, high = row[0].get_ylim()
    share = 0.09 * names  # of the panel's height
    row[0].set_ylim(low, high * (high / low) ** (share / (1 - share)))
    for axis in row:
        axis.legend(
            loc="upper left",
            title=title,
            alignment="left",
            edgecolor="none",
            framealpha=0.9,
            labelcolor="linecolor",
            fontsize=8,
            title_fontsize=8,
            labelspacing=0.2,
            borderaxespad=0.1,
        )


def _log_ticks(axis: Axes, text: Callable[[float], str], top: float) -> None:
    """Three to ten labels on a logarithmic y axis, however short it is; none above `top`."""
    low = axis.get_ylim()[0]
    decades = np.log10(top / low)
    subs = (1, 2, 5) if decades < 1.7 else (1, 3) if decades < 3 else (1,)
    ticks = [v for v in LogLocator(10, subs=subs).tick_values(low, top) if v <= top]
    axis.yaxis.set_major_locator(FixedLocator(ticks))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def heat(
    tables: Mapping[str, pd.DataFrame],
    title: str,
    note: str,
    label: str = "time / nn.Conv2d's",
) -> Figure:
    """Heat maps of ratios with one colour scale: blue below 1, white at 1, red above.

    Args:
        tables: title → ratios, indexed by one size with the other as columns; both have names.
    """
    largest = max(np.nanmax(np.abs(np.log2(t.to_numpy(float)))) for t in tables.values())
    with theme():
        widths = [len(t.columns) for t in tables.values()]
        tall = max(map(len, tables.values()))
        figure, axes = plt.subplots(
            1,
            len(tables) + 1,
            figsize=(0.62 * sum(widths) + 2.8, 0.45 * tall + 1.6),
            width_ratios=[*widths, 0.25],
            squeeze=False,
        )
        bar = axes[0, -1]
        for axis, (name, ratios) in zip(axes[0], tables.items()):
            sns.heatmap(
                np.log2(ratios.astype(float)),
                annot=ratios.astype(float),
                fmt=".2g",
                cmap="RdBu_r",
                vmin=-largest,
                vmax=largest,
                linewidths=1,
                ax=axis,
                cbar_ax=bar,
                cbar_kws={"label": label},
            )
            axis.set_facecolor("#DDDDDD")
            axis.tick_params(axis="y", rotation=0)
            axis.set_title(name, fontsize=10)
        bar.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _times(v)))
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        return _small(figure, note)


def _times(exponent: float) -> str:
    """2 to the `exponent` as "4×" or "1/4×"."""
    return f"{2.0**exponent:.2g}×" if exponent >= 0 else f"1/{2.0**-exponent:.2g}×"


def agreement(
    frame: pd.DataFrame,
    x: str,
    y: str,
    title: str,
    note: str,
    *,
    x_label: str,
    y_label: str,
    within: float | None = None,
    forbidden: str = "",
) -> Figure:
    """Each row as a point, `x` against `y`, with the diagonal where they are equal; log axes.

    Args:
        frame: has the columns algorithm, pass, `x` and `y`; seconds if `x` or `y` begins with
            "time", else bytes.
        within: adds a second panel with y / x - 1, in which this relative error is shaded.
        forbidden: written into the triangle below the diagonal, which is shaded.
    """
    text = seconds if "time" in (x.split("_")[0], y.split("_")[0]) else size
    values = frame[[x, y]].to_numpy(float)
    ends = np.array([np.nanmin(values) / 1.6, np.nanmax(values) * 1.6])
    with theme():
        panels = 2 if within else 1
        figure, grid = plt.subplots(1, panels, figsize=(1 + 4.4 * panels, 4.6), squeeze=False)
        axes, error = grid[0, 0], grid[0, -1]
        axes.plot(ends, ends, color="black", lw=1)
        if forbidden:
            axes.fill_between(ends, ends[0], ends, color="#F0E442", alpha=0.35, lw=0)
            axes.text(0.97, 0.04, forbidden, transform=axes.transAxes, ha="right")
        for (name, pass_), group in frame.groupby(["algorithm", "pass"], sort=False):
            look = {"ls": "", "marker": PASS_MARKERS.get(pass_, "o"), "ms": 5}
            look |= {"color": COLOURS.get(name, OTHER), "markerfacecolor": "none"}
            axes.plot(group[x], group[y], **look, label=f"{name}, {PASS_WORDS.get(pass_, pass_)}")
            if within:
                error.plot(group[x], group[y] / group[x] - 1, **look)
        axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel=x_label, ylabel=y_label)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
        if within:
            error.axhspan(-within, within, color="#999999", alpha=0.3, lw=0)
            error.axhline(0, color="black", lw=1)
            largest = max(2 * within, 1.1 * max(map(abs, error.get_ylim())))
            error.set(xscale="log", ylim=(-largest, largest), xlabel=x_label)
            error.set_ylabel(f"{y_label} / {x_label} - 1; grey: within {within:.0%}")
            error.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+.3g}%"))
        for axis in grid[0]:
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
        axes.legend(loc="upper left", fontsize=9)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        return _small(figure, note)


def budget(
    frame: pd.DataFrame, x: str, limit: float, title: str, note: str, x_label: str = ""
) -> Figure:
    """Memory over `x`: counted (lines), measured (rings), not started (crosses), and the limit.

    Args:
        frame: long form with the columns algorithm, `x`, counted and measured, in bytes; measured
            is nan where the experiment was not started, counted where nothing was counted.
        limit: bytes.
    """
    with theme():
        figure, axes = plt.subplots(figsize=(8, 4.2))
        for i, (name, group) in enumerate(frame.groupby("algorithm", sort=False)):
            group, colour = group.sort_values(x), COLOURS.get(name, OTHER)
            missing = group[group["measured"].isna()]
            axes.plot(group[x], group["counted"], ":", color=colour)
            axes.plot(missing[x], missing["counted"], "x", ms=9, mew=2, color=colour)
            axes.plot(
                group[x],
                group["measured"],
                "o",
                ms=10 - 3 * i,
                color=colour,
                markerfacecolor="none",
                label=f"{name}, measured",
            )
        axes.plot([], [], ":", color=OTHER, label="counted")
        axes.plot([], [], "x", ms=9, mew=2, color=OTHER, label="out of memory (predicted)")
        axes.axhline(limit, color="black", lw=1.5)
        axes.annotate(
            f"budget {size(limit)}",
            (0.01, limit),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            va="bottom",
        )
        axes.set(xscale="log", yscale="log", xlabel=x_label or x, ylabel="memory", title=title)
        axes.xaxis.set_major_locator(FixedLocator(sorted(frame[x].unique())))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        _log_ticks(axes, size, axes.get_ylim()[1])
        axes.legend(loc="center left", fontsize=9)
        return _small(figure, note)
