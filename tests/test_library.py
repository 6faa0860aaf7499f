"""The library's variants: right within their format, really different, and never timed if wrong."""

import json

import pytest
import torch
import torch.nn.functional as F

from convlab import ConvProblem, machine, oracle
from convlab.experiments import VARIANTS, Settings, library, run_case
from convlab.experiments.library import (
    MULTIPLE,
    Variant,
    convolve,
    library_case,
    variant_algorithm,
    variant_pass,
)
from convlab.problem import DTYPES

PROBLEMS = {
    "thread": ConvProblem(2, 10, 15, 12, 12, kernel_size=3, padding=1),
    "dilation": ConvProblem(2, 3, 5, 9, 9, kernel_size=3, padding=2, dilation=2),
    "groups": ConvProblem(2, 6, 9, 8, 8, kernel_size=3, padding=1, groups=3),
    "depthwise": ConvProblem(2, 6, 6, 8, 8, kernel_size=3, padding=1, groups=6),
    "stride": ConvProblem(3, 4, 6, 11, 11, kernel_size=3, stride=2, padding=1),
    "asymmetric": ConvProblem(2, 3, 5, 9, 14, (2, 5), (3, 1), (0, 2), (2, 1)),
    "pointwise": ConvProblem(2, 10, 15, 6, 6, kernel_size=1),
    "one channel, one pixel": ConvProblem(1, 1, 1, 1, 1, kernel_size=1),
}
SMALL = PROBLEMS["thread"]
CPU, CUDA = VARIANTS["cpu"], VARIANTS["cuda"]
each_variant = pytest.mark.parametrize("name", CPU)
autocasts = pytest.mark.parametrize("name", [n for n, v in CPU.items() if v.autocast])


@pytest.fixture
def quick(monkeypatch):
    """Settings with few and short rounds."""
    options = {"seconds": 0.02, "min_rounds": 2, "max_rounds": 2}
    monkeypatch.setattr(Settings, "options", options)
    return Settings(quick=True)


@pytest.fixture
def convolved(monkeypatch):
    """What reached `F.conv2d`: its tensors, its result and the flags at that moment."""
    found, real = [], F.conv2d

    def watched(x, weight, *args, **kwargs):
        y = real(x, weight, *args, **kwargs)
        found.append({"x": x, "weight": weight, "y": y, "flags": machine.flags()})
        return y

    monkeypatch.setattr(F, "conv2d", watched)
    return found


# Right


@each_variant
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_every_variant_agrees_with_float64(name, problem):
    variant = CPU[name]
    with machine.setting(**variant.flags):
        found = oracle.check(variant_algorithm(variant), problem, arithmetic=variant.dtype)
    assert found.ok, found.reason


MANY = ConvProblem(17, 3, 5, 7, 9, kernel_size=3, padding=1)


@pytest.mark.parametrize("name", [n for n in CPU if n != "library off"])
def test_every_variant_of_the_library_agrees_on_many_images(name):
    found = oracle.check(variant_algorithm(CPU[name]), MANY, arithmetic=CPU[name].dtype)
    assert found.ok, found.reason


def test_many_images_without_the_library():
    """NNPACK, where PyTorch has it, takes over: its transforms are no sums, and lose digits."""
    variant = CPU["library off"]
    with machine.setting(**variant.flags):
        assert oracle.check(variant_algorithm(variant), MANY).max_error < 1e-4
        with torch.backends.nnpack.flags(enabled=False):
            found = oracle.check(variant_algorithm(variant), MANY)
    assert found.ok, found.reason


@each_variant
def test_the_tolerance_is_that_of_the_format(name):
    """An error of some roundoffs of the variant's own format is found."""
    variant = CPU[name]
    inner = variant_algorithm(variant)
    problem = PROBLEMS["pointwise"]
    factor = 1 + 40 * torch.finfo(DTYPES[variant.dtype]).eps

    def wrong(*args):
        return inner.function(*args) * factor

    found = oracle.check(library.algorithm("Wrong.")(wrong), problem, arithmetic=variant.dtype)
    assert not found.ok


@each_variant
@pytest.mark.parametrize("pass_", ["forward", "train"])
def test_what_is_timed_is_what_was_checked(name, pass_):
    variant = CPU[name]
    x, weight, bias = SMALL.inputs(requires_grad=True)
    y = F.conv2d(x, weight, bias, padding=1)
    expected = [y, *torch.autograd.grad(y.sum(), (x, weight, bias))][
        slice(*{"forward": (0, 1), "train": (1, 4)}[pass_])
    ]
    with machine.setting(**variant.flags):
        found = variant_pass(variant, SMALL, pass_, "cpu")()
    found = [found] if pass_ == "forward" else found
    eps = torch.finfo(DTYPES[variant.dtype]).eps
    for value, true in zip(found, expected, strict=True):
        assert value.shape == true.shape
        assert (value.float() - true).abs().max() <= 100 * eps * true.abs().max()
    assert not found[0].requires_grad


# Different


@pytest.mark.parametrize("problem", [SMALL, PROBLEMS["stride"], PROBLEMS["pointwise"]], ids=str)
def test_padded_channels_are_padded_and_cut(convolved, problem):
    x, weight, bias = problem.inputs()
    sizes = problem.stride, problem.padding, problem.dilation, problem.groups
    y = convolve(CPU["channels padded"])(x, weight, bias, *sizes)
    (call,) = convolved
    k, c = call["weight"].shape[:2]
    assert call["x"].shape[1] == c
    assert c % MULTIPLE == k % MULTIPLE == 0
    assert 0 <= c - problem.in_channels < MULTIPLE
    assert 0 <= k - problem.out_channels < MULTIPLE
    assert call["y"].shape[1] == k
    assert y.shape == problem.output_shape
    assert torch.equal(call["x"][:, : x.shape[1]], x)
    assert not call["x"][:, x.shape[1] :].any()
    assert not call["weight"][:, x.shape[1] :].any()
    assert not call["weight"][weight.shape[0] :].any()


def test_channels_of_the_right_number_are_left_alone(convolved):
    problem = ConvProblem(1, 2 * MULTIPLE, MULTIPLE, 4, 4, kernel_size=1)
    variant_pass(CPU["channels padded"], problem, "forward", "cpu")()
    assert convolved[-1]["weight"].shape == problem.weight_shape


def test_groups_are_not_padded(convolved):
    variant_pass(CPU["channels padded"], PROBLEMS["groups"], "forward", "cpu")()
    assert convolved[-1]["x"].shape == PROBLEMS["groups"].input_shape


@each_variant
def test_layouts_are_what_the_variant_says(convolved, name):
    variant = CPU[name]
    variant_pass(variant, SMALL, "forward", "cpu")()
    variant_algorithm(variant)(*SMALL.inputs(), **SMALL.kwargs)
    for call in convolved:
        for tensor in (call["x"], call["weight"]):
            nhwc = tensor.is_contiguous(memory_format=torch.channels_last)
            assert (nhwc, tensor.is_contiguous()) == (variant.channels_last, not nhwc)


@each_variant
def test_formats_are_what_the_variant_says(convolved, name):
    variant = CPU[name]
    variant_pass(variant, SMALL, "forward", "cpu")()
    given = torch.float32 if variant.autocast else DTYPES[variant.dtype]
    for call in convolved:
        assert call["x"].dtype == call["weight"].dtype == given
        assert call["y"].dtype == DTYPES[variant.dtype]


@autocasts
def test_autocast_ends_with_the_call(name):
    variant = CPU[name]
    y = convolve(variant)(*SMALL.inputs(), SMALL.stride, SMALL.padding, SMALL.dilation, 1)
    assert y.dtype == DTYPES[variant.dtype] != torch.float32
    assert not torch.is_autocast_enabled("cpu")


@autocasts
def test_autocast_gives_gradients_in_the_format_of_the_tensors(name):
    gradients = variant_pass(CPU[name], SMALL, "train", "cpu")()
    assert {g.dtype for g in gradients} == {torch.float32}


def test_flags_are_set_around_every_call_and_restored(quick, convolved, monkeypatch):
    before = machine.flags()
    monkeypatch.setattr(library, "judge", lambda *_: ("unsupported", {}))  # the thread's layer
    monkeypatch.setattr(library, "_judge", lambda *_: ("ok", {"error": 0.0}))
    variants = {
        "as called": CPU["as called"],
        "other": Variant("Two flags.", {"onednn": False, "cudnn_tf32": not before["cudnn_tf32"]}),
    }
    rows = library._library(SMALL, variants, "forward", quick)
    assert machine.flags() == before
    seen = [call["flags"] for call in convolved]
    changed = before | variants["other"].flags
    assert all(flags in (before, changed) for flags in seen)
    assert seen.count(before) >= 2
    assert seen.count(changed) >= 2
    assert [r.flags for r in rows[:2]] == [before, changed]


def test_the_library_off_runs_something_else():
    """The profiler sees no operator of oneDNN."""
    from convlab import stages

    if not machine.flags()["onednn"]:
        pytest.skip("this PyTorch has no oneDNN")
    names = {}
    for name in ("as called", "library off"):
        variant = CPU[name]
        with machine.setting(**variant.flags):
            fn = variant_pass(variant, MANY, "train", "cpu")
            names[name] = set(stages.operators(fn).index)
    assert "aten::mkldnn_convolution" in names["as called"]
    assert "aten::mkldnn_convolution" not in names["library off"]


# Never timed if wrong


def rows_of(variants, quick, pass_="forward"):
    """The rows of one case by part; all of them can be written."""
    rows = library._library(SMALL, variants, pass_, quick)
    for row in rows:
        json.loads(row.as_json())
    return {row.part or row.algorithm: row for row in rows}


@pytest.mark.parametrize(
    "broken",
    [lambda y: y * 1.001, lambda y: y.detach(), lambda y: y[..., 1:], lambda y: y * torch.nan],
    ids=["values", "gradients", "shape", "nan"],
)
def test_a_variant_that_computes_wrongly_gets_no_time(quick, monkeypatch, broken):
    real = convolve

    def sometimes(variant):
        inner = real(variant)
        if variant.idea != "Broken.":
            return inner
        return lambda *args: broken(inner(*args))

    monkeypatch.setattr(library, "convolve", sometimes)
    rows = rows_of({"as called": CPU["as called"], "broken": Variant("Broken.")}, quick)
    wrong = rows["broken"]
    assert wrong.status == "wrong"
    assert wrong.extra["reason"]
    assert (wrong.median, wrong.samples, wrong.peak_bytes) == (None, [], None)
    assert rows["as called"].status == "ok"
    assert len(rows["as called"].samples) == 2


def test_what_does_not_fit_is_not_started(quick, monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1000)
    rows = rows_of(CPU, quick)
    assert {row.status for row in rows.values()} == {"out of memory (predicted)"}
    assert not any(row.samples for row in rows.values())


def test_a_variant_that_runs_out_of_memory_says_so(quick, monkeypatch):
    def full(variant, *_):
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(library, "variant_pass", full)
    rows = rows_of({"as called": CPU["as called"]}, quick)
    assert rows["as called"].status == "out of memory"
    assert rows["thread"].status == "ok"


# The case as a whole


@pytest.mark.parametrize("pass_", ["forward", "train"])
def test_one_case_measures_all_variants_and_the_layer(quick, pass_):
    case = library_case(SMALL, pass_, quick)
    rows = run_case(case, "now")
    assert sorted(r.algorithm for r in rows) == sorted(case.algorithms)
    assert [r.part for r in rows] == [*CPU, ""]
    assert {(r.status, r.pass_, len(r.samples)) for r in rows} == {("ok", pass_, 2)}
    for row in rows[:-1]:
        variant = CPU[row.part]
        assert row.dtype == variant.dtype
        assert row.layout == ("NHWC" if variant.channels_last else "NCHW")
        assert row.flags == machine.flags() | variant.flags
    errors = {r.part: r.error for r in rows}
    assert errors["bf16"] > 100 * errors["as called"]


def test_both_devices_offer_the_same_kind_of_thing():
    assert set(library.SHARED) <= set(CPU) & set(CUDA)
    for variants in (CPU, CUDA):
        assert next(iter(variants)) == "as called"
        assert variants["as called"] == Variant(variants["as called"].idea)
        facts = [
            (tuple(sorted(v.flags.items())), v.channels_last, v.dtype, v.autocast, v.padded)
            for v in variants.values()
        ]
        assert len(set(facts)) == len(facts), "two variants are the same"
        for name, variant in variants.items():
            assert variant.idea.endswith("."), name
            assert variant.dtype in DTYPES
            assert set(variant.flags) <= set(machine.FLAGS)
            assert variant.dtype != "float32" or not variant.autocast


@pytest.mark.parametrize("name", CUDA)
def test_flags_of_cuda_variants_can_be_set_anywhere(name):
    before = machine.flags()
    with machine.setting(**CUDA[name].flags):
        assert machine.flags() == before | CUDA[name].flags
    assert machine.flags() == before


def test_every_switch_of_cudnn_is_among_the_variants():
    switched = {flag for variant in CUDA.values() for flag in variant.flags}
    assert switched == {flag for flag in machine.FLAGS if flag.startswith("cudnn")} | {
        "matmul_tf32"
    }
    assert any(v.padded for v in CUDA.values())
    assert any(v.channels_last for v in CUDA.values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUDA)
def test_every_variant_agrees_with_float64_on_cuda(name):
    variant = CUDA[name]
    for problem in (*PROBLEMS.values(), MANY):
        with machine.setting(**variant.flags):
            algorithm = variant_algorithm(variant)
            found = oracle.check(algorithm, problem, "cuda", arithmetic=variant.dtype)
        assert found.ok, (problem, found.reason)
