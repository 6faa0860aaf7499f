"""Whole networks: a training step and inference by each algorithm, and where their time goes."""

from __future__ import annotations

import copy
import functools
import json
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlab import datasets, machine, networks, records, timing
from convlab.algorithms import ALGORITHMS, Algorithm
from convlab.datasets import Dataset
from convlab.experiments.cases import Case, Settings, memory_error
from convlab.images import photo_batch
from convlab.records import Row
from convlab.steps import Step
from convlab.swap import LeftAlone, swap_convolutions
from convlab.timing import Measurement, undisturbed

EXPERIMENT = "network_step"
ALGORITHMS_ON_CPU = (
    *("native", "native_channels_last", "thread", "unfold"),
    *("windows", "windows_chunked", "row_windows"),
)
ALGORITHMS_ON_GPU = (
    *("native", "native_channels_last", "thread", "unfold", "unfold_batched"),
    *("windows", "implicit_gemm"),
)
QUICK = {"small CNN": ("native", "thread", "unfold", "windows"), "ResNet-18": ("native", "thread")}
CHECKED = 8  # images
LENIENT = 32  # times the error of nn.Conv2d's logits; a wrong sum is off by thousands
LEAST_ERROR = 1e-5  # of nn.Conv2d, where it happens to be nearly exact
# Rounding moves values across a ReLU's edge: 1 % of a gradient is usual, with TF32 (2¹³ times as
# coarse) 15 % of ResNet-18's. A gradient that is wrong is off by all of its length.
GRADIENT_ERROR, TF32_GRADIENT_ERROR = 0.05, 0.3
SMALL_IMAGE = 1000  # values; a network on larger ones is measured in fewer rounds


@dataclass(frozen=True)
class Network:
    """A network that is measured.

    Attributes:
        make: its weights drawn anew.
        data: what it is trained on.
        images: per step: on a GPU, on a CPU, and on a CPU in quick mode.
    """

    make: Callable[[], nn.Module]
    data: Callable[[], Dataset]
    images: tuple[int, int, int]

    def batch(self, settings: Settings) -> int:
        on_gpu, on_cpu, quick = self.images
        if settings.on_gpu:
            return settings.batch(on_gpu)
        return quick if settings.quick else on_cpu


@functools.cache
def photographs() -> Dataset:
    """1,024 patches of the two photographs, 32×32 pixels, in the form of CIFAR-10."""
    images = (photo_batch(1024, 32) * 255).round().to(torch.uint8)
    labels = torch.arange(len(images)) % 10
    mean, std = (f(images.float(), (0, 2, 3))[:, None, None] for f in (torch.mean, torch.std))
    classes = tuple("0123456789")
    return Dataset("photographs", images, labels, images, labels, classes, mean, std, shift=4)


NETWORKS = {
    "small CNN": Network(networks.SmallCNN, functools.cache(datasets.digits), (256, 256, 64)),
    "ResNet-18": Network(networks.resnet18_32, photographs, (256, 8, 2)),
}


def network_cases(settings: Settings) -> list[Case]:
    """Training and inference of each of `NETWORKS`."""
    return [
        network_case(name, pass_, settings) for name in NETWORKS for pass_ in ("train", "forward")
    ]


def network_case(
    network: str, pass_: str, settings: Settings, algorithms: Sequence[str] | None = None
) -> Case:
    """Rows of the whole step (part ""), of its parts, and of the stages inside `thread`."""
    usual = ALGORITHMS_ON_GPU if settings.on_gpu else ALGORITHMS_ON_CPU
    usual = QUICK.get(network, usual) if settings.quick else usual
    chosen = tuple(a for a in (algorithms or usual) if a in ALGORITHMS)
    batch = NETWORKS[network].batch(settings)
    name = f"{EXPERIMENT}/{network}/b{batch}/{pass_}"
    run = functools.partial(_rows, network, batch, chosen, pass_, settings)
    return Case(EXPERIMENT, name, run, seconds=20.0 if batch > 2 else 3.0)


def _rows(network, batch, algorithms, pass_, settings) -> list[Row]:
    data, flags = NETWORKS[network].data(), json.dumps(machine.flags())
    values = {"network": network, "batch": batch, "pass_": pass_, "device": settings.device}
    write = functools.partial(_row, **values)
    rows, steps, errors, known = [], {}, {}, {}
    for name in algorithms:
        try:
            model = by(networks.seeded(NETWORKS[network].make, 0), name, settings.device)
            error, wrong = _checked(network, name, ALGORITHMS[name], settings.device, flags)
            if wrong:
                rows.append(write(name, status="wrong", reason=wrong))
                continue
            nhwc = name == "native_channels_last"
            step = Step(model, data, batch, pass_, settings.device, nhwc)
            known[name] = timing.once(step, settings.device)
            steps[name], errors[name] = step, records.round_digits(error)
        except ValueError as reason:
            rows.append(write(name, status="unsupported", reason=str(reason)))
        except RuntimeError as error:
            status, more = memory_error(error)
            rows.append(write(name, status=status, reason=more["extra"]["reason"]))
    small = settings.on_gpu or math.prod(data.shape) < SMALL_IMAGE
    seconds = settings.options["seconds"] if small else settings.brief["seconds"]
    options = settings.options | {"seconds": seconds}
    whole = timing.interleaved(steps, settings.device, known=known, **options)
    rows += [write(name, m, error=errors[name]) for name, m in whole.items()]
    rounds = max((len(m.samples) for m in whole.values()), default=0)
    for name, parts in _parts(steps, rounds).items():
        rows += [write(name, m, part=part) for part, m in parts.items()]
    return rows


@functools.lru_cache(maxsize=64)
def _reference(network: str, device: str, flags: str) -> tuple[tuple[Tensor, Tensor], float]:
    """Logits and gradients in float64, and the error of PyTorch's own logits in float32."""
    data, model = NETWORKS[network].data(), networks.seeded(NETWORKS[network].make, 0)
    reference = outcome(copy.deepcopy(model).double(), data, device)
    return reference, errors_of(outcome(model, data, device), reference)[0]


@functools.lru_cache(maxsize=64)
def _checked(
    network: str, name: str, algorithm: Algorithm, device: str, flags: str
) -> tuple[float, str]:
    """The error of the logits, and what is wrong, in words; once for both passes."""
    reference, usual = _reference(network, device, flags)
    model = by(networks.seeded(NETWORKS[network].make, 0), name, device)
    found = outcome(model, NETWORKS[network].data(), device)
    error, of_gradients = errors_of(found, reference)
    tf32 = device != "cpu" and torch.backends.cudnn.allow_tf32
    allowed = TF32_GRADIENT_ERROR if tf32 else GRADIENT_ERROR
    right = error <= LENIENT * max(usual, LEAST_ERROR) and of_gradients <= allowed
    return error, "" if right else f"logits differ by {error:.2g}, gradients by {of_gradients:.2g}"


def by(model: nn.Module, algorithm: str, device: str) -> nn.Module:
    """`model` on `device`, its convolutions by `algorithm`; what that cannot do stays native.

    Raises:
        ValueError: it can do none of them.
    """
    model = model.to(device)
    if algorithm == "native_channels_last":  # the whole network, as one would use it
        return model.to(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftAlone)
        return swap_convolutions(model, algorithm)


def outcome(model: nn.Module, data: Dataset, device: str) -> tuple[Tensor, Tensor]:
    """Logits and all gradients, each as one vector in float64, of a few images in training mode."""
    model = model.to(device).train()
    dtype = next(model.parameters()).dtype
    images, labels = data.batch(torch.arange(CHECKED))
    logits = model(images.to(device, dtype))
    loss = F.cross_entropy(logits, labels.to(device))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return logits.detach().double(), torch.cat([g.double().flatten() for g in gradients])


def errors_of(found: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> tuple:
    """Relative errors of logits and gradients, in the Euclidean norm; nan where a value is none."""
    return tuple(float((a - b).norm() / b.norm()) for a, b in zip(found, reference))


def _parts(steps: dict[str, Step], rounds: int) -> dict[str, dict[str, Measurement]]:
    """Algorithm → part → its times, in interleaved rounds of their own."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            take = functools.partial(steps[name].timed, stages=name == "thread")
            for part, seconds in undisturbed(take).items():
                times[name].setdefault(part, []).append(seconds)
    flags = machine.flags()
    return {
        name: {
            part: Measurement(
                tuple(s), 1, None, str(steps[name].device), flags, *timing.clock(steps[name].device)
            )
            for part, s in parts.items()
        }
        for name, parts in times.items()
    }


def _row(algorithm, measured=None, *, network, batch, pass_, device, reason=None, **more) -> Row:
    channels, height, width = NETWORKS[network].data().shape
    layout = "NHWC" if algorithm == "native_channels_last" else "NCHW"
    values = {"device": device, "layout": layout, "extra": {"network": network}}
    row = records.row(EXPERIMENT, algorithm, None, pass_, measured, **values, **more)
    row.problem.update(batch=batch, in_channels=channels, height=height, width=width)
    if reason:
        row.extra["reason"] = reason
    return row
