"""What a kernel loads and stores, seen in Triton's interpreter, lane by lane."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

SECTOR = 32  # bytes that an NVIDIA GPU fetches at least


class Access(NamedTuple):
    """One load or store of one program.

    Attributes:
        program: its place in the grid.
        place: function and line of the kernel.
        addresses: of every lane, in bytes.
        real: lanes that are not masked out.
    """

    kind: str
    program: tuple[int, int, int]
    place: tuple[str, int]
    addresses: np.ndarray
    real: np.ndarray


@contextlib.contextmanager
def watching() -> Iterator[list[Access]]:
    """Every load and store of the kernels that are interpreted inside the block.

    Raises:
        ModuleNotFoundError: the package triton is not installed.
    """
    from triton.runtime.interpreter import interpreter_builder as builder

    seen: list[Access] = []
    load, store = builder.create_masked_load, builder.create_masked_store

    def note(kind: str, pointers, mask) -> None:
        lanes = np.ravel(pointers.data).astype(np.int64)
        real = np.broadcast_to(np.ravel(mask.data).astype(bool), lanes.shape)
        seen.append(Access(kind, tuple(builder.grid_idx), _place(), lanes, real.copy()))

    def watched_load(pointers, mask, *others):
        note("load", pointers, mask)
        return load(pointers, mask, *others)

    def watched_store(pointers, value, mask, *others):
        note("store", pointers, mask)
        return store(pointers, value, mask, *others)

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    try:
        yield seen
    finally:
        del builder.create_masked_load, builder.create_masked_store  # the class has its own


def _place() -> tuple[str, int]:
    """The innermost line outside of Triton and of this file."""
    frame = sys._getframe(1)
    while (name := frame.f_globals["__name__"]) == __name__ or name.startswith("triton."):
        frame = frame.f_back
    return frame.f_code.co_name, frame.f_lineno


def of_tensor(accesses: Iterable[Access], tensor: Tensor) -> list[Access]:
    """The accesses to `tensor`: all of a line of the kernel that reaches it, masked ones too."""
    accesses = list(accesses)
    storage = tensor.untyped_storage()
    first, last = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    places = {
        (a.kind, a.place)
        for a in accesses
        if bool((a.real & (a.addresses >= first) & (a.addresses < last)).any())
    }
    return [a for a in accesses if (a.kind, a.place) in places]


def totals(accesses: Iterable[Access], tensors: Mapping[str, Tensor]) -> pd.DataFrame:
    """What all programs together load from and store to each tensor.

    Returns:
        One row per tensor: instructions (of a whole program), lanes, masked (lanes), bytes (of the
        lanes that are not), distinct and sectors (bytes at different addresses, or in different
        sectors of 32 bytes, of each program, added up), programs.
    """
    import pandas as pd

    accesses, rows = list(accesses), {}
    for name, tensor in tensors.items():
        mine, item = of_tensor(accesses, tensor), tensor.element_size()
        programs: dict[tuple, list] = {}
        for a in mine:
            programs.setdefault(a.program, []).append(a.addresses[a.real])
        each = [np.concatenate(lanes) for lanes in programs.values()]
        lanes, real = sum(len(a.real) for a in mine), sum(map(len, each))
        rows[name] = {
            "instructions": len(mine),
            "lanes": lanes,
            "masked": lanes - real,
            "bytes": item * real,
            "distinct": item * sum(len(np.unique(at)) for at in each),
            "sectors": SECTOR * sum(len(np.unique(at // SECTOR)) for at in each),
            "programs": len(programs),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def touched(
    accesses: Iterable[Access], tensor: Tensor, program: tuple[int, int, int] | None = None
) -> Tensor:
    """How often each value of `tensor` is loaded or stored, by all programs or by one."""
    storage, item = tensor.untyped_storage(), tensor.element_size()
    counts = torch.zeros(storage.nbytes() // item)
    for a in of_tensor(accesses, tensor):
        if program in (None, a.program):
            at = (a.addresses[a.real] - storage.data_ptr()) // item
            counts += torch.from_numpy(np.bincount(at, minlength=len(counts)))
    return counts.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).clone()
