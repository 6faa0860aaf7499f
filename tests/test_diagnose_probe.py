"""What a layer computes, found out by calling it: its sizes, its branch, its convolutions."""

import naive_layers
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from convlab import ConvProblem, ThreadConv2d
from convlab.diagnosing import forms, geometry
from convlab.diagnosing.kind import kind
from convlab.diagnosing.probe import Probe, behaviour
from convlab.diagnosing.subject import Subject
from convlab.diagnosing.watch import Watched, watch
from convlab.guide import GUIDE

KINDS = {
    "Adder": ("elementwise", True),
    "AdderOfWindows": ("elementwise", True),
    "AdderOfItsOwnGradient": ("elementwise", True),
    "MaxPlus": ("elementwise", True),
    "LogSumExp": ("elementwise", True),
    "Cosine": ("expands", True),
    "CosineBroadcast": ("expands", True),
    "CosineOfWindows": ("expands", True),
    "Distance": ("expands", True),
    "Normalised": ("expands", True),
    "Involution": ("places", True),
    "LocallyConnected": ("places", True),
    "Standardised": ("weight", True),
    "Clipped": ("input", True),
    "TopK": ("patch", False),
    "Median": ("patch", False),
    "Filled": ("plain", True),
    "Picked": ("plain", True),
    "OneImageAtATime": ("plain", True),
}


class Function(nn.Module):
    """Hides a layer's attributes: all that can be told is told by its answers."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x):
        return self.function(self, x)


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def told(layer, x, watched=None):
    """(behaviour, kind)."""
    subject = Subject(layer, x)
    found = behaviour(subject)
    return found, kind(Probe(subject), found, watched or Watched(), len(x))


@st.composite
def problems(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    pair = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))
    kernel = draw(pair(1, 5))
    dilation = draw(pair(1, 2))
    dilation = tuple(d if k > 1 else 1 for d, k in zip(dilation, kernel, strict=True))
    padding = draw(pair(0, 3))
    sizes = {
        "batch": draw(st.integers(1, 3)),
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "height": draw(st.integers(12, 26)),
        "width": draw(st.integers(12, 26)),
    }
    # A stride beyond the kernel leaves pixels unread: any dilation explains the others.
    stride = tuple(draw(st.integers(1, min(3, k))) for k in kernel)
    assume(all(p <= d * (k - 1) for p, d, k in zip(padding, dilation, kernel, strict=True)))
    return ConvProblem(
        **sizes,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


@settings(max_examples=150)
@given(problems())
def test_the_sizes_of_any_convolution_are_found_and_its_weight(p):
    x, weight, bias = p.inputs()
    layer = Function(lambda s, x: F.conv2d(x, s.w, s.b, **p.kwargs), w=weight, b=bias)
    found, what = told(layer, x)
    assert found.problem == p
    assert (what.branch, what.sure) == ("plain", True)
    torch.testing.assert_close(found.fit.weight, weight.double())
    torch.testing.assert_close(found.fit.bias, bias.double())


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_sizes_of_a_maximum_are_found(stride):
    """No gradient shows them: each output is one value."""
    x = images(2, 3, 20, 23)
    found, _ = told(Function(lambda s, x: F.max_pool2d(x, 3, stride, 1)), x)
    assert found.problem == ConvProblem(2, 3, 3, 20, 23, 3, stride, 1, groups=3)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_padding_same_of_an_even_kernel():
    found, what = told(nn.Conv2d(3, 4, 4, padding="same"), images(2, 3, 20, 20))
    assert (found.problem.padding, what.branch, what.sure) == ("same", "plain", True)


def test_large_images_are_probed_by_small_ones():
    sizes = []
    layer = nn.Conv2d(3, 4, 11, stride=4, padding=2)
    layer.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    subject = Subject(layer, images(4, 3, 96, 96))
    sizes.clear()
    found = behaviour(subject)
    assert found.problem == ConvProblem(4, 3, 4, 96, 96, 11, 4, 2)
    assert max(sizes) < 4 * 3 * 96 * 96


def test_a_kernel_larger_than_a_probe():
    found, _ = told(Function(lambda s, x: F.avg_pool2d(x, 21, 1, 10)), images(2, 2, 48, 48))
    assert found.problem.kernel_size == (21, 21)
    assert found.problem.padding == (10, 10)


@pytest.mark.parametrize("name", KINDS)
def test_the_branch_of_naive_layers(name):
    torch.manual_seed(3)
    layer = getattr(naive_layers, name)()
    side = 10 if name == "LocallyConnected" else 14
    x = images(3, 4 if name == "LocallyConnected" else 8, side, side)
    found, what = told(layer, x)
    assert (what.branch, what.sure) == KINDS[name]
    assert found.problem.kernel_size == (3, 3)
    assert found.facts["each image on its own"]
    assert what.why


@settings(max_examples=25)
@given(
    name=st.sampled_from(["Adder", "Cosine", "Distance", "MaxPlus", "Clipped", "Standardised"]),
    channels=st.integers(2, 5),
    out_channels=st.integers(1, 5),
    kernel=st.sampled_from([2, 3, 5]),
    stride=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_the_branch_does_not_depend_on_sizes_or_weights(
    name, channels, out_channels, kernel, stride, seed
):
    layer = getattr(naive_layers, name)(channels, out_channels, kernel, stride)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.manual_seed(seed)))
    found, what = told(layer, images(2, channels, 17, 17))
    assert (what.branch, what.sure) == KINDS[name]
    assert found.problem.kernel_size == (kernel, kernel)
    assert found.problem.stride == (stride, stride)


@pytest.mark.parametrize("name", ["Cosine", "Distance", "Normalised", "Filled", "Standardised"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_fast_form_computes_the_same(name, dtype):
    layer = getattr(naive_layers, name)().to(dtype)
    x = images(4, 8, 13, 13).to(dtype)
    found, _ = told(layer, x)
    (weight, bias), fast = forms.fast_form(found.fit, found.problem, x)
    expected, y = layer(x), fast(x)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    torch.testing.assert_close(
        y, expected, rtol=0, atol=2e-5 * float(expected.detach().abs().max())
    )
    assert weight.requires_grad
    assert bias.requires_grad


@pytest.mark.parametrize("form", ["cosine", "local", "squares"])
def test_the_fast_form_with_groups_and_a_stride(form):
    p = ConvProblem(3, 4, 6, 15, 14, (3, 2), (2, 1), (1, 0), groups=2)
    taps = 2 * p.taps if form == "squares" else p.taps
    weight = images(6, taps)

    def function(s, x):
        padded = F.pad(x, (0, 0, 1, 1)).unflatten(1, (2, 2))
        if form == "squares":
            padded = torch.cat([padded, padded**2], 2)
        columns = F.unfold(padded.flatten(1, 2), (3, 2), stride=(2, 1)).unflatten(1, (2, -1))
        centred = columns - columns.mean(2, keepdim=True)
        norm = {"cosine": columns, "local": centred}.get(form)
        if norm is not None:
            columns = columns / norm.norm(dim=2, keepdim=True)
        y = torch.einsum("ngtl,gkt->ngkl", columns, s.w.unflatten(0, (2, 3)))
        return y.flatten(1, 2).unflatten(2, p.output_shape[2:]) + 0.5

    layer = Function(function, w=weight).double()
    x = p.inputs(dtype=torch.float64)[0]
    found, what = told(layer, x)
    assert found.problem == p
    assert (what.branch, what.sure, found.fit.form) == ("expands", True, form)
    _, fast = forms.fast_form(found.fit, p, x)
    torch.testing.assert_close(fast(x), layer(x))


def test_negative_distances():
    layer = Function(lambda s, x: -naive_layers.Distance.forward(s.inner, x))
    layer.inner = naive_layers.Distance()
    found, what = told(layer, images(2, 8, 12, 12))
    assert (what.branch, found.fit.form, found.fit.sign) == ("expands", "distance", -1.0)


@pytest.mark.parametrize(
    ("function", "branch", "sure"),
    [
        (lambda s, x: F.conv2d(x, s.w).relu(), "expands", False),
        (lambda s, x: (F.conv2d(x, s.w) + 1) ** 3, "expands", False),
        (lambda s, x: F.conv2d(x.exp(), s.w), "input", True),
        (lambda s, x: F.conv2d(x, s.w * (s.w.abs() > 0.5)), "weight", True),
        (lambda s, x: F.max_pool2d(x, 3, 1), "elementwise", True),
        (lambda s, x: -F.max_pool2d(-x, 3, 1), "elementwise", True),
        (lambda s, x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), s.w), "plain", False),
        (lambda s, x: F.conv2d(x * x.mean((2, 3), keepdim=True).sigmoid(), s.w), "", False),
        (lambda s, x: F.conv_transpose2d(x, s.w.mT, stride=2), "", False),
        (lambda s, x: F.dropout(F.conv2d(x, s.w)), "", False),
        (lambda s, x: F.conv2d(x, s.w).mean((2, 3)), "", False),
        (lambda s, x: F.conv2d(x, s.w) * float("nan"), "", False),
        (lambda s, x: F.conv2d(x - x.mean(0), s.w), "", False),
        (lambda s, x: x.round().long(), "", False),
        (lambda s, x: x.new_zeros(len(x), 4, 5, 5), "", False),
    ],
)
def test_other_functions(function, branch, sure):
    layer = Function(lambda s, x: function(s, x), w=images(4, 4, 3, 3) / 3)
    found, what = told(layer, images(3, 4, 14, 14))
    assert (what.branch, what.sure) == (branch, sure)
    if not branch and not found.problem:
        assert found.unknown


def test_weights_per_image():
    def own_weight(s, x):  # of every place in the batch
        y = F.conv2d(x.flatten(0, 1)[None], s.w.flatten(0, 1), groups=len(x))
        return y[0].unflatten(0, (len(x), -1))

    found, what = told(Function(own_weight, w=images(5, 6, 4, 3, 3)), images(5, 4, 9, 9))
    assert (what.branch, what.sure) == ("places", True)
    assert not found.facts["the same at every place of the batch"]

    def made_weight(s, x):  # of the image's own mean
        w = torch.einsum("ne,ekcij->nkcij", x.mean((2, 3)).softmax(1), s.w)
        y = F.conv2d(x.flatten(0, 1)[None], w.flatten(0, 1), groups=len(x))
        return y[0].unflatten(0, (len(x), -1))

    layer, x = Function(made_weight, w=images(4, 6, 4, 3, 3)), images(5, 4, 9, 9)
    _, what = told(layer, x, watch(Subject(layer, x)))
    assert (what.branch, what.sure) == ("places", False)


def test_a_layer_that_takes_only_its_own_batch():
    """Its weight is stored per image, all the same."""
    weight = images(1, 6, 4, 3, 3).expand(5, -1, -1, -1, -1).clone()

    def per_image(s, x):
        y = F.conv2d(x.flatten(0, 1)[None], s.w.flatten(0, 1), groups=5)
        return y[0].unflatten(0, (5, -1))

    found, what = told(Function(per_image, w=weight), images(5, 4, 9, 9))
    assert found.problem == ConvProblem(5, 4, 6, 9, 9, 3)
    assert what.branch in ("plain", "weight")


def test_a_layer_that_cannot_be_copied_or_run_in_float64():
    class Half(nn.Conv2d):
        def __deepcopy__(self, memo):
            raise TypeError("no")

        def forward(self, x):
            return super().forward(x.float())

    found, what = told(Half(4, 6, 3), images(3, 4, 12, 12))
    assert found.problem == ConvProblem(3, 4, 6, 12, 12, 3)
    assert (what.branch, what.sure) == ("plain", True)


def test_declared_sizes_where_none_can_be_seen():
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    layer.register_forward_hook(lambda _, args, y: y * y.mean((2, 3), keepdim=True))
    found, _ = told(layer, images(3, 4, 12, 12))
    assert found.problem == ConvProblem(3, 4, 6, 12, 12, 3, 2, 1)


def test_a_layer_that_reads_the_whole_image():
    subject = Subject(Function(lambda s, x: x - x.mean((2, 3), keepdim=True)), images(2, 3, 9, 9))
    assert "whole image" in behaviour(subject).unknown


def test_uninitialised_weights_are_replaced():
    layer = ThreadConv2d(4, 5, 3, padding=1)
    with torch.no_grad():
        layer.weight.fill_(float("nan"))
    found, what = told(layer, images(2, 4, 9, 9))
    assert (what.branch, found.same_weight) == ("plain", True)


def test_the_guide_has_every_branch():
    assert {branch for branch, _ in KINDS.values()} == GUIDE.keys()
    for branch in GUIDE.values():
        assert all((branch.title, branch.when, branch.action, branch.code, branch.examples))
    assert issubclass(geometry.Unknown, ValueError)
