"""torchvision, also next to a build of PyTorch that its C++ library was not made for."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

# What torchvision's Python code expects its C++ library to have declared.
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # what a `Library` declares lives as long as it does


def torchvision() -> ModuleType:
    """The package `torchvision`, imported.

    A wheel made for CUDA cannot load its C++ library next to a CPU build of PyTorch, and the
    import then ends with "operator torchvision::nms does not exist". Only in that case the two
    operators are declared here, without any code behind them: models, datasets and transforms
    work, `torchvision.ops` does not.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in OPERATORS:
        library.define(schema)
    _declared.append(library)
    return importlib.import_module("torchvision")
