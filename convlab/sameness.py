"""Do two algorithms train the same network? Their loss curves, beside the noise of rounding.

Two correct convolutions add the same products in another order (`winograd` and `fft` add other
products), so their losses differ by rounding from the first steps on, and training lets every
difference grow. How much is too much is told by PyTorch's own convolution: as called, in another
layout, without its library. Those are three orders of one sum too, and what lies between them is
noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from convlab.datasets import Dataset
from convlab.networks import seeded
from convlab.swap import swap_convolutions
from convlab.timing import CONFIDENCE
from convlab.training import History, Recipe, train

if TYPE_CHECKING:
    import pandas as pd

YARDSTICKS = ("native_channels_last", "native_no_library")
"""The same library function in another layout, and another implementation of it."""


def train_each(
    make: Callable[[], nn.Module],
    data: Dataset,
    recipe: Recipe,
    algorithms: Sequence[str],
    seed: int = 0,
    *,
    device: str = "cpu",
    folder: str | Path | None = None,
    progress: bool = False,
) -> dict[str, History]:
    """Train one network, from the same weights on the same batches, by each algorithm.

    Args:
        make: the network, without arguments; its weights are drawn from `seed`.
        folder: for checkpoints, one per algorithm and seed: a stopped run goes on there.
    """
    first, found = seeded(make, seed), {}
    for name in algorithms:
        model = swap_convolutions(copy.deepcopy(first), name)
        path = None if folder is None else Path(folder) / f"{name}-{seed}.pt"
        options = {"device": device, "checkpoint": path, "progress": progress}
        found[name] = train(model, data, recipe, seed, label=f"{name}, seed {seed}", **options)
    return found


def distances(histories: Mapping[str, History], reference: str = "native") -> pd.DataFrame:
    """Largest difference of each loss curve to the reference's so far, step by step.

    Returns:
        Index step (0 …), a column for each name but the reference.

    Raises:
        ValueError: the reference is not among them, or the curves have not the same steps.
    """
    import pandas as pd

    if reference not in histories:
        known = ", ".join(histories)
        raise ValueError(f"reference must be one of {known}, got {reference!r}")
    steps = {len(h.losses) for h in histories.values()}
    if len(steps) > 1:
        raise ValueError(f"histories must have the same number of steps, got {sorted(steps)}")
    base = np.array(histories[reference].losses)
    columns = {
        name: np.maximum.accumulate(np.abs(np.array(h.losses) - base))
        for name, h in histories.items()
        if name != reference
    }
    return pd.DataFrame(columns).rename_axis("step")


def noise_table(
    histories: Mapping[str, History],
    reference: str = "native",
    yardsticks: Iterable[str] = YARDSTICKS,
) -> pd.DataFrame:
    """How far every curve lies from the reference's, in units of what the yardsticks do.

    Returns:
        Index: the names. `first`: difference of the first step's loss; `largest`: of any step's;
        `times_noise`: the running largest difference over that of the yardsticks, as a median
        over the steps; `accuracy`.

    Raises:
        ValueError: a yardstick is missing, or does not differ from the reference at all.
    """
    import pandas as pd

    found, yardsticks = distances(histories, reference), list(yardsticks)
    if missing := [name for name in yardsticks if name not in found]:
        raise ValueError(f"yardsticks must be among the histories, got {missing[0]!r}")
    noise = found[yardsticks].max(axis=1)
    counted = noise > 0
    if not counted.any():
        raise ValueError(f"yardsticks must differ from {reference!r}, got the same losses")
    rows = {
        name: {
            "first": found[name].iloc[0],
            "largest": found[name].iloc[-1],
            "times_noise": (found[name] / noise)[counted].median(),
            "accuracy": histories[name].accuracy,
        }
        for name in found
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("algorithm")


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of independent runs and its 95 % interval, by Student's t; all of one run unbounded.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("values must hold at least one number, got none")
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, -np.inf, np.inf
    from scipy.stats import t

    half = t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1)
    half = float(half / np.sqrt(len(values)))
    return mean, mean - half, mean + half
