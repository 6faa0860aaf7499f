"""What a GPU's math library computes, for kernels that Triton's interpreter runs on the CPU."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

# libdevice's names where PyTorch has others
OTHERS = {
    "nearbyint": torch.round,
    "cyl_bessel_i0": torch.special.i0,
    "cyl_bessel_i1": torch.special.i1,
    "erfcx": torch.special.erfcx,
    "fast_expf": torch.exp,
}


class _Libdevice:
    """The functions of `triton.language.extra.libdevice` on interpreted tensors."""

    def __getattr__(self, name: str) -> Callable[..., tl.tensor]:
        function = OTHERS.get(name) or getattr(torch, name)

        def interpreted(*arguments: tl.tensor) -> tl.tensor:
            data = np.broadcast_arrays(*(a.handle.data for a in arguments))
            found = function(*(torch.from_numpy(np.array(d)) for d in data)).numpy()
            kind = max((a.type for a in arguments), key=lambda t: len(getattr(t, "shape", ())))
            if len(arguments) > 1 and kind.is_block():
                kind = tl.block_type(kind.scalar, list(found.shape))
            return tl.tensor(TensorHandle(found, kind.scalar), kind)

        return interpreted


@functools.lru_cache(maxsize=2048)
def plain(function) -> Callable | None:
    """A generated Triton function as the Python function that the interpreter calls."""
    if function is None:
        return None
    python = function.fn
    known = python.__globals__
    if "libdevice" in known:
        known = known | {"libdevice": _Libdevice()}
        return types.FunctionType(python.__code__, known, python.__name__)
    return python
