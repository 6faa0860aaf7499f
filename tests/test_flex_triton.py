"""`flex_conv2d(backend="triton")`: the generated kernels, step by step in Triton's interpreter."""

import importlib.util
import re

import pytest
import torch
import torch.nn.functional as F
from drawn import LAYOUTS, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from convlab import ConvProblem
from convlab.flex import flex_conv2d, triton_source
from convlab.flex.forms import REDUCTIONS
from convlab.kernels import interpreter

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton exists for Linux"
)
TEMPERATURE = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
SLOPE = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)

FUNCTIONS = {
    "|x − w|": lambda x, w: (x - w).abs(),
    "x + w": lambda x, w: x + w,
    "x · w": lambda x, w: x * w,
    "(x − w)²": lambda x, w: -((x - w) ** 2),
    "(x · w + 0.3)³": lambda x, w: (x * w + 0.3) ** 3,
    "|x − w|^1.5": lambda x, w: (x - w).abs() ** 1.5,
    "RBF": lambda x, w: torch.exp(-TEMPERATURE * (x - w).square()),
    "tanh": lambda x, w: torch.tanh(TEMPERATURE * x * w),
    "leaky ReLU": lambda x, w: torch.where(x * w > 0, x * w, SLOPE.squeeze() * x * w),
    "GELU": lambda x, w: F.gelu(x * w) + 0.1 * x,
    "Huber": lambda x, w: F.huber_loss(x, w, reduction="none", delta=0.8),
    "soft minimum": lambda x, w: torch.logaddexp(x / TEMPERATURE, w / TEMPERATURE),
    "clamped": lambda x, w: (x * w).clamp(-0.5, 0.9) - torch.minimum(x, w),
    "x only": lambda x, w: torch.sigmoid(x),
    "constant": lambda x, w: torch.full_like(x, 0.1) * SLOPE.squeeze(),
    "a band": lambda x, w: torch.where((x > w - 0.5) & ~(x > w + 0.5), torch.sin(x), w.abs()),
}
WITH_AUX = {
    "threshold": lambda x, w, t: F.relu(x * w - t),
    "normalised": lambda x, w, s: TEMPERATURE * x * w / (1 + s * s),
}
OPERATIONS = [
    *(torch.neg, torch.abs, torch.exp, torch.exp2, torch.log, torch.log2, torch.log10, torch.log1p),
    *(torch.expm1, torch.sqrt, torch.rsqrt, torch.reciprocal, torch.square, torch.sin, torch.cos),
    *(torch.tan, torch.asin, torch.acos, torch.atan, torch.sinh, torch.cosh, torch.tanh),
    *(torch.asinh, torch.atanh, torch.erf, torch.erfc, torch.erfinv, torch.sigmoid, torch.sign),
    *(torch.floor, torch.ceil, torch.round, torch.trunc, torch.frac, torch.sinc, torch.deg2rad),
    *(torch.relu, torch.logit, torch.i0, torch.nan_to_num, torch.special.erfcx, F.silu, F.gelu),
    *(F.elu, F.selu, F.celu, F.mish, F.softplus, F.softsign, F.hardtanh, F.hardswish),
    *(F.logsigmoid, F.leaky_relu, F.relu6, F.tanhshrink, F.softshrink),
    F.hardshrink,
]
UNARY = {
    **{function.__name__: function for function in OPERATIONS},
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "acosh": lambda x: torch.acosh(x + 1.5),
    "pow 2.5": lambda x: x**2.5,
    "2 to the x": lambda x: 2.0**x,
    "x to the x": lambda x: x**x,
    "pow −1": lambda x: x**-1,
    "pow 4": lambda x: x**4,
    "fmod": lambda x: torch.fmod(x * 5, 0.7),
    "remainder": lambda x: torch.remainder(x * 5, 0.7),
    "atan2": lambda x: torch.atan2(x, x + 0.3),
    "hypot": lambda x: torch.hypot(x, x + 0.3),
    "copysign": lambda x: torch.copysign(x, x - 0.5),
    "lerp": lambda x: torch.lerp(x, x * x, 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x + 1, value=0.5),
    "threshold": lambda x: F.threshold(x, 0.5, 0.2),
    "fmax": lambda x: torch.fmax(x, 1 - x),
    "maximum": lambda x: torch.maximum(x, 1 - x),
    "isnan": lambda x: torch.where(torch.isnan(x) | torch.isinf(x), 0.0, x),
    "counted": lambda x: (x > 0.5) * x + (x < 0.3) * 2,
    "floor division": lambda x: torch.div(x * 5, 0.7, rounding_mode="floor") + x,
    "rsub": lambda x: torch.rsub(x, 1.0, alpha=2),
    "cast": lambda x: (x * 5).to(torch.int32).to(x.dtype) + x,
    "clamped below": lambda x: x.clamp_min(0.4) * x,
}

EACH = [
    ConvProblem(2, 4, 6, 7, 6, kernel_size=3, padding=1),
    ConvProblem(2, 4, 6, 7, 8, kernel_size=3, stride=2, padding=1, dilation=2, groups=2),
    ConvProblem(1, 3, 3, 9, 10, kernel_size=(3, 2), stride=(3, 2), padding=(2, 0), groups=3),
    ConvProblem(2, 3, 5, 8, 7, kernel_size=(2, 5), padding="same", dilation=(2, 1)),
    ConvProblem(1, 4, 2, 5, 5, kernel_size=1, stride=3),  # most pixels reach no output
    ConvProblem(1, 2, 3, 5, 5, kernel_size=3, padding=6, dilation=2),
    ConvProblem(3, 6, 18, 16, 15, kernel_size=2),  # several tiles
]


@pytest.fixture(autouse=True)
def on_the_cpu():
    with interpreter():
        yield


def found(problem, function, reduce, backend, tensors, pad_value=0.0):
    """y and the gradients of the tensors (x, weight, aux or None, captured …) that y has."""
    x, weight, aux, *captured = tensors
    sizes = problem.kwargs
    y = flex_conv2d(
        x, weight, function, reduce, **sizes, pad_value=pad_value, aux=aux, backend=backend
    )
    wanted = [t for t in (x, weight, aux, *captured) if t is not None and t.requires_grad]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    if not y.requires_grad:
        return [y]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad, allow_unused=True)]


def assert_same(problem, function, reduce, tensors, pad_value=0.0, tolerance=1e-10):
    """Output and gradients are those of the definition, relative to the largest of each."""
    pairs = zip(
        found(problem, function, reduce, "triton", tensors, pad_value),
        found(problem, function, reduce, "eager", tensors, pad_value),
        strict=True,
    )
    for ours, exact in pairs:
        assert (ours is None) or ours.dtype == tensors[0].dtype
        exact = torch.zeros_like(ours) if exact is None and ours is not None else exact
        if exact is not None:
            scale = exact.double().abs().nan_to_num(posinf=0.0).max() if exact.numel() else 0.0
            ours = torch.zeros_like(exact) if ours is None else ours
            assert ours.shape == exact.shape
            torch.testing.assert_close(ours, exact, rtol=0.0, atol=tolerance * float(scale))


def tensors_of(problem, function=None, aux=None, layout="contiguous", seed=0):
    """x, weight, aux and what all the functions of this file close over, in float64."""
    x, weight, _ = problem.inputs(dtype=torch.float64, seed=seed)
    x, weight = LAYOUTS[layout](x).requires_grad_(), weight.requires_grad_()
    if aux:
        n, k, *size = problem.output_shape
        generator = torch.Generator().manual_seed(seed + 1)
        shape = n, (1 if aux == "shared" else k), *size
        aux = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    return x, weight, aux, TEMPERATURE, SLOPE


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, reduce):
    layout = "channels_last" if reduce == "max" else "contiguous"
    problem = ConvProblem(2, 3, 4, 7, 8, kernel_size=(2, 3), stride=(1, 2), padding=1)
    tensors = tensors_of(problem, layout=layout)
    assert_same(problem, FUNCTIONS[name], reduce, tensors, pad_value=0.3)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("problem", EACH, ids=str)
def test_problems(problem, reduce, layout):
    tensors = tensors_of(problem, layout=layout)
    assert_same(problem, FUNCTIONS["|x − w|"], reduce, tensors, pad_value=-0.2)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("aux", ["shared", "per channel"])
@pytest.mark.parametrize("name", WITH_AUX)
def test_aux(name, aux, reduce):
    cases = [(EACH[1], "contiguous"), (EACH[3], "channels_last")]
    for problem, layout in cases[aux == "shared" :]:
        assert_same(problem, WITH_AUX[name], reduce, tensors_of(problem, aux=aux, layout=layout))


@settings(max_examples=25)
@given(
    problem=problems(),
    name=st.sampled_from(sorted(FUNCTIONS)),
    reduce=st.sampled_from(sorted(REDUCTIONS)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    pad_value=st.sampled_from([0.0, 1.5, -0.25]),
)
def test_drawn_problems(problem, name, reduce, layout, pad_value):
    with interpreter():  # hypothesis and a fixture do not go together
        assert_same(problem, FUNCTIONS[name], reduce, tensors_of(problem, layout=layout), pad_value)


@pytest.mark.parametrize("name", UNARY)
def test_operations(name):
    """Value, derivatives, and the same of the derivative with a captured factor in it."""
    problem = ConvProblem(1, 2, 2, 3, 4, kernel_size=1)
    x = torch.linspace(0.08, 0.93, 24, dtype=torch.float64).view(1, 2, 3, 4).requires_grad_()
    weight = torch.tensor([0.5, -0.7, 1.1, 0.4], dtype=torch.float64).view(2, 2, 1, 1)
    tensors = x, weight.requires_grad_(), None, TEMPERATURE

    def function(x, w):
        return UNARY[name](x) * w * TEMPERATURE

    assert_same(problem, function, "sum", tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_shorter_types_are_added_in_float32(dtype, reduce):
    """Rounded once: as near to float64 as the type allows."""
    problem, function = EACH[6], FUNCTIONS["|x − w|"]
    x, weight = (t.detach().to(dtype).requires_grad_() for t in tensors_of(problem)[:2])
    exact = (t.detach().double().requires_grad_() for t in (x, weight))
    roundoff = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    ours = found(problem, function, reduce, "triton", (x, weight, None))
    exact = found(problem, function, reduce, "eager", (*exact, None))
    for value, true in zip(ours, exact, strict=True):
        assert value.dtype == dtype
        if reduce != "max" or value is ours[0]:  # a rounded maximum may be another term's
            limit = roundoff * float(true.abs().max())
            torch.testing.assert_close(value.double(), true, rtol=0.0, atol=limit)


@pytest.mark.parametrize("reduce", ["max", "logsumexp"])
def test_padding_that_takes_no_part(reduce):
    problem = ConvProblem(2, 3, 4, 5, 6, kernel_size=3, padding=1)
    tensors = tensors_of(problem)
    assert_same(problem, FUNCTIONS["x + w"], reduce, tensors, pad_value=-torch.inf)
    outside = ConvProblem(1, 2, 3, 3, 3, kernel_size=2, padding=2)  # corners see padding alone
    y = found(outside, FUNCTIONS["x + w"], reduce, "triton", tensors_of(outside), -torch.inf)[0]
    assert torch.equal(y[..., 0, 0], torch.full_like(y[..., 0, 0], -torch.inf))


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 3e38, 1e300])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_what_is_not_finite_goes_through(reduce, value):
    problem = ConvProblem(1, 2, 3, 4, 4, kernel_size=2)
    x, weight, _ = problem.inputs(dtype=torch.float64)
    x[0, 0, 1, 1] = x[0, 1, 2, 2] = value
    y = [
        flex_conv2d(x, weight, FUNCTIONS["x + w"], reduce, backend=backend)
        for backend in ("triton", "eager")
    ]
    torch.testing.assert_close(*y, equal_nan=True)


def test_a_tap_that_is_not_there_has_no_gradient():
    """√|x − w| is steep without bound where x = w: at a corner too, for taps that do not reach."""
    problem = ConvProblem(1, 1, 1, 3, 3, kernel_size=2)
    x, weight, _ = problem.inputs(dtype=torch.float64)
    x[0, 0, 0, 0] = weight[0, 0, 1, 1]
    tensors = x.requires_grad_(), weight.requires_grad_(), None
    assert_same(problem, lambda x, w: (x - w).abs().sqrt(), "sum", tensors)


@pytest.mark.parametrize("combine", [FUNCTIONS["x + w"], FUNCTIONS["x · w"]])
def test_ties_share_the_gradient(combine):
    problem = ConvProblem(2, 3, 4, 6, 5, kernel_size=3, padding=1)
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randint(0, 2, shape, generator=generator).double().requires_grad_()
        for shape in (problem.input_shape, problem.weight_shape)
    )
    assert_same(problem, combine, "max", (x, weight, None))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_repeatable_bit_for_bit(reduce):
    tensors = tensors_of(EACH[6])
    first, second = (found(EACH[6], FUNCTIONS["RBF"], reduce, "triton", tensors) for _ in range(2))
    for one, other in zip(first[:4], second[:4], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["PIXELS", "WEIGHT"])
def test_every_tile_that_ships(kind, monkeypatch):
    from convlab.flex import tiles

    problem = ConvProblem(2, 2, 20, 11, 10, kernel_size=(3, 2), padding=1, stride=(1, 2))
    name = "INTERPRETED_WEIGHT" if kind == "WEIGHT" else "INTERPRETED"
    for tile in getattr(tiles, kind):
        monkeypatch.setattr(tiles, name, tile)
        for reduce, layout in (("sum", "contiguous"), ("logsumexp", "channels_last")):
            tensors = tensors_of(problem, layout=layout)
            assert_same(problem, FUNCTIONS["|x − w|"], reduce, tensors)


def test_every_size_has_a_tile():
    import triton.language as tl

    from convlab.flex import kernels, tiles

    for kernel in (kernels.outputs, kernels.input_gradients, kernels.weight_gradients):
        for channels in (1, 2, 3, 4, 6, 8, 15, 16, 33, 64, 100, 512):
            for reduce, nhwc in (("sum", False), ("max", True), ("logsumexp", True)):
                constants = {"REDUCE": reduce, "NHWC": nhwc, "SUM": tl.float32}
                found = tiles.fitting(kernel, {"C": channels, "K": channels}, constants)
                assert 1 <= len(found) <= 5


def test_gradients_of_first_and_second_order():
    problem = ConvProblem(1, 2, 1, 2, 2, kernel_size=2, padding=1)
    tensors = problem.inputs(dtype=torch.float64, requires_grad=True)[:2]

    def f(x, weight):
        return flex_conv2d(x, weight, FUNCTIONS["RBF"], padding=1, backend="triton")

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


def test_one_image_and_none():
    problem = ConvProblem(1, 2, 3, 4, 4, kernel_size=3)
    x, weight, _ = problem.inputs()
    combine = FUNCTIONS["|x − w|"]
    y = flex_conv2d(x[0], weight, combine, backend="triton")
    assert torch.equal(y, flex_conv2d(x, weight, combine, backend="triton")[0])
    assert flex_conv2d(x[:0], weight, combine, backend="triton").shape == (0, 3, 2, 2)


def test_the_source_can_be_read():
    text = triton_source(lambda x, w: torch.exp(-TEMPERATURE * (x - w).abs()), torch.float64)
    assert text.count("tl.exp(") >= 4
    assert "def value(x, w, aux, numbers):\n    t0 = -numbers[1]\n    t1 = x - w\n" in text
    for name in ("by_x", "by_w", "by_c1", "one"):
        assert f"def {name}(x, w, aux, numbers):" in text
    assert "tl.float64" in text
    compile(text, "text", "exec")


def test_a_captured_number_is_read_at_each_call():
    problem = ConvProblem(1, 2, 3, 4, 4, kernel_size=3)
    x, weight, _ = problem.inputs()
    factor = torch.tensor(2.0)

    def call():
        return flex_conv2d(x, weight, lambda x, w: factor * x * w, backend="triton")

    twice = call()
    factor.fill_(3.0)
    torch.testing.assert_close(call(), twice * 1.5)


def test_says_why_not(monkeypatch):
    problem = ConvProblem(1, 2, 3, 4, 4, kernel_size=3)
    x, weight, _ = problem.inputs()
    with pytest.raises(ValueError, match=r'uses digamma, .*"triton".*backend="eager"'):
        flex_conv2d(x, weight, lambda x, w: torch.digamma(x * w + 9), backend="triton")
    from convlab.kernels import running

    monkeypatch.setattr(running, "_interpreting", False)
    with pytest.raises(ValueError, match='backend="triton" runs on a CUDA GPU; on the CPU only'):
        flex_conv2d(x, weight, lambda x, w: x * w, backend="triton")
    monkeypatch.setattr(running.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("triton is not installed")):
        flex_conv2d(x, weight, lambda x, w: x * w, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_on_a_gpu(reduce, layout, monkeypatch):
    """The tile is chosen by time: the result must not depend on it."""
    from convlab.kernels import running

    monkeypatch.setattr(running, "_interpreting", False)
    for problem in (EACH[1], EACH[6], ConvProblem(8, 10, 15, 50, 50, kernel_size=3, padding=1)):
        for name in ("|x − w|", "x + w", "Huber", "GELU"):
            x, weight = tensors_of(problem, layout=layout)[:2]
            tensors = [t.detach().cuda().requires_grad_() for t in (x, weight)]
            sizes = problem.kwargs | {"pad_value": 0.3}
            results = []
            for backend in ("triton", "eager"):
                y = flex_conv2d(*tensors, FUNCTIONS[name], reduce, **sizes, backend=backend)
                results.append([y, *torch.autograd.grad(y.sum(), tensors)])
            for ours, exact in zip(*results, strict=True):
                scale = float(exact.abs().max())
                torch.testing.assert_close(ours, exact, rtol=0.0, atol=1e-10 * scale)
