"""How long a kernel takes if nothing but the number of its instructions holds it up.

The machine code for a GPU that need not be there is disassembled, and the instructions of the loop
over the terms are counted.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from convlab.flex.kernels import input_gradients, weight_gradients
from convlab.flex.tiles import Tile
from convlab.kernels.compiling import HOPPER, compile_launch
from convlab.kernels.launching import Launch

ARITHMETIC = re.compile(r"(@!?U?P\w+ +)?(F(ADD|MUL|FMA|MNMX|SETP?|SEL)|D(ADD|MUL|FMA|SETP)|MUFU)\b")
LOAD = re.compile(r"(@!?U?P\w+ +)?LDG\b")
LANES = 128  # instructions for one thread each that a multiprocessor starts per cycle: 4 warps
SPECIAL = 16  # of exponentials and the like


class Estimate(NamedTuple):
    """What the loop over the terms costs.

    Attributes:
        instructions: per term, with its share of loads, addresses and the loop.
        special: those among them that take eight times as long: exponentials, roots, reciprocals.
        terms: all that the launch computes, with those that fill up its tiles.
        seconds: terms · the larger of instructions and 8 · special, one per lane and cycle.
    """

    instructions: float
    special: float
    terms: int
    seconds: float


def estimate(
    launch: Launch,
    tile: Tile,
    multiprocessors: int = 132,
    clock: float = 1.98e9,
    capability: int = HOPPER,
) -> Estimate:
    """The instruction-bound time of a launch; multiprocessors and clock (Hz): an H200's, boosted.

    Source of the defaults: NVIDIA's H200 data sheet, 67 TFLOP/s in float32 = 132 · 128 · 2 · clock.
    """
    code = compile_launch(launch, tile, capability)
    threads = 32 * tile.warps
    instructions, special = (
        count * threads / tile.sums for count in per_pass(disassemble(code.ptx, capability))
    )
    programs = 1
    for count in launch.grid(tile.constants()):
        programs *= count
    terms = programs * tile.rows * tile.channels * _passes(launch, tile)
    cycles = terms * max(instructions, LANES / SPECIAL * special) / (multiprocessors * LANES)
    return Estimate(instructions, special, terms, cycles / clock)


def _passes(launch: Launch, tile: Tile) -> int:
    """Terms of one sum of a program."""
    sizes = dict(zip(launch.kernel.arg_names, launch.arguments))
    taps = launch.constants["R"] * launch.constants["S"]
    if launch.kernel is weight_gradients:
        return -(-sizes["part"] // tile.depth) * tile.depth
    return taps * sizes["K" if launch.kernel is input_gradients else "C"]


def disassemble(ptx: str, capability: int = HOPPER) -> list[tuple[int, str]]:
    """(address, instruction) of the machine code."""
    from triton import knobs

    architecture = f"sm_{capability}{'a' if capability >= HOPPER else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        told = []
        for command in (
            [knobs.nvidia.ptxas.path, f"--gpu-name={architecture}", source, "-o", made],
            [knobs.nvidia.cuobjdump.path, "-sass", made],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{command[0]} failed: {done.stderr or done.stdout}")
            told.append(done.stdout)
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", told[-1])
    return [(int(address, 16), text) for address, text in lines]


def loops(instructions: list[tuple[int, str]]) -> list[list[str]]:
    """The instructions of each loop that loads from memory and holds no other such loop."""
    place = {address: i for i, (address, _) in enumerate(instructions)}
    spans = []
    for last, (address, text) in enumerate(instructions):
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        first = place.get(int(jump[1], 16)) if jump else None
        if first is None or int(jump[1], 16) >= address:
            continue
        if any(LOAD.match(t) for _, t in instructions[first : last + 1]):
            spans.append((first, last))
    inner = [
        (a, b) for a, b in spans if not any((c, d) != (a, b) and a <= c <= d <= b for c, d in spans)
    ]
    return [[text for _, text in instructions[a : b + 1]] for a, b in inner]


def per_pass(instructions: list[tuple[int, str]]) -> tuple[float, float]:
    """Instructions, and special ones, of the innermost loop for one term of each sum of a thread.

    A compiler may write a loop several times over, with a plain one behind it for the rest: the
    plain one tells how many times.
    """
    found = [(sum(bool(ARITHMETIC.match(t)) for t in loop), loop) for loop in loops(instructions)]
    found = [(count, loop) for count, loop in found if count]
    if not found:
        raise ValueError("the machine code has no loop with loads and arithmetic")
    plain = min(count for count, _ in found)
    most, main = max(found, key=lambda pair: pair[0])
    times = round(most / plain)
    return len(main) / times, sum("MUFU" in text for text in main) / times
