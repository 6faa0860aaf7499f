"""The diagnosis as one self-contained HTML page, its figures inside."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import TYPE_CHECKING

from convlab.diagnosing.findings import Findings
from convlab.diagnosing.report import LINES, Section, sections, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 1.8em }
table { border-collapse: collapse; margin: .5em 0 } td, th { text-align: left; padding: .25em 1em
.25em 0; vertical-align: top; overflow-wrap: anywhere; border-bottom: 1px solid #ddd }
td.number, th.number { text-align: right; white-space: nowrap }
img { max-width: 100%; margin: .5em 0; display: block } small { color: #555 }
"""


def body(d: Findings) -> str:
    """The report and its figures, without the frame of a page."""
    from convlab.plots import image

    drawn = _figures(d)
    parts = [f"<h1>{html.escape(title(d))}</h1>"]
    for section in sections(d):
        parts.append(_section(section))
        for name, figure in drawn.pop(section.title, {}).items():
            parts.append(image(figure, name))
    parts.append(f"<p><small>{html.escape(d.caption)}</small></p>")
    return "\n".join(parts)


def save(d: Findings, path: str | os.PathLike) -> None:
    """Write the page.

    Raises:
        ValueError: `path` cannot be written.
    """
    text = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title(d))}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body(d)}\n</body></html>\n"
    )
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        text = f"html must be a file that can be written, got {str(path)!r}: {reason}"
        raise ValueError(text) from None


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    parts += [f"<p>{html.escape(sentence)}</p>" for sentence in section.sentences]
    if section.items:
        items = (
            f"<li><b>{html.escape(name)}</b><br>{'<br>'.join(map(html.escape, lines))}</li>"
            for name, lines in section.items
        )
        parts.append(f"<ol>{''.join(items)}</ol>")
    if section.rows:
        header, *rows = section.rows
        head = f"<thead>{_row(header, 'th', section.numbers)}</thead>" if any(header) else ""
        rest = "".join(_row(row, "td", section.numbers) for row in rows)
        parts.append(f"<table>{head}<tbody>{rest}</tbody></table>")
    return "\n".join(parts)


def _row(cells: tuple[str, ...], tag: str, numbers: int) -> str:
    first = len(cells) - numbers
    text = "".join(
        f"<{tag}{' class=number' if place >= first else ''}>{html.escape(cell)}</{tag}>"
        for place, cell in enumerate(cells)
    )
    return f"<tr>{text}</tr>"


def _figures(d: Findings) -> dict[str, dict[str, Figure]]:
    """Section → what a figure shows → the figure."""
    from convlab.plots import diagnosis as figures

    beside, note = {}, d.caption
    for name, table in (("Forward", d.times.forward), ("Training", d.times.train)):
        if table is not None:
            beside[f"{name} time"] = figures.beside(table, f"{name}: time of one call", note)
    peaks = d.times.forward["peak_bytes"]
    itemsize = d.dtype.itemsize
    count = 1
    for side in d.shape:
        count *= side
    held = {"input x": count * itemsize}
    if d.watched.columns:
        held["columns"] = d.watched.columns * itemsize
    held |= {str(name): value for name, value in peaks.items() if value is not None}
    beside["Memory"] = figures.memory(held, "Forward: highest memory above what was in use", note)
    found = {"Beside nn.Conv2d" if d.problem else "Time": beside}
    causes = {cause.name: cause.share for cause in d.causes if cause.seconds}
    if causes:
        text = "Share of the operators' time by cause (causes may overlap)"
        found["Known causes, the most important first"] = {
            "Share of each cause": figures.shares(causes, text, note)
        }
    lines = {
        f"{row['line']}  {row['source']}": row["share"] for _, row in d.lines.head(LINES).iterrows()
    }
    if lines:
        text = "Forward: share of the time by line"
        found["Forward, by line"] = {text: figures.shares(lines, text, note)}
    return found
