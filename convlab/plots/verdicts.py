"""The verdicts on the thread's claims: a grid, the figure behind each, and rows that fold out."""

from __future__ import annotations

import base64
import html
import io
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from convlab import thread
from convlab.plots.basics import finish, theme
from convlab.records import Row
from convlab.thread import DEPENDS, FAILS, HOLDS, UNKNOWN, Claim, Interval, Verdict

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VERDICT_COLOURS = {HOLDS: "#0072B2", DEPENDS: "#F0E442", FAILS: "#D55E00", UNKNOWN: "#CCCCCC"}
SIDES = {HOLDS: "inside", FAILS: "outside", DEPENDS: "across the edge"}
THREAD = "the thread's own figures (no interval known)"
IMAGE_COLOURS = 24  # of a folded figure, so that twelve of them stay small

MEANINGS = {
    "T1": "F.unfold and F.fold return views",
    "T2": "unfold and fold with their copies / all stages, forward and backward",
    "T3": "training step: the thread's layer / nn.Conv2d",
    "T4": "fold / all of forward",
    "T5": "product / unfold, forward",
    "T6": "backward / forward",
    "T7": "unfold and fold with their copies / extra time over nn.Conv2d, training",
    "T8": "the thread's layer / nn.Conv2d",
    "T9": "inference: the thread's layer / nn.Conv2d",
    "T10": "training step: nn.Conv2d without its library / the thread's layer",
    "T11": "training step: nn.Conv2d without its library / with it",
    "T12": "the thread's layer / the fastest form without the library's convolution",
}
"""Claim → what its figure is: which time over which."""

CONDITIONS = {
    "T4": ", and F.fold copies nothing",
    "T8": " everywhere; one clear exception refutes it",
    "T12": " everywhere; one clear exception refutes it",
}

_THREAD: dict[str, Callable[[dict[str, float]], dict[str, float]]] = {
    "T2": lambda f: {"CPU, 512 images": _stage_share(f) / _both(f, "custom")},
    "T3": lambda f: {
        "GPU, batch 256": f["train_custom"] / f["train_conv"],
        "GPU, first report": f["train_custom_first"] / f["train_conv_first"],
    },
    "T4": lambda f: {"CPU, 512 images": f["b512_fold"] / f["b512_forward_custom"]},
    "T5": lambda f: {"CPU, 512 images": f["b512_product"] / f["b512_unfold"]},
    "T6": lambda f: {
        "CPU, 512 images": f["b512_backward_custom"] / f["b512_forward_custom"],
    },
    "T7": lambda f: {
        "CPU, 512 images": _stage_share(f) / (_both(f, "custom") - _both(f, "conv")),
    },
    "T8": lambda f: {
        "CPU, 512 images, forward": f["b512_forward_custom"] / f["b512_forward_conv"],
        "CPU, 512 images, backward": f["b512_backward_custom"] / f["b512_backward_conv"],
    },
    "T9": lambda f: {"GPU": f["inference_custom"] / f["inference_conv"]},
    "T11": lambda f: {"GPU": f["train_cudnn_off"] / f["train_cudnn_on"]},
}


def _both(f: dict[str, float], layer: str) -> float:
    """Forward and backward of "conv" or "custom" in the thread's CPU run, seconds."""
    return f[f"b512_forward_{layer}"] + f[f"b512_backward_{layer}"]


def _stage_share(f: dict[str, float]) -> float:
    """Unfold and fold, forward and backward, in the thread's CPU run, seconds."""
    names = ("unfold", "fold", "backward_unfold", "backward_fold")
    return sum(f[f"b512_{name}"] for name in names)


def thread_marks() -> dict[str, dict[str, float]]:
    """Claim → where → the thread's own figure in the unit of `MEANINGS`, where it gave one.

    Raises:
        RecordError: `data/thread.json` is missing or damaged.
    """
    figures = thread.figures()
    return {claim: marks(figures) for claim, marks in _THREAD.items()}


def rule(claim_id: str, found: Iterable[Verdict]) -> str:
    """When the claim counts as right, in one sentence; `found` are verdicts that its rule gave."""
    verdict = next((v for v in found if np.isfinite(v.claimed).any()), None)
    meaning = MEANINGS[claim_id]
    if verdict is None:
        return f"Right where {meaning}." if claim_id == "T1" else f"Judged by: {meaning}."
    within = f"{_range(*verdict.claimed, verdict.style)}{CONDITIONS.get(claim_id, '')}"
    return f"Right where ({meaning}) is {within}."


def _range(low: float, high: float, style: str) -> str:
    """ "between 2× and 4×", "at least 50%" or "at most 5%"."""
    ends = [f"{v:.0%}" if style == "%" else f"{v:.3g}×" for v in (low, high)]
    if math.isfinite(low) and math.isfinite(high) and low > 0:
        return f"between {ends[0]} and {ends[1]}"
    return f"at least {ends[0]}" if math.isfinite(low) and low > 0 else f"at most {ends[1]}"


def verdict_grid(words: pd.DataFrame, title: str, note: str) -> Figure:
    """Coloured cells with one verdict each: a row per claim, a column per machine or session.

    Raises:
        ValueError: a cell holds something other than a verdict.
    """
    for word in words.to_numpy().ravel():
        if word not in VERDICT_COLOURS:
            known = ", ".join(map(repr, VERDICT_COLOURS))
            raise ValueError(f"words must be verdicts ({known}), got {word!r}")
    height, width = words.shape
    column = min(1.75, max(1.0, 6.4 / width))  # inches: up to six columns fit on a page
    with theme():
        figure, axes = plt.subplots(figsize=(4.6 + column * width, 1.5 + 0.43 * height))
        for (y, x), word in np.ndenumerate(words.to_numpy()):
            colour = VERDICT_COLOURS[word]
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", lw=3))
            ink = _ink(colour)
            axes.text(x + 0.5, y + 0.5, word, ha="center", va="center", color=ink, fontsize=9.5)
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_xticks(
            np.arange(width) + 0.5, [_wrapped(c, int(11.5 * column)) for c in words.columns]
        )
        axes.set_yticks(np.arange(height) + 0.5, [_wrapped(c, 50) for c in words.index], fontsize=9)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        return finish(figure, note)


def forest(
    panels: Mapping[str, Verdict],
    meaning: str,
    title: str,
    note: str,
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """Every figure behind a claim with its 95 % interval; the claim's range is shaded.

    Args:
        panels: machine → its verdict, one panel each.
        meaning: what the figures are, for the axis.
        marks: where → the thread's own figure, drawn above the others.
    """
    decided = [v for v in panels.values() if v.intervals]
    claimed, style = (decided[0].claimed, decided[0].style) if decided else ((-np.inf, np.inf), "×")
    groups = {f"{name}: {v.verdict}": v.intervals for name, v in panels.items()}
    if marks:
        groups = {THREAD: [Interval(w, v, v, v) for w, v in marks.items()], **groups}
    limits = _limits([f for group in groups.values() for f in group], claimed, style)
    sizes = [max(len(group), 1) for group in groups.values()]
    with theme():
        figure, panes = plt.subplots(
            len(sizes),
            sharex=True,
            squeeze=False,
            figsize=(8.5, 0.25 * sum(sizes) + 0.5 * len(sizes) + 1.1),
            height_ratios=sizes,
        )
        for axes, (name, intervals) in zip(panes[:, 0], groups.items(), strict=True):
            axes.set_title(name, fontsize=10)
            axes.axvspan(*np.clip(claimed, *limits), color=VERDICT_COLOURS[HOLDS], alpha=0.13, lw=0)
            _panel(axes, intervals, None if name == THREAD else claimed, limits, style)
        _scale(panes[-1, 0], limits, style, claimed)
        shaded = f"shaded: {_range(*claimed, style)}" if decided else "not measured"
        panes[-1, 0].set_xlabel(f"{meaning}\n({shaded})")
        figure.suptitle("\n".join(textwrap.wrap(title, 90)), x=0.01, ha="left", fontweight="bold")
        return finish(figure, note)


def _panel(
    axes: Axes,
    intervals: Sequence[Interval],
    claimed: tuple[float, float] | None,
    limits: tuple[float, float],
    style: str,
) -> None:
    """A line per interval, its marker in the colour of its side of `claimed` (None: no side).

    Ends beyond the axis become arrows.
    """
    axes.set_yticks(range(len(intervals)), [f.where for f in intervals], fontsize=9)
    axes.set_ylim(max(len(intervals), 1) - 0.4, -0.6)
    axes.grid(False, axis="y")
    if not intervals:
        axes.text(0.5, 0.5, "no figure", ha="center", va="center", transform=axes.transAxes)
    for y, f in enumerate(intervals):
        side = None if claimed is None else f.against(*claimed)
        axes.hlines(y, *np.clip((f.low, f.high), *limits), color="#333333", lw=2)
        for end, arrow, beyond in zip(limits, "<>", (f.low < limits[0], f.high > limits[1])):
            if beyond:
                axes.plot(end, y, arrow, color="#333333", clip_on=False)
        face = VERDICT_COLOURS[side] if side else "black"
        shape = {HOLDS: "o", FAILS: "s", DEPENDS: "D", None: "d"}[side]
        axes.plot(np.clip(f.value, *limits), y, shape, color=face, mec="black", ms=7, zorder=3)
        text = f"{f.text(style)}  {SIDES[side]}" if side else f.text(style).partition(" ")[0]
        right = axes.get_yaxis_transform()
        axes.text(1.01, y, text, va="center", fontsize=9, transform=right)


def _limits(
    intervals: Iterable[Interval], claimed: tuple[float, float], style: str
) -> tuple[float, float]:
    """Of the axis: all values and edges, and ends as far as a fifth or five times of those."""
    intervals = list(intervals)
    usable = lambda v: math.isfinite(v) and (v > 0 or style == "%")
    middle = [v for v in (*(f.value for f in intervals), *claimed) if usable(v)]
    if not middle:
        return (0.0, 1.0) if style == "%" else (0.5, 2.0)
    ends = [v for f in intervals for v in (f.low, f.high) if usable(v)]
    if style == "%":
        top = min(max([*middle, *ends]), 2 * max(middle))
        bottom = max(min([*middle, *ends]), -0.5 * top)
        return min(0.0, 1.1 * bottom), max(1.08 * top, 0.1)
    low, high = (
        max(min([*middle, *ends]), min(middle) / 5),
        min(max([*middle, *ends]), 5 * max(middle)),
    )
    return low / 1.12, high * 1.12


STEPS = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 2, 4, 3, 6, 8, 1.5),
    (1, 2, 5, 3, 4, 6, 8, 1.5, 7, 9, 2.5, 1.2, 1.75),
)
"""Ticks of a decade, few or many, the most wanted first."""

APART = 0.13  # of the axis, that the labels of two ticks do not touch


def _scale(
    axes: Axes, limits: tuple[float, float], style: str, edges: tuple[float, ...] = ()
) -> None:
    """Percent on a linear axis; ratios on a logarithmic one, ticks at `edges` and at round ones."""
    if style == "%":
        axes.set_xlim(*limits)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        return
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(limits, edges)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))


def _ticks(limits: tuple[float, float], edges: tuple[float, ...]) -> list[float]:
    """`edges` and round values between `limits`, at least four where they fit beside each other."""
    low, high = limits
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    gap = APART * math.log(high / low)
    for steps in STEPS:
        ticks: list[float] = []
        for tick in (*edges, *(s * 10.0**n for s in steps for n in tens)):
            if low <= tick <= high and all(abs(math.log(tick / t)) >= gap for t in ticks):
                ticks.append(tick)
        if len(ticks) >= 4:
            break
    return sorted(ticks)


DOTS = {"o": "#009E73", "s": "#CC79A7", "D": "#56B4E9", "^": "#E69F00", "v": "#999999"}


def factor_dots(frame: pd.DataFrame, label: str, title: str, note: str) -> Figure:
    """Factors of at least 1 on a logarithmic axis: a row per claim, a marker per column.

    NaN is left out.
    """
    height, width = frame.shape
    shapes = [list(DOTS.items())[i % len(DOTS)] for i in range(width)]
    with theme():
        figure, axes = plt.subplots(figsize=(8.5, (0.17 * width + 0.2) * height + 1.9))
        shifts = (np.arange(width) - (width - 1) / 2) * 0.75 / max(width, 1)
        for name, shift, (shape, colour) in zip(frame, shifts, shapes, strict=True):
            y = np.arange(height) + shift
            axes.plot(frame[name], y, shape, color=colour, mec="black", ms=7, label=name)
            for x, at in zip(frame[name], y, strict=True):
                if np.isfinite(x):
                    beside = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
                    axes.annotate(f"{x:.3g}×", (x, at), fontsize=8, **beside)
        finite = [x for x in frame.to_numpy().ravel() if np.isfinite(x)]
        _scale(axes, (0.96, 1.3 * max([1.2, *finite])), "×")
        axes.axvline(1, color="black", lw=1)
        for y in range(1, height):
            axes.axhline(y - 0.5, color="#DDDDDD", lw=0.8)
        axes.grid(False, axis="y")
        axes.set_yticks(range(height), [_wrapped(c, 50) for c in frame.index], fontsize=9)
        axes.set_ylim(height - 0.5, -0.5)
        axes.set(xlabel=label, title=title)
        below = -0.75 / (figure.get_figheight() - 1.5)
        axes.legend(loc="upper left", bbox_to_anchor=(0, below), frameon=False)
        return finish(figure, note)


# Rows that fold out


def badge(word: str) -> str:
    """HTML: the verdict as a word on its colour."""
    colour = VERDICT_COLOURS[word]
    style = f"background-color:{colour};color:{_ink(colour)};padding:0 6px;border-radius:4px"
    return f'<b style="{style}">{html.escape(word)}</b>'


def png(figure: Figure, dpi: float = 72) -> bytes:
    """`figure` as a PNG of few colours, which is much smaller."""
    from PIL import Image

    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
    full, method = Image.open(buffer).convert("RGB"), Image.Quantize.MAXCOVERAGE
    few = full.quantize(IMAGE_COLOURS, method, kmeans=1)
    few.save(small, "PNG", optimize=True)
    return small.getvalue()


def image(figure: Figure, alt: str) -> str:
    """HTML: `figure` as an embedded PNG."""
    data = base64.b64encode(png(figure)).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def copies(machines: Mapping[str, Sequence[Row]], names: Sequence[str] = ()) -> pd.DataFrame:
    """Operation × machine: a view, or a copy and how much it writes; `names`: only these."""
    import pandas as pd

    facts = {machine: thread.storage(rows) for machine, rows in machines.items()}
    names = names or list(dict.fromkeys(name for found in facts.values() for name in found))
    words = {
        machine: [_copied(found.get(name)) for name in names] for machine, found in facts.items()
    }
    return pd.DataFrame(words, index=pd.Index(names, name="operation"))


def _copied(fact: dict | None) -> str:
    if fact is None:
        return UNKNOWN
    if fact["view"]:
        return "a view, writes nothing"
    return f"a copy, writes {fact['bytes_written'] / fact['bytes_in']:.3g}× its input"


def ledger(machines: Mapping[str, Sequence[Row]]) -> str:
    """HTML: one row per claim with its verdicts, which folds out into the figure that decides it.

    Args:
        machines: name → the rows of one session of that machine and device.
    """
    judged = {name: thread.judge(rows) for name, rows in machines.items()}
    figures, marks = thread.figures(), thread_marks()
    folded = []
    for i, claim in enumerate(thread.CLAIMS):
        found = {name: verdicts[i][1] for name, verdicts in judged.items()}
        words = ", ".join(f"{html.escape(name)}: {badge(v.verdict)}" for name, v in found.items())
        summary = (
            f"<b>{claim.id}</b> {html.escape(claim.text)} "
            f"(<i>the thread: {html.escape(claim.figure(figures))}</i>)<br>{words}"
        )
        body = _body(claim, found, machines, marks.get(claim.id, {}))
        folded.append(f"<details><summary>{summary}</summary>{body}</details><hr>")
    return "\n".join(folded)


def _body(
    claim: Claim,
    found: Mapping[str, Verdict],
    machines: Mapping[str, Sequence[Row]],
    marks: Mapping[str, float],
) -> str:
    """The rule, the reasons, the facts about copies where they count, and the figure."""
    parts = [f"<p>{html.escape(rule(claim.id, found.values()))}</p>", "<ul>"]
    parts += [
        f"<li>{html.escape(name)}: <b>{v.verdict}</b>. {html.escape(v.reason)}</li>"
        for name, v in found.items()
    ]
    parts.append("</ul>")
    if claim.id in ("T1", "T4"):
        names = ("F.fold",) if claim.id == "T4" else ()
        parts.append(copies(machines, names).to_html(border=0, justify="left"))
    note = "; ".join(measured_on(rows) for rows in machines.values())
    if any(v.intervals for v in found.values()):
        drawn = forest(found, MEANINGS[claim.id], f"{claim.id} {claim.text}", note, marks)
        alt = "; ".join(f"{name}: {v.figure}" for name, v in found.items())
        parts.append(image(drawn, alt))
    else:
        parts.append(f"<p><small>{html.escape(note)}</small></p>")
    return "".join(parts)


def measured_on(rows: Sequence[Row]) -> str:
    """`thread.title`, and what "memory kept" means where only some rows are."""
    mixed = len({thread.kept(row) for row in rows}) == 2
    more = ', "memory kept": malloc set to keep freed memory' if mixed else ""
    return (thread.title(rows) if rows else UNKNOWN) + more


def _ink(colour: str) -> str:
    """Black or white, whichever is told better from `colour`."""
    red, green, blue = mpl.colors.to_rgb(colour)
    return (
        "white" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.18 else "black"
    )


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(str(text), width))
