"""The kernels of custom convolutions compiled for sm_90, without a GPU: registers, instructions."""

import importlib.util
import sys

import pytest
import torch

from convlab import PROBLEMS
from convlab.cost import flops
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
FUNCTIONS = {
    "Σ|x − w|": (lambda x, w: (x - w).abs(), "sum"),
    "max(x + w)": (lambda x, w: x + w, "max"),
    "logsumexp(x · w)": (lambda x, w: x * w, "logsumexp"),
}
LEAST = {  # instructions that one term needs, each pass
    "Σ|x − w|": (2, 3, 4),  # subtract, add | compare (two, or one and a sign), add
    "max(x + w)": (2, 3, 3),
    "logsumexp(x · w)": (6, 5, 5),
}


def launches(problem, function, reduce, dtype=torch.float32, nhwc=False):
    """Of the output, the gradient of x and that of the weight, on tensors without values."""
    from convlab.flex import launching, running
    from convlab.flex.combine import parse

    (ph, _), (pw, _) = problem.pads
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    plan = parse(function, sums, False), reduce, problem.stride, (ph, pw), problem.dilation
    call = running.Call(*plan, problem.groups, False, problem.output_shape[2:], True)
    layout = torch.channels_last if nhwc else torch.contiguous_format

    def tensor(*shape):
        return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout)

    x = tensor(problem.batch, problem.in_channels, problem.height, problem.width)
    weight, y = tensor(*problem.weight_shape), tensor(*problem.output_shape)
    limit = None if reduce == "sum" else y.to(sums)
    numbers = torch.empty(1, dtype=sums, device="meta")
    tensors = x, weight, None, limit, y
    output = launching.output_launch(call, x, weight, None, None, y, numbers, None)
    (by_x,) = launching.input_launches(call, *tensors, torch.empty_like(x), numbers)
    return output, by_x, launching.weight_launch(call, *tensors, numbers)


def fitting(launch):
    from convlab.flex import tiles

    sizes = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    return tiles.fitting(launch.kernel, sizes, launch.constants)


@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("problem", [THREAD, WIDE], ids=["thread", "64 to 64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_sums_stay_in_registers(name, problem, nhwc):
    """Up to 16 bytes that the assembler puts aside lie outside of the loop over the terms."""
    from convlab.flex.estimating import disassemble, loops
    from convlab.kernels.compiling import compile_launch

    for launch in launches(problem, *FUNCTIONS[name], nhwc=nhwc):
        assert fitting(launch)
        for tile in fitting(launch):
            code = compile_launch(launch, tile)
            assert code.spills <= 16, (launch.kernel.fn.__name__, tile)
            assert code.registers * 32 * tile.warps <= 65536
            assert code.shared <= 48 * 1024
            if code.spills:
                inner = [text for loop in loops(disassemble(code.ptx)) for text in loop]
                assert not [text for text in inner if "LDL" in text or "STL" in text]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_types_compile(dtype):
    from convlab.kernels.compiling import compile_launch

    for launch in launches(THREAD, *FUNCTIONS["logsumexp(x · w)"], dtype=dtype):
        code = compile_launch(launch, fitting(launch)[0])
        assert code.spills <= 16
        assert ("f64" in code.ptx) == (dtype == torch.float64)


def test_numbers_are_not_rounded_on_their_way_into_float64():
    """A GPU showed it first: 0.8, taken for float32 in a comparison or a `tl.where`."""
    import struct

    from convlab.kernels.compiling import compile_launch

    def huber(x, w):
        return torch.nn.functional.huber_loss(x, w, reduction="none", delta=0.8)

    exact = struct.pack(">d", 0.8).hex().upper()
    rounded = struct.pack(">d", float(torch.tensor(0.8, dtype=torch.float32))).hex().upper()
    for launch in launches(THREAD, huber, "sum", torch.float64):
        ptx = compile_launch(launch, fitting(launch)[0]).ptx
        assert exact[1:] in ptx  # after the digit of the sign
        assert rounded[1:] not in ptx


@pytest.mark.parametrize("name", FUNCTIONS)
def test_instructions_per_term(name):
    from convlab.flex.estimating import estimate

    for launch, least in zip(launches(WIDE, *FUNCTIONS[name]), LEAST[name], strict=True):
        for tile in fitting(launch):
            found = estimate(launch, tile)
            assert least <= found.instructions <= 2 * least + 3, (launch.kernel.fn.__name__, tile)
            assert flops(WIDE) / 2 <= found.terms <= 1.2 * flops(WIDE) / 2
            assert round(found.special) == (FUNCTIONS[name][1] == "logsumexp")
            slots = max(found.instructions, 8 * found.special)
            assert found.seconds == pytest.approx(slots * found.terms / (132 * 128 * 1.98e9))


def test_counts_a_loop_that_is_written_four_times_over_once():
    from convlab.flex.estimating import per_pass

    def loop(start, times):
        term = ["LDG.E R1, [R2.64]", "FADD R3, R3, R1", "FFMA R4, R1, R1, R4", "MUFU.EX2 R6, R1"]
        body = term * times + ["IADD3 R5, R5, 0x1, RZ", f"@P0 BRA 0x{start:x}"]
        return [(start + 16 * i, text) for i, text in enumerate(body)]

    assert per_pass(loop(0, 1)) == (6, 1)
    assert per_pass(loop(0, 4) + loop(0x100, 1)) == (18 / 4, 1)
    with pytest.raises(ValueError, match="no loop"):
        per_pass([(0, "EXIT")])


def test_every_operation_compiles():
    """What the table spells, libdevice's names too, is known to Triton."""
    import test_flex_triton as functions

    from convlab.kernels.compiling import compile_launch

    problem = PROBLEMS["thread_b2"].replace(batch=1, height=8, width=8)
    known = [*functions.UNARY.values()]
    for dtype, passes in ((torch.float32, 2), (torch.float64, 1)):
        for some in (known[first::8] for first in range(8)):

            def combine(x, w, some=some):
                return sum(f(x) for f in some) * w

            for launch in launches(problem, combine, "sum", dtype)[:passes]:
                compile_launch(launch, fitting(launch)[0])
