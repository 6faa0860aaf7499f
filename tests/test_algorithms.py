"""Every algorithm computes what `F.conv2d` computes, and refuses what it refuses."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from drawn import assert_same, calls
from hypothesis import given, settings

from convlab import ALGORITHMS, PROBLEMS, ConvProblem, check

# The import would freeze the flags of torch.backends, which `native_no_library` sets.
with mock.patch.object(torch.backends, "disable_global_flags"):
    from torch.testing._internal.common_methods_invocations import op_db

(CONV2D,) = [op for op in op_db if op.name == "nn.functional.conv2d"]
SMALL = [
    ConvProblem(2, 2, 2, 4, 3, kernel_size=3, padding=1),
    ConvProblem(2, 4, 2, 4, 5, kernel_size=(2, 3), stride=(1, 2), padding=(1, 0), groups=2),
]

each = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=list(ALGORITHMS))


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_pytorchs_own_samples(algorithm, dtype):
    for sample in CONV2D.sample_inputs("cpu", dtype, requires_grad=True):
        assert_same(algorithm, sample.input, *sample.args, **sample.kwargs)


@each
def test_pytorchs_own_errors(algorithm):
    for error in CONV2D.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            algorithm(sample.input, *sample.args, **sample.kwargs)


@each
def test_drawn_problems(algorithm):
    traced = algorithm.name in ("compiled", "fused", "auto")  # anew for every problem

    @settings(max_examples=60 if traced else 300)
    @given(call=calls())
    def same(call):
        assert_same(algorithm, call.x, call.weight, call.bias, **call.problem.kwargs)

    same()


@each
def test_groups_in_channels_last(algorithm):
    problem = ConvProblem(2, 2, 2, 1, 2, kernel_size=3, padding=1, groups=2)
    x, weight, bias = problem.inputs(dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last)
    assert_same(algorithm, *(t.requires_grad_() for t in (x, weight, bias)), **problem.kwargs)


X, WEIGHT, BIAS = torch.ones(2, 4, 5, 6), torch.ones(6, 2, 3, 2), torch.ones(6)
BAD_CALLS = {
    "bias too short": ((X, WEIGHT, BIAS[:5]), {}),
    "bias of two dimensions": ((X, WEIGHT, BIAS[None]), {}),
    "bias a number": ((X, WEIGHT, 3.0), {}),
    "bias float64": ((X, WEIGHT, BIAS.double()), {}),
    "bias float32, the rest float16": ((X.half(), WEIGHT.half(), BIAS), {}),
    "x float64": ((X.double(), WEIGHT, BIAS), {}),
    "x of two dimensions": ((X[0, 0], WEIGHT, BIAS), {}),
    "x an array": ((X.numpy(), WEIGHT, BIAS), {}),
    "x smaller than the kernel": ((X[:, :, :2], WEIGHT, BIAS), {}),
    "x without channels": ((X[:, :0], WEIGHT, BIAS), {}),
    "weight of three dimensions": ((X, WEIGHT[0], BIAS), {}),
    "weight missing": ((X, None, BIAS), {}),
    "weight of an empty kernel": ((X, WEIGHT[:, :, :0], BIAS), {}),
    "groups": ((X, WEIGHT, BIAS), {"groups": 3}),
    "groups a float": ((X, WEIGHT, BIAS), {"groups": 2.0}),
    "groups a bool": ((X[:, :2], WEIGHT, BIAS), {"groups": True}),
    "stride 0": ((X, WEIGHT, BIAS), {"stride": 0}),
    "stride a float": ((X, WEIGHT, BIAS), {"stride": (1.0, 1)}),
    "stride a bool": ((X, WEIGHT, BIAS), {"stride": True}),
    "stride a text": ((X, WEIGHT, BIAS), {"stride": "2"}),
    "stride None": ((X, WEIGHT, BIAS), {"stride": None}),
    "stride of length 3": ((X, WEIGHT, BIAS), {"stride": (1, 1, 1)}),
    "padding negative": ((X, WEIGHT, BIAS), {"padding": (0, -1)}),
    "padding a range": ((X, WEIGHT, BIAS), {"padding": range(2)}),
    "padding of length 3": ((X, WEIGHT, BIAS), {"padding": [1, 1, 1]}),
    "padding 'full'": ((X, WEIGHT, BIAS), {"padding": "full"}),
    "padding 'same' with stride": ((X, WEIGHT, BIAS), {"padding": "same", "stride": 2}),
    "padding 'same', dilation 0": ((X, WEIGHT, BIAS), {"padding": "same", "dilation": 0}),
    "padding 'same', dilation of length 3": (
        (X, WEIGHT, BIAS),
        {"padding": "same", "dilation": (1, 1, 1)},
    ),
}


@each
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(algorithm, name):
    tensors, kwargs = BAD_CALLS[name]
    kwargs = {"groups": 2} | kwargs
    with pytest.raises(Exception) as expected:  # noqa: PT011
        F.conv2d(*tensors, **kwargs)
    with pytest.raises(expected.type):
        algorithm(*tensors, **kwargs)


@each
@pytest.mark.parametrize("problem", SMALL, ids=["3x3", "groups"])
def test_gradients_of_first_and_second_order(algorithm, problem):
    if algorithm.supports(problem):
        pytest.skip(algorithm.supports(problem))
    tensors = problem.inputs(dtype=torch.float64, requires_grad=True)

    def f(x, weight, bias):
        return algorithm(x, weight, bias, **problem.kwargs)

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_floats(algorithm, dtype):
    for problem in [*SMALL, ConvProblem(3, 8, 5, 9, 9, kernel_size=3, padding="same")]:
        tensors = problem.inputs(dtype=dtype, requires_grad=True)
        assert_same(algorithm, *tensors, **problem.kwargs)


@each
def test_autocast(algorithm):
    for problem in SMALL:
        tensors = [t.bfloat16().float().requires_grad_() for t in problem.inputs()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(algorithm, *tensors, dtype=torch.bfloat16, **problem.kwargs)


@each
@pytest.mark.parametrize(
    "sizes",
    [
        {"stride": [2], "padding": [1], "dilation": [2]},
        {"stride": (2,), "padding": (1,), "dilation": (2,)},
        {"stride": [2, 1], "padding": [1, 0], "dilation": [1, 2]},
        {"stride": torch.Size([2, 1]), "padding": "valid"},
        {"stride": [1], "padding": "same", "dilation": [2]},
    ],
    ids=str,
)
def test_sizes_as_lists_and_tuples(algorithm, sizes):
    assert_same(algorithm, X, WEIGHT, BIAS, **sizes, groups=2)


@each
def test_without_gradients(algorithm):
    tensors = SMALL[0].inputs(requires_grad=True)
    with torch.no_grad():
        assert_same(algorithm, *tensors, padding=1)
    if algorithm.supports(SMALL[0]):
        pytest.skip(algorithm.supports(SMALL[0]))
    with torch.inference_mode():
        y = algorithm(*tensors, padding=1)
    assert y.is_inference()


@each
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_output_is_memory_of_its_own(algorithm, kernel_size, groups):
    """Writing to it changes neither the inputs nor what backward needs."""
    problem = ConvProblem(2, 2, 2, 6, 6, kernel_size, padding=kernel_size // 2, groups=groups)
    if algorithm.supports(problem):
        pytest.skip(algorithm.supports(problem))
    tensors = problem.inputs(dtype=torch.float64, requires_grad=True)
    grads = []
    for f in (algorithm, F.conv2d):
        y = f(*tensors, **problem.kwargs)
        y.detach().zero_()
        assert all(t.detach().all() for t in tensors)
        grads.append(torch.autograd.grad(y, tensors, torch.ones_like(y)))
    torch.testing.assert_close(*grads)


@each
def test_describes_itself(algorithm):
    assert ALGORITHMS[algorithm.name] is algorithm
    assert algorithm.idea.endswith(".")
    assert ". " not in algorithm.idea
    assert algorithm.idea in repr(algorithm)
    for problem in [*SMALL, *PROBLEMS.values()]:
        reason = algorithm.supports(problem, device="cpu")
        assert reason is None or reason.endswith(".")


@pytest.mark.gpu
@each
@pytest.mark.parametrize(
    "problem",
    [*SMALL, PROBLEMS["thread_b2"], ConvProblem(3, 6, 9, 12, 11, (5, 2), (2, 1), 2, 1, 3)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_on_the_gpu(algorithm, problem, dtype):
    if algorithm.supports(problem, "cuda"):
        pytest.skip(algorithm.supports(problem, "cuda"))
    result = check(algorithm, problem, device="cuda", dtype=dtype)
    assert result.ok, result.reason
