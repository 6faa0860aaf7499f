"""`check` accepts every algorithm, and says what is wrong with one that is wrong."""

import math

import pytest
import torch
import torch.nn.functional as F
from drawn import problems
from hypothesis import given, settings
from hypothesis import strategies as st

from convlab import ALGORITHMS, PROBLEMS, ConvProblem, check, oracle
from convlab.algorithms import algorithm
from convlab.oracle import tolerance
from convlab.problem import parse_dtype

GROUPS = ConvProblem(3, 4, 6, 9, 8, kernel_size=(3, 2), stride=(2, 1), padding=1, groups=2)
PROBLEMS_CHECKED = {
    "thread_b2": PROBLEMS["thread_b2"],
    "wide": PROBLEMS["wide_32"].replace(batch=2, height=14),
    "groups": GROUPS,
    "depthwise": ConvProblem(2, 8, 8, 14, 14, kernel_size=5, padding="same", groups=8),
    "dilated": ConvProblem(2, 6, 5, 17, 12, kernel_size=3, dilation=(2, 3), padding=2),
    "1x1": ConvProblem(2, 12, 20, 7, 7, kernel_size=1),
    "no images": ConvProblem(0, 3, 4, 8, 8, kernel_size=3),
}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("problem", PROBLEMS_CHECKED.values(), ids=list(PROBLEMS_CHECKED))
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_every_algorithm_is_ok(name, problem, dtype):
    if ALGORITHMS[name].supports(problem):
        pytest.skip(ALGORITHMS[name].supports(problem))
    result = check(name, problem, dtype=dtype)
    assert result.ok, result.reason
    assert result.reason == ""
    assert result.grad_errors.keys() == {"x", "weight", "bias"}


def one_tap_missing(x, weight, bias, *sizes):
    keep = torch.ones_like(weight)
    keep[..., 0, 0] = 0
    return F.conv2d(x, weight * keep, bias, *sizes)


def kernel_flipped(x, weight, bias, *sizes):
    return F.conv2d(x, weight.flip(2, 3), bias, *sizes)


def shifted_by_a_pixel(x, weight, bias, *sizes):
    return F.conv2d(x, weight, bias, *sizes).roll(1, dims=3)


def groups_swapped(x, weight, bias, stride, padding, dilation, groups):
    swapped = weight.unflatten(0, (groups, -1)).flip(0).flatten(0, 1)
    return F.conv2d(x, swapped, bias, stride, padding, dilation, groups)


def bias_of_the_next_channel(x, weight, bias, *sizes):
    return F.conv2d(x, weight, bias.roll(1), *sizes)


def bias_forgotten(x, weight, bias, *sizes):
    return F.conv2d(x, weight, None, *sizes)


def rounded_to_bfloat16(x, weight, bias, *sizes):
    return F.conv2d(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), *sizes).to(x.dtype)


def output_rounded_to_bfloat16(x, weight, bias, *sizes):
    return F.conv2d(x, weight, bias, *sizes).bfloat16().to(x.dtype)


def one_nan(x, weight, bias, *sizes):
    y = F.conv2d(x, weight, bias, *sizes).clone()
    y[-1, -1, -1, -1] = math.nan
    return y


def one_infinity(x, weight, bias, *sizes):
    y = F.conv2d(x, weight, bias, *sizes).clone()
    y[0, 0, 0, 0] = math.inf
    return y


def one_column_less(x, weight, bias, *sizes):
    return F.conv2d(x, weight, bias, *sizes)[..., :-1]


def one_value_of_the_last_image(x, weight, bias, *sizes):
    y = F.conv2d(x, weight, bias, *sizes).clone()
    y[-1, -1, 0, 0] *= 1.001
    return y


def gradient_of_x_twice(x, weight, bias, *sizes):
    return F.conv2d(2 * x - x.detach(), weight, bias, *sizes)


def gradient_of_x_missing(x, weight, bias, *sizes):
    return F.conv2d(x.detach(), weight, bias, *sizes)


def gradient_of_weight_without_the_last_image(x, weight, bias, *sizes):
    last = F.conv2d(x[-1:], weight.detach(), bias, *sizes)
    return torch.cat([F.conv2d(x[:-1], weight, bias, *sizes), last])


def gradient_of_bias_missing(x, weight, bias, *sizes):
    return F.conv2d(x, weight, bias.detach(), *sizes)


def all_gradients_missing(x, weight, bias, *sizes):
    return F.conv2d(x, weight, bias, *sizes).detach()


BROKEN = {
    one_tap_missing: "y differs",
    kernel_flipped: "y differs",
    shifted_by_a_pixel: "y differs",
    groups_swapped: "y differs",
    bias_of_the_next_channel: "y differs",
    bias_forgotten: "y differs",
    rounded_to_bfloat16: "y differs",
    output_rounded_to_bfloat16: "y differs",
    one_nan: "y differs",
    one_infinity: "y differs",
    one_column_less: "y has shape (3, 6, 5, 8), not (3, 6, 5, 9)",
    one_value_of_the_last_image: "y differs",
    gradient_of_x_twice: "gradient of x differs",
    gradient_of_x_missing: "gradient of x differs",
    gradient_of_weight_without_the_last_image: "gradient of weight differs",
    gradient_of_bias_missing: "gradient of bias differs",
    all_gradients_missing: "gradient of x differs",
}


@pytest.mark.parametrize("function", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_algorithm_is_not_ok(function):
    result = check(algorithm("Broken on purpose.")(function), GROUPS)
    assert not result.ok
    assert result.reason.startswith(BROKEN[function])


def test_faults_of_the_gradients_alone_do_not_show_without_gradients():
    for function, reason in BROKEN.items():
        result = check(algorithm("Broken on purpose.")(function), GROUPS, gradients=False)
        assert result.ok == reason.startswith("gradient")
        assert result.grad_errors == {}


def test_a_wrong_gradient_is_named_by_its_error():
    broken = algorithm("Broken on purpose.")(gradient_of_bias_missing)
    result = check(broken, GROUPS)
    assert result.grad_errors["bias"] == 1
    assert max(result.max_error, result.grad_errors["x"], result.grad_errors["weight"]) < 1e-5


def test_random_rounding_is_ok_but_not_repeatable():
    @algorithm("The last bit is random.")
    def noisy(x, weight, bias, *sizes):
        y = F.conv2d(x, weight, bias, *sizes)
        return y * (1 + torch.randint(0, 2, y.shape) * 2.0**-23)

    result = check(noisy, GROUPS)
    assert result.ok, result.reason
    assert not result.repeatable
    assert check("native", GROUPS).repeatable


# Arithmetic in another format than the tensors'

COARSE = [
    *(one_tap_missing, kernel_flipped, shifted_by_a_pixel, groups_swapped),
    *(bias_of_the_next_channel, bias_forgotten, one_nan, one_infinity, one_column_less),
    *(gradient_of_x_twice, gradient_of_x_missing, all_gradients_missing),
]


def too_large_by_one_percent(x, weight, bias, *sizes):
    return 1.01 * F.conv2d(x, weight, bias, *sizes)


def rounded(function, dtype):
    """The algorithm under autocast's rounding: what it is given and what it returns."""

    def low(x, weight, bias, *sizes):
        return function(*(t.to(dtype) for t in (x, weight, bias)), *sizes).to(x.dtype)

    return algorithm("Rounds what it is given.")(low)


@pytest.mark.parametrize("problem", PROBLEMS_CHECKED.values(), ids=list(PROBLEMS_CHECKED))
@pytest.mark.parametrize("arithmetic", ["bfloat16", torch.float16], ids=str)
def test_arithmetic_in_a_smaller_format_is_ok_only_if_it_is_told(problem, arithmetic):
    low = rounded(F.conv2d, parse_dtype(arithmetic))
    told = check(low, problem, arithmetic=arithmetic)
    assert told.ok, told.reason
    assert told.grad_errors.keys() == {"x", "weight", "bias"}
    plain = check(low, problem)
    assert plain.max_error == told.max_error, "what is found is the same, what is allowed is not"
    if problem.batch:
        assert not plain.ok
        assert 1e-5 < plain.max_error < 0.02


def test_an_error_of_one_percent_is_one_in_float32():
    off = algorithm("Broken on purpose.")(too_large_by_one_percent)
    for problem in (GROUPS, PROBLEMS_CHECKED["wide"]):
        result = check(off, problem)
        assert not result.ok
        assert result.max_error == pytest.approx(0.01, rel=0.01)
        assert result.ok == check(off, problem, arithmetic="float32").ok


@pytest.mark.parametrize("function", COARSE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("arithmetic", ["bfloat16", "float16"])
def test_coarse_faults_show_in_a_smaller_format_too(function, arithmetic):
    broken = algorithm("Broken on purpose.")(function)
    result = check(broken, GROUPS, arithmetic=arithmetic)
    assert not result.ok
    assert result.reason.startswith(BROKEN[function])
    low = check(rounded(function, parse_dtype(arithmetic)), GROUPS, arithmetic=arithmetic)
    assert not low.ok
    assert low.reason.startswith(BROKEN[function])


def test_a_smaller_format_allows_more():
    """float32 less than float16, float16 less than bfloat16."""
    once = {t: rounded(F.conv2d, t) for t in (torch.float16, torch.bfloat16)}
    for told, used, ok in (
        (torch.float16, torch.float16, True),
        (torch.bfloat16, torch.float16, True),
        (torch.float32, torch.float16, False),
        (torch.bfloat16, torch.bfloat16, True),
    ):
        assert check(once[used], GROUPS, arithmetic=told).ok == ok


@given(problem=problems(min_batch=1), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_the_limit_is_the_derived_one(problem, seed):
    """An error of half the tolerance is ok and one of twice the tolerance is not."""
    limit = (6 * math.sqrt(problem.taps + 1) + 1) * 2.0**-24
    assert tolerance(problem.taps + 1, 2.0**-24, torch.float32) == pytest.approx(limit)

    for factor in (0.5, 2):

        @algorithm("One value is off.")
        def off(x, weight, bias, *sizes, factor=factor):
            y = F.conv2d(x.double(), weight.double(), bias.double(), *sizes)
            scale = F.conv2d(*(t.abs().double() for t in (x, weight, bias)), *sizes)
            y[-1, -1, -1, -1] += factor * limit * scale[-1, -1, -1, -1]
            return y.float()

        assert check(off, problem, seed=seed, gradients=False).ok == (factor < 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(count=st.integers(1, 1000), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_sums_of_products_stay_within_the_tolerance(dtype, count, seed):
    """Summed one after the other and rounded each time: the order with the largest error."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(count, 50, generator=generator).to(dtype) for _ in range(2))
    found = torch.zeros(50, dtype=dtype)
    for product in a * b:
        found += product
    products = a.double() * b.double()
    limit = tolerance(count, torch.finfo(dtype).eps / 2, dtype)
    assert bool(((found.double() - products.sum(0)).abs() <= limit * products.abs().sum(0)).all())


def test_numbers_near_zero_may_miss_by_half_a_step():
    """A GPU showed it: below 6e-5 float16 has steps of 6e-8, whatever the sum."""
    p = ConvProblem(1, 1, 1, 1, 1, kernel_size=1)
    tiny = [torch.full(s, 2.0**-10, dtype=torch.float64) for s in ((1, 1, 1, 1), (1, 1, 1, 1))]
    tensors = [*tiny, torch.zeros(1, dtype=torch.float64)]
    roundoff = torch.finfo(torch.float16).eps / 2
    allowed = oracle.allowed_errors("sums", p, tensors, None, roundoff, torch.float16)["y"]
    exact = torch.tensor(2.0**-20 + 2.0**-26, dtype=torch.float64)
    assert abs(exact.half().double() - exact) <= allowed < 2.0**-24
    wide = oracle.allowed_errors("sums", p, tensors, None, roundoff, torch.float32)["y"]
    assert wide < allowed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"algorithm": "unfolded"}, ["algorithm", "native, .*unfold", "'unfolded'"]),
        ({"dtype": "int8"}, ["dtype", "float32", "'int8'"]),
        ({"dtype": torch.complex64}, ["dtype", "torch.complex64"]),
        ({"arithmetic": "int8"}, ["dtype", "float32", "'int8'"]),
        ({"device": "tpu"}, ["device", "'tpu'"]),
        ({"device": "cuda:99"}, ["device", "'cuda:99'"]),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, named):
    arguments = {"algorithm": "native"} | arguments
    with pytest.raises(ValueError, match=".*".join(named)):
        check(problem=GROUPS, **arguments)


def test_a_problem_that_is_not_supported_is_an_error():
    @algorithm("Refuses.", limits=lambda problem, device: f"No {problem.groups} groups.")
    def refuses(x, weight, bias, *sizes):
        raise AssertionError

    with pytest.raises(ValueError, match=r"No 2 groups\."):
        check(refuses, GROUPS)


def test_a_plain_function_is_checked():
    problem = ConvProblem(2, 3, 4, 8, 7, kernel_size=3, padding=1)
    right = lambda x, weight, bias, **sizes: F.conv2d(x, weight, bias, **sizes)
    wrong = lambda x, weight, bias, **sizes: F.conv2d(x, weight, bias, **sizes) * 1.001
    assert check(right, problem).ok
    assert not check(wrong, problem).ok
