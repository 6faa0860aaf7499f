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
from convlab.plots.library import KINDS, layer_map, network_bars, switches, variant_colour
from convlab.plots.scaling import agreement, budget, heat, scaling, slope
from convlab.plots.verdicts import (
    VERDICT_COLOURS,
    copies,
    factor_dots,
    forest,
    ledger,
    measured_on,
    png,
    rule,
    thread_marks,
    verdict_grid,
)

__all__ = [
    "COLOURS",
    "KINDS",
    "OTHER",
    "STAGE_COLOURS",
    "VERDICT_COLOURS",
    "agreement",
    "bars",
    "budget",
    "copies",
    "errors",
    "factor_dots",
    "finish",
    "forest",
    "heat",
    "layer_map",
    "ledger",
    "lines",
    "measured_on",
    "network_bars",
    "png",
    "ratio_bars",
    "rule",
    "scaling",
    "slope",
    "stage_bars",
    "stage_shares",
    "switches",
    "theme",
    "thread_marks",
    "time_axis",
    "timeline",
    "trace",
    "variant_colour",
    "verdict_grid",
]
