"""One function per kind of figure; one colour per algorithm everywhere.

The colours are Okabe and Ito's, told apart by colour-blind readers.
"""

from convlab.plots.basics import (
    COLOURS,
    OTHER,
    STAGE_COLOURS,
    bars,
    errors,
    finish,
    lines,
    ratio_bars,
    stage_bars,
    stage_shares,
    theme,
    time_axis,
    timeline,
    trace,
)

__all__ = [
    "COLOURS",
    "OTHER",
    "STAGE_COLOURS",
    "bars",
    "errors",
    "finish",
    "lines",
    "ratio_bars",
    "stage_bars",
    "stage_shares",
    "theme",
    "time_axis",
    "timeline",
    "trace",
]
