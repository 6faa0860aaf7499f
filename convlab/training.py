"""Training a network: a loop that can be stopped at any time and goes on as if it had not been.

Every random number comes from a seed and the number of the epoch: initial weights, the order of
the images, their shifts. So two networks trained with one seed see the same batches, and a run
that was stopped ends with the very numbers of one that was not.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlab.datasets import Dataset
from convlab.problem import parse_device

SAVE_SECONDS = 5.0  # so much work at most is done again after a stop
TEST_BATCH = 500
WARM_UP = 0.2  # of all steps, in which the learning rate grows


class CheckpointError(Exception):
    """A checkpoint cannot be read, or belongs to another training; one sentence says which."""


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs, batch: passes over the images, and images per step.
        learning_rate: the largest; it grows to it and falls to zero, along a cosine.
        weight_decay: of Adam with decoupled decay.
    """

    epochs: int = 10
    batch: int = 64
    learning_rate: float = 0.01
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if not (isinstance(value, float | int) and 0 <= value < math.inf):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0 … `steps` − 1."""
        warm = WARM_UP * steps
        part = (step + 1) / warm if step + 1 < warm else 1 - (step + 1 - warm) / (steps - warm)
        return self.learning_rate * (1 - math.cos(math.pi * part)) / 2


@dataclass
class History:
    """What a training has shown.

    Attributes:
        losses: cross-entropy of every step's batch.
        accuracies: share of the test images that are recognised, after every epoch.
        epoch_seconds: of every epoch's steps, without tests.
    """

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    epoch_seconds: list[float] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """The last one."""
        return self.accuracies[-1]


def train(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe | None = None,
    seed: int = 0,
    *,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    label: str = "",
    progress: bool = False,
) -> History:
    """Train `model` in place, with Adam and cross-entropy; the batches are those of `seed`.

    Args:
        checkpoint: a file that is written every few seconds and after every epoch, always whole;
            if it is there already, training goes on from it, or is over.
        label: what is trained, for the progress bar; a checkpoint of another label is refused.
        progress: show a bar.

    Raises:
        CheckpointError: the file is damaged, or from a training with other settings.
    """
    run = _Run(model, data, recipe or Recipe(), seed, parse_device(device), label)
    path = None if checkpoint is None else Path(checkpoint)
    cuda = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), _bar(label, run.steps, progress) as show:
        torch.manual_seed(seed)
        if path is not None and path.exists():
            run.restore(path)
        saved = time.monotonic()
        for done in run:
            if path is not None and (run.at_end or time.monotonic() - saved > SAVE_SECONDS):
                run.save(path)
                saved = time.monotonic()
            show(done, run.history)
    return run.history


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset) -> float:
    """Share of the test images that `model` recognises, in evaluation mode."""
    training, parameter = model.training, next(model.parameters())
    model.eval()
    right = 0
    for images, labels in zip(
        data.test_images.split(TEST_BATCH), data.test_labels.split(TEST_BATCH)
    ):
        x = data.normalised(images).to(parameter.device, parameter.dtype)
        right += int((model(x).argmax(1).cpu() == labels).sum())
    model.train(training)
    return right / len(data.test_labels)


class _Run:
    """The state of a training between two steps."""

    def __init__(self, model, data, recipe, seed, device, label) -> None:
        self.model, self.data, self.recipe, self.seed = model.to(device), data, recipe, seed
        self.device, self.label = device, label
        self.per_epoch = -(-len(data.images) // recipe.batch)
        self.steps = self.per_epoch * recipe.epochs
        self.optimiser = torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.history, self.losses, self.seconds = History(), [], 0.0

    @property
    def at_end(self) -> bool:
        """Whether the last step ended an epoch."""
        return len(self.losses) % self.per_epoch == 0

    def __iter__(self) -> Iterator[int]:
        """Step by step; yields how many are done."""
        while len(self.losses) < self.steps:
            epoch, first = divmod(len(self.losses), self.per_epoch)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.data.images), generator=generator)
            batches = order.split(self.recipe.batch)
            for index in batches[:first]:  # of an epoch that was begun: only their random numbers
                self.data.batch(index, generator)
            self.model.train()
            for index in batches[first:]:
                start = time.perf_counter()
                self._step(*self.data.batch(index, generator))
                last = len(self.losses) % self.per_epoch == 0
                if last and self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                self.seconds += time.perf_counter() - start
                if last:
                    self._end_epoch()
                yield len(self.losses)

    def _step(self, images: Tensor, labels: Tensor) -> None:
        dtype = next(self.model.parameters()).dtype
        rate = self.recipe.rate(len(self.losses), self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        x = images.to(self.device, dtype, non_blocking=True)
        loss = F.cross_entropy(self.model(x), labels.to(self.device, non_blocking=True))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.losses.append(loss.detach())

    def _end_epoch(self) -> None:
        self.history.epoch_seconds.append(self.seconds)
        self.seconds = 0.0
        self.history.accuracies.append(accuracy(self.model, self.data))
        self._note_losses()

    def _note_losses(self) -> None:
        new = self.losses[len(self.history.losses) :]
        self.history.losses += torch.stack(new).tolist() if new else []

    def _settings(self) -> dict:
        """What must be the same for a training to go on."""
        shapes = {name: list(p.shape) for name, p in self.model.named_parameters()}
        data = [self.data.name, len(self.data.images)]
        dtype = str(next(self.model.parameters()).dtype)
        recipe = asdict(self.recipe)
        return {
            "label": self.label,
            "recipe": recipe,
            "seed": self.seed,
            "data": data,
            "dtype": dtype,
            "parameters": shapes,
        }

    def save(self, path: Path) -> None:
        """Write everything, or nothing: the old file stays until the new one is on the disk."""
        self._note_losses()
        content = {
            "settings": self._settings(),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "history": asdict(self.history),
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            content["cuda_random"] = torch.cuda.get_rng_state(self.device)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            with open(beside, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def restore(self, path: Path) -> None:
        try:
            content = torch.load(path, map_location=self.device, weights_only=True)
            settings = content["settings"]
        except Exception as error:
            raise CheckpointError(f"{path}: not a checkpoint that can be read: {error}") from error
        for name, value in self._settings().items():
            if settings.get(name) != value:
                raise CheckpointError(
                    f"{path}: a checkpoint of another training: its {name} is "
                    f"{settings.get(name)!r}, not {value!r}; delete it to begin anew"
                )
        self.model.load_state_dict(content["model"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.history = History(**content["history"])
        self.seconds = content["seconds"]
        self.losses = [torch.tensor(x, device=self.device) for x in self.history.losses]
        torch.set_rng_state(content["random"].cpu())
        if "cuda_random" in content:
            torch.cuda.set_rng_state(content["cuda_random"].cpu(), self.device)


class _bar:
    """A progress bar with the loss and the last accuracy, or nothing."""

    def __init__(self, label: str, steps: int, shown: bool) -> None:
        self.label, self.steps, self.progress = label or "training", steps, None
        if shown:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            text = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}")
            self.progress = Progress(*text, TimeRemainingColumn(), transient=True)

    def __enter__(self) -> Callable[[int, History], None]:
        if self.progress is None:
            return lambda done, history: None
        self.progress.start()
        task = self.progress.add_task(self.label, total=self.steps, state="")

        def show(done: int, history: History) -> None:
            state = f"{history.accuracy:.1%} of the test images" if history.accuracies else ""
            self.progress.update(task, completed=done, state=state)

        return show

    def __exit__(self, *_) -> None:
        if self.progress is not None:
            self.progress.stop()
