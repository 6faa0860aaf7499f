"""Images to train on: handwritten digits that are always there, CIFAR-10 where it can be loaded."""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from convlab.records import data_folder
from convlab.vision import torchvision

DIGITS_FOR_TESTS = 360  # of 1,797
WAIT_SECONDS = 30.0  # for an answer of the server


class DataError(Exception):
    """A data set cannot be loaded; one sentence says why."""


@dataclass(frozen=True)
class Dataset:
    """Labelled images in two parts.

    Attributes:
        images, test_images: (N, C, H, W), uint8.
        labels, test_labels: (N,), int64.
        classes: their names.
        mean, std: of each channel of `images`, (C, 1, 1), to normalise with.
        shift: pixels that a picture may be shifted by, in training; 0: pictures stay as they are.
            Where it is not 0 they are mirrored too.
    """

    name: str
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor
    shift: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return tuple(self.images.shape[1:])

    def first(self, images: int) -> Dataset:
        """The same with only so many images to train on."""
        return replace(self, images=self.images[:images], labels=self.labels[:images])

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple:
        """Normalised images (B, C, H, W) in float32 and labels (B,) of the training part.

        Args:
            generator: draws shifts and mirrorings; None: pictures as they are.
        """
        images = self.images[index]
        if generator is not None and self.shift:
            images = shifted(images, self.shift, generator)
        return self.normalised(images), self.labels[index]

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 → float32 of zero mean and unit deviation over the training part."""
        return (images.float() - self.mean) / self.std


def shifted(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Every image moved by up to so many pixels each way, zeros moving in, half of them mirrored.

    images (B, C, H, W) → the same shape.
    """
    batch, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (pixels,) * 4)
    top, left = torch.randint(2 * pixels + 1, (2, batch, 1), generator=generator)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    rows, columns = top + torch.arange(height), torch.arange(width)
    columns = left + torch.where(mirrored, width - 1 - columns, columns)
    picture = torch.arange(batch)[:, None, None]
    return padded.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None]].permute(
        0, 3, 1, 2
    )


def load(name: str = "digits", *, folder: str | Path | None = None) -> Dataset:
    """The data set of that name; the digits, after one warning, where CIFAR-10 is not to be had.

    Args:
        name: "digits" or "cifar10".
        folder: where downloads are kept; `cache/` beside the records if None.

    Raises:
        ValueError: another name.
    """
    if name not in ("digits", "cifar10"):
        raise ValueError(f"name must be 'digits' or 'cifar10', got {name!r}")
    if name == "cifar10":
        try:
            return cifar10(folder)
        except DataError as error:
            warnings.warn(f"{error} The digits of scikit-learn stand in.", stacklevel=2)
    return digits()


def digits(seed: int = 0) -> Dataset:
    """1,797 handwritten digits of 8×8 pixels, which come with scikit-learn; 360 are for tests.

    E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI repository, 1998.

    Args:
        seed: which of them are for tests; as many of every class.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.uint8)[:, None]
    labels = torch.tensor(found.target, dtype=torch.int64)
    train, test = train_test_split(
        range(len(labels)), test_size=DIGITS_FOR_TESTS, stratify=labels, random_state=seed
    )
    classes = tuple(map(str, found.target_names))
    return _dataset("digits", images[train], labels[train], images[test], labels[test], classes)


def cifar10(folder: str | Path | None = None) -> Dataset:
    """60,000 photographs of 32×32 pixels in ten classes, 10,000 of them for tests.

    The first call downloads 170 MB, with a progress bar, and compares their checksum; later ones
    read what is there. A download that was interrupted is begun anew.

    A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.

    Raises:
        DataError: no connection, a damaged download, a folder that cannot be written.
    """
    folder = default_folder() if folder is None else Path(folder)
    source = torchvision().datasets.CIFAR10
    try:
        with _patience():
            train, test = (source(folder, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError, EOFError) as error:
        reason = str(getattr(error, "reason", error)).rstrip(".")
        raise DataError(f"CIFAR-10 cannot be loaded into {folder}: {reason}.") from error
    images, test_images = (
        torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test)
    )
    labels, test_labels = (torch.tensor(part.targets) for part in (train, test))
    classes = tuple(train.classes)
    return _dataset("CIFAR-10", images, labels, test_images, test_labels, classes, shift=4)


def default_folder() -> Path:
    """`cache/` in $CONVLAB_DATA or in the data folder; git ignores it."""
    return Path(os.environ.get("CONVLAB_DATA") or data_folder()) / "cache"


def _dataset(name, images, labels, test_images, test_labels, classes, shift=0) -> Dataset:
    parts = images.split(1000)
    count = images.numel() // images.shape[1]
    mean = sum(part.double().sum((0, 2, 3)) for part in parts) / count
    std = (sum(part.double().square().sum((0, 2, 3)) for part in parts) / count - mean**2).sqrt()
    mean, std = (t.float()[:, None, None] for t in (mean, std))
    return Dataset(name, images, labels, test_images, test_labels, classes, mean, std, shift)


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """A server that does not answer is given up after a while."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(WAIT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
