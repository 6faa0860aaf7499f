"""The layer under diagnosis: called safely, put back as it was found."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

from convlab.problem import parse_device
from convlab.timing import synchronize

TORCH = str(Path(torch.__file__).parent)
HERE = str(Path(__file__).parent)


class Sink(io.TextIOBase):
    """Takes what the layer prints, so that a thousand calls do not fill the terminal."""

    def __init__(self) -> None:
        self.on_write = None

    def write(self, text: str) -> int:
        if self.on_write:
            self.on_write()
        return len(text)


class Subject:
    """A module with its input batch.

    Args:
        layer: any `nn.Module` that takes x and returns one tensor.
        x: (N, C, H, W), floating point, on the layer's device.

    Raises:
        ValueError: names what is wrong with `layer` or `x`: it fails, returns no tensor, changes
            its input, or moves its output to another device.
    """

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        if not isinstance(layer, nn.Module):
            raise ValueError(f"layer must be an nn.Module, got {_kind(layer)}")
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            got = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else _kind(x)
            raise ValueError(f"x must be a floating-point tensor (N, C, H, W), got {got}")
        if not x.numel():
            raise ValueError(f"x must hold at least one value, got shape {tuple(x.shape)}")
        self.layer, self.x = layer, x.detach()
        self.device = parse_device(x.device)
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if tensor.device != x.device:
                raise ValueError(
                    f"layer and x must be on one device, got {name!r} on {tensor.device} and x on "
                    f"{x.device}"
                )
        original = getattr(layer, "_orig_mod", layer)  # what torch.compile was given
        self.name = type(original).__name__
        self.compiled = original is not layer
        self.watched = original
        self.y = self._first_output()

    def _first_output(self) -> Tensor:
        x = self.x.clone()
        with self.quiet(), torch.no_grad():
            graphs, start = _compiled_graphs(), time.perf_counter()
            y = self(x)
            synchronize(self.device)
            self.first_seconds = time.perf_counter() - start
            self.compiled = self.compiled or _compiled_graphs() > graphs
        if not isinstance(y, Tensor):
            raise ValueError(f"layer must return one tensor, {self.name} returned {_kind(y)}")
        if y.device != self.x.device:
            raise ValueError(
                f"layer must leave its output on x's device, {self.name} moved it from "
                f"{self.device} to {y.device}"
            )
        if not torch.equal(torch.nan_to_num(x), torch.nan_to_num(self.x)):
            raise ValueError(
                f"layer must not change its input, {self.name} wrote to x in place: every further "
                "call would see another x"
            )
        self.obstacle = ""  # to a call that records gradients
        self.differentiable = self._has_gradient()
        return y.detach()

    def _has_gradient(self) -> bool:
        """Whether the output requires a gradient when x does."""
        with self.quiet(), torch.enable_grad():
            try:
                return self(self.x.clone().requires_grad_()).requires_grad
            except ValueError as error:  # it works on an x without gradient
                self.obstacle = str(error)
                return False

    def __call__(self, x: Tensor, layer: nn.Module | None = None) -> Tensor:
        """layer(x); ValueError, in one sentence with the line, if it fails."""
        try:
            return (self.layer if layer is None else layer)(x)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            shape = tuple(x.shape)
            text = f"{self.name} failed on x of shape {shape}: {describe(error)}"
            raise ValueError(text) from error

    @contextlib.contextmanager
    def quiet(self) -> Iterator[Sink]:
        """What the layer writes to stdout and stderr is dropped; its state is put back after."""
        sink = Sink()
        tensors = [*self.layer.buffers(), *self.layer.parameters()]
        kept = [t.detach().clone() for t in self.layer.buffers()]
        grads = [p.grad for p in self.layer.parameters()]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            try:
                with _logging_to(sink), redirect_stdout(sink), redirect_stderr(sink):
                    yield sink
            finally:
                with torch.no_grad():
                    for tensor, value in zip(tensors, kept, strict=False):
                        if not tensor.is_inference():
                            tensor.copy_(value)
                for parameter, grad in zip(self.layer.parameters(), grads, strict=True):
                    parameter.grad = grad

    def in_float64(self) -> tuple[nn.Module, torch.dtype]:
        """A copy of the layer for experiments, in float64 if it works so, and its dtype.

        A parameter that holds no usable numbers (NaN, infinite, beyond 10⁴, a weight of zeros) is
        drawn anew.
        """
        try:
            layer = copy.deepcopy(self.watched)
        except Exception:  # cannot be copied: the experiments use it as it is
            return self.watched, self.x.dtype
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.is_floating_point() and not usable(parameter):
                    drawn = torch.randn(parameter.shape, generator=generator)
                    fan = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 1
                    parameter.copy_(drawn / fan**0.5)
        double = copy.deepcopy(layer).double()
        try:
            with self.quiet(), torch.no_grad():
                y = double(self.x[:1].double())
            if y.dtype == torch.float64:
                return double, torch.float64
        except Exception:
            pass
        return layer, self.x.dtype


def _compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)
    return counters["stats"]["unique_graphs"] if counters else 0


@contextlib.contextmanager
def _logging_to(sink: Sink) -> Iterator[None]:
    """Handlers that hold on to stdout or stderr write to `sink` inside the block."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    streams = (sys.stdout, sys.stderr)
    changed = {
        handler: handler.stream
        for logger in loggers
        for handler in getattr(logger, "handlers", ())
        if isinstance(handler, logging.StreamHandler) and handler.stream in streams
    }
    for handler in changed:
        handler.setStream(sink)
    try:
        yield
    finally:
        for handler, stream in changed.items():
            handler.setStream(stream)


def usable(parameter: Tensor) -> bool:
    """Whether the numbers can be those of a layer, and are not what memory happened to hold."""
    if not parameter.numel():
        return True
    top = parameter.detach().abs().max()
    zero = top == 0 and parameter.dim() < 2  # a bias may be zero
    return bool(zero or (torch.isfinite(top) and 1e-20 < top < 1e4))


def describe(error: BaseException) -> str:
    """Type, first line and place of an error in the reader's own code."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((TORCH, HERE, sys.prefix, "<frozen"))]
    if own:
        text += f" ({Path(own[-1].filename).name}, line {own[-1].lineno})"
    return text


def _kind(value: object) -> str:
    article = "an" if type(value).__name__[0].lower() in "aeiou" else "a"
    return "None" if value is None else f"{article} {type(value).__name__}"
