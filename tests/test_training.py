"""Training can be stopped anywhere; what it computes is the same by every algorithm."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from convlab import ALGORITHMS, datasets, networks, sameness, training
from convlab.networks import L1_LAYER, TOP_K_LAYER, PatchLayer, SmallCNN, seeded, settled
from convlab.sameness import distances, mean_interval, noise_table, train_each
from convlab.training import CheckpointError, History, Recipe, train

SHORT = Recipe(epochs=2, batch=32)


@pytest.fixture(scope="module")
def digits():
    return datasets.digits()


@pytest.fixture(scope="module")
def few(digits):
    """100 digits to train on, 40 to test on, moved about in training."""
    parts = (
        digits.images[:100],
        digits.labels[:100],
        digits.test_images[:40],
        digits.test_labels[:40],
    )
    return datasets.Dataset("few", *parts, digits.classes, digits.mean, digits.std, shift=1)


class Dropping(nn.Sequential):
    """Random numbers of its own in every step."""

    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
        self.append(nn.Linear(4 * 36, 10))


# Networks


def test_the_small_network_halves_its_image():
    model, sizes = SmallCNN(classes=7, channels=3), []
    for block in model.features:
        block.register_forward_hook(lambda m, args, y: sizes.append(tuple(y.shape[1:])))
    assert model(torch.ones(2, 3, 32, 32)).shape == (2, 7)
    assert sizes == [(16, 32, 32), (32, 16, 16), (64, 16, 16)]


def test_resnet_for_small_images_starts_at_full_size():
    model, sizes = networks.resnet18_32(), []
    model.layer1.register_forward_hook(lambda m, args, y: sizes.append(tuple(y.shape)))
    assert model(torch.ones(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(2, 64, 32, 32)]
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # as the paper's: 11.17 M


def test_weights_come_from_the_seed_and_nothing_else_changes():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (seeded(SmallCNN, seed, 10).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


SIZES = [(1, 0), (2, 1), (3, 2)]


@pytest.mark.parametrize(("stride", "padding"), SIZES)
def test_l1_is_the_sum_of_distances(stride, padding):
    x, w = torch.randn(2, 3, 7, 6), torch.randn(4, 3, 3, 3)
    y = networks.l1_by_unfold(x, w, stride, padding)
    padded = nn.functional.pad(x, (padding,) * 4)
    assert y.shape[2:] == nn.functional.conv2d(x, w, stride=stride, padding=padding).shape[2:]
    for n, k, i, j in np.ndindex(*y.shape):
        top, left = i * stride, j * stride
        patch = padded[n, :, top : top + 3, left : left + 3]
        torch.testing.assert_close(y[n, k, i, j], -(patch - w[k]).abs().sum())


@pytest.mark.parametrize(("stride", "padding"), SIZES)
@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_top_k_multiplies_the_largest_inputs_only(stride, padding, keep):
    x, w = torch.randn(2, 3, 7, 6) + 0.1, torch.randn(4, 3, 3, 3)
    y = networks.top_k_by_unfold(x, w, stride, padding, keep=keep)
    padded = nn.functional.pad(x, (padding,) * 4)
    kept = {0.1: 3, 0.5: 14}[keep]  # of 27
    for n, i, j in np.ndindex(y.shape[0], *y.shape[2:]):
        top, left = i * stride, j * stride
        patch = padded[n, :, top : top + 3, left : left + 3].flatten()
        chosen = patch.abs().topk(kept).indices
        torch.testing.assert_close(y[n, :, i, j], w.flatten(1)[:, chosen] @ patch[chosen])
    everything = networks.top_k_by_unfold(x, w, stride, padding, keep=1.0)
    torch.testing.assert_close(everything, nn.functional.conv2d(x, w, None, stride, padding))


@pytest.mark.parametrize(("stride", "padding"), SIZES)
@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_the_fused_top_k_is_the_same_function(stride, padding, keep):
    x, w = torch.randn(2, 3, 7, 6), torch.randn(4, 3, 3, 3)
    x[0, 0, 2, :3] = 0.25  # values of equal size: all of them are kept, or none
    found = []
    for form, options in (("by_unfold", {}), ("fused", {"backend": "loops"})):
        tensors = [t.double().requires_grad_() for t in (x, w)]
        function = getattr(networks, f"top_k_{form}")
        y = function(*tensors, stride, padding, keep=keep, **options)
        found.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    torch.testing.assert_close(*found)


def test_a_patch_layer_takes_any_function():
    def convolution(x, weight, *, stride, padding):
        return nn.functional.conv2d(x, weight, None, stride, padding)

    layer = PatchLayer(3, 4, 3, stride=2, padding=1, function=convolution)
    plain = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(layer(x), plain(x))
    assert "convolution" in repr(layer)


# Training


def test_a_recipe_names_bad_values():
    for name, value in (
        ("epochs", 0),
        ("batch", 2.0),
        ("learning_rate", -1),
        ("weight_decay", "x"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be .*{value!r}"):
            Recipe(**{name: value})


def test_batch_norms_are_settled_on_the_images():
    model, images = seeded(SmallCNN, 0), 3 + 5 * torch.randn(64, 1, 8, 8)
    norm, before = model.features[0][1], model.features[0][1].momentum
    assert settled(model, images) is model
    assert not model.training
    assert norm.momentum == before
    values = model.features[0][0](images).detach()
    torch.testing.assert_close(norm.running_mean, values.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, values.var((0, 2, 3)))
    assert norm(values).std().item() == pytest.approx(1, abs=0.01)


def test_the_rate_grows_and_falls():
    rates = [Recipe(learning_rate=2.0).rate(step, 100) for step in range(100)]
    assert max(rates) == rates[19] == pytest.approx(2)
    assert rates[:20] == sorted(rates[:20])
    assert rates[19:] == sorted(rates[19:], reverse=True)
    assert rates[-1] == pytest.approx(0)
    assert rates[0] > 0


def test_the_digits_are_learnt(digits):
    history = train(seeded(SmallCNN, 0), digits, Recipe(epochs=6))
    assert history.accuracy > 0.97
    assert (len(history.losses), len(history.accuracies)) == (6 * 23, 6)
    assert len(history.epoch_seconds) == 6
    assert np.mean(history.losses[-23:]) < 0.1 < history.losses[0]


def test_training_leaves_the_callers_random_numbers_alone(few):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train(Dropping(), few, SHORT)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), expected)


def test_equal_seeds_make_equal_curves(few):
    first, second, other = (
        train(seeded(Dropping, 0), few, SHORT, seed=seed).losses for seed in (0, 0, 1)
    )
    assert first == second
    assert first != other


class Stop(Exception):
    pass


def stopped(monkeypatch, step, model, data, **options):
    """A training that ends with an error in the middle of step `step`."""
    done = []

    def forward(module, arguments):
        if module.training and len(done) == step:
            raise Stop
        if module.training:
            done.append(1)

    hook = model.register_forward_pre_hook(forward)
    with pytest.raises(Stop):
        train(model, data, SHORT, **options)
    hook.remove()


@pytest.mark.parametrize("step", [1, 3, 4, 6])  # of 8, 4 in an epoch
def test_a_stopped_training_ends_as_if_it_had_not_been(few, tmp_path, monkeypatch, step):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    whole = seeded(Dropping, 0)
    expected = train(whole, few, SHORT)
    path = tmp_path / "new" / "run.pt"
    stopped(monkeypatch, step, seeded(Dropping, 0), few, checkpoint=path)
    assert [p.name for p in path.parent.iterdir()] == ["run.pt"]

    model, steps = seeded(Dropping, 99), []
    model.register_forward_pre_hook(lambda m, args: steps.append(1) if m.training else None)
    history = train(model, few, SHORT, checkpoint=path)
    assert len(steps) == 8 - step
    assert history.losses == expected.losses
    assert history.accuracies == expected.accuracies
    assert len(history.epoch_seconds) == 2
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    again = train(seeded(Dropping, 1), few, SHORT, checkpoint=path)
    assert again.losses == expected.losses, "what is over is not done again"


def test_between_two_writings_the_last_one_counts(few, tmp_path, monkeypatch):
    expected = train(seeded(Dropping, 0), few, SHORT).losses
    path = tmp_path / "run.pt"
    stopped(monkeypatch, 6, seeded(Dropping, 0), few, checkpoint=path)
    saved = torch.load(path)["history"]["losses"]
    assert saved == expected[:4], "written at the end of the epoch"
    assert train(seeded(Dropping, 0), few, SHORT, checkpoint=path).losses == expected


def test_a_failed_writing_leaves_the_old_checkpoint(few, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    train(Dropping(), few, SHORT, checkpoint=path)
    before = path.read_bytes()

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    run = training._Run(Dropping(), few, SHORT, 0, torch.device("cpu"), "")
    with pytest.raises(OSError, match="No space left"):
        run.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"label": "b"}, "label"),
        ({"seed": 1}, "seed"),
        ({"recipe": Recipe(epochs=3, batch=32)}, "recipe"),
        ({"model": SmallCNN()}, "parameters"),
        ({"model": Dropping().double()}, "dtype"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_checkpoint_of_another_training_is_refused(few, tmp_path, changes, name):
    arguments = {"model": Dropping(), "data": few, "recipe": SHORT, "seed": 0, "label": "a"}
    path = tmp_path / "run.pt"
    train(**arguments, checkpoint=path)
    with pytest.raises(CheckpointError, match=f"run.pt: .* another training: its {name} is"):
        train(**arguments | changes, checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"half of it"])
def test_a_damaged_checkpoint_is_named(few, tmp_path, content):
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"run\.pt: not a checkpoint"):
        train(Dropping(), few, SHORT, checkpoint=path)


def test_a_progress_bar_leaves_nothing_behind(few, capsys):
    train(Dropping(), few, SHORT, progress=True, label="native")
    assert "native" not in capsys.readouterr().out.splitlines()[-1:]


@pytest.mark.parametrize("layer", [L1_LAYER, TOP_K_LAYER], ids=["l1", "top k"])
def test_layers_that_are_no_convolution_learn(few, layer):
    recipe = Recipe(epochs=30, batch=25, learning_rate=0.1, weight_decay=0.0)
    model = seeded(SmallCNN, 0, layer=layer, widths=(8, 8, 8))
    losses = train(model, few, recipe).losses
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])


# The same training by every algorithm


@pytest.fixture(scope="module")
def curves(few):
    """Every algorithm in float64, as one short training."""
    names = [name for name in ALGORITHMS if name not in ("compiled", "fused", "implicit_gemm")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_each(lambda: SmallCNN(widths=(4, 6, 8)).double(), few, SHORT, names)


def test_every_algorithm_trains_the_same_network(curves):
    found = distances(curves)
    assert set(found) == set(curves) - {"native"}
    assert len(found) == 8
    assert found.to_numpy().max() < 1e-9
    assert len({h.accuracy for h in curves.values()}) == 1


def test_another_training_is_told_from_noise(few, monkeypatch):
    """Batch norm would hide a factor; one tap that counts 1 % more is what it cannot hide."""
    wrong, tap = copy.copy(ALGORITHMS["unfold"]), torch.ones(3, 3)
    tap[0, 0] = 1.01
    wrong.function = lambda x, w, *sizes: ALGORITHMS["unfold"].function(x, w * tap, *sizes)
    monkeypatch.setitem(ALGORITHMS, "unfold_batched", wrong)
    names = ["native", *sameness.YARDSTICKS, "unfold", "unfold_batched"]
    table = noise_table(train_each(SmallCNN, few, SHORT, names))
    assert table.loc["unfold", "times_noise"] < 30
    assert table.loc["unfold_batched", "times_noise"] > 30
    assert table.loc[list(sameness.YARDSTICKS), "times_noise"].max() <= 1


def test_distances_grow_and_want_equal_lengths():
    curves = {
        "native": History([1.0, 1.0, 1.0], [0.5]),
        "a": History([1.0, 1.5, 1.25], [0.5]),
        "b": History([1.0, 0.9, 1.0], [0.5]),
    }
    assert distances(curves)["a"].tolist() == [0, 0.5, 0.5]
    table = noise_table(curves, yardsticks=["b"])
    assert table.loc["a"].tolist() == [0, 0.5, pytest.approx(5), 0.5]
    with pytest.raises(ValueError, match="reference must be one of native, a, b, got 'c'"):
        distances(curves, "c")
    with pytest.raises(ValueError, match="yardsticks must be among the histories, got 'c'"):
        noise_table(curves, yardsticks=["a", "c"])
    with pytest.raises(ValueError, match=r"same number of steps, got \[2, 3\]"):
        distances(curves | {"b": History([1.0, 1.0], [0.5])})
    with pytest.raises(ValueError, match="yardsticks must differ from 'native'"):
        noise_table(curves | {"b": curves["native"]}, yardsticks=["b"])


def test_checkpoints_of_several_trainings(few, tmp_path):
    names = ["native", "unfold"]
    expected = train_each(Dropping, few, SHORT, names, 3, folder=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["native-3.pt", "unfold-3.pt"]
    again = train_each(Dropping, few, SHORT, names, 3, folder=tmp_path)
    assert [h.losses for h in again.values()] == [h.losses for h in expected.values()]


def test_the_interval_of_a_mean():
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2, 2 - 2.4841, 2 + 2.4841), rel=1e-4)
    assert mean_interval([0.5]) == (0.5, -np.inf, np.inf)
    with pytest.raises(ValueError, match="at least one number"):
        mean_interval([])
