"""One function per kind of figure; one colour per algorithm everywhere.

The colours are Okabe and Ito's, told apart by colour-blind readers, and for the ladder lighter and
darker relatives of them.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.ticker import FuncFormatter, NullFormatter

from convlab.pitfalls import factor_text
from convlab.timing import seconds

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLOURS = {
    "native": "#0072B2",
    "native_channels_last": "#56B4E9",
    "native_no_library": "#999999",
    "thread": "#D55E00",
    "unfold": "#E69F00",
    "windows": "#009E73",
    "unfold_batched": "#A66F00",
    "unfold_chunked": "#F2C45C",
    "unfold_recompute": "#664400",
    "windows_chunked": "#005C45",
    "row_windows": "#44BFA0",
    "shifts": "#CC79A7",
    "winograd": "#882255",
    "fft": "#9A8F1B",
    "compiled": "#8F86E0",
    "fused": "#332288",
    "implicit_gemm": "#B3003C",
    "auto": "#000000",
    "flex_conv2d": "#AA4499",
    "flex_conv2d_triton": "#D69CD1",
    "by_definition": "#B8860B",
    "unfoldnd": "#4D4D4D",
    "einconv": "#737373",
    "fft_conv": "#9C9C9C",
    "compiled_thread": "#C2C2C2",
    "compiled_native_matmul": "#606060",
}
STAGE_COLOURS = {
    "unfold": "#E69F00",
    "product": "#009E73",
    "fold": "#CC79A7",
    "remainder": "#BBBBBB",
}
OTHER = "#666666"


@contextmanager
def theme() -> Iterator[None]:
    """Seaborn's white grid with readable sizes, inside the block only."""
    settings = {"axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    with sns.axes_style("whitegrid"), mpl.rc_context({**settings, "figure.dpi": 100}):
        yield


def finish(figure: Figure, note: str) -> Figure:
    """Lay `figure` out and write `note` (machine and date) under it; close it for notebooks."""
    figure.tight_layout()
    wrapped = "\n".join(textwrap.wrap(note, int(figure.get_figwidth() * 15)))
    figure.text(0.01, -0.01, wrapped, fontsize=8, color="#555555", va="top")
    plt.close(figure)
    return figure


def time_axis(axis) -> None:
    """Ticks of a (logarithmic) axis in seconds as 10 µs, 2 ms, …"""
    axis.set_major_formatter(FuncFormatter(lambda value, _: seconds(value) if value > 0 else "0"))
    axis.set_minor_formatter(NullFormatter())


def bars(
    frame: pd.DataFrame,
    title: str,
    note: str,
    floor: float | None = None,
    colours: Mapping[str, str] = COLOURS,
) -> Figure:
    """Horizontal bars of the table of `compare`: median with quartiles, labelled with the ratio.

    Args:
        floor: seconds that nothing can beat, drawn as a line.
    """
    with theme():
        figure, axes = plt.subplots(figsize=(8, 0.5 * len(frame) + 1.3))
        spread = [frame["median"] - frame["q25"], frame["q75"] - frame["median"]]
        names = [str(name) for name in frame.index]
        fill = [colours.get(name, OTHER) for name in names]
        axes.barh(names, frame["median"], xerr=np.clip(spread, 0, None), color=fill, capsize=3)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlim(0, 1.35 * frame["q75"].max())
        for y, (_, row) in enumerate(frame.iterrows()):
            label = f"{seconds(row['median'])}  (×{row['ratio']:.2f})"
            axes.text(row["q75"] + 0.02 * axes.get_xlim()[1], y, label, va="center")
        if floor is not None:
            axes.axvline(floor, color="black", linestyle=":")
            axes.text(floor, -0.6, "floor", ha="center", va="bottom")
        time_axis(axes.xaxis)
        axes.set_title(title)
        return finish(figure, note)


def stage_bars(
    parts: Mapping[str, Mapping[str, float]],
    title: str,
    note: str,
    totals: Mapping[str, float] | None = None,
) -> Figure:
    """Stacked horizontal bars: row → stage → seconds; `totals` marks the ordinary measurement."""
    with theme():
        figure, axes = plt.subplots(figsize=(8, 0.6 * len(parts) + 1.9))
        stages = list(dict.fromkeys(stage for row in parts.values() for stage in row))
        left = np.zeros(len(parts))
        for stage in stages:
            width = np.array([max(row.get(stage, 0.0), 0.0) for row in parts.values()])
            colour = STAGE_COLOURS.get(stage, OTHER)
            axes.barh(list(parts), width, left=left, color=colour, label=stage)
            left += width
        for y, row in enumerate(totals or {}):
            label = "measured as a whole" if y == 0 else None
            axes.plot([totals[row]] * 2, [y - 0.45, y + 0.45], color="black", lw=2, label=label)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        time_axis(axes.xaxis)
        axes.set_title(title)
        axes.legend(ncols=5, loc="upper left", bbox_to_anchor=(0, -0.18), frameon=False)
        return finish(figure, note)


def lines(
    frame: pd.DataFrame,
    x: str,
    title: str,
    note: str,
    *,
    y: str = "median",
    low: str = "q25",
    high: str = "q75",
    x_label: str = "",
    y_label: str = "",
    band: tuple[float, float, str] | None = None,
    log_y: bool = True,
) -> Figure:
    """One line per algorithm over `x` with its spread, labelled at its end; log axes.

    Args:
        frame: long form with the columns algorithm, `x`, `y`, `low`, `high`.
        band: (from, to, label) shades a range of y, for a claim.
    """
    with theme():
        figure, axes = plt.subplots(figsize=(8, 4.2))
        if band:
            axes.axhspan(*band[:2], color="#F0E442", alpha=0.35, label=band[2])
            axes.legend(loc="best", frameon=True)
        ends = {}
        for name, group in frame.groupby("algorithm", sort=False):
            group = group.sort_values(x)
            colour = COLOURS.get(name, OTHER)
            axes.plot(group[x], group[y], "o-", color=colour)
            axes.fill_between(group[x], group[low], group[high], color=colour, alpha=0.2, lw=0)
            ends[name] = group[[x, y]].iloc[-1]
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if log_y:
            axes.set_yscale("log")
        if y == "median":
            time_axis(axes.yaxis)
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _end_labels(axes, ends)
        axes.set(xlabel=x_label or x, ylabel=y_label, title=title)
        return finish(figure, note)


def ratio_bars(
    panels: Mapping[str, pd.DataFrame],
    title: str,
    note: str,
    one: str,
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """One panel per table of `compare`: how many times as long as the baseline, with intervals.

    Args:
        one: what the ratio 1 is, written at its line.
        labels: name → what the axis says in its place.
    """
    with theme():
        rows = max(map(len, panels.values()))
        figure, axes = plt.subplots(
            1, len(panels), figsize=(9, 0.45 * rows + 1.6), sharey=True, squeeze=False
        )
        for axis, (name, frame) in zip(axes[0], panels.items(), strict=True):
            names = [(labels or {}).get(n, n) for n in frame.index]
            spread = [frame["ratio"] - frame["ratio_low"], frame["ratio_high"] - frame["ratio"]]
            fill = [COLOURS.get(n, OTHER) for n in frame.index]
            axis.barh(names, frame["ratio"], xerr=np.clip(spread, 0, None), color=fill, capsize=3)
            top = frame["ratio_high"].max()
            for y, (_, row) in enumerate(frame.iterrows()):
                text = f"{row['ratio']:.2g}×  {seconds(row['median'])}"
                axis.text(max(row["ratio_high"], 1) + 0.03 * top, y, text, va="center", fontsize=9)
            axis.axvline(1, color="black", linestyle=":")
            axis.set(xlim=(0, 1.5 * top), title=name, xlabel=f"time / {one}")
            inner_labels(axis)
            axis.grid(False, axis="y")
        axes[0, 0].invert_yaxis()
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        return finish(figure, note)


def inner_labels(axes) -> None:
    """Numbers along x, but none where it would touch the 0 of the panel to the right."""
    last = 0.94 * axes.get_xlim()[1]
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < last else ""))


def _end_labels(axes, ends: Mapping[str, Sequence[float]]) -> None:
    """Names beside the ends of their lines, moved apart where they would overlap."""
    axes.figure.canvas.draw()
    height = 14 * axes.figure.dpi / 72
    taken = -np.inf
    for name, (x, y) in sorted(ends.items(), key=lambda item: item[1].iloc[1]):
        pixel = axes.transData.transform((x, y))[1]
        taken = max(pixel, taken + height)
        offset = (taken - pixel) * 72 / axes.figure.dpi
        axes.annotate(
            name,
            (x, y),
            xytext=(8, offset),
            textcoords="offset points",
            va="center",
            color=COLOURS.get(name, OTHER),
            annotation_clip=False,
        )


def errors(
    contrasts: Mapping[str, object],
    title: str,
    note: str,
    limit: float = 300,
    either_way: Collection[str] = (),
) -> Figure:
    """One horizontal bar per mistake from 1 (no error) to its factor, with its spread; log axis.

    Args:
        contrasts: name → `convlab.pitfalls.Contrast`, or anything with its factor, low, high and
            noticeable.
        limit: what would pass this factor, or 1 / this, is cut there and ends in an arrow; a bar
            that is cut has no line. The labels are not cut.
        either_way: names whose error is the spread: labelled so, and not "within the noise".
    """
    slow, fast, none = COLOURS["thread"], COLOURS["native"], COLOURS["native_no_library"]
    with theme():
        figure, axes = plt.subplots(figsize=(8.5, 0.36 * len(contrasts) + 1.7))
        axes.set_xscale("log")
        low, high = 0.5, 2.0
        for y, (name, c) in enumerate(contrasts.items()):
            colour = none if not c.noticeable else slow if c.factor > 1 else fast
            start, end, middle = np.clip([c.low, c.high, c.factor], 1 / limit, limit)
            axes.barh(y, middle - 1, left=1, color=colour, height=0.65)
            if middle == c.factor:
                axes.hlines(y, start, end, color="black", lw=1.5)
            for edge, value in ((start, c.low), (end, c.high)):
                if edge != value:
                    axes.plot(edge, y, "<" if value < edge else ">", color="black", clip_on=False)
            text = factor_text(c.factor)
            if not c.noticeable:
                text += ", either way" if name in either_way else ", within the noise"
            axes.text(max(end, 1) * 1.1, y, text, va="center")
            low, high = min(low, start), max(high, end)
        axes.set_xlim(low / 1.3, high * (high / low) ** 0.4)
        axes.set_yticks(range(len(contrasts)), list(contrasts))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.axvline(1, color="black", lw=1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("wrong / right number (1 = no error; left: too low, right: too high)")
        axes.set_title(title)
        return finish(figure, note)


def _power(value: float) -> str:
    """A tick below 1 as a fraction, so that the axis reads 1/100, 1/10, 1, 10."""
    return factor_text(value) if value >= 1 else f"1/{factor_text(1 / value)}"


def timeline(
    lanes: Mapping[str, Sequence[tuple[float, float, str]]],
    marks: Mapping[str, float],
    title: str,
    note: str,
) -> Figure:
    """What ran when: lane → (start, end, label) in seconds, and the readings of a clock."""
    colours = [STAGE_COLOURS[k] for k in ("remainder", "product", "unfold", "fold")]
    first = min(marks.values())
    with theme():
        figure, axes = plt.subplots(figsize=(8, 0.7 * len(lanes) + 0.3 * len(marks) + 1.2))
        for y, spans in enumerate(lanes.values()):
            for start, end, label in spans:
                axes.barh(y, end - start, left=start - first, color=colours[y], height=0.6)
                axes.text((start + end) / 2 - first, y, label, ha="center", va="center")
        for i, (label, at) in enumerate(marks.items()):
            height = -0.55 - 0.3 * (len(marks) - i)
            left = at - first < 0.6 * (max(marks.values()) - first)
            axes.plot([at - first] * 2, [height, len(lanes) - 0.5], color="black", lw=1, ls="--")
            axes.text(at - first, height, f" {label} ", ha="left" if left else "right", va="center")
        axes.set_yticks(range(len(lanes)), list(lanes))
        axes.set_ylim(len(lanes) - 0.5, -0.75 - 0.3 * len(marks))
        axes.grid(False, axis="y")
        time_axis(axes.xaxis)
        axes.set_title(title)
        return finish(figure, note)


def stage_shares(shares: pd.DataFrame, title: str, note: str) -> Figure:
    """Stacked horizontal bars: one per row of `shares`, its columns as shares of a total of 1."""
    with theme():
        figure, axes = plt.subplots(figsize=(8.5, 0.5 * len(shares) + 1.8))
        left = np.zeros(len(shares))
        for stage in shares:
            width = shares[stage].clip(lower=0).to_numpy()
            colour = STAGE_COLOURS.get(stage, OTHER)
            axes.barh(list(shares.index), width, left=left, color=colour, label=stage)
            for y, value in enumerate(width):
                if value >= 0.06 and stage != "remainder":
                    axes.text(left[y] + value / 2, y, f"{value:.0%}", ha="center", va="center")
            left += width
        axes.axvline(1, color="black", lw=2, label="measured as a whole")
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlim(0, max(1.02, 1.02 * left.max()))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.set_title(title)
        axes.legend(
            ncols=5, loc="upper left", bbox_to_anchor=(-0.3, -0.4 / len(shares)), frameon=False
        )
        return finish(figure, note)


OPERATOR_COLOURS = {
    "aten::im2col": "#E69F00",
    "aten::copy_": "#D55E00",
    "aten::mm": "#009E73",
    "aten::col2im": "#CC79A7",
}


def trace(path: str | Path, title: str, note: str) -> Figure:
    """The operators in a file of `stages.save_trace` over time, callees below their callers.

    What takes less than 0.2 % of the whole is not drawn; a name is written where it fits.
    """
    spans = _spans(json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"])
    whole = max(end for _, end, _, _ in spans)
    depths = 1 + max(depth for *_, depth in spans)
    with theme():
        figure, axes = plt.subplots(figsize=(9, 0.36 * depths + 1.9))
        for start, end, name, depth in spans:
            colour = OPERATOR_COLOURS.get(name, "#DDDDDD")
            axes.barh(depth, end - start, 0.85, left=start, color=colour, edgecolor="white", lw=0.5)
            text = name.removeprefix("aten::")
            if len(text) * 0.08 < 8 * (end - start) / whole:  # inches
                axes.text((start + end) / 2, depth, text, ha="center", va="center", fontsize=9)
        backward = [start for start, _, name, _ in spans if name.endswith("Backward0")]
        if backward:
            axes.axvline(min(backward), color="black", ls="--", lw=1)
            axes.text(min(backward), -0.7, " backward", va="bottom")
        for name, colour in OPERATOR_COLOURS.items():
            axes.barh(0, 0, color=colour, label=name)
        axes.barh(0, 0, color="#DDDDDD", label="others")
        axes.set(xlim=(0, whole), ylim=(depths - 0.4, -1.3), yticks=[], title=title)
        axes.grid(False, axis="y")
        time_axis(axes.xaxis)
        axes.legend(ncols=5, loc="upper left", bbox_to_anchor=(0, -0.12), frameon=False)
        return finish(figure, note)


def _spans(events: Sequence[Mapping]) -> list[tuple[float, float, str, int]]:
    """(start, end, name, depth) of the operators, in seconds; autograd's own wrappers left out."""
    found = [
        (e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6, e["name"])
        for e in events
        if e.get("cat") == "cpu_op" and not e["name"].startswith("autograd::")
    ]
    found.sort(key=lambda span: (span[0], -span[1]))
    first, whole = found[0][0], max(end for _, end, _ in found) - found[0][0]
    open_, spans = [], []
    for start, end, name in found:
        if end - start < 0.002 * whole:
            continue
        while open_ and open_[-1] <= start:
            open_.pop()
        spans.append((start - first, end - first, name, len(open_)))
        open_.append(end)
    return spans
