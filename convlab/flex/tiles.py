"""The tiles into which the kernels of custom convolutions cut their results."""

import functools
from typing import NamedTuple

import triton

from convlab.flex.kernels import weight_gradients


class Tile(NamedTuple):
    """What one program computes: `rows` by `channels`; `depth` pixels a step of weight_gradients.

    A thread holds rows · channels (· depth) / (32 · warps) sums in registers: 16 to 64.
    """

    rows: int
    channels: int
    depth: int
    warps: int
    stages: int = 1

    def constants(self) -> dict:
        """What the kernels are compiled for."""
        depth = {"DEPTH": self.depth} if self.depth else {}
        return {"ROWS": self.rows, "CHANNELS": self.channels} | depth


PIXELS = (
    Tile(128, 4, 0, 4),
    Tile(128, 16, 0, 4),
    Tile(256, 16, 0, 4),
    Tile(128, 32, 0, 4),
    Tile(128, 64, 0, 4),
    Tile(128, 64, 0, 8),
)
WEIGHT = (
    Tile(4, 4, 128, 4),
    Tile(8, 4, 128, 4),
    Tile(8, 8, 128, 4),
    Tile(16, 4, 128, 4),
)
WIDEST = max(t.channels for t in PIXELS)
INTERPRETED = Tile(512, 16, 0, 4)  # an operation costs the same, however large
INTERPRETED_WEIGHT = Tile(64, 16, 256, 4)


def shipped(kernel) -> tuple[Tile, ...]:
    """The tiles that a kernel has."""
    return WEIGHT if kernel is weight_gradients else PIXELS


@functools.cache
def tuned(kernel):
    """The kernel with the fastest tile per function and problem, found at its first call."""
    configs = [triton.Config(t.constants(), t.warps, t.stages) for t in shipped(kernel)]
    sizes = ["pixels", "C", "K", "H", "WIDTH", "OH", "OW", "R", "S"]
    return triton.autotune(
        configs,
        key=[*sizes, "NHWC", "REDUCE", "VALUE", "PARTIAL"],
        prune_configs_by={"early_config_prune": functools.partial(_fitting_configs, kernel)},
        do_bench=functools.partial(triton.testing.do_bench, warmup=5, rep=20),
    )(kernel)


def fitting(kernel, channels: int) -> list[Tile]:
    """The tiles that waste little on so many channels of one group."""
    tiles, wide = shipped(kernel), triton.next_power_of_2(channels)
    most = max(t.channels for t in tiles)
    narrow = [t for t in tiles if min(wide, most) // 2 <= t.channels <= wide]
    return narrow or [tiles[0]]


def _fitting_configs(kernel, configs: list, sizes: dict, **constants) -> list:
    channels = sizes["C" if "GX" in sizes else "K"]
    chosen = fitting(kernel, channels)
    return [config for tile, config in zip(shipped(kernel), configs) if tile in chosen]
