"""The figures of the ladder of rewrites: time, memory and ratio of many algorithms at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from convlab.peers import PEERS
from convlab.pitfalls import factor_text
from convlab.plots.basics import COLOURS, OTHER, finish, theme, time_axis
from convlab.plots.scaling import PaletteCanvas, scaling
from convlab.timing import seconds, size

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT_COLOURS = 32
MAP_END = 8  # the colours of `ladder_map` end at this factor and at 1 / this
PASS_LOOKS = (("o", "#0072B2"), ("s", "#D55E00"), ("^", "#009E73"), ("D", "#CC79A7"))


class FewColoursCanvas(FigureCanvasAgg):
    """Writes PNG files with few colours: half the bytes, for a notebook of many such figures."""

    def print_png(self, filename_or_obj, **_) -> None:
        FigureCanvasAgg.draw(self)
        image = PIL.Image.fromarray(np.asarray(self.buffer_rgba())).convert("RGB")
        few = image.quantize(KEPT_COLOURS, PIL.Image.Quantize.MAXCOVERAGE, kmeans=1)
        few.save(filename_or_obj, format="png", optimize=True)


def _small(figure: Figure, note: str) -> Figure:
    """`finish`, then a `FewColoursCanvas`."""
    return FewColoursCanvas(finish(figure, note)).figure


def rungs(
    panels: Mapping[str, pd.DataFrame], floors: Mapping[str, float], title: str, note: str
) -> Figure:
    """Bars of time, two panels a row; beside each bar its time, ratio and peak memory.

    Args:
        panels: name → table indexed by algorithm, with the columns time, time_low, time_high
            (seconds), ratio and memory (bytes). An algorithm that only other panels have is drawn
            without a time.
        floors: name → seconds that nothing can beat, a dotted line.
    """
    names = list(dict.fromkeys(name for table in panels.values() for name in table.index))
    rows = -(-len(panels) // 2)
    with theme():
        size_ = (9.6, 0.4 + rows * (0.85 + 0.3 * len(names)))
        figure, grid = plt.subplots(rows, 2, figsize=size_, sharey=True, squeeze=False)
        for axis in grid.flat[len(panels) :]:
            axis.set_axis_off()
        for axis, (name, table) in zip(grid.flat, panels.items()):
            _rung(axis, table.reindex(names), floors[name])
            axis.set_title(name, fontsize=10)
        grid[0, 0].set_yticks(range(len(names)), names)
        grid[0, 0].set_ylim(len(names) - 0.5, -0.95)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        return _small(figure, note)


def _rung(axis: Axes, table: pd.DataFrame, floor: float) -> None:
    top = table["time_high"].max()
    top = top if top > 0 else 1.0
    for y, (name, row) in enumerate(table.iterrows()):
        if math.isnan(row["time"]):
            axis.text(0.03 * top, y, "no time", va="center", fontsize=8, color=OTHER)
            continue
        axis.barh(y, row["time"], 0.7, color=COLOURS.get(name, OTHER))
        axis.hlines(y, row["time_low"], row["time_high"], color="black", lw=1.5)
        text = f"{seconds(row['time'])}   {factor_text(row['ratio'])}×   {size(row['memory'])}"
        axis.text(row["time_high"] + 0.04 * top, y, text, va="center", fontsize=8)
    axis.axvline(floor, color="black", ls=":", lw=1.2)
    axis.text(floor, -0.62, " floor", fontsize=8, va="center")
    axis.set_xlim(0, 2.05 * top)
    axis.grid(False, axis="y")
    axis.xaxis.set_major_locator(MaxNLocator(4))
    time_axis(axis.xaxis)


def trade(
    panels: Mapping[str, pd.DataFrame], floors: Mapping[str, float], title: str, note: str
) -> Figure:
    """Time against peak memory, a labelled point per algorithm, two panels a row; log axes.

    A grey staircase joins the points that no other beats in both; each has a ring. Circles are
    ours, squares the peers'. The vertical lines are nn.Conv2d's time and the floor.

    Args:
        panels: name → table indexed by algorithm, with the columns ratio and memory (bytes).
        floors: name → the ratio that nothing can beat, a dotted line.
    """
    rows = -(-len(panels) // 2)
    with theme():
        figure, grid = plt.subplots(rows, 2, figsize=(10, 0.6 + 4.9 * rows), squeeze=False)
        for axis in grid.flat[len(panels) :]:
            axis.set_axis_off()
        shown = list(zip(grid.flat, panels.items()))
        for axis, (name, table) in shown:
            _points(axis, table.dropna(subset=["ratio", "memory"]), floors[name])
            axis.set_title(name, fontsize=10)
        for axis in grid[:, 0]:
            axis.set_ylabel("peak memory")
        for axis in grid[-1]:
            axis.set_xlabel("time / nn.Conv2d's")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        figure.tight_layout()  # labels are placed where the points will be
        for axis, (_, table) in shown:
            table = table.dropna(subset=["ratio", "memory"])
            _label(axis, [str(n) for n in table.index], table[["ratio", "memory"]].to_numpy(float))
        return _small(figure, note)


def front(points: np.ndarray) -> list[int]:
    """Indices of the points (x, y) that no other beats in both, by rising x."""
    best, found = math.inf, []
    for i in np.lexsort((points[:, 1], points[:, 0])):
        if points[i, 1] < best:
            best = points[i, 1]
            found.append(int(i))
    return found


def _points(axis: Axes, table: pd.DataFrame, floor: float) -> None:
    points = table[["ratio", "memory"]].to_numpy(float)
    axis.set(xscale="log", yscale="log")
    if len(points):
        x, y = points[front(points)].T
        axis.plot(x, y, color="#CCCCCC", lw=4, drawstyle="steps-post", zorder=1)
        axis.plot(x, y, "o", ms=11, mfc="none", mec="black", mew=1.2, zorder=2)
        low, high = points.min(axis=0), points.max(axis=0)
        axis.set_xlim(min(low[0], floor) / 1.4, high[0] * 2)
        axis.set_ylim(low[1] / 1.7, high[1] * 1.9)
    for name, x, y in zip(table.index, *points.T):
        shape = "s" if name in PEERS else "o"
        axis.plot(x, y, shape, ms=7, color=COLOURS.get(name, OTHER), mec="white", mew=0.5)
    axis.axvline(1, color=COLOURS["native"], lw=1, zorder=1)
    axis.axvline(floor, color="black", ls=":", lw=1.2, zorder=1)
    where = axis.get_xaxis_transform()
    axis.text(floor, 0.99, " floor", fontsize=8, va="top", transform=where)
    axis.text(1, 0.99, " nn.Conv2d's time", fontsize=8, va="top", transform=where)
    _ticks(axis.xaxis, axis.get_xlim(), lambda value: f"{factor_text(value)}×")
    _ticks(axis.yaxis, axis.get_ylim(), size)


def _ticks(axis, limits: tuple[float, float], text) -> None:
    """Three to ten labels on a logarithmic axis, however short it is."""
    decades = math.log10(limits[1] / limits[0])
    subs = (1, 2, 5) if decades < 1.7 else (1, 3) if decades < 2.5 else (1,)
    axis.set_major_locator(LogLocator(10, subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(NullFormatter())


DISTANCES = (7, 12, 20, 30, 42, 56, 72, 90, 110)  # of a label from its point, in points
ANGLES = (0, 180, 30, -30, 150, -150, 60, -60, 90, -90, 120, -120)  # degrees, best first


def _label(axis: Axes, names: Sequence[str], points: np.ndarray) -> None:
    """Write each name near its point, where it covers neither points nor other names."""
    if not len(points):
        return
    axis.figure.canvas.draw()
    unit = axis.figure.dpi / 72  # pixels per point
    pixels = axis.transData.transform(points)
    inside = axis.get_window_extent()
    taken = [Bbox.from_bounds(x - 4 * unit, y - 4 * unit, 8 * unit, 8 * unit) for x, y in pixels]
    crowd = np.hypot(*(pixels[:, None] - pixels[None]).T) < 60 * unit
    for i in np.argsort(crowd.sum(axis=0)):  # the lonely ones first: they have one good place
        text = axis.annotate(
            names[i],
            points[i],
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color="#222222",
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "#777777", "shrinkA": 0},
        )
        text.set_in_layout(False)
        box = Text.get_window_extent(text)
        place, distance = _place(pixels[i], box.width, box.height, taken, inside, unit)
        taken.append(place)
        centre = (place.min + place.max) / 2
        text.set_position((centre - pixels[i]) / unit)
        text.arrow_patch.set_visible(distance > DISTANCES[1])


def _place(
    point: np.ndarray, width: float, height: float, taken: list[Bbox], inside: Bbox, unit: float
) -> tuple[Bbox, float]:
    """The box of a label nearest to its point that meets least of what is there, its distance."""
    best, least = None, math.inf
    for distance, angle in itertools.product(DISTANCES, ANGLES):
        turn = math.radians(angle)
        x = point[0] + math.cos(turn) * (distance * unit + width / 2)
        y = point[1] + math.sin(turn) * (distance * unit + height / 2)
        box = Bbox.from_bounds(x - width / 2, y - height / 2, width, height)
        cost = sum(_common(box, other) for other in taken)
        cost += 3 * (width * height - _common(box, inside))
        if cost < least:
            best, least = (box, distance), cost
        if cost < 0.5:  # nothing, up to rounding
            break
    return best


def _common(a: Bbox, b: Bbox) -> float:
    """Square pixels that two boxes share."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0.0) * max(height, 0.0)


def ladder_map(
    tables: Mapping[str, pd.DataFrame],
    title: str,
    note: str,
    framed: Collection[str] = (),
    words: Mapping[str, pd.DataFrame] | None = None,
) -> Figure:
    """Ratios as coloured cells: blue below 1, red above, grey without a time.

    Args:
        tables: name → ratios, a row per problem, a column per algorithm; all with the same columns.
        framed: of these columns, the smallest of each row gets a frame.
        words: name → what is written where there is no ratio.
    """
    names = list(next(iter(tables.values())).columns)
    heights = [len(table) for table in tables.values()]
    with theme():
        figure, axes = plt.subplots(
            len(tables),
            1,
            figsize=(2.4 + 0.42 * len(names), 1.3 + 0.3 * sum(heights) + 0.45 * len(tables)),
            height_ratios=heights,
            squeeze=False,
        )
        for axis, (name, table) in zip(axes[:, 0], tables.items()):
            _cells(axis, table, framed, None if words is None else words[name])
            axis.set_ylabel(name, fontweight="bold")
        axes[0, 0].xaxis.tick_top()
        axes[0, 0].set_xticks(np.arange(len(names)) + 0.3, names, rotation=45, ha="left")
        for axis in axes[1:, 0]:
            axis.set_xticks([])
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        return PaletteCanvas(finish(figure, note)).figure


def _cells(
    axis: Axes, table: pd.DataFrame, framed: Collection[str], words: pd.DataFrame | None
) -> None:
    values = table.to_numpy(float)
    end = math.log2(MAP_END)
    axis.set_facecolor("#DDDDDD")
    axis.pcolormesh(np.log2(values), cmap="RdBu_r", vmin=-end, vmax=end, edgecolor="white", lw=1)
    chosen = table[[name for name in table if name in framed]].min(axis=1).to_numpy(float)
    for (y, x), value in np.ndenumerate(values):
        if math.isnan(value):
            text = "–" if words is None else words.iat[y, x]
        else:
            text = f"{value:.2g}" if value < 99.5 else f"{value:.0f}"
        dark = abs(math.log2(value)) > 0.7 * end if value > 0 else False
        ink = "white" if dark else "#222222"
        axis.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8, color=ink)
        if table.columns[x] in framed and value == chosen[y]:
            axis.add_patch(Rectangle((x, y), 1, 1, fill=False, ec="black", lw=1.8, zorder=3))
    axis.set_yticks(np.arange(len(table)) + 0.5, table.index, fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_ylim(len(table), 0)
    axis.grid(False)


def dumbbells(
    panels: Mapping[str, pd.DataFrame], labels: tuple[str, str], title: str, note: str
) -> Figure:
    """Two times per algorithm, joined by a line: a ring and a dot; log axis, one scale.

    Args:
        panels: name → table indexed by algorithm with two columns in seconds; ordered by the first
            panel.
        labels: what a ring and a dot mean.
    """
    first = next(iter(panels.values()))
    names = list(first[first.columns[1]].sort_values(na_position="last").index)
    with theme():
        figure, grid = plt.subplots(
            1,
            len(panels),
            figsize=(9.6, 0.27 * len(names) + 1.7),
            sharey=True,
            squeeze=False,
        )
        for axis, (name, table) in zip(grid[0], panels.items()):
            axis.set_xscale("log")
            low, high = np.nanmin(table.to_numpy(float)), np.nanmax(table.to_numpy(float))
            axis.set_xlim(low / 1.3, high * max(high / low, 4) ** 0.3)
            for y, row in enumerate(table.reindex(names).to_numpy(float)):
                _dumbbell(axis, y, *row, COLOURS.get(names[y], OTHER))
            axis.set_title(name, fontsize=10)
            axis.grid(False, axis="y")
            _ticks(axis.xaxis, axis.get_xlim(), seconds)
        look = {"ls": "", "ms": 7, "color": OTHER, "marker": "o"}
        for label, face in zip(labels, ("white", OTHER)):
            grid[0, 0].plot([], [], markerfacecolor=face, label=label, **look)
        grid[0, 0].set_yticks(range(len(names)), names)
        grid[0, 0].set_ylim(len(names) - 0.4, -0.6)
        height = figure.get_figheight() - 1.2
        anchor = {"loc": "upper left", "bbox_to_anchor": (-0.3, -0.3 / height)}
        grid[0, 0].legend(ncols=2, frameon=False, **anchor)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        return _small(figure, note)


def _dumbbell(axis: Axes, y: int, before: float, after: float, colour: str) -> None:
    axis.plot([before, after], [y, y], color=colour, lw=2)
    axis.plot(before, y, "o", ms=7, color=colour, markerfacecolor="white")
    axis.plot(after, y, "o", ms=7, color=colour)
    known = [value for value in (before, after) if not math.isnan(value)]
    text = f"{factor_text(before / after)}×" if len(known) == 2 else "no time" if not known else ""
    x = max(known) if known else axis.get_xlim()[0]
    axis.annotate(text, (x, y), (8, 0), textcoords="offset points", va="center", fontsize=8)


def versus(frames: Mapping[str, pd.DataFrame], label: str, title: str, note: str) -> Figure:
    """Ratios with intervals on a log axis: a row per problem, a marker per table; 1 is a line.

    Args:
        frames: name → table with the columns value, low, high and, to be written at the right,
            text; a row per problem, nan where there is no ratio.
    """
    names = list(dict.fromkeys(name for table in frames.values() for name in table.index))
    values = np.concatenate([t[["value", "low", "high"]].to_numpy(float) for t in frames.values()])
    low, high = min(np.nanmin(values), 0.9), max(np.nanmax(values), 1.1)
    shifts = (np.arange(len(frames)) - (len(frames) - 1) / 2) * 0.8 / max(len(frames), 1)
    with theme():
        height = (0.22 * len(frames) + 0.12) * len(names) + 1.6
        figure, axis = plt.subplots(figsize=(9.6, height))
        axis.set_xscale("log")
        axis.set_xlim(low / 1.1, high * 1.1)
        right = axis.get_yaxis_transform()
        for (name, table), shift, (shape, colour) in zip(
            frames.items(), shifts, itertools.cycle(PASS_LOOKS)
        ):
            axis.plot([], [], shape, ms=7, color=colour, mec="black", label=name)
            for y, key in enumerate(names):
                if key not in table.index or math.isnan(table.loc[key, "value"]):
                    continue
                row = table.loc[key]
                axis.hlines(y + shift, row["low"], row["high"], color="#333333", lw=2)
                axis.plot(row["value"], y + shift, shape, ms=6, color=colour, mec="black", zorder=3)
                text = f"{factor_text(row['value'])}×  {row.get('text', '')}"
                axis.text(1.01, y + shift, text, va="center", fontsize=8, transform=right)
        axis.axvline(1, color="black", lw=1)
        for y in range(1, len(names)):
            axis.axhline(y - 0.5, color="#DDDDDD", lw=0.8)
        axis.grid(False, axis="y")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_ylim(len(names) - 0.5, -0.5)
        _ticks(axis.xaxis, axis.get_xlim(), lambda value: f"{factor_text(value)}×")
        axis.set(xlabel=label, title=title)
        below = -0.55 / (height - 1.2)
        axis.legend(ncols=4, loc="upper left", bbox_to_anchor=(-0.3, below), frameon=False)
        return _small(figure, note)


def at_a_time(
    frame: pd.DataFrame,
    quantities: Mapping[str, str],
    title: str,
    note: str,
    marks: Mapping[str, float],
) -> Figure:
    """`scaling` over the column "images", with dashed lines at marked numbers of images.

    Args:
        marks: what a line means, said in the note → how many images.
    """
    dashed = "".join(f"Dashed: {text}. " for text in marks)
    labels = {"x_label": "images at a time"}
    figure = scaling({"": frame}, "images", quantities, title, dashed + note, **labels)
    for axis in figure.axes:
        if legend := axis.get_legend():
            legend.set_loc("upper right")  # lines are marked at few images
        limits = axis.get_xlim()
        for x in marks.values():
            axis.axvline(x, color="black", ls="--", lw=1, zorder=1)
        axis.set_xlim(limits)
    return figure
