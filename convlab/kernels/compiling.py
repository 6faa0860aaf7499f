"""Kernels compiled for a GPU that need not be there, and what the compiler made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from convlab.kernels import tiles
from convlab.kernels.implicit_gemm import product
from convlab.kernels.launching import Launch
from convlab.kernels.tiles import Tile

HOPPER = 90  # compute capability 9.0


@dataclass(frozen=True)
class Compiled:
    """What one kernel needs of a multiprocessor, and what it is made of.

    Attributes:
        registers: of each thread, of 255; a multiprocessor has 65536.
        spills: bytes of registers that went to memory.
        shared: bytes of shared memory of one program.
        matrix: instructions for tensor cores (`mma`, `wgmma`).
        fma: multiply-and-add instructions on ordinary cores.
        ptx: the code.
    """

    registers: int
    spills: int
    shared: int
    matrix: int
    fma: int
    ptx: str


def compile_kernel(
    kernel: JITFunction, arguments, constants: dict, warps: int, stages: int, capability=HOPPER
) -> Compiled:
    """`kernel` compiled as a call with `arguments` would compile it.

    Args:
        arguments: tensors on any device, numbers and None, in the kernel's order.
        constants: the values of its `tl.constexpr` parameters.
        capability: compute capability, 90 for 9.0.

    Raises:
        RuntimeError: the assembler that comes with Triton is missing or fails.
    """
    source = ASTSource(kernel, *_signature(kernel, arguments, constants))
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": warps, "num_stages": stages}
    code = triton.compile(source, target=target, options=options)
    ptx = code.asm["ptx"]
    told = _assemble(ptx, capability)
    return Compiled(
        registers=int(re.search(r"Used (\d+) registers", told)[1]),
        spills=sum(map(int, re.findall(r"(\d+) bytes spill", told))),
        shared=code.metadata.shared,
        matrix=len(re.findall(r"\bwgmma\.mma_async|\bmma\.sync", ptx)),
        fma=len(re.findall(r"\bfma\.rn\.f(?:32|64)", ptx)),
        ptx=ptx,
    )


def _signature(kernel: JITFunction, arguments, constants: dict) -> tuple[dict, dict, dict]:
    """Types, constants and divisibility by 16, as Triton tells them apart at a launch."""
    types, fixed, attributes = {}, {}, {}
    values = iter(arguments)
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        value = constants[name] if name in constants else next(values)
        aligned, special = False, not parameter.do_not_specialize
        if isinstance(value, Tensor):
            types[name] = f"*{_TYPES[str(value.dtype).removeprefix('torch.')]}"
            aligned = value.data_ptr() % 16 == 0
        elif parameter.is_constexpr or value is None or (value == 1 and special):
            types[name], fixed[place,] = "constexpr", value
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and special
        if aligned:
            attributes[place,] = [["tt.divisibility", 16]]
    return types, fixed, attributes


_TYPES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def _assemble(ptx: str, capability: int) -> str:
    """What ptxas says about registers and spills."""
    from triton import knobs

    ptxas = knobs.nvidia.ptxas
    architecture = f"sm_{capability}{'a' if capability >= HOPPER else ''}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        command = [ptxas.path, "-v", f"--gpu-name={architecture}", file, "-o", file.with_suffix("")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas failed: {done.stderr or done.stdout}")
    return done.stderr + done.stdout


def compile_launch(launch: Launch, tile: Tile, capability: int = HOPPER) -> Compiled:
    """A noted launch (`launching.noting`) compiled with one tile."""
    constants = launch.constants | tile.constants()
    return compile_kernel(
        launch.kernel, launch.arguments, constants, tile.warps, tile.stages, capability
    )


def fitting_tiles(launch: Launch) -> list[Tile]:
    """The tiles among which a GPU would choose for this launch."""
    tuner = tiles.tuned(launch.kernel)
    sizes = dict(zip(launch.kernel.arg_names, launch.arguments))
    chosen = tiles.fitting(tuner.configs, sizes, **launch.constants)
    shipped = tiles.OUTPUT if launch.kernel is product else tiles.WEIGHT
    return [tile for tile, config in zip(shipped, tuner.configs) if config in chosen]
