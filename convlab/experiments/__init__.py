"""The named experiments; notebooks, `reproduce` and `record` run these and nothing else.

An experiment is a list of cases. A case measures everything that is to be compared, together, in
interleaved rounds, and its rows are written at once: what was measured is on disk before the next
case begins.
"""

from convlab.experiments.cases import (
    Case,
    Settings,
    compare_case,
    measured,
    one_pass,
    short_name,
    training_step,
)
from convlab.experiments.facts import ceilings_case, ceilings_of, stages_case, storage_case
from convlab.experiments.kernel import error_case, kernel_case, roofs_of
from convlab.experiments.library import VARIANTS, Variant, library_case
from convlab.experiments.mistakes import mistakes_case
from convlab.experiments.named import (
    EXPERIMENTS,
    LAYER,
    PAIR,
    REPEATED,
    REPRODUCE,
    SCALES,
    Experiment,
)
from convlab.experiments.networks import NETWORKS, network_case
from convlab.experiments.sessions import (
    Progress,
    by_machine,
    last_session,
    latest,
    plan,
    run,
    run_case,
)

__all__ = [
    "EXPERIMENTS",
    "LAYER",
    "NETWORKS",
    "PAIR",
    "REPEATED",
    "REPRODUCE",
    "SCALES",
    "VARIANTS",
    "Case",
    "Experiment",
    "Progress",
    "Settings",
    "Variant",
    "by_machine",
    "ceilings_case",
    "ceilings_of",
    "compare_case",
    "error_case",
    "kernel_case",
    "last_session",
    "latest",
    "library_case",
    "measured",
    "mistakes_case",
    "network_case",
    "one_pass",
    "plan",
    "roofs_of",
    "run",
    "run_case",
    "short_name",
    "stages_case",
    "storage_case",
    "training_step",
]
