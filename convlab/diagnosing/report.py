"""The diagnosis in words and tables: sections that the terminal and the page both show."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from convlab.diagnosing.findings import Findings, Gain
from convlab.diagnosing.measure import CONV, LAYER
from convlab.timing import seconds, size

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Group

LINES = OPERATORS = 6
CAUSES = 8
ONE_DIGIT = 9.95  # ratios below are shown with two decimals
NOTHING_TO_WIN = 1.15
WIDTH = 100


@dataclass
class Section:
    """A heading, sentences, numbered items (a name and its lines), a table with its header."""

    title: str
    sentences: list[str] = field(default_factory=list)
    items: list[tuple[str, list[str]]] = field(default_factory=list)
    rows: list[tuple[str, ...]] = field(default_factory=list)
    numbers: int = 0  # columns at the end that hold numbers


def sections(d: Findings) -> list[Section]:
    """All parts of the report, the answer first."""
    parts = [_answer(d), _causes(d), _compared(d), _lines(d), _operators(d), _branch(d)]
    if d.notes:
        parts.append(Section("Limits of this diagnosis", list(d.notes)))
    return [part for part in parts if part.sentences or part.rows]


def title(d: Findings) -> str:
    """Layer, input and type."""
    sizes = "×".join(map(str, d.shape))
    return f"{d.layer} on {sizes}, {str(d.dtype).removeprefix('torch.')}, {d.device}"


def _answer(d: Findings) -> Section:
    part = Section("In short")
    speed = [
        f"{name} takes {factor(table.loc[LAYER, 'ratio'])} the time of nn.Conv2d"
        for name, table in (("forward", d.times.forward), ("training", d.times.train))
        if table is not None and CONV in table.index
    ]
    if speed:
        text = " and ".join(speed)
        part.sentences.append(f"{text[0].upper()}{text[1:]} of the same sizes ({d.problem}).")
    if d.causes:
        first = d.causes[0]
        share = f", {first.share:.0%} of the operators' time" if first.share >= 0.005 else ""
        part.sentences.append(f"First cause: {first.name}{share}.")
    else:
        part.sentences.append("None of the known causes was found.")
    if d.branch:
        unsure = "" if d.kind.sure else ", probably"
        part.sentences.append(f"Kind of layer: {d.branch.title}{unsure} ({d.kind.why}).")
    for word, text in zip(("Try first", "Then", "Then"), advice(d)):
        part.sentences.append(f"{word}: {text}")
    return part


def advice(d: Findings) -> list[str]:
    """What to try, in order, with what it can bring."""
    steps = []
    spoiling = [cause for cause in d.causes if cause.rank[0] == 0]
    steps += [cause.advice + "." for cause in spoiling]
    gains = [gain for gain in d.gains if gain.factor > NOTHING_TO_WIN]
    if d.branch and gains:
        steps.append(f"{d.branch.action}. Expected: {'; '.join(map(gain_text, gains))}.")
    elif d.branch and d.gains:
        steps.append("nothing else: it is about as fast as nn.Conv2d of the same sizes.")
    working = [c for c in d.causes if c.rank[0] == 1 and c.gain]
    if not gains and working and not d.gains:
        cause = working[0]
        text = f" Expected: at most {factor(cause.gain)} faster (if all its time vanished)"
        steps.append(f"{cause.advice}.{text}.")
    return steps


def gain_text(gain: Gain) -> str:
    """ "forward 12× faster [11× … 13×], measured", or a bound."""
    if gain.how == "measured":
        interval = f" [{factor(gain.low)} … {factor(gain.high)}]"
        return f"{gain.what} {factor(gain.factor)} faster{interval}, measured"
    return (
        f"{gain.what} at most {factor(gain.factor)} faster (a bound: nn.Conv2d of the same sizes)"
    )


def factor(value: float) -> str:
    """3.52×, 12.3×, 251×."""
    if value < ONE_DIGIT:
        return f"{value:.2f}×"
    return f"{value:.1f}×" if value < 10 * ONE_DIGIT else f"{value:.0f}×"


def _causes(d: Findings) -> Section:
    part = Section("Known causes, the most important first")
    for cause in d.causes[:CAUSES]:
        time = f": {seconds(cause.seconds)}, {cause.share:.0%}" if cause.seconds else ""
        bound = ""
        if cause.gain and cause.gain > NOTHING_TO_WIN:
            bound = f" Bound: {factor(cause.gain)} faster in all, if its time vanished."
        part.items.append(
            (f"{cause.name}{time}", [f"Seen: {cause.evidence}.", f"Do: {cause.advice}.{bound}"])
        )
    if part.items:
        part.sentences.append(
            "Ranked by the memory traffic and operator calls counted in one forward and backward "
            f"pass. Times: measured in these operators, median of {d.watched.passes}, and their "
            f"share of the {seconds(d.watched.seconds())} of all."
        )
    return part


def _compared(d: Findings) -> Section:
    part = Section("Beside nn.Conv2d" if d.problem else "Time", numbers=4)
    part.rows.append(("pass", "what", "median", "ratio", "95 %", "memory"))
    for name, table in (("forward", d.times.forward), ("training", d.times.train)):
        for what, row in [] if table is None else table.iterrows():
            interval = f"{factor(row['ratio_low'])} … {factor(row['ratio_high'])}"
            memory = "–" if row["peak_bytes"] is None else size(row["peak_bytes"])
            alone = what == LAYER and not d.problem
            ratios = ("–", "–") if alone else (factor(row["ratio"]), interval)
            part.rows.append((name, str(what), seconds(row["median"]), *ratios, memory))
    part.sentences.append(
        "Forward without gradients; training: forward, backward, gradients of x and the parameters."
        f" Backward alone, by difference: {_backward(d)}. Memory: highest above what was in use."
        f" First call: {seconds(d.first_seconds)}."
    )
    if d.times.launches is not None:
        part.sentences.append(f"Kernel launches in forward: {d.times.launches}.")
    return part


def _backward(d: Findings) -> str:
    if d.times.backward is None:
        return "none, the output requires no gradient"
    if d.times.backward <= 0:
        return "not to be told, the times scatter too much"
    return seconds(d.times.backward)


def _lines(d: Findings) -> Section:
    part = Section("Forward, by line", numbers=3)
    part.rows.append(("line", "source", "operators", "time", "share"))
    for _, row in d.lines.head(LINES).iterrows():
        shown = row["line"], row["source"], str(row["calls"]), seconds(row["seconds"])
        part.rows.append((*shown, f"{row['share']:.0%}"))
    return part if len(part.rows) > 1 else Section("")


def _operators(d: Findings) -> Section:
    part = Section("By operator (torch.profiler, one call)", numbers=3)
    part.rows.append(("pass", "operator", "calls", "time", "share"))
    for name, frame in d.times.operators.items():
        for operator, row in costliest(frame).iterrows():
            calls, taken = f"{row['calls']:.0f}", seconds(row["self_seconds"])
            shown = {"train": "training"}.get(name, name)
            part.rows.append((shown, str(operator), calls, taken, f"{row['share']:.0%}"))
    return part if len(part.rows) > 1 else Section("")


def costliest(frame: pd.DataFrame) -> pd.DataFrame:
    """The operators worth a line."""
    return frame[frame["self_seconds"] > 0].head(OPERATORS)


def _branch(d: Findings) -> Section:
    part = Section("Decision guide")
    tests = ", ".join(
        f"{name}: {'yes' if yes else 'no'}" for name, yes in d.behaviour.facts.items()
    )
    if tests:
        part.sentences.append(f"Tests with random images: {tests}.")
    if d.branch is None:
        part.sentences.append(f"No branch could be told: {d.kind.why or 'no test decided'}.")
        return part
    branch = d.branch
    part.rows = [
        ("", ""),
        ("branch", branch.title + ("" if d.kind.sure else " (a guess)")),
        ("because", d.kind.why),
        ("applies when", branch.when),
        ("do", branch.action),
        ("code", branch.code),
        ("examples", branch.examples),
    ]
    return part


def as_rich(d: Findings) -> Group:
    """The report for a terminal."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    parts: list = [Text(title(d), style="bold")]
    for section in sections(d):
        parts += [Text(), Text(section.title, style="bold cyan")]
        parts += [Padding(Text(sentence), (0, 0, 0, 2)) for sentence in section.sentences]
        for number, (name, lines) in enumerate(section.items, 1):
            parts.append(Padding(Text(f"{number}. {name}", style="bold"), (0, 0, 0, 2)))
            parts += [Padding(Text(line), (0, 0, 0, 5)) for line in lines]
        if section.rows:
            header, *rows = section.rows
            table = Table(show_header=any(header), box=None, padding=(0, 2, 0, 0))
            for place, name in enumerate(header):
                right = place >= len(header) - section.numbers
                table.add_column(Text(name), justify="right" if right else "left", overflow="fold")
            for row in rows:
                table.add_row(*map(Text, row))
            parts.append(Padding(table, (0, 0, 0, 2)))
    return Group(*parts, Text(), Text(d.caption, style="dim"))


def as_text(d: Findings) -> str:
    """The same without colour."""
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=WIDTH, color_system=None).print(as_rich(d))
    return file.getvalue()
