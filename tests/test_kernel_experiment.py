"""`implicit_gemm` beside the library: same format, same flags, nothing timed that is wrong."""

import json

import pytest
import torch
import torch.nn.functional as F

from convlab import ALGORITHMS, experiments, machine, oracle
from convlab.algorithms import algorithm
from convlab.experiments import Settings, cases, error_case, kernel, kernel_case
from convlab.kernels import interpreter
from convlab.problem import ConvProblem
from convlab.problems import thread_problem

SMALL = ConvProblem(5, 3, 4, 6, 6, kernel_size=3, padding=1)
needs_triton = pytest.mark.skipif("triton" not in machine.versions(), reason="triton: for Linux")


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Two rounds for everything that is measured here."""
    monkeypatch.setattr(Settings, "options", {"seconds": 0.01, "min_rounds": 2, "max_rounds": 2})


@pytest.fixture
def gpu(monkeypatch):
    """Settings that plan for a GPU wherever this runs."""
    monkeypatch.setattr(cases, "parse_device", torch.device)
    return lambda **options: Settings("cuda", **options)


def test_on_the_cpu_there_is_nothing_to_measure():
    for name in ("kernel", "kernel_errors"):
        for quick in (True, False):
            assert experiments.EXPERIMENTS[name].cases(Settings(quick=quick)) == []


def test_the_plan_holds_what_is_to_be_compared(gpu):
    roofs, planned = [], []
    for case in experiments.EXPERIMENTS["kernel"].cases(gpu()):
        (roofs if case.name.startswith("kernel/roof/") else planned).append(case)
    assert [case.name.rpartition("/")[2] for case in roofs] == [*kernel.MODES]
    names = [case.name for case in planned]
    assert len(set(names)) == len(names) == 4 * (2 * 2 + 7)
    for n in (256, 512):
        for pass_ in ("forward", "train"):
            for mode in kernel.MODES:
                assert f"kernel/b{n}-10to15-50x50/{pass_}/{mode}" in names
    assert "kernel/b256-512to512-7x7/forward/bf16" in names
    assert len(experiments.EXPERIMENTS["kernel"].cases(gpu(quick=True))) == 4 * (2 + 1 + 1)
    for case in planned:
        assert case.algorithms.count("native") == case.algorithms.count("implicit_gemm") == 2
        assert {"unfold", "unfold_batched", "thread"} < {*case.algorithms}
        assert case.flags["cudnn_tf32"] == case.flags["matmul_tf32"] == case.name.endswith("TF32")
        assert case.flags["cudnn_benchmark"]
    compiled = [case.name for case in planned if "compiled_native_matmul" in case.algorithms]
    assert compiled == [f"kernel/b256-10to15-50x50/forward/{m}" for m in ("TF32", "bf16")]


def test_roofs_come_from_their_rows():
    rows = experiments.run_case(kernel.roof_case("fp32", Settings()), "now")
    assert [(r.part, r.algorithm, r.problem) for r in rows] == [
        ("fp32, product", "", {}),
        ("fp32, copy", "", {}),
    ]
    (name, roof), *others = experiments.roofs_of(rows).items()
    assert (name, others) == ("fp32", [])
    assert roof.flops_per_second == 2 * 256**3 / rows[0].median
    assert roof.bytes_per_second == 2 * 4 * 2**20 / rows[1].median
    assert experiments.roofs_of([]) == {}


def test_errors_are_asked_for_on_every_named_problem(gpu):
    planned = experiments.EXPERIMENTS["kernel_errors"].cases(gpu())
    names = [case.name for case in planned]
    assert len(set(names)) == len(names)
    wanted = {oracle.checked_part(p) for p in kernel.PROBLEMS.values()}
    assert len(names) == len(wanted)
    assert 1 < len(experiments.EXPERIMENTS["kernel_errors"].cases(gpu(quick=True))) < len(names)


def rows_of(case):
    """Its rows by algorithm and layout, as written; all of them can be written."""
    rows = experiments.run_case(case, "now")
    for row in rows:
        json.loads(row.as_json())
    assert sorted(r.algorithm for r in rows) == sorted(case.algorithms)
    assert len({(r.algorithm, r.part) for r in rows}) == len(rows)
    return {(r.algorithm, r.layout): r for r in rows}


@needs_triton
@pytest.mark.parametrize(
    ("pass_", "mode"), [("forward", "fp32"), ("forward", "fp16"), ("train", "fp32")]
)
def test_a_case_in_the_interpreter(pass_, mode):
    with interpreter():
        rows = rows_of(kernel_case(SMALL, pass_, mode, Settings()))
    for (name, layout), row in rows.items():
        assert (row.status, len(row.samples)) == ("ok", 2), (name, row.extra)
        assert row.part == f"{mode}, {layout}"
        assert row.dtype == kernel.MODES[mode].dtype
        assert row.flags == machine.flags() | kernel.MODES[mode].flags
        assert 0 < row.error < (1e-5 if mode == "fp32" else 1e-2)
    assert {layout for _, layout in rows} == {"NCHW", "NHWC"}


def test_what_this_machine_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(kernel, "BATCH", 2)
    rows = rows_of(kernel_case(thread_problem(2), "forward", "bf16", Settings()))
    for name in ("implicit_gemm", "compiled_native_matmul"):
        assert rows[name, "NCHW"].status == "unsupported"
        assert "CUDA GPU" in rows[name, "NCHW"].extra["reason"]
    assert rows["native", "NHWC"].status == "ok"


@pytest.mark.parametrize("pass_", ["forward", "train"])
def test_an_error_in_the_last_image_of_the_batch_is_found(monkeypatch, pass_):
    @algorithm("Wrong in the fifth image.")
    def wrong(x, weight, bias, stride, padding, dilation, groups):
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return y + (torch.arange(len(y)) == 4)[:, None, None, None] * 0.01

    monkeypatch.setitem(ALGORITHMS, "unfold", wrong)
    rows = rows_of(kernel_case(SMALL, pass_, "fp32", Settings()))
    assert rows["unfold", "NCHW"].status == "wrong"
    assert rows["unfold", "NCHW"].samples == []
    assert rows["unfold_batched", "NCHW"].status == "ok"


def test_a_layout_is_what_reaches_the_algorithm(monkeypatch):
    seen = []

    @algorithm("Watches.")
    def watched(x, weight, bias, stride, padding, dilation, groups):
        nhwc = torch.channels_last
        seen.append([t.is_contiguous(memory_format=nhwc) for t in (x, weight)] + [len(x)])
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    monkeypatch.setitem(ALGORITHMS, "native", watched)
    rows_of(kernel_case(SMALL, "forward", "fp32", Settings()))
    assert {tuple(s) for s in seen} == {(False, False, 5), (True, True, 5)}


def test_what_does_not_fit_is_not_started(monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1000)
    rows = rows_of(kernel_case(SMALL, "train", "fp32", Settings()))
    statuses = {row.status for (name, _), row in rows.items() if name != "implicit_gemm"}
    assert statuses == {"out of memory (predicted)"}


def test_running_out_of_memory_is_said(monkeypatch):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(kernel, "prepared_pass", full)
    rows = rows_of(kernel_case(SMALL, "forward", "fp32", Settings()))
    assert rows["native", "NCHW"].status == "out of memory"


@needs_triton
def test_errors_of_both_with_their_gradients(monkeypatch):
    modes = {name: kernel.MODES[name] for name in ("fp32", "fp16")}
    monkeypatch.setattr(kernel, "MODES", modes)
    with interpreter():
        rows = experiments.run_case(error_case(SMALL, Settings()), "now")
    assert [(r.algorithm, r.part) for r in rows] == [(n, m) for m in modes for n in kernel.RIVALS]
    for row in rows:
        assert (row.status, row.samples, row.median) == ("ok", [], None)
        assert row.extra["gradients"].keys() == {"x", "weight", "bias"}
        assert row.flags == machine.flags() | modes[row.part].flags
    errors = {(r.algorithm, r.part): r.error for r in rows}
    assert errors["implicit_gemm", "fp16"] > 100 * errors["implicit_gemm", "fp32"] > 0


def test_errors_without_a_gpu_say_why():
    rows = experiments.run_case(error_case(SMALL, Settings()), "now")
    statuses = {r.algorithm: r.status for r in rows if r.part == "fp32"}
    assert statuses == {"native": "ok", "implicit_gemm": "unsupported"}


@pytest.mark.gpu
@pytest.mark.parametrize("mode", kernel.MODES)
@pytest.mark.parametrize("pass_", ["forward", "train"])
def test_a_case_on_the_gpu(mode, pass_):
    rows = rows_of(kernel_case(thread_problem(32), pass_, mode, Settings("cuda", quick=True)))
    for (name, _), row in rows.items():
        assert row.status == "ok", (name, row.extra)
        assert row.launches >= 1
    assert rows["implicit_gemm", "NCHW"].launches < rows["thread", "NCHW"].launches
