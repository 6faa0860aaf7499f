"""Photographs have the promised shapes and values; every figure draws without a warning."""

import warnings

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from convlab import pictures
from convlab.images import photo_batch, photographs

matplotlib.use("Agg")

TINY = torch.rand(10, 12, generator=torch.Generator().manual_seed(0))


def test_photographs_are_two_different_colour_pictures():
    photos = photographs()
    assert photos.shape == (2, 3, 427, 640)
    assert photos.dtype == torch.float32
    assert photos.is_contiguous()
    assert (photos.min(), photos.max()) == (0, 1)
    assert not torch.equal(photos[0], photos[1])
    pagoda, dahlia = photos[:, :, :20].mean(dim=(2, 3))
    assert pagoda.min() > 0.7, "bright sky at the top"
    assert dahlia.max() < 0.4, "dark leaves at the top"


def test_changing_a_photograph_leaves_the_next_call_alone():
    photographs().zero_()
    assert photographs().any()


def test_patches_are_cut_from_the_photographs():
    patches = photo_batch(5, 32, seed=1)
    assert patches.shape == (5, 3, 32, 32)
    windows = photographs().unfold(2, 32, 1).unfold(3, 32, 1)  # N, C, OH, OW, 32, 32
    for patch in patches:
        candidates = (windows[..., 0, 0] == patch[:, :1, :1]).all(dim=1).nonzero()
        assert any(torch.equal(windows[n, :, i, j], patch) for n, i, j in candidates)


def test_patches_depend_on_the_seed_alone():
    assert torch.equal(photo_batch(3, 16, seed=2), photo_batch(3, 16, seed=2))
    assert not torch.equal(photo_batch(3, 16, seed=2), photo_batch(3, 16, seed=3))


def test_patches_at_the_limits():
    assert photo_batch(0, 8).shape == (0, 3, 8, 8)
    assert photo_batch(2, 427).shape == (2, 3, 427, 427)
    with pytest.raises(ValueError, match="size must be in 1 … 427, got 428"):
        photo_batch(1, 428)
    with pytest.raises(ValueError, match="size must be in 1 … 427, got 0"):
        photo_batch(1, 0)
    with pytest.raises(ValueError, match="batch must be at least 0, got -1"):
        photo_batch(-1, 8)


FIGURES = {
    "show": lambda: pictures.show(
        {"colour": TINY.expand(3, -1, -1), "numbers": TINY, "zero": TINY * 0, "signed": TINY - 0.5},
        numbers=["numbers"],
    ),
    "window": lambda: pictures.window(torch.stack([TINY] * 3), 1, 2),
    "columns": lambda: pictures.columns(TINY, 4, 5),
    "rows": lambda: pictures.rows(TINY, 4, 5),
    "product": lambda: pictures.product(
        torch.ones(2, 1, 3, 3), F.unfold(TINY[None, None], 3)[0], place=7, kernel=1
    ),
    "memory": lambda: pictures.memory(TINY, 3, 4),
    "verdicts": lambda: pictures.verdicts(
        pd.DataFrame({"a": ["right", "error"], "b": ["wrong, no error", "right"]}, index=["x", "y"])
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_draw_without_warnings_and_are_closed(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = FIGURES[name]()
        figure.canvas.draw()
    assert plt.get_fignums() == [], "an open figure is shown twice in a notebook"


def test_every_place_of_a_pixel_is_outlined():
    inside, corner = pictures.columns(TINY, 4, 5), pictures.columns(TINY, 0, 0)
    assert [len(ax.patches) for ax in inside.axes] == [1, 9]
    assert [len(ax.patches) for ax in corner.axes] == [1, 1]
    assert [len(ax.patches) for ax in pictures.rows(TINY, 4, 5).axes] == [1] * 9


def test_outlines_surround_the_pixels_they_mean():
    numbered = torch.arange(120.0).view(10, 12)
    _, strip = pictures.memory(numbered, row=3, column=4).axes
    values = torch.as_tensor(strip.images[0].get_array())[0]
    runs = [
        values[round(b.get_x() + 0.5) :][: round(b.get_width())].tolist() for b in strip.patches
    ]
    assert runs == [[40, 41, 42], [52, 53, 54], [64, 65, 66]]


def test_the_product_drawn_is_the_matrix_product():
    weight, columns = torch.randn(2, 1, 3, 3), F.unfold(TINY[None, None], 3)[0]
    drawn = pictures.product(weight, columns, place=0).axes[2].images[0].get_array()
    torch.testing.assert_close(torch.tensor(drawn), weight.flatten(1) @ columns)


def test_negative_values_put_zero_at_mid_grey():
    low, high = pictures.show({"signed": TINY - 0.9}).axes[0].images[0].get_clim()
    assert low == -high
