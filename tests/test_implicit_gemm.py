"""The Triton kernels of `implicit_gemm`, step by step in the interpreter and compiled for sm_90."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from drawn import assert_same, calls
from hypothesis import given, settings
from test_algorithms import CONV2D, SMALL

from convlab import ALGORITHMS, PROBLEMS, Conv2d, ConvProblem, check, machine
from convlab.kernels import interpreter, interpreting

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton exists for Linux"
)
implicit_gemm = ALGORITHMS["implicit_gemm"]

EACH = [
    ConvProblem(2, 3, 4, 7, 6, kernel_size=k, stride=s, padding=p, dilation=d)
    for k in (1, 2, 3, (1, 3))
    for s in (1, 2)
    for p in (0, 1)
    for d in (1, 2)
    if p == 0 or k != 1
]
OTHERS = [
    ConvProblem(2, 10, 15, 12, 12, kernel_size=3, padding=1),
    ConvProblem(1, 3, 70, 6, 5, kernel_size=3, padding=1),  # two tiles of output channels
    ConvProblem(3, 40, 8, 18, 16, kernel_size=3, padding=1),  # two tiles of pixels
    ConvProblem(2, 8, 12, 6, 6, kernel_size=3, padding=1, groups=4),
    ConvProblem(2, 6, 6, 8, 8, kernel_size=3, padding=1, groups=6),
    ConvProblem(1, 4, 8, 9, 9, kernel_size=3, stride=2, padding=1, groups=4),
    ConvProblem(2, 3, 5, 11, 9, kernel_size=5, stride=3, padding=2),
    ConvProblem(2, 3, 5, 11, 9, kernel_size=(5, 2), stride=(3, 2), padding=(1, 0)),
    ConvProblem(1, 2, 3, 12, 13, kernel_size=3, stride=4, padding=1, dilation=2),
    ConvProblem(1, 2, 3, 12, 13, kernel_size=3, stride=(2, 3), padding=3, dilation=(2, 3)),
    ConvProblem(1, 2, 3, 5, 5, kernel_size=3, padding=6, dilation=2),  # more padding than taps
    ConvProblem(1, 2, 3, 6, 7, kernel_size=4, padding="same"),
    ConvProblem(1, 2, 3, 6, 7, kernel_size=(2, 5), padding="same", dilation=2),
    ConvProblem(1, 1, 1, 1, 1, kernel_size=1),
    ConvProblem(1, 4, 2, 5, 5, kernel_size=1, stride=3),  # most pixels reach no output
    ConvProblem(0, 2, 3, 5, 5, kernel_size=3),
    ConvProblem(1, 2, 3, 9, 8, kernel_size=(6, 7), padding=3),  # more taps than 32 bits
    ConvProblem(1, 2, 3, 12, 11, kernel_size=(11, 9), padding=4),  # more than 64
]


TINY = [  # gradgradcheck calls the kernels for every number
    ConvProblem(1, 2, 1, 3, 3, kernel_size=2, padding=1),
    ConvProblem(1, 2, 2, 3, 4, kernel_size=(2, 1), stride=(1, 2), groups=2),
]


@pytest.fixture(autouse=True)
def on_the_cpu():
    with interpreter(), machine.setting(cudnn_tf32=False):
        yield


@pytest.fixture(params=[False, True], ids=["by channel", "by tap"])
def order(request, monkeypatch):
    """Both orders in which a tile goes through the taps."""
    from convlab.kernels import tiles

    monkeypatch.setattr(tiles, "INTERPRETED", tiles.INTERPRETED._replace(by_tap=request.param))


@pytest.mark.parametrize("problem", EACH + OTHERS, ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_output_and_gradients(problem, layout, order):
    x, weight, bias = problem.inputs()
    if layout == "NHWC":
        x = x.contiguous(memory_format=torch.channels_last)
        weight = weight.contiguous(memory_format=torch.channels_last)
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    assert_same(implicit_gemm, *tensors, **problem.kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_pytorchs_own_samples(dtype):
    for sample in CONV2D.sample_inputs("cpu", dtype, requires_grad=True):
        assert_same(implicit_gemm, sample.input, *sample.args, **sample.kwargs)


@settings(max_examples=40)
@given(call=calls())
def test_drawn_problems(call):
    with interpreter():  # hypothesis and a fixture do not go together
        assert_same(implicit_gemm, call.x, call.weight, call.bias, **call.problem.kwargs)


@pytest.mark.parametrize("problem", TINY, ids=["stride 1", "stride 2"])
def test_gradients_of_first_and_second_order(problem):
    tensors = problem.inputs(dtype=torch.float64, requires_grad=True)

    def f(x, weight, bias):
        return implicit_gemm(x, weight, bias, **problem.kwargs)

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


def tf32_by_steps(x):
    """The nearest multiple of 2⁻¹⁰ of each number's power of two, ties away from zero."""
    _, exponent = torch.frexp(x)
    step = torch.ldexp(torch.ones_like(x, dtype=torch.float64), exponent - 11)
    return torch.sign(x) * torch.floor(x.double().abs() / step + 0.5) * step


def test_tf32_rounds_to_nearest_where_the_flag_of_conv2d_allows_it():
    """Products of numbers that TF32 holds are exact; cut off in place of rounded they are not."""
    problem = ConvProblem(2, 4, 5, 7, 6, kernel_size=3, padding=1)
    x, weight = problem.inputs()[:2]
    with machine.setting(cudnn_tf32=True):
        y = implicit_gemm(x, weight, None, padding=1)
    exact = F.conv2d(tf32_by_steps(x), tf32_by_steps(weight), None, padding=1)
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(y, F.conv2d(x, weight, None, padding=1), rtol=1e-6, atol=1e-6)
    with machine.setting(cudnn_tf32=True):
        assert check("implicit_gemm", problem).ok
        tensors = problem.inputs(dtype=torch.float64, requires_grad=True)
        assert_same(implicit_gemm, *tensors, padding=1)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3e38, 1e-40, 0.0])
def test_tf32_keeps_what_is_special(value):
    x = torch.full((1, 1, 1, 1), value)
    bits = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # CUDA's NaN
    with machine.setting(cudnn_tf32=True):
        y = implicit_gemm(x, torch.ones(1, 1, 1, 1))
        assert implicit_gemm(bits.reshape(1, 1, 1, 1), torch.ones(1, 1, 1, 1)).isnan().all()
    torch.testing.assert_close(y, x, rtol=2**-11, atol=1e-40, equal_nan=True)


def test_half_precision():
    for problem in [*SMALL, ConvProblem(3, 8, 5, 9, 9, kernel_size=3, padding="same")]:
        tensors = problem.inputs(dtype=torch.float16, requires_grad=True)
        assert_same(implicit_gemm, *tensors, **problem.kwargs)


def test_repeatable_bit_for_bit():
    """The parts of the weight's gradient are added up in one order: no atomics."""
    found = check("implicit_gemm", ConvProblem(4, 3, 5, 20, 20, kernel_size=3, padding=1))
    assert found.ok, found.reason
    assert found.repeatable


def test_the_output_lies_as_the_input_does():
    problem = ConvProblem(2, 3, 4, 6, 6, kernel_size=3)
    x, weight, bias = problem.inputs()
    nhwc = x.contiguous(memory_format=torch.channels_last)
    assert implicit_gemm(x, weight, bias).is_contiguous()
    y = implicit_gemm(nhwc, weight, bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, F.conv2d(x, weight, bias))


def test_as_a_layer():
    layer = Conv2d(3, 4, 3, padding=1, algorithm="implicit_gemm")
    reference = torch.nn.Conv2d(3, 4, 3, padding=1)
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(layer(x), reference(x))


@pytest.mark.parametrize("kind", ["OUTPUT", "WEIGHT"])
def test_every_tile_that_ships(kind, monkeypatch):
    from convlab.kernels import tiles

    problem = ConvProblem(1, 24, 20, 9, 8, kernel_size=3, padding=1)
    for tile in getattr(tiles, kind):
        monkeypatch.setattr(tiles, "INTERPRETED", tile)
        tensors = problem.inputs(requires_grad=True)
        assert_same(implicit_gemm, *tensors, **problem.kwargs)


def test_every_problem_has_a_tile():
    import triton

    from convlab.kernels import tiles

    for part, shipped in enumerate((tiles.OUTPUT, tiles.WEIGHT)):
        configs = [triton.Config(t.constants(), t.warps, t.stages) for t in shipped]
        for p in PROBLEMS.values():
            sizes = {"C": p.in_channels // p.groups, "K": p.out_channels // p.groups}
            r, s = p.kernel_size
            chosen = tiles.fitting(configs, sizes | ({"part": 1} if part else {}), R=r, S=s)
            assert 1 <= len(chosen) <= 5
            if not part and r * s > tiles.BITS:
                assert all(c.kwargs["BY_TAP"] for c in chosen)
            widest = max(c.kwargs["CHANNELS"] for c in chosen)
            assert widest >= min(sizes["K"], 64) / 2


def test_says_why_not(monkeypatch):
    problem = ConvProblem(2, 3, 4, 6, 6, kernel_size=3)
    huge = ConvProblem(2**20, 1, 1, 64, 64, kernel_size=3)
    assert implicit_gemm.supports(problem) is None
    assert "2³⁰" in implicit_gemm.supports(huge)
    assert "on the CPU" in implicit_gemm.supports(problem, "cuda")
    assert "not on mps" in implicit_gemm.supports(problem, "mps")
    from convlab.kernels import running

    monkeypatch.setattr(running, "_interpreting", False)
    assert not interpreting()
    reason = implicit_gemm.supports(problem)
    assert "CUDA GPU" in reason
    with pytest.raises(ValueError, match=re.escape(reason)):
        implicit_gemm(*problem.inputs())
    monkeypatch.setattr(running.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in implicit_gemm.supports(problem)
    with pytest.raises(RuntimeError, match="triton is not installed"), interpreter():
        pass


def test_the_variable_interprets_everywhere():
    code = (
        "import torch, convlab; p = convlab.ConvProblem(1, 2, 3, 4, 4, kernel_size=3);"
        "f = convlab.ALGORITHMS['implicit_gemm']; print(f(*p.inputs()).shape)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "torch.Size([1, 3, 2, 2])", done.stderr
