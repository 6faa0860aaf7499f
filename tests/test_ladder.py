"""What the faster algorithms promise beyond being right: memory, options, compiling."""

import contextlib
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from drawn import problems
from hypothesis import given, settings

from convlab import ALGORITHMS, Conv2d, ConvProblem, check, machine, timing
from convlab.algorithms import method
from convlab.algorithms.method import METHODS, Sizes
from convlab.algorithms.winograd import magnitudes
from convlab.kernels import interpreter
from convlab.oracle import allowed_errors
from convlab.problems import thread_problem


@pytest.fixture(autouse=True)
def kernels_run_on_the_cpu():
    """Triton's, step by step and in plain float32, where the package is installed."""
    triton = importlib.util.find_spec("triton") is not None
    with interpreter() if triton else contextlib.nullcontext(), machine.setting(cudnn_tf32=False):
        yield


CHUNKED = ("unfold_chunked", "unfold_recompute", "windows_chunked", "row_windows", "shifts")
LONE = [*CHUNKED, "winograd", "fused"]
SMALL = ConvProblem(5, 4, 6, 8, 7, kernel_size=3, padding=1, groups=2)


def training(algorithm, problem, **options):
    tensors = problem.inputs(requires_grad=True)
    grad = torch.ones(problem.output_shape)
    return lambda: torch.autograd.grad(
        ALGORITHMS[algorithm](*tensors, **problem.kwargs, **options), tensors, grad
    )


def forward(algorithm, problem, **options):
    tensors = problem.inputs()
    return lambda: ALGORITHMS[algorithm](*tensors, **problem.kwargs, **options)


def results(problem):
    """Bytes of the output, and of the output with the three gradients."""
    n, k, oh, ow = problem.output_shape
    y = 4 * n * k * oh * ow
    return y, y + sum(t.nbytes for t in problem.inputs())


@pytest.mark.parametrize("limit", [2 * 2**20, 5 * 2**20, 64 * 2**20])
@pytest.mark.parametrize(
    "problem",
    [
        thread_problem(32),
        ConvProblem(16, 16, 8, 20, 20, 5, stride=2, padding=2, groups=4),
        ConvProblem(8, 32, 32, 9, 9, 3, dilation=2, padding=2),
    ],
    ids=str,
)
def test_memory_stays_under_the_limit(problem, limit):
    y, all_results = results(problem)
    peak = timing.peak_bytes(forward("unfold_chunked", problem, memory_limit=limit))
    assert peak - y <= limit + 2**14
    peak = timing.peak_bytes(training("unfold_chunked", problem, memory_limit=limit))
    assert peak - all_results <= limit + 2**14


def test_a_limit_too_small_for_one_image_takes_one_image():
    x, w, b = SMALL.inputs()
    y = ALGORITHMS["unfold_chunked"](x, w, b, **SMALL.kwargs, memory_limit=1)
    torch.testing.assert_close(y, F.conv2d(x, w, b, **SMALL.kwargs))


@pytest.mark.parametrize("bad", [0, -1, "64 MiB", None, 1.5, True])
def test_a_bad_limit_is_refused(bad):
    x, w, b = SMALL.inputs()
    with pytest.raises(ValueError, match=r"memory_limit must be .* got"):
        ALGORITHMS["unfold_chunked"](x, w, b, **SMALL.kwargs, memory_limit=bad)


def test_an_unknown_option_is_refused():
    x, w, b = SMALL.inputs()
    with pytest.raises(TypeError, match="no option 'memory'; its options: memory_limit"):
        ALGORITHMS["unfold_chunked"](x, w, b, memory=3)
    with pytest.raises(TypeError, match="unfold has no option 'memory_limit'; its options: none"):
        ALGORITHMS["unfold"](x, w, b, memory_limit=3)


@pytest.mark.parametrize("name", LONE)
def test_nothing_but_inputs_is_kept_for_backward(name):
    problem = ConvProblem(8, 6, 5, 30, 30, kernel_size=3, padding=1)
    tensors = problem.inputs(requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ALGORITHMS[name](*tensors, **problem.kwargs)
    assert sum(t.nbytes for t in kept) <= sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("name", METHODS)
def test_the_chunk_does_not_matter(name):
    """One image at a time, two, or all: the same up to the order of summation."""

    @settings(max_examples=15 if name in ("fused", "implicit_gemm") else 40)
    @given(problem=problems(min_batch=1))
    def agree(problem):
        assert_chunks_agree(name, problem)

    agree()


def assert_chunks_agree(name, problem):
    x, weight, bias = problem.inputs(dtype=torch.float64)
    bias = torch.zeros_like(bias)
    limited = name in ("winograd", "implicit_gemm") and ALGORITHMS[name].supports(problem)
    if problem.padding == "same" or limited:
        return
    pads = tuple(p for p, _ in problem.pads)
    expected = None
    for images in (1, 2, problem.batch):
        sizes = Sizes(problem.stride, pads, problem.dilation, problem.groups, images)
        y = METHODS[name].output(x, weight, sizes)
        found = [y, *METHODS[name].gradients(torch.ones_like(y), x, weight, sizes, (True, True))]
        expected = expected or found
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_chunks_follow_from_the_cache(monkeypatch):
    x = torch.ones(64, 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(method.machine, "cache_bytes", lambda device="cpu": 2**20)
    assert method.images_at_once(x, 2**10) == 2 * method.CACHES * 2**8
    assert method.images_at_once(x.double(), 2**10) == 2 * method.CACHES * 2**7
    assert method.images_at_once(x, 2**30) == 2  # one for each thread


def test_batched_columns_are_those_of_unfold_bit_for_bit():
    problem = ConvProblem(3, 4, 6, 9, 8, (3, 2), (2, 1), (1, 0), (1, 2), 2)
    x, _, _ = problem.inputs()
    options = {k: problem.kwargs[k] for k in ("stride", "padding", "dilation")}
    one_image = F.unfold(x.reshape(1, -1, *x.shape[2:]), (3, 2), **options)
    assert torch.equal(one_image.view(3, -1, one_image.shape[-1]), F.unfold(x, (3, 2), **options))


# Tolerances


def test_magnitudes_bound_what_winograd_adds_up():
    """With nothing to cancel, it is the result; else it is never smaller."""
    problem = ConvProblem(2, 3, 4, 7, 6, kernel_size=3, padding=1)
    x, weight, _ = problem.inputs(dtype=torch.float64)
    y = F.conv2d(x, weight, padding=1)
    bound = magnitudes(x, weight, (1, 1), 1)
    assert bool((bound >= F.conv2d(x.abs(), weight.abs(), padding=1) * (1 - 1e-12)).all())
    assert bool((bound >= y.abs()).all())


@pytest.mark.parametrize("name", ["winograd", "fft"])
def test_their_tolerance_is_wider_and_still_catches_a_fault(name):
    problem = ConvProblem(4, 3, 4, 12, 10, kernel_size=3, padding=1)
    tensors = [t.double() for t in problem.inputs()]
    grad = torch.ones(problem.output_shape, dtype=torch.float64)
    roundoff = torch.finfo(torch.float32).eps / 2
    wide, narrow = (
        allowed_errors(r, problem, tensors, grad, roundoff, torch.float32) for r in (name, "sums")
    )
    assert bool((wide["y"] > narrow["y"]).all())
    assert float(wide["y"].max()) < 1e-2  # the output has unit variance

    faulty = ALGORITHMS[name].function
    wrong = type(ALGORITHMS[name])(
        lambda x, *others: faulty(x * (1 + 1e-2), *others), "Wrong.", False, lambda *_: None, name
    )
    assert check(name, problem).ok
    assert not check(wrong, problem).ok


# torch.compile


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if n != "auto"])
def test_compiles_without_a_graph_break(name):
    problem = ConvProblem(3, 4, 6, 8, 7, kernel_size=3, padding=1, groups=2)
    if name == "implicit_gemm" and ALGORITHMS[name].supports(problem):
        pytest.skip(ALGORITHMS[name].supports(problem))
    tensors = problem.inputs(requires_grad=True)
    torch.compiler.reset()
    f = torch.compile(
        lambda *t: ALGORITHMS[name](*t, **problem.kwargs).square(),
        backend="aot_eager",
        fullgraph=True,
    )
    y, expected = f(*tensors), F.conv2d(*tensors, **problem.kwargs).square()
    grad = torch.ones_like(y)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    found, true = (torch.autograd.grad(t, tensors, grad) for t in (y, expected))
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(bool(ALGORITHMS["compiled"].supports(SMALL)), reason="no C++ compiler")
@pytest.mark.parametrize("name", ["compiled", "fused"])
def test_inductors_code_is_right(name, monkeypatch, no_code_is_generated):
    monkeypatch.setattr(no_code_is_generated, "BACKEND", "inductor")
    no_code_is_generated._compile.cache_clear()
    for problem in (SMALL, ConvProblem(2, 3, 4, 9, 8, (3, 2), (2, 1), (1, 0), (1, 2))):
        result = check(name, problem)
        assert result.ok, result.reason
    no_code_is_generated._compile.cache_clear()


def test_many_problems_do_not_run_into_a_recompilation_limit():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for n in range(6, 36):
        problem = SMALL.replace(batch=n)
        ALGORITHMS["compiled"](*problem.inputs(), **problem.kwargs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 30


def test_compiled_says_when_there_is_no_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    reason = ALGORITHMS["compiled"].supports(SMALL)
    assert "C++ compiler" in reason
    with pytest.raises(ValueError, match=r"C\+\+ compiler"):
        ALGORITHMS["compiled"](*SMALL.inputs(), groups=2)


def test_a_layer_trains_with_each():
    for name in LONE:
        torch.manual_seed(0)
        layer = Conv2d(4, 6, 3, padding=1, algorithm=name)
        reference = torch.nn.Conv2d(4, 6, 3, padding=1)
        reference.load_state_dict(layer.state_dict())
        x = torch.randn(5, 4, 8, 8).to(memory_format=torch.channels_last)
        for module in (layer, reference):
            module(x).square().mean().backward()
        torch.testing.assert_close(layer.weight.grad, reference.weight.grad, rtol=1e-4, atol=1e-5)
