"""`flex_conv2d` against its definition: values, all gradients, and what it refuses."""

import functools
import operator
import types

import pytest
import torch
import torch.nn.functional as F
from drawn import problems
from hypothesis import given, settings
from hypothesis import strategies as st

from convlab import ConvProblem, timing
from convlab.flex import flex_conv2d, running
from convlab.flex import function as module
from convlab.flex.combine import parse

REDUCTIONS = ("sum", "max", "logsumexp")
SCALE = torch.tensor(0.7, dtype=torch.float64)
FUNCTIONS = {
    "product": lambda x, w: x * w,
    "L1": lambda x, w: (x - w).abs(),
    "L2": lambda x, w: (x - w) ** 2,
    "max-plus": lambda x, w: x + w,
    "min-plus": lambda x, w: -(x + w),
    "polynomial": lambda x, w: (0.3 * x * w + 0.5) ** 3,
    "gaussian": lambda x, w: torch.exp(-(x - w).square()),
    "gated": lambda x, w: torch.sigmoid(x) * w,
    "temperature": lambda x, w: SCALE * torch.tanh(x * w),
    "larger": torch.maximum,
    "where": lambda x, w: torch.where(x > w, x * w, 0.5 * w),
    "of x alone": lambda x, w: x.square(),
    "of w alone": lambda x, w: w.exp(),
    "clamped": lambda x, w: (x * w).clamp(-0.8, 0.9),
}

UNARY = {
    "abs": torch.abs,
    "tanh": torch.tanh,
    "square": torch.square,
    "sin": torch.sin,
    "relu": torch.relu,
    "softplus": F.softplus,
    "neg": operator.neg,
    "bell": lambda t: torch.exp(-t * t),
}
BINARY = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "max": torch.maximum,
    "min": torch.minimum,
    "atan2": lambda a, b: torch.atan2(a, b.abs() + 0.5),
}


def expressions():
    """(text, function of x and w), drawn from a small grammar."""
    number = st.sampled_from([-1.5, -0.5, 0.25, 0.8, 2.0])
    leaves = st.one_of(
        st.just(("x", lambda x, w: x)),
        st.just(("w", lambda x, w: w)),
        number.map(lambda n: (f"{n} x", lambda x, w: n * x)),
    )

    def unary(inner):
        return st.builds(
            lambda name, e: (f"{name}({e[0]})", lambda x, w: UNARY[name](e[1](x, w))),
            st.sampled_from(sorted(UNARY)),
            inner,
        )

    def binary(inner):
        return st.builds(
            lambda name, a, b: (
                f"({a[0]} {name} {b[0]})",
                lambda x, w: BINARY[name](a[1](x, w), b[1](x, w)),
            ),
            st.sampled_from(sorted(BINARY)),
            inner,
            inner,
        )

    drawn = st.recursive(leaves, lambda e: st.one_of(unary(e), binary(e)), max_leaves=5)
    # A sum over nothing but functions of one argument says little: both take part.
    return drawn.map(lambda e: (f"{e[0]} + x w", lambda x, w: e[1](x, w) + x * w))


def tensors_of(problem, aux=False):
    x, weight, _ = problem.inputs(dtype=torch.float64, requires_grad=True)
    if not aux:
        return x, weight, None
    generator = torch.Generator().manual_seed(3)
    shape = problem.output_shape
    return x, weight, torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def assert_as_defined(function, problem, reduce, backend, pad_value=0.0, aux=None, others=()):
    x, weight, aux = tensors_of(problem, aux=aux is not None)
    inputs = [t for t in (x, weight, aux, *others) if t is not None]
    options = {"reduce": reduce, "pad_value": pad_value, "aux": aux, **problem.kwargs}
    found, expected = (
        flex_conv2d(x, weight, function, backend=b, **options) for b in (backend, "eager")
    )
    assert found.shape == problem.output_shape
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(1))
    pairs = zip(
        *(
            torch.autograd.grad(y, inputs, grad, allow_unused=True, materialize_grads=True)
            for y in (found, expected)
        )
    )
    for a, b in pairs:
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * scale)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@settings(max_examples=80)
@given(
    problem=problems(min_batch=1),
    expression=st.one_of(st.sampled_from(sorted(FUNCTIONS.items())), expressions()),
    pad_value=st.sampled_from([0.0, -1.5]),
)
def test_loops_compute_the_definition(reduce, problem, expression, pad_value):
    assert_as_defined(expression[1], problem, reduce, "loops", pad_value)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function(name, reduce):
    problem = ConvProblem(2, 4, 6, 7, 6, (3, 2), (1, 2), (1, 0), (2, 1), 2)
    assert_as_defined(FUNCTIONS[name], problem, reduce, "loops", others=(SCALE.requires_grad_(),))


@pytest.mark.parametrize(("reduce", "groups"), [("sum", 1), ("max", 2), ("logsumexp", 1)])
def test_what_the_compiler_is_given(reduce, groups):
    """Traced as for inductor, the graph run as it is: several sums share a loop here."""
    problem = ConvProblem(2, 4, 8, 9, 8, (4, 3), (2, 1), (1, 2), 1, groups)
    scale = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)

    def function(x, w, a):
        return torch.tanh(scale * x * w) + a * x

    assert_as_defined(function, problem, reduce, "inductor", aux=True, others=(scale,))


@pytest.mark.slow
@pytest.mark.skipif(not module._can_compile("cpu"), reason="no C++ compiler")
@pytest.mark.parametrize(
    ("function", "reduce"),
    [
        (FUNCTIONS["L1"], "sum"),
        (FUNCTIONS["max-plus"], "max"),
        (FUNCTIONS["temperature"], "logsumexp"),
    ],
    ids=REDUCTIONS,
)
def test_inductors_code_computes_the_definition(
    function, reduce, monkeypatch, no_code_is_generated
):
    monkeypatch.setattr(no_code_is_generated, "BACKEND", "inductor")
    no_code_is_generated._compile.cache_clear()
    problem = ConvProblem(2, 4, 6, 9, 21, 3, (1, 2), 1)
    assert_as_defined(function, problem, reduce, "inductor", others=(SCALE.requires_grad_(),))
    no_code_is_generated._compile.cache_clear()


@pytest.mark.parametrize("backend", ["loops", "eager"])
@pytest.mark.parametrize("reduce", ["sum", "logsumexp"])
def test_gradients_numerically(reduce, backend):
    problem = ConvProblem(1, 2, 2, 4, 3, 2, stride=(1, 2), padding=1)
    x, weight, aux = tensors_of(problem, aux=True)
    scale = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def f(x, weight, aux, scale):
        return flex_conv2d(
            x,
            weight,
            lambda x, w, a: torch.tanh(scale * x * w) + a * x,
            reduce,
            aux=aux,
            backend=backend,
            **problem.kwargs,
        )

    assert torch.autograd.gradcheck(f, (x, weight, aux, scale))
    assert torch.autograd.gradgradcheck(f, (x, weight, aux, scale))


@pytest.mark.parametrize("backend", ["loops", "inductor"])
def test_equal_maxima_share_the_gradient(backend):
    x = torch.tensor([[[[1.0, 2.0, 2.0, 0.0]]]], requires_grad=True)
    weight = torch.zeros(1, 1, 1, 3, requires_grad=True)
    y = flex_conv2d(x, weight, torch.add, "max", backend=backend)
    gx, gw = torch.autograd.grad(y.sum(), (x, weight))
    assert y.flatten().tolist() == [2.0, 2.0]
    assert gx.flatten().tolist() == [0.0, 1.0, 1.0, 0.0]
    assert gw.flatten().tolist() == [0.5, 1.0, 0.5]


def test_padding_with_minus_infinity_is_no_term():
    problem = ConvProblem(2, 1, 1, 6, 5, 3, padding=1)
    x = problem.inputs()[0]
    flat = torch.zeros(1, 1, 3, 3)
    for backend in ("loops", "eager", "inductor"):
        y = flex_conv2d(x, flat, torch.add, "max", padding=1, pad_value=-torch.inf, backend=backend)
        assert torch.equal(y, F.max_pool2d(x, 3, 1, 1))
        y = flex_conv2d(
            x, flat, torch.add, "logsumexp", padding=1, pad_value=-torch.inf, backend=backend
        )
        expected = F.unfold(F.pad(x, (1,) * 4, value=-torch.inf), 3).logsumexp(1)
        torch.testing.assert_close(y.flatten(1), expected)


def test_a_product_summed_is_a_convolution():
    problem = ConvProblem(3, 6, 4, 9, 8, (3, 2), (2, 1), (1, 2), (1, 2), 2)
    x, weight, _ = problem.inputs()
    y = flex_conv2d(x, weight, torch.mul, backend="loops", **problem.kwargs)
    torch.testing.assert_close(y, F.conv2d(x, weight, **problem.kwargs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flex_conv2d(x[0], weight, torch.mul, **problem.kwargs), y[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_short_floats_are_summed_in_float32(dtype, reduce):
    problem = ConvProblem(2, 8, 4, 7, 7, 3, padding=1)
    x, weight, _ = problem.inputs(dtype=dtype, requires_grad=True)
    y = flex_conv2d(x, weight, FUNCTIONS["L1"], reduce, padding=1, backend="loops")
    wide = x.detach().double(), weight.detach().double()
    exact = flex_conv2d(*wide, FUNCTIONS["L1"], reduce, padding=1, backend="eager")
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=4 * eps, atol=4 * eps)
    gx, gw = torch.autograd.grad(y.sum(), (x, weight))
    assert gx.dtype == gw.dtype == dtype


@pytest.mark.parametrize("backend", ["loops", "inductor"])
def test_the_memory_does_not_grow_with_the_kernel(backend):
    peaks = {}
    for k in (1, 3, 5, 7):
        problem = ConvProblem(4, 8, 8, 40, 40, k, padding=k // 2)
        x, weight, _ = problem.inputs()
        y, padded = 4 * 4 * 8 * 40 * 40, 4 * 4 * 8 * (40 + k - 1) ** 2
        call = functools.partial(
            flex_conv2d, x, weight, FUNCTIONS["L1"], padding=k // 2, backend=backend
        )
        call()
        peaks[k] = timing.peak_bytes(call) - y - padded
    assert max(peaks.values()) <= 1.2 * peaks[1] + 4 * running.TERMS * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_terms_times_one_are_the_same_sums(dtype, monkeypatch):
    x, weight = torch.randn(2, 3, 6, 21, dtype=dtype), torch.randn(2, 3, 2, 2, dtype=dtype)
    assert parse(FUNCTIONS["L1"], torch.float64, False).product_free
    assert not parse(FUNCTIONS["L2"], torch.float64, False).product_free
    y = flex_conv2d(x, weight, FUNCTIONS["L1"])
    monkeypatch.setattr(running, "_takes_multiply_add", lambda: False)
    assert torch.equal(y, flex_conv2d(x, weight, FUNCTIONS["L1"]))


def test_many_sizes_and_functions_in_one_process():
    for n in range(30):
        x, weight = torch.randn(1, 1, 5 + n % 6, 5 + n // 6), torch.randn(2, 1, 2, 2)
        power = 1 + n % 3
        y = flex_conv2d(x, weight, lambda x, w, p=power: (x - w).abs() ** p)
        expected = flex_conv2d(x, weight, lambda x, w, p=power: (x - w).abs() ** p, backend="eager")
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_no_gradient_where_there_is_no_output(reduce):
    """A slope that is infinite at taps that do not exist."""
    x = torch.ones(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[[[1.0, 3.0]]]], dtype=torch.float64, requires_grad=True)

    def root(x, w):
        return ((x - w).abs() + 0.0).sqrt()

    y = flex_conv2d(x, weight, root, reduce, stride=3, padding=(0, 0), backend="loops")
    (gx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gx[..., 1:, :], torch.zeros_like(gx[..., 1:, :]))


def test_what_a_function_closes_over_may_change():
    x, weight = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1)
    settings_ = types.SimpleNamespace(power=2.0)
    layer = torch.nn.Module()
    layer.scale = torch.nn.Parameter(torch.tensor(3.0))
    for value in (2.0, 5.0):
        y = flex_conv2d(x, weight, lambda x, w: x * w * value, backend="loops")  # noqa: B023
        assert y.unique().item() == value
        settings_.power = value
        y = flex_conv2d(x, 2 * weight, lambda x, w: x * w**settings_.power, backend="loops")
        assert y.unique().item() == 2.0**value
        layer.scale = torch.nn.Parameter(torch.tensor(value))
        y = flex_conv2d(x, weight, lambda x, w: x * w * layer.scale, backend="loops")
        y.sum().backward()
        assert y.unique().item() == value
        assert layer.scale.grad.item() == 9.0
        with torch.no_grad():
            layer.scale += 1
        y = flex_conv2d(x, weight, lambda x, w: x * w * layer.scale, backend="loops")
        assert y.unique().item() == value + 1


def test_operations_of_several_results_can_be_used():
    x, weight = torch.randn(1, 1, 4, 4), torch.randn(2, 1, 2, 2)

    def mantissa(x, w):
        return torch.frexp(x).mantissa.detach() * w

    y = flex_conv2d(x, weight, mantissa, "max", backend="loops")
    torch.testing.assert_close(y, flex_conv2d(x, weight, mantissa, "max", backend="eager"))
    assert not parse(mantissa, torch.float32, False).exact


def test_a_function_written_again_is_not_parsed_again():
    def make(power):
        return lambda x, w: x * w**power

    assert parse(make(2), torch.float32, False) is parse(make(2), torch.float32, False)
    assert parse(make(2), torch.float32, False) is not parse(make(3), torch.float32, False)
    assert parse(make(2), torch.float32, False) != parse(make(3), torch.float32, False)
    assert parse(torch.add, torch.float32, False) is parse(torch.add, torch.float32, False)
    assert parse(torch.add, torch.float32, False) != parse(torch.mul, torch.float32, False)


X, WEIGHT = torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3)
VECTOR, COUNT = torch.ones(3), torch.tensor(3)
SEEN = []


def writes(x, w):
    return x.mul_(2) + w


def reads(x, w):
    return x * SCALE.item() + w


def prints(x, w):
    print("here")
    return x * w


def branches(x, w):
    return x if (x > 0).all() else w


BAD = {
    "not elementwise": (lambda x, w: x.softmax(0) * w, "elementwise"),
    "reversed": (lambda x, w: x.flip(0) * w if x.dim() else x * w, "elementwise"),
    "a sum": (lambda x, w: (x * w).sum(), "shape and dtype"),
    "a number": (lambda x, w: 3.0, "return a tensor"),
    "a comparison": (lambda x, w: x > w, "shape and dtype"),
    "random": (lambda x, w: x * w + torch.rand_like(x), "same result each time"),
    "writes": (writes, "write to its arguments; writes does"),
    "reads a number": (reads, "reads a number out of one"),
    "prints": (prints, "prints"),
    "branches": (branches, "reads a number out of one"),
    "captures a vector": (lambda x, w: x * w * VECTOR[:1], "VECTOR of shape"),
    "captures an integer": (lambda x, w: x * w * COUNT, "COUNT of shape"),
    "fails": (lambda x, w: x @ w @ x @ w, "elementwise tensor operations"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses_what_it_cannot_fuse(name):
    function, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        flex_conv2d(X, WEIGHT, function)


def test_refuses_bad_arguments():
    cases = [
        (TypeError, "combine must be a function", {"combine": 3}),
        (TypeError, "combine must take x and w", {"combine": lambda x: x}),
        (
            TypeError,
            "combine must take x, w and aux",
            {"aux": torch.ones(1, 3, 3, 3), "combine": lambda x, w: x * w},
        ),
        (ValueError, "reduce must be one of sum, max, logsumexp, got 'mean'", {"reduce": "mean"}),
        (ValueError, "backend must be one of", {"backend": "cuda"}),
        (ValueError, "pad_value must be a number, got '0'", {"pad_value": "0"}),
        (TypeError, "aux must be a tensor", {"aux": 3.0}),
        (ValueError, r"aux must have shape \(1, 1 or 3, 3, 3\)", {"aux": torch.ones(1, 3, 4, 3)}),
        (ValueError, "aux must be torch.float32", {"aux": torch.ones(1, 3, 3, 3).double()}),
    ]
    for kind, message, arguments in cases:
        with pytest.raises(kind, match=message):
            flex_conv2d(X, WEIGHT, **{"combine": torch.mul} | arguments)
    with pytest.raises(RuntimeError, match="Given groups"):
        flex_conv2d(X, WEIGHT, torch.mul, groups=2)
    with pytest.raises(ValueError, match="floating-point"):
        flex_conv2d(X.int(), WEIGHT.int(), torch.mul)


def test_without_a_compiler_the_loops_run_as_they_are(monkeypatch):
    monkeypatch.setattr(module, "missing_compiler", lambda device: "There is no compiler.")
    monkeypatch.setattr(module, "_warned", False)
    with pytest.warns(UserWarning, match=r"There is no compiler\. flex_conv2d loops"):
        y = flex_conv2d(X, WEIGHT, FUNCTIONS["L1"])
    assert torch.equal(y, flex_conv2d(X, WEIGHT, FUNCTIONS["L1"], backend="loops"))


def test_says_once_that_it_compiles(monkeypatch, capsys):
    monkeypatch.setattr(running, "_announced", False)
    for size in (6, 7):
        flex_conv2d(torch.ones(1, 2, size, size), WEIGHT, FUNCTIONS["gated"])
    assert capsys.readouterr().err.count("flex_conv2d compiles its loops") == 1


def test_inside_a_compiled_function():
    torch.compiler.reset()
    f = torch.compile(
        lambda x, w: flex_conv2d(x, w, lambda a, b: (a - b).abs(), padding=1).relu(),
        backend="aot_eager",
        fullgraph=True,
    )
    expected = flex_conv2d(X, WEIGHT, FUNCTIONS["L1"], padding=1, backend="eager")
    torch.testing.assert_close(f(X, WEIGHT), expected)
