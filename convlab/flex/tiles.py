"""The tiles into which the kernels of custom convolutions cut their results."""

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from convlab.flex.kernels import input_gradients, weight_gradients
from convlab.kernels.tiles import autotuned


class Tile(NamedTuple):
    """What one program computes: `rows` by `channels`; `depth` pixels a step of weight_gradients.

    A thread holds sums / (32 · warps) of its sums in registers: 8 to 64.
    """

    rows: int
    channels: int
    depth: int
    warps: int
    stages: int = 1

    @property
    def sums(self) -> int:
        """Running sums of one program."""
        return self.rows * self.channels * (self.depth or 1)

    def constants(self) -> dict:
        """What the kernels are compiled for."""
        depth = {"DEPTH": self.depth} if self.depth else {}
        return {"ROWS": self.rows, "CHANNELS": self.channels} | depth


PIXELS = (
    Tile(256, 4, 0, 4),
    Tile(256, 8, 0, 4),
    Tile(128, 16, 0, 4),
    Tile(256, 16, 0, 4),
    Tile(128, 32, 0, 4),
    Tile(256, 32, 0, 4),
    Tile(128, 64, 0, 4),
)
WEIGHT = (
    Tile(16, 1, 128, 4),
    Tile(32, 4, 32, 4),
    Tile(32, 8, 32, 4),
    Tile(16, 16, 32, 4),
    Tile(32, 16, 16, 4),
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
    key, fits = ["REDUCE", "VALUE", "PARTIAL"], functools.partial(_fitting_configs, kernel)
    return autotuned(kernel, shipped(kernel), key, fits)


def fitting(kernel, sizes: dict, constants: dict) -> list[Tile]:
    """The tiles that waste little on these sizes, and whose sums fit into registers.

    In NHWC each pixel of a tile costs registers for its address and bounds; logsumexp has two
    values per sum, float64 two registers per value.
    """
    tiles = shipped(kernel)
    wide = triton.next_power_of_2(sizes["C" if kernel is input_gradients else "K"])
    most = max(t.channels for t in tiles)
    narrow = [t for t in tiles if min(wide, most) // 2 <= t.channels <= wide] or [tiles[0]]
    if kernel is weight_gradients:
        if constants["SUM"] == tl.float64:
            return [t for t in tiles if t.channels <= wide and t.sums <= 4096]
        return narrow
    heavy = constants["SUM"] == tl.float64 or constants["REDUCE"] == "logsumexp"
    rows = 128 if constants["NHWC"] else 256
    return [t for t in narrow if t.rows <= rows and t.sums <= (4096 if heavy else 8192)] or [
        tiles[0]
    ]


def _fitting_configs(kernel, configs: list, sizes: dict, **constants) -> list:
    chosen = fitting(kernel, sizes, constants)
    return [config for tile, config in zip(shipped(kernel), configs) if tile in chosen]
