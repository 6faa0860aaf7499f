"""FlexConv2d: nn.Conv2d's constructor, state and devices; captured parameters; copies; errors."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convlab import FlexConv2d, flex_conv2d
from convlab.flex.examples import absolute_difference, plus


def product(x, w):
    return x * w


def above(x, w, threshold):
    return torch.where(x > threshold, x * w, 0.0)


class Tempered(nn.Module):
    """|x − w| times a learnable number."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, w):
        return self.temperature * (x - w).abs()


def layer(*sizes, combine=product, **options):
    return FlexConv2d(*sizes, combine=combine, **{"backend": "loops", **options})


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((4, 6, 3), {}),
        ((4, 6, (3, 2), (2, 1), (1, 2), (1, 2), 2), {"bias": False}),
        ((4, 6, 3), {"padding": "same", "dilation": 2, "padding_mode": "reflect"}),
        ((4, 6, 4), {"padding": "same", "padding_mode": "circular"}),
        ((4, 6, 3), {"padding": (2, 1), "padding_mode": "replicate", "stride": 2}),
        ((4, 6, 3), {"padding": "valid", "padding_mode": "reflect", "dtype": torch.float64}),
    ],
)
def test_with_a_product_it_is_conv2d(sizes, options):
    """The same seed gives the same weights too."""
    layers = []
    for kind in (layer, nn.Conv2d):
        torch.manual_seed(0)
        layers.append(kind(*sizes, **options))
    mine, theirs = layers
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    for name, value in mine.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])
    x = torch.randn(2, 4, 9, 8, dtype=options.get("dtype"))
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine(x[0]), theirs(x[0]), rtol=1e-4, atol=1e-5)


def test_new_weights_are_drawn_as_those_of_conv2d():
    mine, theirs = layer(4, 6, 3), nn.Conv2d(4, 6, 3)
    for each in (mine, theirs):
        torch.manual_seed(1)
        each.reset_parameters()
    assert torch.equal(mine.weight, theirs.weight)
    assert torch.equal(mine.bias, theirs.bias)


def test_it_trains_with_bias_and_padding_value():
    mine = layer(2, 3, 3, padding=1, combine=absolute_difference, pad_value=0.5)
    x = torch.randn(2, 2, 5, 5, requires_grad=True)
    y = mine(x)
    padded = F.pad(x, (1, 1, 1, 1), value=0.5).unfold(2, 3, 1).unfold(3, 3, 1)
    terms = padded[:, None] - mine.weight[:, :, None, None]
    expected = terms.abs().sum((2, 5, 6)) + mine.bias[:, None, None]
    torch.testing.assert_close(y, expected)
    tensors = x, mine.weight, mine.bias
    found, true = (torch.autograd.grad(t.square().sum(), tensors) for t in (y, expected))
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)


def test_aux_reaches_a_combine_of_three():
    mine = layer(2, 3, 3, combine=above, bias=False)
    x, threshold = torch.randn(1, 2, 5, 5), torch.randn(1, 1, 3, 3)
    expected = flex_conv2d(x, mine.weight, above, aux=threshold, backend="eager")
    torch.testing.assert_close(mine(x, threshold), expected)
    with pytest.raises(TypeError, match="combine above needs aux"):
        mine(x)
    with pytest.raises(TypeError, match="combine product takes no aux"):
        layer(2, 3, 3)(x, threshold)


# Parameters of combine


def test_a_combine_with_parameters_is_a_part_of_the_layer():
    mine = layer(2, 3, 3, combine=Tempered())
    assert [*mine.state_dict()] == ["weight", "bias", "combine.temperature"]
    x = torch.randn(1, 2, 5, 5)
    before = mine(x)
    before.sum().backward()
    plain = layer(2, 3, 3, combine=absolute_difference, bias=False)
    plain.weight = mine.weight
    torch.testing.assert_close(mine.combine.temperature.grad, plain(x).sum())

    other = layer(2, 3, 3, combine=Tempered())
    other.combine.temperature.data.fill_(7)
    other.load_state_dict(mine.state_dict())
    assert torch.equal(other(x), before)
    assert mine.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("combine", [plus, Tempered()], ids=["function", "module"])
def test_copies_are_alike_and_their_own(copied, combine):
    mine = layer(2, 3, 3, combine=combine)
    other = copied(mine)
    x = torch.randn(1, 2, 5, 5)
    before = mine(x)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3)
    assert torch.equal(mine(x), before)
    assert not torch.equal(other(x), before)


def test_parameters_that_a_function_closes_over_are_registered():
    temperature = nn.Parameter(torch.tensor(2.0))
    mine = layer(2, 3, 3, combine=lambda x, w: temperature * (x - w).abs())
    assert mine.temperature is temperature
    assert [*mine.state_dict()] == ["weight", "bias", "temperature"]
    mine.double()
    y = mine(torch.randn(1, 2, 5, 5, dtype=torch.float64))
    y.sum().backward()
    assert temperature.grad.dtype == torch.float64

    with pytest.raises(TypeError, match="a copy would go on using temperature"):
        copy.deepcopy(mine)
    mine.temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="temperature was replaced"):
        mine(torch.randn(1, 2, 5, 5))


def test_a_captured_parameter_does_not_hide_what_the_layer_has():
    weight = nn.Parameter(torch.tensor(2.0))
    mine = layer(2, 3, 3, combine=lambda x, w: weight * x * w)
    assert mine.weight.shape == (3, 2, 3, 3)
    assert mine.captured_0 is weight


def test_a_lambda_cannot_be_pickled():
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(layer(2, 3, 3, combine=lambda x, w: x * w))


# Words


def test_repr():
    text = repr(layer(4, 6, 3, padding=1, groups=2, combine=plus, reduce="max", pad_value=-1.0))
    expected = "4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2, pad_value=-1.0, "
    expected += "backend='loops', combine=plus, reduce='max'"
    assert text == f"FlexConv2d({expected})"
    assert "(combine): Tempered()" in repr(layer(4, 6, 3, combine=Tempered(), bias=False))
    assert "bias=False" in repr(layer(4, 6, 3, bias=False))


def test_what_replaces_convolutions_leaves_it_alone():
    model = nn.Sequential(layer(2, 3, 3), nn.Conv2d(3, 3, 3))
    assert not isinstance(model[0], nn.Conv2d)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"combine": 3}, TypeError, "combine must be a function of x and w, got 3"),
        ({"combine": lambda x: x}, TypeError, "combine must take x and w, got"),
        ({"combine": lambda x, w: x.sum() * w}, ValueError, "combine must be elementwise"),
        ({"reduce": "mean"}, ValueError, "reduce must be one of sum, max, .* got 'mean'"),
        ({"backend": "numpy"}, ValueError, "backend must be one of .* got 'numpy'"),
        ({"padding_mode": "mirror"}, ValueError, "padding_mode must be one of .* got 'mirror'"),
        ({"padding_mode": "reflect", "pad_value": 1.0}, ValueError, "pad_value must be 0 with"),
        ({"groups": 3}, ValueError, "in_channels must be divisible by groups"),
        ({"padding": "all"}, ValueError, "Invalid padding string 'all'"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        layer(4, 6, 3, **options)
