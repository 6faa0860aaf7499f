"""What is counted in the interpreter is what a kernel does, counted by hand."""

import builtins
import importlib
import importlib.util
import sys

import pytest
import torch

from convlab.kernels import interpreter, lesson
from convlab.kernels.lesson import interpret, jit, tl

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton exists for Linux"
)


@jit
def shifted(X, Y, n, FIRST: tl.constexpr, LANES: tl.constexpr):
    """y[i] = x[i + FIRST] + x[i], four values to a program."""
    i = tl.program_id(0) * LANES + tl.arange(0, LANES)
    later = tl.load(X + i + FIRST, mask=i + FIRST < n, other=0.0)
    now = tl.load(X + i, mask=i < n, other=0.0)
    tl.store(Y + i, now + later, mask=i < n)


@jit
def total(X, Y, n):
    """One value at a time, without masks."""
    y = 0.0
    for i in range(n):
        y += tl.load(X + i)
    tl.store(Y, y)


@pytest.fixture
def seen():
    """x (10,), y, and what `shifted` does to them with three programs of four lanes."""
    from convlab.kernels.watching import watching

    x, y = torch.arange(10.0), torch.zeros(10)
    with watching() as accesses:
        interpret(shifted, [3], x, y, 10, FIRST=1, LANES=4)
    expected = x + torch.cat([x[1:], torch.zeros(1)])
    assert torch.equal(y, expected)
    return x, y, accesses


@needs_triton
def test_totals_by_hand(seen):
    from convlab.kernels.watching import totals

    x, y, accesses = seen
    table = totals(accesses, {"x": x, "y": y})
    assert table.loc["x"].to_dict() == {
        "instructions": 6,
        "lanes": 24,
        "masked": 24 - 9 - 10,
        "bytes": 4 * 19,
        "distinct": 4 * (5 + 5 + 2),  # the last program has two values
        "sectors": table.loc["x", "sectors"],  # where x begins decides
        "programs": 3,
    }
    assert table.loc["x", "sectors"] in range(3 * 32, 7 * 32, 32)
    assert table.loc["y"].drop("sectors").to_list() == [3, 12, 2, 40, 40, 3]


@needs_triton
def test_touched_by_all_and_by_one(seen):
    from convlab.kernels.watching import touched

    x, y, accesses = seen
    assert touched(accesses, x).tolist() == [1] + [2] * 9
    assert touched(accesses, x, (1, 0, 0)).tolist() == [0] * 4 + [1, 2, 2, 2, 1, 0]
    assert touched(accesses, y, (2, 0, 0)).tolist() == [0] * 8 + [1, 1]
    assert touched(accesses, x.view(2, 5)).tolist() == [[1, 2, 2, 2, 2], [2] * 5]
    assert touched(accesses, x[::2]).tolist() == [1, 2, 2, 2, 2]


@needs_triton
def test_a_line_that_loads_nothing_in_one_program_still_belongs_to_its_tensor():
    from convlab.kernels.watching import totals, watching

    x, y = torch.arange(4.0), torch.zeros(4)
    with watching() as accesses:
        interpret(shifted, [1], x, y, 4, FIRST=4, LANES=4)
    assert totals(accesses, {"x": x}).loc["x", "lanes"] == 4, "no lane of the line is ever real"
    with watching() as accesses:
        interpret(shifted, [2], x, y, 4, FIRST=2, LANES=2)
    table = totals(accesses, {"x": x})
    assert table.loc["x", ["instructions", "lanes", "masked"]].to_list() == [4, 8, 2]


@needs_triton
def test_single_values_and_no_masks():
    from convlab.kernels.watching import totals, watching

    x, y = torch.arange(5.0), torch.zeros(1)
    with watching() as accesses:
        interpret(total, [1], x, y, 5)
    assert y.item() == 10
    table = totals(accesses, {"x": x, "y": y})
    assert table["instructions"].to_list() == [5, 1]
    assert table["masked"].to_list() == [0, 0]


@needs_triton
def test_the_shipped_kernel_is_watched_and_left_as_it_was():
    from triton.runtime.interpreter import interpreter_builder

    from convlab import ALGORITHMS, ConvProblem
    from convlab.kernels.watching import totals, watching

    p = ConvProblem(1, 3, 4, 6, 6, kernel_size=3, padding=1)
    x, weight, _ = p.inputs()
    with interpreter(), watching() as accesses:
        y = ALGORITHMS["implicit_gemm"](x, weight, **p.kwargs)
    table = totals(accesses, {"x": x, "y": y})
    inside = 3 * (6 * 3 - 2) ** 2  # window pixels that are no padding, each axis on its own
    assert table.loc["x", "bytes"] == 4 * inside
    assert table.loc["y", "bytes"] == y.nbytes
    count = len(accesses)
    with interpreter():
        ALGORITHMS["implicit_gemm"](x, weight, **p.kwargs)
    assert len(accesses) == count
    assert "create_masked_load" not in vars(interpreter_builder)


@needs_triton
@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("by_tap", [False, True], ids=["flattened", "by tap"])
def test_the_shipped_kernel_with_a_tile_of_ones_own(nhwc, by_tap):
    from convlab import ConvProblem
    from convlab.kernels.tiles import Tile
    from convlab.kernels.watching import totals

    p = ConvProblem(2, 10, 16, 6, 6, kernel_size=3, padding=1)
    tensors, seen = lesson.watch(p, Tile(32, 16, 16, by_tap, 4, 1), nhwc)
    table = totals(seen, tensors)
    assert (table["programs"] == 3).all(), "72 pixels in tiles of 32"
    chunks = 9 if by_tap else 6  # of 16, for 90 products
    assert table.loc["weight", "lanes"] == 3 * chunks * 16 * 16
    assert table.loc["weight", "masked"] == 3 * 16 * (chunks * 16 - 90)
    assert table.loc["weight", "distinct"] == 3 * 4 * 16 * 90, "each program the whole weight"
    assert table.loc["x", "lanes"] == 3 * chunks * 16 * 32
    assert table.loc["x", "bytes"] == 4 * 2 * 10 * (6 * 3 - 2) ** 2


@jit
def row_sums(X, Y, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    i, j = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    x = tl.load(X + i[:, None] * DEPTH + j[None, :])
    y = tl.zeros((ROWS,), tl.float32)
    tl.store(Y + i, y + tl.sum(x, axis=1))


@needs_triton
def test_functions_that_are_kernels_themselves_are_interpreted_and_put_back():
    from triton.runtime.jit import JITFunction

    x, y = torch.randn(4, 8), torch.zeros(4)
    interpret(row_sums, [1], x, y, ROWS=4, DEPTH=8)
    torch.testing.assert_close(y, x.sum(1))
    assert isinstance(tl.sum, JITFunction)
    assert isinstance(tl.zeros, JITFunction)


@needs_triton
@pytest.mark.slow
def test_a_kernel_that_was_interpreted_compiles_afterwards():
    pytest.importorskip("triton.backends.nvidia")
    from convlab.kernels.compiling import compile_kernel

    x, y = torch.randn(64, 32), torch.zeros(64)
    interpret(row_sums, [1], x, y, ROWS=64, DEPTH=32)
    code = compile_kernel(row_sums, (x, y), {"ROWS": 64, "DEPTH": 32}, warps=4, stages=1)
    assert code.spills == 0
    assert code.matrix == 0


@needs_triton
def test_launches_are_noted_without_tensors():
    from convlab import ConvProblem

    p = ConvProblem(2, 4, 6, 9, 9, kernel_size=3, stride=2, padding=1)
    assert [len(lesson.launches(p, q)) for q in ("forward", "gradient of weight")] == [1, 1]
    taps = [n.constants["R"] * n.constants["S"] for n in lesson.launches(p, "gradient of x")]
    assert sorted(taps) == [1, 2, 2, 4]
    (launch,) = lesson.launches(p, nhwc=True, dtype=torch.bfloat16)
    assert launch.constants["NHWC"]
    assert launch.arguments[0].dtype == torch.bfloat16


def test_without_triton_kernels_can_be_read_and_not_run(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.partition(".")[0] == "triton":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    try:
        bare = importlib.reload(lesson)

        @bare.jit
        def kernel(X, N: bare.tl.constexpr):
            raise AssertionError

        with pytest.raises(RuntimeError, match="triton is not installed"):
            bare.interpret(kernel, [1], torch.zeros(1), N=1)
    finally:
        monkeypatch.undo()
        importlib.reload(lesson)
    assert "convlab.kernels.lesson" in sys.modules
