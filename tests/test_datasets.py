"""The digits are always there; CIFAR-10 is loaded as torchvision has it, or said not to be."""

import types
import warnings

import numpy as np
import pytest
import torch

from convlab import datasets
from convlab.datasets import DataError


@pytest.fixture(scope="module")
def digits():
    return datasets.digits()


def test_digits_are_split_with_as_many_of_every_class(digits):
    assert digits.images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    assert digits.shape == (1, 8, 8)
    counts = digits.test_labels.bincount(minlength=len(digits.classes))
    assert (counts.min(), counts.max()) == (35, 37)
    again, other = datasets.digits(), datasets.digits(seed=1)
    assert torch.equal(again.images, digits.images)
    assert not torch.equal(other.images, digits.images)


def test_only_the_first_images(digits):
    few = digits.first(5)
    assert torch.equal(few.batch(torch.arange(5))[0], digits.batch(torch.arange(5))[0])
    assert (len(few.images), len(few.labels), len(few.test_images)) == (5, 5, 360)


def test_no_test_image_is_trained_on(digits):
    from sklearn.datasets import load_digits

    parts = torch.cat([digits.images, digits.test_images]).flatten(1)
    known = torch.tensor(load_digits().images, dtype=torch.uint8).flatten(1)
    assert sorted(map(tuple, parts.tolist())) == sorted(map(tuple, known.tolist()))


def test_images_are_normalised(digits):
    x, labels = digits.batch(torch.arange(len(digits.images)))
    assert x.dtype == torch.float32
    assert x.mean() == pytest.approx(0, abs=1e-4)
    assert x.std() == pytest.approx(1, abs=1e-3)
    assert torch.equal(labels, digits.labels)


def test_shifted_pictures_are_parts_of_the_padded_ones():
    images = torch.randint(1, 255, (40, 3, 5, 6), dtype=torch.uint8)
    found = datasets.shifted(images, 2, torch.Generator().manual_seed(0))
    assert found.shape == images.shape
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for one, whole in zip(found, padded):
        places = [
            (top, left, mirrored)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            if torch.equal(
                one.flip(2) if mirrored else one, whole[:, top : top + 5, left : left + 6]
            )
        ]
        assert len(places) == 1
        seen |= set(places)
    assert {mirrored for *_, mirrored in seen} == {False, True}
    assert len({top for top, *_ in seen}) == len({left for _, left, _ in seen}) == 5


def made_up_cifar(folder, train, download):
    data = np.random.default_rng(train).integers(0, 255, (20, 32, 32, 3), dtype=np.uint8)
    assert download
    return types.SimpleNamespace(
        data=data, targets=[i % 10 for i in range(20)], classes="abcdefghij"
    )


def replace_source(monkeypatch, source):
    package = types.SimpleNamespace(datasets=types.SimpleNamespace(CIFAR10=source))
    monkeypatch.setattr(datasets, "torchvision", lambda: package)


def test_cifar_becomes_channels_first(monkeypatch):
    replace_source(monkeypatch, made_up_cifar)
    data = datasets.load("cifar10", folder="nowhere")
    assert (data.name, data.shape, len(data.images)) == ("CIFAR-10", (3, 32, 32), 20)
    raw = made_up_cifar("", True, True).data
    assert torch.equal(data.images[3, 1], torch.tensor(raw[3, :, :, 1]))
    assert data.mean.flatten().tolist() == pytest.approx(raw.mean((0, 1, 2)).tolist(), rel=1e-5)
    assert data.std.flatten().tolist() == pytest.approx(raw.std((0, 1, 2)).tolist(), rel=1e-4)
    index = torch.arange(20)
    assert torch.equal(data.batch(index)[0], data.normalised(data.images))
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    first, second = (data.batch(index, g)[0] for g in generators)
    assert torch.equal(first, second)
    assert not torch.equal(first, data.normalised(data.images))


def test_without_a_connection_the_digits_stand_in(tmp_path, monkeypatch):
    source = datasets.torchvision().datasets.CIFAR10
    monkeypatch.setattr(source, "url", "https://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(DataError, match=r"^CIFAR-10 cannot be loaded into .*refused\.$"):
        datasets.cifar10(tmp_path)
    with pytest.warns(UserWarning, match=r"refused\. The digits of scikit-learn stand in\.$"):
        data = datasets.load("cifar10", folder=tmp_path)
    assert data.name == "digits"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("File not found or corrupted."), PermissionError(13, "Permission denied")],
)
def test_a_failed_download_is_one_sentence(monkeypatch, error):
    def fails(*arguments, **options):
        raise error

    replace_source(monkeypatch, fails)
    with pytest.raises(DataError, match=r"^CIFAR-10 cannot be loaded into x: [^.]*\.$"):
        datasets.cifar10("x")


def test_names():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert datasets.load().name == "digits"
    with pytest.raises(ValueError, match="name must be 'digits' or 'cifar10', got 'mnist'"):
        datasets.load("mnist")


def test_downloads_are_kept_beside_the_records_out_of_git(monkeypatch, tmp_path):
    folder = datasets.default_folder()
    assert folder == datasets.data_folder() / "cache"
    ignored = (folder.parent.parent / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert "data/cache/" in ignored
    monkeypatch.setenv("CONVLAB_DATA", str(tmp_path))
    assert datasets.default_folder() == tmp_path / "cache"
