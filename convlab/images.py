"""Two real photographs as tensors, and batches cut from them; both come with scikit-learn."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def photographs() -> Tensor:
    """A pagoda and a dahlia, (2, 3, 427, 640), values in 0..1."""
    return _loaded().clone()


def photo_batch(batch: int, size: int, seed: int = 0) -> Tensor:
    """Square patches at random places of the photographs, (batch, 3, size, size), in 0..1.

    Raises:
        ValueError: a negative `batch`, or a `size` that does not fit into the photographs.
    """
    photos = _loaded()
    count, _, height, width = photos.shape
    if batch < 0:
        raise ValueError(f"batch must be at least 0, got {batch}")
    if not 1 <= size <= min(height, width):
        raise ValueError(f"size must be in 1 … {min(height, width)}, got {size}")
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randint, size=(batch,), generator=generator)
    places = zip(draw(count).tolist(), draw(height - size + 1).tolist(), draw(width - size + 1))
    patches = photos.new_empty(batch, 3, size, size)
    for patch, (photo, top, left) in zip(patches, places):
        patch.copy_(photos[photo, :, top : top + size, left : left + size])
    return patches


@functools.cache
def _loaded() -> Tensor:
    from sklearn.datasets import load_sample_images

    images = [torch.tensor(image) for image in load_sample_images().images]  # (H, W, 3), 0..255
    return torch.stack(images).permute(0, 3, 1, 2).div(255).contiguous()
