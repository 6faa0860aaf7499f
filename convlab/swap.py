"""`swap_convolutions`: every `nn.Conv2d` of a model computed by another algorithm, and back.

A module keeps its identity and everything in it: parameters, hooks, buffers, mode, its place in
the model or places. What changes is its class, from `nn.Conv2d` to `convlab.Conv2d`, which
inherits all but `forward` from it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from convlab.algorithms import ALGORITHMS
from convlab.layers import Conv2d
from convlab.problem import ConvProblem

Only = str | Iterable[str] | Callable[[str, nn.Module], bool] | None
NAMED = 4  # names listed in a message
OUTPUT_PIXELS = 8  # along each axis, of the problem that a layer is judged by


class LeftAlone(UserWarning):
    """Convolutions that `swap_convolutions` did not change, and why."""


@dataclass(frozen=True)
class Convolution:
    """A convolution of a model.

    Attributes:
        names: where it is in the model; several where it is shared.
        module: the module itself.
        algorithm: what computes it, "native" for PyTorch's own; None if it cannot be swapped.
        reason: None, or why it cannot be swapped.
    """

    names: tuple[str, ...]
    module: nn.Module
    algorithm: str | None
    reason: str | None = None


def swap_convolutions(model: nn.Module, algorithm: str, only: Only = None) -> nn.Module:
    """Compute every `nn.Conv2d` of `model` by `algorithm`, in place; `"native"` undoes it.

    The modules stay the objects that they are, so parameters, `state_dict`, hooks, gradients,
    mode, dtype, device, sharing, and what optimisers and wrappers hold of them stay too. For a
    second model beside the first, swap a `copy.deepcopy`. Subclasses of `nn.Conv2d` that compute
    nothing of their own, parametrized and weight-normalised layers are swapped like the rest.

    Left alone, and named in one warning (`LeftAlone`): transposed, 1-D, 3-D, lazy and quantised
    convolutions, subclasses with a `forward` of their own, and layers whose kernel, stride,
    dilation, groups or present device `algorithm` does not support. So move a model to its device
    before. A problem refused at the call for its size raises the ValueError of `convlab.Conv2d`.

    Args:
        model: any module; an `nn.Conv2d` itself too.
        algorithm: a name in `ALGORITHMS`.
        only: which convolutions: a name as in `named_modules` or a pattern ("layer1.*"), several
            of them, or a function (name, module) → bool. None: all.

    Returns:
        `model`.

    Raises:
        ValueError: no such algorithm; `only`, or one of its patterns, fits no convolution; or
            there is nothing to swap.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {model!r}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    chosen = _chosen(convolutions(model), only)
    reasons = [found.reason or unsupported(found.module, algorithm) for found in chosen]
    swapped = [found.module for found, reason in zip(chosen, reasons) if not reason]
    left = [(found, reason) for found, reason in zip(chosen, reasons) if reason]
    if not swapped:
        listed = _listed(left) if left else "it has no convolution"
        raise ValueError(f"model must contain an nn.Conv2d that can be swapped, but {listed}")
    for module in swapped:
        _set(module, algorithm)
    if left:
        count = f"{len(left)} of {len(chosen)} convolutions"
        warnings.warn(f"{count} left alone: {_listed(left)}", LeftAlone, stacklevel=2)
    return model


def convolutions(model: nn.Module) -> list[Convolution]:
    """Every convolution in `model`, in the order of `named_modules`, a shared one once."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    results = []
    for module, names in found.items():
        if isinstance(module, nn.Conv2d):
            reason = _obstacle(module)
            algorithm = None if reason else getattr(module, "algorithm", "native")
            results.append(Convolution(tuple(names), module, algorithm, reason))
        elif isinstance(module, _ConvNd) or _resembles_one(module):
            kind = f"{type(module).__name__} is no nn.Conv2d"
            results.append(Convolution(tuple(names), module, None, kind))
    return results


def unsupported(module: nn.Conv2d, algorithm: str) -> str | None:
    """None, or why `algorithm` cannot compute this layer on its present device, at any size."""
    found = ALGORITHMS[algorithm]
    if not (found.library or module.weight.is_floating_point()):
        dtype = str(module.weight.dtype).removeprefix("torch.")
        return f"{algorithm} needs a floating-point weight, not {dtype}"
    extents = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size)]
    size = [e + (OUTPUT_PIXELS - 1) * s for e, s in zip(extents, module.stride)]
    padding = module.padding if module.padding_mode == "zeros" else 0
    problem = ConvProblem(
        *(1, module.in_channels, module.out_channels, *size),
        kernel_size=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=padding if isinstance(padding, str | int) else tuple(padding),
        dilation=tuple(module.dilation),
        groups=module.groups,
    )
    return found.supports(problem, module.weight.device)


def _obstacle(module: nn.Conv2d) -> str | None:
    """Why an `nn.Conv2d` cannot be swapped by any algorithm."""
    cls = type(module)
    if isinstance(module, LazyModuleMixin):
        return f"{cls.__name__} has no sizes before its first call"
    known = (nn.Conv2d.forward, Conv2d.forward)
    replaced = {"forward", "_conv_forward"} & vars(module).keys()
    if replaced or cls.forward not in known or cls._conv_forward is not nn.Conv2d._conv_forward:
        return f"{cls.__name__} has a forward of its own"
    return None


def _resembles_one(module: nn.Module) -> bool:
    """A leaf with a weight, called Conv…: quantised layers, layers of other packages."""
    weight = getattr(module, "weight", None)  # of a quantised layer it is a method
    leaf = next(module.children(), None) is None
    return leaf and "Conv" in type(module).__name__ and (callable(weight) or weight is not None)


def _chosen(found: list[Convolution], only: Only) -> list[Convolution]:
    if only is None:
        return found
    names = [name for each in found for name in each.names]
    if callable(only):
        chosen = [c for c in found if any(only(name, c.module) for name in c.names)]
        if not chosen:
            raise ValueError(f"only must choose a convolution, none of: {_few(names)}")
        return chosen
    iterable = isinstance(only, Iterable)
    patterns = [only] if isinstance(only, str) else list(only) if iterable else []
    if not (patterns and all(isinstance(p, str) for p in patterns)):
        raise ValueError(f"only must be names, patterns, a function or None, got {only!r}")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"only must fit a convolution, got {pattern!r}, none of {_few(names)}")
    return [c for c in found if any(fnmatchcase(n, p) for n in c.names for p in patterns)]


def _few(names: list[str]) -> str:
    shown = ", ".join(name or "the model itself" for name in names[:NAMED]) or "no convolution"
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


def _listed(left: list[tuple[Convolution, str]]) -> str:
    """Reason by reason, with the names that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for found, reason in left:
        by_reason.setdefault(reason.rstrip("."), []).append(found.names[0])
    return "; ".join(f"{reason} ({_few(names)})" for reason, names in by_reason.items())


def _set(module: nn.Conv2d, algorithm: str) -> None:
    change = _without_algorithm if algorithm == "native" else _with_algorithm
    cls = type(module)
    if parametrize.is_parametrized(module):
        # A class for this module alone, or its copies, with the properties of its tensors.
        own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(cls)(cls.__name__, (change(cls.__bases__[0]),), own)
    else:
        module.__class__ = change(cls)
    if isinstance(module, Conv2d):
        module.algorithm = algorithm
    else:
        vars(module).pop("algorithm", None)


def _with_algorithm(cls: type[nn.Conv2d]) -> type[nn.Conv2d]:
    if cls is nn.Conv2d:
        return Conv2d
    return cls if issubclass(cls, Conv2d) else _both(cls)


def _without_algorithm(cls: type[nn.Conv2d]) -> type[nn.Conv2d]:
    return nn.Conv2d if cls is Conv2d else vars(cls).get("swapped_from", cls)


@functools.cache
def _both(cls: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """A subclass of `nn.Conv2d` with `convlab.Conv2d`'s forward, which can be pickled."""
    own = {"swapped_from": cls, "__module__": cls.__module__, "__reduce_ex__": _reduced}
    return type(cls)(cls.__name__, (Conv2d, cls), own)


def _reduced(module: nn.Module, protocol: int) -> tuple:
    state = module.__getstate__() if hasattr(module, "__getstate__") else vars(module).copy()
    return _empty, (type(module).swapped_from,), state


def _empty(cls: type[nn.Conv2d]) -> nn.Conv2d:
    both = _both(cls)
    return both.__new__(both)
