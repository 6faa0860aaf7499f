"""The reader's line of code behind what is being run."""

from __future__ import annotations

import linecache
import sys
from dataclasses import dataclass
from pathlib import Path

from convlab.diagnosing.subject import HERE, TORCH

ENDS = ("call_layer", "run_backward")  # functions of this package that run the reader's code


@dataclass(frozen=True)
class Where:
    """A line of the reader's code."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}"


def find_line() -> tuple[Where | None, bool]:
    """The innermost line on the stack that is the reader's, and whether a checkpoint runs again.

    A library that the reader calls counts only where no frame of their own is left.
    """
    frame, library, again = sys._getframe(2), None, False
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(HERE) and frame.f_code.co_name in ENDS:
            break
        again = again or file.endswith("checkpoint.py")
        if not file.startswith((TORCH, HERE, "<frozen")):
            installed = file.startswith((sys.prefix, sys.base_prefix)) or file.startswith("<")
            where = _where(file, frame.f_lineno)
            if not installed:
                return where, again
            library = library or where
        frame = frame.f_back
    return library, again


def _where(file: str, line: int) -> Where:
    return Where(file, line, linecache.getline(file, line).strip())
