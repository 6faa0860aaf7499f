"""The tiles into which the kernels cut a convolution, and which of them fits a problem."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import triton

from convlab.kernels.implicit_gemm import product


class Tile(NamedTuple):
    """What one program computes: `rows` by `channels`, `depth` products at a time."""

    rows: int
    channels: int
    depth: int
    by_tap: bool
    warps: int
    stages: int

    def constants(self) -> dict:
        """What the kernels are compiled for."""
        return {
            "ROWS": self.rows,
            "CHANNELS": self.channels,
            "DEPTH": self.depth,
            "BY_TAP": self.by_tap,
        }


NARROW = 16  # output channels of the narrowest tile

# Few output channels: a narrow tile. Many: a wide one, whose values are each used 64 or 128 times.
OUTPUT = (
    Tile(128, NARROW, 16, True, 4, 1),
    Tile(256, NARROW, 1, False, 4, 1),
    Tile(128, NARROW, 16, False, 4, 1),
    Tile(128, 32, 32, False, 4, 1),
    Tile(128, 64, 32, False, 8, 1),
    Tile(128, 32, 32, True, 4, 3),
    Tile(64, 64, 32, True, 4, 3),
    Tile(128, 64, 32, True, 4, 1),
    Tile(128, 64, 64, True, 8, 3),
    Tile(128, 128, 32, True, 4, 3),
    Tile(128, 128, 64, True, 8, 3),
)
WEIGHT = (
    Tile(64, 16, 32, False, 4, 3),
    Tile(32, 16, 64, False, 4, 1),
    Tile(128, 16, 32, False, 8, 3),
    Tile(64, 64, 32, False, 4, 3),
    Tile(64, 64, 32, True, 4, 3),
    Tile(128, 64, 32, True, 8, 3),
    Tile(128, 128, 32, True, 8, 3),
)
INTERPRETED = Tile(512, 16, 128, False, 4, 1)  # an operation costs the same, however large


@functools.cache
def tuned(kernel):
    """The kernel with the fastest tile per problem, found at its first call."""
    tiles = OUTPUT if kernel is product else WEIGHT
    return autotuned(kernel, tiles, ["stride_h", "stride_w", "PRECISION"], fitting)


SIZES = ("pixels", "C", "K", "H", "WIDTH", "OH", "OW", "R", "S", "NHWC")


def autotuned(kernel, tiles, key: list[str], fitting: Callable):
    """The kernel, tried with each of its `fitting` tiles once for all `SIZES` and `key`."""
    return triton.autotune(
        [triton.Config(t.constants(), t.warps, t.stages) for t in tiles],
        key=[*SIZES, *key],
        prune_configs_by={"early_config_prune": fitting},
        do_bench=functools.partial(triton.testing.do_bench, warmup=5, rep=20),
    )(kernel)


FLATTENED = 256  # products of one output up to which the loop of `product` is written out
BITS = 63  # taps that one number can hold a bit of


def flattened(channels: int, taps: int) -> bool:
    """Whether tiles go through the taps of all channels in one row."""
    return 1 < taps <= BITS and channels * taps <= FLATTENED


def fitting(configs: list, sizes: dict, **constants) -> list:
    """The tiles that waste little on these sizes."""
    c, k, taps = sizes["C"], sizes["K"], constants["R"] * constants["S"]
    wide = triton.next_power_of_2(k)
    wide_floats = constants.get("PRECISION") == "ieee" and sizes["X"].dtype.itemsize >= 4
    few = taps > 1 and c % 32 != 0 if "part" in sizes else flattened(c, taps)

    def fits(tile: dict, warps: int) -> bool:
        sums = tile["ROWS"] * tile["CHANNELS"] // (32 * warps)  # of a thread
        written_out = not tile["BY_TAP"] and "part" not in sizes
        if wide_floats and (sums > 64 or (written_out and tile["DEPTH"] > 16)):
            return False  # they and both factors would not fit into registers
        if tile["DEPTH"] == 1:
            return few
        narrow = min(wide, 128) // 2 <= tile["CHANNELS"] <= max(wide, 16)
        if tile["BY_TAP"]:
            return narrow and c >= tile["DEPTH"] // 2
        return narrow and few

    return [config for config in configs if fits(config.kwargs, config.num_warps)] or configs[:1]
