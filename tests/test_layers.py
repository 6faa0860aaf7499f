"""`Conv2d` is `nn.Conv2d` by another algorithm; `ThreadConv2d` has the faults as posted."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convlab import ALGORITHMS, Conv2d, ConvProblem, ThreadConv2d
from convlab.oracle import tolerance

SIZES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2},
    {"kernel_size": 3, "padding": "same", "bias": False},
    {"kernel_size": (2, 3), "padding": "same", "dilation": (2, 1)},
    {"kernel_size": 1},
]


def doubles(algorithm, **sizes):
    """An `nn.Conv2d` and a `Conv2d` with its parameters, in float64."""
    reference = nn.Conv2d(4, 6, **sizes, dtype=torch.float64)
    ours = Conv2d(4, 6, **sizes, dtype=torch.float64, algorithm=algorithm)
    assert ours.load_state_dict(reference.state_dict()).missing_keys == []
    return reference, ours


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_computes_what_nn_conv2d_computes(algorithm, mode, sizes):
    reference, ours = doubles(algorithm, **sizes, padding_mode=mode)
    x = torch.randn(2, 4, 8, 7, dtype=torch.float64)
    if reason := refusal(algorithm, sizes):
        with pytest.raises(ValueError, match=re.escape(reason)):
            ours(x)
        return
    torch.testing.assert_close(ours(x), reference(x))
    torch.testing.assert_close(ours(x[0]), reference(x[0]))
    for layer in (ours, reference):
        layer(x).square().sum().backward()
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def refusal(algorithm, sizes):
    sizes = {name: value for name, value in sizes.items() if name != "bias"}
    return ALGORITHMS[algorithm].supports(ConvProblem(2, 4, 6, 8, 7, **sizes))


def test_parameters_are_those_of_nn_conv2d():
    torch.manual_seed(0)
    reference = nn.Conv2d(4, 6, 3)
    torch.manual_seed(0)
    ours = Conv2d(4, 6, 3, algorithm="unfold")
    assert isinstance(ours, nn.Conv2d)
    for (name, a), (other, b) in zip(
        ours.state_dict().items(), reference.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)
    reference.load_state_dict(Conv2d(4, 6, 3).state_dict())


def test_the_algorithm_is_the_one_that_was_asked_for(monkeypatch):
    layer = Conv2d(4, 6, 3, algorithm="thread")
    monkeypatch.setitem(ALGORITHMS, "thread", lambda *arguments: "thread")
    assert layer(torch.ones(1, 4, 5, 5)) == "thread"
    assert "algorithm='thread'" in repr(layer)
    assert Conv2d(4, 6, 3).algorithm == "native"


def test_a_bad_algorithm_is_named():
    with pytest.raises(ValueError, match=r"algorithm must be one of native, .*'unfolded'"):
        Conv2d(4, 6, 3, algorithm="unfolded")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_survives_copy_and_pickle(duplicate):
    layer = Conv2d(4, 6, 3, padding=1, padding_mode="reflect", algorithm="unfold")
    twin = duplicate(layer)
    assert repr(twin) == repr(layer)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(twin(x), layer(x))


# The thread's layer.


def thread_layer(*arguments, **sizes):
    layer = ThreadConv2d(*arguments, **sizes)
    nn.init.normal_(layer.weight)
    return layer


@pytest.mark.parametrize(("kernel_size", "padding"), [(1, 0), (3, 1), (5, 2)])
def test_the_threads_layer_is_right_where_padding_keeps_the_size(kernel_size, padding):
    layer = thread_layer(4, 6, kernel_size, padding=padding).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), F.conv2d(x, layer.weight, padding=padding)
    allowed = 2 * tolerance(4 * kernel_size**2, 2.0**-53, torch.float64)
    scale = F.conv2d(x.abs(), layer.weight.abs(), padding=padding)
    assert bool(((y - expected).abs() <= allowed * scale).all())
    wrt = [x, layer.weight]
    for a, b in zip(*(torch.autograd.grad(o.sum(), wrt) for o in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_threads_layer_ignores_stride():
    layer, x = thread_layer(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 9, 8)
    assert layer(x).shape == (2, 6, 9, 8)
    assert F.conv2d(x, layer.weight, stride=2, padding=1).shape == (2, 6, 5, 4)


def test_the_threads_layer_does_not_dilate():
    x = torch.randn(2, 4, 9, 8)
    layer = thread_layer(4, 6, 3, padding=2, dilation=2)
    with pytest.raises(RuntimeError, match="number of sliding blocks"):
        layer(x)  # where dilation 2 keeps the size, the columns of dilation 1 are too many

    layer = thread_layer(4, 6, 3, padding=1, dilation=2)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, padding=1))
    assert F.conv2d(x, layer.weight, padding=1, dilation=2).shape != layer(x).shape


@pytest.mark.parametrize("padding", [0, 2])
def test_the_threads_layer_fails_where_padding_does_not_keep_the_size(padding):
    with pytest.raises(RuntimeError, match="number of sliding blocks"):
        thread_layer(4, 6, 3, padding=padding)(torch.randn(2, 4, 9, 8))


def test_the_threads_layer_has_uninitialised_weights_and_no_bias():
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        layer = ThreadConv2d(4, 6, 3)
        initialised = Conv2d(4, 6, 3)
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill
    assert layer.weight.isnan().all(), "PyTorch fills memory that nobody has written with NaN"
    assert initialised.weight.isfinite().all()
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


def test_the_threads_layer_never_uses_sratio():
    x = torch.randn(1, 4, 5, 5)
    layer = thread_layer(4, 6, 3, padding=1)
    y = layer(x)
    layer.sratio = 0.7
    assert torch.equal(layer(x), y)
