"""What every notebook shows the same way: predictions, sentences with numbers, tables, captions."""

from __future__ import annotations

import html
import os
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from convlab import machine
from convlab.timing import seconds, size

if TYPE_CHECKING:
    import pandas as pd

QUICK = os.environ.get("CONVLAB_QUICK") == "1"
"""Set by the test suite: fewer samples and smaller batches, same cells."""


def device() -> str:
    """ "cuda" where PyTorch sees a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def caption(device: str = "cpu") -> str:
    """Machine, threads, allocator, versions and date, for the foot of a figure or table."""
    flags = machine.flags()
    where = machine.name(device)
    if device == "cpu":
        threads = flags["threads"]
        where += f", {threads} thread{'s' if threads != 1 else ''}, {flags['allocator']}"
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return f"{where}, torch {machine.versions()['torch']}, {when}"


def answer(text: str, summary: str = "Show the answer", **values: object) -> None:
    """Display `text` folded away under `summary`; `values` as in `say`."""
    from IPython.display import HTML, display

    body = html.escape(_filled(text, values), quote=False)
    display(HTML(f"<details><summary><b>{html.escape(summary)}</b></summary>{body}</details>"))


def say(text: str, **values: object) -> None:
    """Display a sentence of Markdown with measured values in its {braces}.

    Values are formatted in the braces: `{t:time}` (seconds), `{n:bytes}`, or any format of Python.
    """
    from IPython.display import Markdown, display

    display(Markdown(_filled(text, values)))


def table(frame: pd.DataFrame, note: str | None = None, **formats: str) -> None:
    """Display `frame` with its columns formatted ("time", "bytes" or a Python format) and a foot.

    Args:
        note: the foot; the machine's caption if None.
        formats: column name → format.
    """
    from IPython.display import HTML, display

    shown = frame.copy().astype(object)
    for column, spec in formats.items():
        values = frame[column].astype(object).where(frame[column].notna(), None)
        shown[column] = [_Value(v).__format__(spec) for v in values]
    foot = html.escape(caption() if note is None else note)
    style = "text-align:left;white-space:pre-line;max-width:40em"
    text = _marked(shown).to_html(border=0, justify="left").replace(LINE_END, "<br>")
    text = text.replace("<td>", f'<td style="{style}">')
    display(HTML(f"{text}<p><small>{foot}</small></p>"))


LINE_END = "\ue000"  # a private character: pandas would write a line's end as backslash and n


def _marked(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with `LINE_END` for every line's end in its texts, labels included."""

    import pandas as pd

    def mark(value: object) -> object:
        return value.replace("\n", LINE_END) if isinstance(value, str) else value

    marked = frame.rename(index=mark, columns=mark)
    for i in range(marked.shape[1]):  # by place: names may occur twice
        values = [mark(value) for value in marked.iloc[:, i]]
        marked.isetitem(i, pd.Series(values, marked.index, dtype=object))
    return marked


class _Value:
    """Adds the formats "time" and "bytes" to a number's own."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __format__(self, spec: str) -> str:
        if self.value is None or self.value != self.value:
            return "–"
        if spec == "time":
            return seconds(float(self.value))
        if spec == "bytes":
            return size(float(self.value))
        return format(self.value, spec)


def _filled(text: str, values: dict[str, object]) -> str:
    return text.format(**{k: _Value(v) for k, v in values.items()})
