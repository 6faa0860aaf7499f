"""The shipped tiles compiled for sm_90, without a GPU: no spills, tensor cores where asked for."""

import importlib.util
import sys

import pytest
import torch

from convlab import PROBLEMS, machine
from convlab.algorithms.method import Sizes
from convlab.problems import thread_problem

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or sys.platform != "linux",
        reason="the package triton and its assembler exist for Linux",
    ),
]
THREAD = thread_problem(256)
WIDE = PROBLEMS["resnet50_64to64_56px_k3"].replace(batch=256)
SHORT = (torch.bfloat16, torch.float16)


def launches(problem, dtype, nhwc, pass_):
    """The launches of one pass, noted: tensors on the meta device have shapes and no values."""
    from convlab.kernels import launching

    (ph, _), (pw, _) = problem.pads
    sizes = Sizes(problem.stride, (ph, pw), problem.dilation, problem.groups, 1)
    layout = torch.channels_last if nhwc else torch.contiguous_format

    def tensor(*shape):
        return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout)

    n, k = problem.batch, problem.out_channels
    x = tensor(n, problem.in_channels, problem.height, problem.width)
    weight, y = tensor(*problem.weight_shape), tensor(*problem.output_shape)
    bias = torch.empty(k, dtype=dtype, device="meta")
    with launching.noting() as found:
        if pass_ == "output":
            launching.output(x, weight, bias, y, sizes)
        elif pass_ == "input gradient":
            launching.input_gradient(y, weight, torch.empty_like(x), sizes)
        else:
            launching.weight_gradient(y, x, weight, sizes)
    return found


@pytest.mark.parametrize("pass_", ["output", "input gradient", "weight gradient"])
@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("problem", [THREAD, WIDE], ids=["thread", "64 to 64"])
@pytest.mark.parametrize(
    ("dtype", "tf32"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.float16, False),
    ],
    ids=["float32", "TF32", "bfloat16", "float16"],
)
def test_no_spills_and_tensor_cores(problem, dtype, tf32, nhwc, pass_):
    from convlab.kernels.compiling import compile_launch, fitting_tiles

    with machine.setting(cudnn_tf32=tf32):
        (launch,) = launches(problem, dtype, nhwc, pass_)
    found = {tile: compile_launch(launch, tile) for tile in fitting_tiles(launch)}
    assert found
    for tile, code in found.items():
        assert code.spills == 0, tile
        assert code.registers * 32 * tile.warps <= 65536, tile
        assert code.shared <= 227 * 1024, tile
        tensor_cores = (tf32 or dtype in SHORT) and tile.depth > 1
        assert bool(code.matrix) == tensor_cores, tile
        assert bool(code.fma) != tensor_cores, tile


def test_every_tile_is_compiled_somewhere():
    from convlab.kernels import tiles
    from convlab.kernels.compiling import fitting_tiles

    others = [PROBLEMS["wide_32"], PROBLEMS["resnet50_128to128_28px_k3"]]
    others += [PROBLEMS["resnet50_3to64_224px_k7_s2"]]
    for pass_, shipped in (("output", tiles.OUTPUT), ("weight gradient", tiles.WEIGHT)):
        seen = set()
        for problem in (THREAD, WIDE, *others):
            for launch in launches(problem, torch.float32, False, pass_):
                seen |= set(fitting_tiles(launch))
        assert seen == set(shipped)
