"""A network's step by each algorithm: checked first, then the whole, its parts and the stages."""

import copy
import json

import pytest
import torch
from torch import nn

from convlab import ALGORITHMS, datasets, networks, steps, swap_convolutions
from convlab.experiments import Settings, network_case, run_case
from convlab.experiments import networks as network_experiment
from convlab.experiments.networks import NETWORKS
from convlab.networks import SmallCNN
from convlab.steps import PARTS, STAGES, Step

TINY = {"seconds": 0.01, "min_rounds": 2, "max_rounds": 2}


@pytest.fixture(scope="module")
def digits():
    return datasets.digits()


# One step


def test_a_training_step_changes_the_weights_and_inference_does_not(digits):
    for pass_ in ("train", "forward"):
        model = SmallCNN()
        before = copy.deepcopy(model.state_dict())
        step = Step(model, digits, 4, pass_)
        assert tuple(step.parts) == PARTS[pass_]
        step()
        changed = [not torch.equal(before[k], v) for k, v in model.state_dict().items()]
        assert any(changed) == (pass_ == "train")
        assert model.training == (pass_ == "train")
        assert step.logits.shape == (4, 10)
        assert step.logits.requires_grad == (pass_ == "train")


def test_a_step_is_one_of_stochastic_gradient_descent(digits):
    model = networks.seeded(SmallCNN, 0)
    twin = copy.deepcopy(model)
    step = Step(model, digits, 8)
    step()
    loss = nn.functional.cross_entropy(twin(step.images), step.labels)
    loss.backward()
    with torch.no_grad():
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b - 1e-3 * b.grad)


def test_every_step_has_a_batch_of_its_own_the_same_for_equal_steps(digits):
    first, second = (Step(SmallCNN(), digits, 8, "forward") for _ in range(2))
    batches = []
    for _ in range(2):
        first()
        second()
        assert torch.equal(first.images, second.images)
        batches.append(first.images)
    assert not torch.equal(*batches)


def test_channels_last_reaches_the_images(digits):
    data = NETWORKS["ResNet-18"].data()
    step = Step(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), data, 2, "forward", nhwc=True)
    step.data()
    assert step.images.is_contiguous(memory_format=torch.channels_last)
    assert not step.images.is_contiguous()


@pytest.mark.parametrize("pass_", PARTS)
def test_the_parts_are_the_whole_step(digits, pass_, monkeypatch):
    """By a clock that counts how often it was read: the parts touch and nothing is between."""
    ticks = iter(range(100))
    clock = (lambda: float(next(ticks)), lambda a, b: b - a)
    monkeypatch.setattr(steps, "stopwatch", lambda device: clock)
    found = Step(SmallCNN(), digits, 2, pass_).timed()
    assert found == dict.fromkeys(PARTS[pass_], 1.0)


def test_bad_arguments_are_named(digits):
    with pytest.raises(ValueError, match="pass_ must be 'train' or 'forward', got 'backward'"):
        Step(SmallCNN(), digits, 2, "backward")
    for batch in (0, 2.0, True):
        with pytest.raises(ValueError, match=f"batch must be an integer of .* got {batch!r}"):
            Step(SmallCNN(), digits, batch)


# The stages of the thread's layers inside


class Branches(nn.Module):
    """Two layers that read one tensor: gradients are added up outside both."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, groups=2)
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        x = self.first(x)
        return self.head((self.left(x) + self.right(x)).mean((2, 3)))


def test_every_layer_marks_its_stages_in_both_directions():
    model = swap_convolutions(Branches(), "thread")
    log, order = {name: [] for name in STAGES}, []

    def mark():
        order.append(len(order))
        return order[-1]

    x = torch.randn(2, 1, 8, 8)
    expected = model(x)
    plain = ALGORITHMS["thread"].function
    with steps.marked_stages(log, mark):
        y = model(x)
        torch.testing.assert_close(y, expected)
        y.sum().backward()
    assert ALGORITHMS["thread"].function is plain
    marked = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for a, b in zip(marked, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(a, b)
    # The first layer's input needs no gradient: no backward of its unfold and of its product.
    assert {name: len(pairs) for name, pairs in log.items()} == {
        "unfold": 3 + 2,
        "product": 3 + 2,
        "fold": 3 + 3,
    }
    for name, pairs in log.items():
        assert all(end == begin + 1 for begin, end in pairs), f"{name}: marks of others between"


def test_stages_are_restored_after_an_error():
    plain = ALGORITHMS["thread"].function
    with (
        pytest.raises(KeyError),
        steps.marked_stages({name: [] for name in STAGES}, lambda: 0),
    ):
        raise KeyError
    assert ALGORITHMS["thread"].function is plain


def test_stages_lie_within_forward_and_backward(digits):
    model = swap_convolutions(SmallCNN(), "thread")
    found = Step(model, digits, 16).timed(stages=True)
    assert set(found) == {*PARTS["train"], *STAGES}
    assert all(found[name] > 0 for name in STAGES)
    inside = sum(found[name] for name in STAGES)
    assert inside < found["forward"] + found["backward"]


# The experiment


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(Settings, "options", TINY)
    monkeypatch.setattr(Settings, "brief", TINY)
    return Settings(quick=True)


@pytest.mark.parametrize("pass_", PARTS)
def test_rows_of_a_network(brief, pass_):
    names = ("native", "native_channels_last", "thread", "windows", "winograd")
    case = network_case("small CNN", pass_, brief, names)
    assert case.name == f"network_step/small CNN/b64/{pass_}"
    rows = run_case(case, "now")
    assert [json.loads(r.as_json())["status"] for r in rows] == ["ok"] * len(rows)
    found = {(r.algorithm, r.part): r for r in rows}
    assert len(found) == len(rows)
    parts = {"", *PARTS[pass_]}
    assert {p for a, p in found if a == "native"} == parts
    assert {p for a, p in found if a == "thread"} == parts | set(STAGES)
    assert {len(r.samples) for r in rows} == {2}
    for r in rows:
        assert r.problem == {"batch": 64, "in_channels": 1, "height": 8, "width": 8}
        assert (r.pass_, r.extra) == (pass_, {"network": "small CNN"})
        assert r.layout == ("NHWC" if r.algorithm == "native_channels_last" else "NCHW")
        if not r.part:
            assert 0 < r.error < 1e-4
            assert r.peak_bytes > 0


def test_a_wrong_algorithm_has_no_time(brief, monkeypatch):
    def wrong(part):
        bad = copy.copy(ALGORITHMS["unfold"])
        bad.function = lambda x, w, *sizes: part(ALGORITHMS["unfold"].function, x, w, *sizes)
        return bad

    tap = torch.ones(3, 3)
    tap[0, 0] = 1.1

    def values(function, x, w, *sizes):
        return function(x, w * tap.to(w), *sizes)

    def gradients(function, x, w, *sizes):
        right, bad = function(x, w, *sizes), values(function, x, 2 * w, *sizes)
        return bad + (right - bad).detach()

    monkeypatch.setitem(ALGORITHMS, "windows", wrong(values))
    monkeypatch.setitem(ALGORITHMS, "shifts", wrong(gradients))
    case = network_case("small CNN", "train", brief, ("native", "windows", "shifts"))
    rows = {(r.algorithm, r.part): r for r in run_case(case)}
    for name in ("windows", "shifts"):
        row = rows[name, ""]
        assert (row.status, row.median, row.samples) == ("wrong", None, [])
        assert "logits differ by" in row.extra["reason"]
        assert (name, "forward") not in rows
    assert rows["native", ""].status == "ok"


def test_an_unsupported_algorithm_and_a_full_memory_say_why(brief, monkeypatch):
    refuses = copy.copy(ALGORITHMS["windows"])
    refuses._limits = lambda problem, device: "Not here."
    monkeypatch.setitem(ALGORITHMS, "windows", refuses)
    full = copy.copy(ALGORITHMS["unfold"])

    def no_memory(*arguments):
        raise RuntimeError("not enough memory: you tried to allocate 1 byte")

    full.function = no_memory
    monkeypatch.setitem(ALGORITHMS, "unfold", full)
    case = network_case("small CNN", "train", brief, ("native", "windows", "unfold"))
    rows = {r.algorithm: r for r in run_case(case) if not r.part}
    assert rows["windows"].status == "unsupported"
    assert "Not here" in rows["windows"].extra["reason"]
    assert rows["unfold"].status == "out of memory"
    assert rows["native"].status == "ok"


def test_the_networks_and_their_batches():
    quick, full = Settings(quick=True), Settings()
    assert {n: k.batch(full) for n, k in NETWORKS.items()} == {"small CNN": 256, "ResNet-18": 8}
    assert {n: k.batch(quick) for n, k in NETWORKS.items()} == {"small CNN": 64, "ResNet-18": 2}
    names = [case.name for case in network_experiment.network_cases(full)]
    assert len(set(names)) == 4
    assert set(network_experiment.ALGORITHMS_ON_CPU) <= set(ALGORITHMS)
    data = NETWORKS["ResNet-18"].data()
    assert data.shape == (3, 32, 32)
    assert data.shift > 0


def test_the_large_network_runs_by_the_threads_layer(brief):
    rows = run_case(network_case("ResNet-18", "forward", brief, ("native", "thread")))
    assert {r.status for r in rows} == {"ok"}
    assert {r.problem["batch"] for r in rows} == {2}
