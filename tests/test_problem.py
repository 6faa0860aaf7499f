"""`ConvProblem`: sizes that are right, sizes that are refused by name, tensors from a seed."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from drawn import problems
from hypothesis import given, settings

from convlab import PROBLEMS, ConvProblem
from convlab.problem import parse_device, parse_dtype

GOOD = {
    "batch": 2,
    "in_channels": 4,
    "out_channels": 6,
    "height": 9,
    "width": 8,
    "kernel_size": 3,
    "stride": 1,
    "padding": 1,
    "dilation": 1,
    "groups": 2,
}


@given(problem=problems())
@settings(max_examples=200)
def test_shapes_are_those_of_conv2d(problem):
    x, weight, bias = problem.inputs()
    assert x.shape == problem.input_shape
    assert weight.shape == problem.weight_shape
    y = F.conv2d(x, weight, bias, **problem.kwargs)
    assert y.shape == problem.output_shape
    assert problem.taps == weight[0].numel()


@given(problem=problems())
def test_survives_json(problem):
    fields = json.loads(json.dumps(problem.as_dict()))
    assert fields.keys() == GOOD.keys()
    assert ConvProblem.from_dict(fields) == problem


def test_an_integer_is_the_same_as_a_pair():
    one = ConvProblem(2, 4, 6, 9, 8, kernel_size=3, stride=2, padding=1, dilation=1)
    two = ConvProblem(2, 4, 6, 9, 8, (3, 3), [2, 2], (1, 1), torch.Size([1, 1]))
    assert one == two
    assert hash(one) == hash(two)


@pytest.mark.parametrize("name", ["batch", "in_channels", "height", "width", "groups"])
@pytest.mark.parametrize("value", [-1, True, 2.0, "2", None, (2, 2)], ids=repr)
def test_a_bad_count_is_named(name, value):
    assert_refused(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("in_channels", 0), ("out_channels", 0), ("height", 0), ("width", 0), ("groups", 0)],
)
def test_nothing_but_the_batch_may_be_empty(name, value):
    assert_refused(name, value)
    assert ConvProblem(**GOOD | {"batch": 0}).output_shape == (0, 6, 9, 8)


@pytest.mark.parametrize("name", ["kernel_size", "stride", "dilation", "padding"])
@pytest.mark.parametrize(
    "value",
    [-1, True, 1.0, "1", None, (1, 1, 1), (1,), (), (1, -1), (1, 1.0), (True, 1), {1, 2}],
    ids=repr,
)
def test_a_bad_pair_is_named(name, value):
    assert_refused(name, value)


@pytest.mark.parametrize(
    ("changes", "name", "value"),
    [
        ({"kernel_size": 0}, "kernel_size", 0),
        ({"stride": (0, 1)}, "stride", (0, 1)),
        ({"dilation": 0}, "dilation", 0),
        ({"padding": "full"}, "padding", "full"),
        ({"padding": "same", "stride": 2}, "stride", (2, 2)),
        ({"in_channels": 5}, "in_channels", 5),
        ({"out_channels": 7}, "out_channels", 7),
        ({"kernel_size": (3, 11)}, "kernel_size", 11),
        ({"kernel_size": 3, "dilation": 6}, "kernel_size", 3),
        ({"kernel_size": (10, 1), "padding": "valid"}, "kernel_size", 10),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_together_are_named(changes, name, value):
    assert_refused(name, value, changes)


def assert_refused(name, value, changes=None):
    with pytest.raises(ValueError, match=rf"{name}\b.*got .*{re.escape(repr(value))}"):
        ConvProblem(**GOOD | (changes or {name: value}))


def test_changed_sizes_are_checked_too():
    with pytest.raises(ValueError, match="groups"):
        ConvProblem(**GOOD).replace(groups=3)


@given(problem=problems(min_batch=1))
@settings(max_examples=50)
def test_the_same_seed_gives_the_same_numbers(problem):
    double, single, half = (problem.inputs(dtype=t) for t in ("float64", torch.float32, "float16"))
    for d, s, h in zip(double, single, half, strict=True):
        assert (d.dtype, s.dtype, h.dtype) == (torch.float64, torch.float32, torch.float16)
        assert torch.equal(d.float(), s)
        assert torch.equal(s.half(), h)
    for a, b in zip(single, problem.inputs(seed=1), strict=True):
        assert not torch.equal(a, b)


def test_inputs_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    PROBLEMS["thread_b2"].inputs()
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_are_asked_for_on_leaves():
    for dtype in (torch.float32, torch.bfloat16):
        tensors = PROBLEMS["thread_b2"].inputs(dtype=dtype, requires_grad=True)
        assert all(t.is_leaf and t.requires_grad for t in tensors)
    assert not any(t.requires_grad for t in PROBLEMS["thread_b2"].inputs())


def test_the_output_has_unit_variance():
    x, weight, _ = PROBLEMS["wide_64"].inputs()
    assert F.conv2d(x, weight).std().item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("device", ["tpu", "mps", "", "cuda:999", None, 3.5])
def test_a_bad_device_is_named(device):
    with pytest.raises(ValueError, match=rf"device .*{re.escape(repr(device))}"):
        parse_device(device)


def test_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda' is not there"):
        PROBLEMS["thread_b2"].inputs(device="cuda")


@pytest.mark.parametrize("dtype", ["int8", "torch.int64", torch.complex64, None, "double"])
def test_a_bad_dtype_is_named(dtype):
    with pytest.raises(ValueError, match=rf"dtype .*got {re.escape(repr(dtype))}"):
        parse_dtype(dtype)


def test_devices_and_dtypes_by_name_and_as_objects():
    assert parse_device("cpu") == parse_device(torch.device("cpu")) == torch.device("cpu")
    assert parse_dtype("float16") is parse_dtype("torch.float16") is torch.float16
    assert parse_dtype(torch.bfloat16) is torch.bfloat16


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (PROBLEMS["thread_b2"], "2 images, 10→15 channels, 50×50, kernel 3×3, padding 1×1"),
        (
            ConvProblem(3, 4, 6, 9, 8, (3, 2), padding="same", dilation=(1, 2), groups=2),
            "3 images, 4→6 channels, 9×8, kernel 3×2, padding same, dilation 1×2, 2 groups",
        ),
    ],
)
def test_in_words(problem, text):
    assert str(problem) == text
