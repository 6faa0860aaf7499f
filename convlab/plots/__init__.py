"""One function per kind of figure; one colour per algorithm everywhere.

The colours are Okabe and Ito's, told apart by colour-blind readers, and for the ladder lighter and
darker relatives of them.
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
from convlab.plots.guide import gains, tree
from convlab.plots.kernel import above_floor, roofline, traffic, waste
from convlab.plots.ladder import at_a_time, dumbbells, front, ladder_map, rungs, trade, versus
from convlab.plots.library import KINDS, layer_map, network_bars, switches, variant_colour
from convlab.plots.scaling import agreement, budget, heat, scaling, slope
from convlab.plots.training import PART_COLOURS, accuracy_dots, loss_curves, step_parts
from convlab.plots.verdicts import (
    VERDICT_COLOURS,
    copies,
    factor_dots,
    forest,
    image,
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
    "PART_COLOURS",
    "STAGE_COLOURS",
    "VERDICT_COLOURS",
    "above_floor",
    "accuracy_dots",
    "agreement",
    "at_a_time",
    "bars",
    "budget",
    "copies",
    "dumbbells",
    "errors",
    "factor_dots",
    "finish",
    "forest",
    "front",
    "gains",
    "heat",
    "image",
    "ladder_map",
    "layer_map",
    "ledger",
    "lines",
    "loss_curves",
    "measured_on",
    "network_bars",
    "png",
    "ratio_bars",
    "roofline",
    "rule",
    "rungs",
    "scaling",
    "slope",
    "stage_bars",
    "stage_shares",
    "step_parts",
    "switches",
    "theme",
    "thread_marks",
    "time_axis",
    "timeline",
    "trace",
    "trade",
    "traffic",
    "tree",
    "variant_colour",
    "verdict_grid",
    "versus",
    "waste",
]
