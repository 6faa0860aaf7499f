"""What is counted on paper is what PyTorch counts and what its allocator hands out."""

import functools

import pytest
import torch
import torch.nn.functional as F
from drawn import problems
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from convlab import ALGORITHMS, PROBLEMS, ConvProblem, cost, counts, timing


@given(problem=problems())
@settings(max_examples=50)
def test_flops_are_those_of_the_flop_counter(problem):
    x, weight, _ = problem.inputs(requires_grad=True)
    with counter() as forward:
        F.conv2d(x, weight, **problem.kwargs)
    assert cost.flops(problem) == forward.get_total_flops()

    # Group by group: FlopCounterMode counts the gradient of a grouped weight `groups` times.
    sizes = problem.kwargs | {"groups": 1}
    pieces = zip(x.chunk(problem.groups, 1), weight.chunk(problem.groups), strict=True)
    outputs = [F.conv2d(a, w, **sizes) for a, w in pieces]
    with counter() as backward:
        torch.autograd.grad(sum(y.sum() for y in outputs), [x, weight])
    assert cost.flops(problem, "backward") == backward.get_total_flops()
    assert cost.flops(problem, "train") == forward.get_total_flops() + backward.get_total_flops()


counter = functools.partial(FlopCounterMode, display=False)


@given(problem=problems())
def test_compulsory_bytes_are_those_of_the_tensors(problem):
    x, weight, _ = problem.inputs(dtype="float64")
    y = F.conv2d(x, weight, **problem.kwargs)
    forward = sum(t.nbytes for t in (x, weight, y))
    backward = sum(t.nbytes for t in (y, x, weight, x, weight))
    assert cost.compulsory_bytes(problem, itemsize=8) == forward
    assert cost.compulsory_bytes(problem, itemsize=8, direction="backward") == backward
    assert cost.compulsory_bytes(problem, itemsize=8, direction="train") == forward + backward


def runs(algorithm, problem):
    x, weight, _ = problem.inputs()
    weight.requires_grad_()
    return functools.partial(ALGORITHMS[algorithm], x, weight, **problem.kwargs)


def assume_counted_exactly(problem):
    """No axis of length 1 that makes a transpose free, no lopsided "same" that pads first."""
    _, channels, height, width = problem.output_shape
    assume(1 not in (problem.taps, height * width, channels // problem.groups))
    assume(all(before == after for before, after in problem.pads))


@pytest.mark.parametrize("algorithm", ["thread", "unfold"])
@given(problem=problems())
@settings(max_examples=12)
def test_peak_memory_is_what_is_measured(algorithm, problem):
    assume_counted_exactly(problem)
    measured = timing.peak_bytes(torch.no_grad()(runs(algorithm, problem)))
    assert cost.peak_bytes(algorithm, problem) == measured


@pytest.mark.parametrize("algorithm", ["thread", "unfold"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"batch": 1}, {"stride": 2}, {"groups": 5}, {"kernel_size": 1, "padding": 0}],
    ids=str,
)
def test_peak_memory_of_the_threads_problem(algorithm, changes):
    problem = PROBLEMS["thread_b2"].replace(**changes)
    measured = timing.peak_bytes(torch.no_grad()(runs(algorithm, problem)))
    assert cost.peak_bytes(algorithm, problem) == measured


@pytest.mark.parametrize("algorithm", ["thread", "unfold"])
@given(problem=problems(min_batch=1))
@settings(max_examples=12)
def test_peak_memory_of_training_is_what_is_measured(algorithm, problem):
    assume_counted_exactly(problem)
    sizes = cost.Sizes.of(problem)
    assume(sizes.columns >= sizes.x)
    tensors = problem.inputs(requires_grad=True)
    grad = torch.ones(problem.output_shape)
    train = lambda: torch.autograd.grad(
        ALGORITHMS[algorithm](*tensors, **problem.kwargs), tensors, grad
    )
    measured = timing.peak_bytes(train)
    assert cost.peak_bytes(algorithm, problem, direction="train") == measured


@pytest.mark.parametrize("algorithm", ["thread", "unfold"])
@given(problem=problems(min_batch=2))
@settings(max_examples=20)
def test_what_the_steps_write_is_what_is_allocated(algorithm, problem):
    assume_counted_exactly(problem)
    sizes = cost.Sizes.of(problem)
    assume(sizes.columns > sizes.x)
    written = sum(step.written for step in cost.steps(algorithm, problem))
    first_output_of_unfold = 4 * sizes.x
    measured = timing.allocated_bytes(runs(algorithm, problem))
    assert written + first_output_of_unfold == measured


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("algorithm", ["native", "thread", "unfold"])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_steps_do_the_arithmetic_once_and_move_no_less_than_they_must(
    algorithm, problem, direction
):
    steps = cost.steps(algorithm, problem, direction=direction)
    assert sum(step.flops for step in steps) == cost.flops(problem, direction)
    moved = cost.moved_bytes(algorithm, problem, direction=direction)
    assert moved == sum(step.read + step.written for step in steps)
    assert moved >= cost.compulsory_bytes(problem, direction=direction)
    assert cost.launches(algorithm, problem, direction) == sum(step.launches for step in steps)


DIRECT = ("unfold_batched", "unfold_chunked", "windows", "row_windows", "compiled", "fused")
CACHED = ("unfold_recompute", "windows_chunked", "row_windows")


DEPTHWISE = "mobilenet_v3_large_72to72_56px_k5_s2_depthwise"


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", ["thread_b2", "wide_32", DEPTHWISE])
def test_faster_forms_do_the_same_arithmetic(name, direction):
    problem = PROBLEMS[name]
    for algorithm in (*DIRECT, *CACHED):
        steps = cost.steps(algorithm, problem, direction=direction)
        assert sum(step.flops for step in steps) == cost.flops(problem, direction), algorithm


@pytest.mark.parametrize("name", ["thread_b2", "thread_b512", "wide_64"])
def test_columns_in_a_cache_are_no_traffic(name):
    problem = PROBLEMS[name]
    for algorithm in CACHED:
        assert cost.moved_bytes(algorithm, problem) == cost.compulsory_bytes(problem)
    columns = 4 * cost.Sizes.of(problem).columns
    for algorithm in ("unfold_batched", "unfold_chunked", "windows", "compiled"):
        assert cost.moved_bytes(algorithm, problem) > 2 * columns


def test_winograds_products_are_four_ninths():
    problem = PROBLEMS["wide_64"]
    (product,) = [s for s in cost.steps("winograd", problem) if s.stage == "product"]
    assert product.flops == cost.flops(problem) * 4 // 9
    with counter() as counted:
        ALGORITHMS["winograd"](*problem.replace(batch=2).inputs(), padding=1)
    tiles = counted.get_total_flops() - 2 * 16 * 9 * 64 * 64  # the taps' own transform
    assert tiles == pytest.approx(cost.flops(problem.replace(batch=2)) * 4 / 9, rel=0.05)


@pytest.mark.parametrize("algorithm", ["unfold_batched", "unfold_recompute", "windows"])
def test_products_are_those_of_the_flop_counter(algorithm):
    problem = PROBLEMS["thread_b2"]
    with counter() as counted:
        ALGORITHMS[algorithm](*problem.inputs(), **problem.kwargs)
    assert counted.get_total_flops() == cost.flops(problem)


def test_every_algorithm_is_counted():
    for algorithm in ALGORITHMS:
        if algorithm not in ("native_channels_last", "native_no_library", "auto"):
            for direction in ("forward", "backward"):
                assert cost.steps(algorithm, PROBLEMS["thread_b2"], direction=direction)


@pytest.mark.parametrize("name", ["thread_b2", "thread_b512", "wide_64", DEPTHWISE])
def test_implicit_gemm_moves_what_it_must_and_no_columns(name):
    p = PROBLEMS[name]
    for direction in ("forward", "backward"):
        steps = cost.steps("implicit_gemm", p, direction=direction)
        assert sum(step.flops for step in steps) == cost.flops(p, direction)
    assert cost.moved_bytes("implicit_gemm", p) == cost.compulsory_bytes(p)
    assert cost.launches("implicit_gemm", p) == 1


def test_implicit_gemm_backwards_by_hand():
    """Each image 8 values of y; one part of 512 pixels of y or less, of at most 528."""
    p = ConvProblem(1, 1, 2, 4, 4, kernel_size=3, stride=2, padding=1)
    x, weight, y = 16, 18, 8
    gx, gw, added = cost.steps("implicit_gemm", p, 1, "backward")
    assert (gx.read, gx.written, gx.launches) == (4 * y + weight, x, 4)  # 2×2 phases
    assert (gw.read, gw.written) == (x + y, weight)
    assert (added.read, added.written) == (weight, weight)
    many = counts.partial_sums(p.replace(batch=1000))
    assert many == -(-4 * 1000 // 512)
    assert counts.partial_sums(p.replace(batch=10**6)) == counts.PROGRAMS
    point = p.replace(kernel_size=1, padding=0)  # one phase of four has a tap
    assert cost.steps("implicit_gemm", point, 1, "backward")[0].read == y + 2
    wide = ConvProblem(256, 512, 512, 7, 7, kernel_size=3, padding=1)  # 36 · 8 tiles
    assert counts.partial_sums(wide) == 528 // 288


def test_the_thread_launches_one_unfold_per_image():
    for batch in (2, 64):
        problem = PROBLEMS["thread_b2"].replace(batch=batch)
        assert cost.launches("thread", problem) == batch + 4


def test_the_floor_is_the_slower_of_arithmetic_and_memory():
    problem = ConvProblem(1, 1, 1, 3, 3, kernel_size=3)
    flops, moved = 2 * 9, 4 * (9 + 9 + 1)
    assert cost.floor_seconds(problem, cost.Ceilings(2.0, 1e9)) == flops / 2
    assert cost.floor_seconds(problem, cost.Ceilings(1e9, 2.0)) == moved / 2
    assert cost.floor_seconds(problem, cost.Ceilings(1e9, 2.0), itemsize=2) == moved / 4
    assert cost.intensity(problem) == flops / moved


CEILINGS = st.builds(cost.Ceilings, *[st.floats(1e3, 1e15)] * 2)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("algorithm", ["native", "thread", "unfold"])
@given(problem=problems(min_batch=1), ceilings=CEILINGS, itemsize=st.sampled_from([2, 4, 8]))
@settings(max_examples=50)
def test_no_steps_are_faster_than_the_floor(algorithm, direction, problem, ceilings, itemsize):
    sizes = cost.Sizes.of(problem)
    assume(sizes.columns >= sizes.x)  # a stride that skips pixels need not read them
    predicted = cost.predicted_seconds(algorithm, problem, ceilings, itemsize, direction)
    floor = cost.floor_seconds(problem, ceilings, itemsize, direction)
    assert predicted >= floor * (1 - 1e-9)
    if (algorithm, direction) == ("native", "forward"):
        assert predicted == pytest.approx(floor)


def test_predicted_seconds_by_hand():
    """Two images, one channel, kernel 3 on 3×3 pixels: x 18, weight 9, y 2, columns 18 values."""
    problem = ConvProblem(2, 1, 1, 3, 3, kernel_size=3)
    only_memory = cost.Ceilings(1e30, 1.0)
    unfold, product = 18 + 18, (18 + 18) + (18 + 9 + 2)
    assert cost.predicted_seconds("unfold", problem, only_memory, 1) == unfold + product + (2 + 2)
    fold = (2 + 2) + (2 + 2)
    assert cost.predicted_seconds("thread", problem, only_memory, 1) == unfold + product + fold
    only_arithmetic = cost.Ceilings(1.0, 1e30)
    flops = 2 * 2 * 9
    for name in ("native", "unfold", "thread"):
        assert cost.predicted_seconds(name, problem, only_arithmetic) == pytest.approx(flops)


@pytest.mark.parametrize(
    ("call", "value"),
    [
        (lambda p: cost.steps("winograd3", p), "'winograd3'"),
        (lambda p: cost.steps("thread", p, direction="sideways"), "'sideways'"),
        (lambda p: cost.predicted_seconds("winograd3", p, cost.Ceilings(1, 1)), "'winograd3'"),
        (lambda p: cost.moved_bytes("winograd3", p), "'winograd3'"),
        (lambda p: cost.peak_bytes("native", p), "'native'"),
        (lambda p: cost.peak_bytes("thread", p, direction="backward"), "'backward'"),
        (lambda p: cost.flops(p, "sideways"), "'sideways'"),
        (lambda p: cost.compulsory_bytes(p, direction="sideways"), "'sideways'"),
    ],
)
def test_bad_names_are_named(call, value):
    with pytest.raises(ValueError, match=rf"(algorithm|direction) must be one of .*got .*{value}"):
        call(PROBLEMS["thread_b2"])
