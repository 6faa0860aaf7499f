"""The known causes: each found where it is, not found where it is not, whatever the sizes."""

import dataclasses

import naive_layers
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from convlab import ThreadConv2d
from convlab.diagnosing import around, inside  # noqa: F401  (they register their detectors)
from convlab.diagnosing.causes import Facts, find
from convlab.diagnosing.subject import Subject
from convlab.diagnosing.watch import Op, Watched, watch

COLUMNS, BLOWN = "columns materialised (im2col)", "broadcasting blows the columns up"
WAITS, COPIES, FOLD = (
    "printing or synchronising in forward",
    "hidden copies",
    "F.fold with kernel 1",
)
LAYOUT = "layout conversions (NCHW ↔ NHWC)"
FIRST = {
    "Adder": BLOWN,
    "AdderOfWindows": BLOWN,
    "AdderOfItsOwnGradient": BLOWN,
    "MaxPlus": BLOWN,
    "LogSumExp": BLOWN,
    "CosineBroadcast": BLOWN,
    "Cosine": COLUMNS,
    "CosineOfWindows": COLUMNS,
    "Involution": COLUMNS,
    "Filled": COLUMNS,
    "Stacked": COLUMNS,
    "Indexed": COLUMNS,
    "Picked": COLUMNS,
    "Distance": COLUMNS,
    "Standardised": COLUMNS,
    "TopK": COLUMNS,
    "Clipped": COLUMNS,
    "Normalised": COLUMNS,
    "Printing": WAITS,
    "Item": WAITS,
    "PrintsAndUnfolds": WAITS,
    "OneImageAtATime": "one iteration per image",
}


def facts(layer, x, **changes):
    subject = Subject(layer, x)
    return Facts(
        watched=watch(subject),
        input_shape=tuple(x.shape),
        input_values=x.numel(),
        itemsize=x.element_size(),
        output_values=subject.y.numel(),
        differentiable=subject.differentiable,
        **changes,
    )


def causes(layer, x, **changes):
    """name → cause, in order."""
    return {cause.name: cause for cause in find(facts(layer, x, **changes))}


def images(n=6, c=8, h=12, w=12):
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(1))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize("name", FIRST)
def test_the_first_cause_of_naive_layers(name):
    found = causes(getattr(naive_layers, name)(), images())
    assert next(iter(found)) == FIRST[name]
    cause = found[FIRST[name]]
    assert "naive_layers.py:" in cause.evidence


def test_every_naive_layer_is_looked_at():
    own = {
        name
        for name, value in vars(naive_layers).items()
        if isinstance(value, type) and issubclass(value, nn.Module)
    }
    assert own - {"Custom", "LocallyConnected", "Median"} == FIRST.keys()


@settings(max_examples=25)
@given(
    name=st.sampled_from(["Adder", "AdderOfWindows", "Cosine", "Stacked", "Indexed", "Thread"]),
    batch=st.integers(1, 5),
    channels=st.integers(1, 9),
    out_channels=st.integers(3, 9),
    kernel=st.sampled_from([2, 3, 5]),
    side=st.integers(6, 15),
)
def test_the_first_cause_does_not_depend_on_the_sizes(
    name, batch, channels, out_channels, kernel, side
):
    x = images(batch, channels, side, side)
    if name in ("Stacked", "Indexed", "Thread"):
        kernel |= 1
    if name == "Thread":
        layer = ThreadConv2d(channels, out_channels, kernel, padding=kernel // 2)
        nn.init.normal_(layer.weight)
    else:
        layer = getattr(naive_layers, name)(channels, out_channels, kernel)
    found = causes(layer, x)
    assert next(iter(found)) == (BLOWN if name.startswith("Adder") else COLUMNS)


@pytest.mark.parametrize("order", range(3))
def test_the_order_does_not_depend_on_the_clock(order):
    """Times of operators turned upside down leave the ranking as it is."""
    seen = facts(naive_layers.Adder(), images())
    draw = torch.Generator().manual_seed(order)
    noise = torch.rand(len(seen.watched.ops), generator=draw).tolist()
    ops = [
        dataclasses.replace(op, seconds=share / (1 + op.written))
        for op, share in zip(seen.watched.ops, noise, strict=True)
    ]
    disturbed = dataclasses.replace(seen, watched=dataclasses.replace(seen.watched, ops=ops))
    assert [c.name for c in find(disturbed)] == [c.name for c in find(seen)]


def test_the_layer_of_the_thread_shows_its_three_causes():
    layer = ThreadConv2d(8, 6, 3, padding=1)
    nn.init.normal_(layer.weight)
    found = causes(layer, images())
    assert list(found)[:3] == [COLUMNS, COPIES, FOLD]
    assert "9× the input" in found[COLUMNS].evidence
    assert "F.unfold" in found[COLUMNS].evidence
    assert "matmul" in found[COPIES].evidence
    assert "also counted as columns" in found[COPIES].evidence
    assert "F.fold" in found[FOLD].evidence
    assert 0 < sum(found[name].share for name in (COLUMNS, FOLD)) <= 1
    assert found[COLUMNS].seconds >= found[COPIES].seconds > 0


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 6, 3, padding=1),
        nn.Conv2d(8, 64, 3, padding=1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        nn.AvgPool2d(2),
        nn.ConvTranspose2d(8, 6, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_library_layers_show_no_cause(layer):
    assert list(causes(layer, images(32, 8, 32, 32))) == []


@pytest.mark.parametrize("k", [2, 3, 4])
def test_columns_are_as_large_as_counted(k):
    layer = naive_layers.Adder(8, 6, k, stride=2)
    seen = facts(layer, images())
    side = (12 + 2 * (k // 2) - k) // 2 + 1
    assert seen.watched.columns == 6 * 8 * k * k * side * side


def test_unfold_with_more_output_than_columns():
    """3 channels, 64 filters: the output is larger than the columns."""
    for name in ("Cosine", "CosineOfWindows"):
        layer = getattr(naive_layers, name)(3, 64)
        assert next(iter(causes(layer, images(c=3)))) == COLUMNS, name


# Printing and waiting


@pytest.mark.parametrize(
    ("function", "seen"),
    [
        (lambda s, x: (print("x"), s.conv(x))[1], "print()"),
        (lambda s, x: s.conv(x) * x.mean().item(), ".item()"),
        (lambda s, x: s.conv(x) * float(x.detach().mean()), "float() of a tensor"),
        (lambda s, x: s.conv(x) if x.sum() > 0 else -s.conv(x), "if or bool() of a tensor"),
        (lambda s, x: s.conv(x.cpu()), ".cpu()"),
        (lambda s, x: (x.numpy(), s.conv(x.clone()))[1], ".numpy()"),
        (lambda s, x: (x[0, 0].tolist(), s.conv(x))[1], ".tolist()"),
        (lambda s, x: (f"{x.mean():.3f}", s.conv(x))[1], "a tensor formatted as text"),
        (lambda s, x: (str(x), s.conv(x))[1], "a tensor formatted as text"),
        (lambda s, x: (x.nonzero(), s.conv(x))[1], "nonzero()"),
    ],
)
def test_what_waits_is_named_with_its_line(function, seen):
    layer = Function(lambda s, x: function(s, x))
    found = causes(layer, images())
    assert next(iter(found)) == WAITS
    assert f"{seen} 1×" in found[WAITS].evidence
    assert "test_diagnose_causes.py:" in found[WAITS].evidence


def test_a_tensor_that_is_printed_counts_as_one_print():
    watched = facts(naive_layers.Printing(), images()).watched
    assert [wait.what for wait in watched.waits] == ["print()"]
    assert "print(" in watched.waits[0].where.text
    assert {op.name for op in watched.ops if op.direction == "forward"} == {"convolution", "mean"}


# Others


def test_copies_of_the_layout():
    def nhwc(s, x):
        y = x.permute(0, 2, 3, 1).contiguous() @ s.conv.weight[:, :, 0, 0].t()
        return y.permute(0, 3, 1, 2).contiguous()

    assert next(iter(causes(Function(nhwc), images()))) == LAYOUT
    to = Function(lambda s, x: s.conv(x.contiguous(memory_format=torch.channels_last)))
    assert LAYOUT in causes(to, images())


def test_a_weight_repeated_for_every_image_is_a_copy():
    def repeated(s, x):
        return torch.bmm(s.conv.weight.flatten(1)[:, :8].repeat(len(x), 4, 1), x.flatten(2))

    found = causes(Function(repeated), images(16, h=4, w=4))
    assert next(iter(found)) == COPIES
    assert COLUMNS not in found


def test_recomputed_in_backward():
    layer = Function(lambda s, x: checkpoint(lambda x: s.conv(x).sin(), x, use_reentrant=False))
    assert next(iter(causes(layer, images()))) == "forward computed again in the backward pass"


def test_parameters_without_a_gradient():
    frozen = causes(nn.Conv2d(8, 6, 3), images(), frozen=("weight",))
    assert "weight" in frozen["parameters without a gradient"].evidence
    unused = facts(Function(lambda s, x: F.conv2d(x, s.conv.weight)), images())
    assert unused.watched.unused == ("conv.bias",)
    assert list(causes(Function(lambda s, x: s.conv(x).detach()), images())) == ["no gradient"]


@pytest.mark.parametrize(
    ("count", "function"),
    [
        ("image", lambda s, x: torch.stack([s.conv(i[None])[0] for i in x])),
        ("tap", lambda s, x: sum(_shifted(x, i, j) for i in range(3) for j in range(3))),
    ],
)
def test_loops(count, function):
    from convlab import ConvProblem

    layer = Function(lambda s, x: function(s, x))
    problem = ConvProblem(7, 8, 8, 12, 12, 3, padding=1)
    found = causes(layer, images(7), problem=problem)
    assert f"one iteration per {count}" in found


def _shifted(x, i, j):
    return F.pad(x, (1, 1, 1, 1))[:, :, i : i + x.shape[2], j : j + x.shape[3]] * (i + j)


def made_up(**changes):
    """Facts of one large matrix product."""
    op = Op("mm", "forward", 1e-3, (1000, 1000), 10**6, 10**6, "", False, None)
    values = {"input_shape": (1, 1, 8, 8), "input_values": 64, "itemsize": 4, "output_values": 64}
    return Facts(watched=Watched([op]), **{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"threads": 1, "cores": 4}, "fewer CPU threads than cores"),
        ({"first_seconds": 3.0, "later_seconds": 0.01}, "a slow first call"),
        ({"compiled": True}, "a slow first call"),
        ({"device": "cuda", "tf32": (True, False)}, "TF32 for convolutions only"),
        ({"differentiable": False}, "no gradient"),
    ],
)
def test_circumstances(changes, name):
    assert [cause.name for cause in find(made_up(**changes))] == [name]


@pytest.mark.parametrize(
    "changes",
    [
        {"threads": 4, "cores": 4},
        {"first_seconds": 0.1, "later_seconds": 0.001},
        {"first_seconds": 3.0, "later_seconds": 1.0},
        {"device": "cuda", "tf32": (True, True)},
        {"device": "cuda", "tf32": (False, False)},
        {"device": "cpu", "tf32": (True, False)},
        {"device": "cuda", "threads": 1, "cores": 4},
    ],
)
def test_circumstances_that_are_as_they_should_be(changes):
    assert find(made_up(**changes)) == ()


def test_a_tiny_problem_is_said_last():
    found = causes(naive_layers.Cosine(2, 2), images(1, 2, 4, 4))
    names = list(found)
    assert names[0] == COLUMNS
    assert "a tiny problem" in names


def test_bounds_on_the_gain():
    found = causes(naive_layers.Adder(), images())
    for cause in found.values():
        if cause.gain is not None:
            assert cause.gain == pytest.approx(1 / (1 - cause.share))
