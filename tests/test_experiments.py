"""What is wrong, unsupported or too large has no time; all else is compared in the same rounds."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from convlab import experiments, machine, records, thread, timing
from convlab.algorithms import ALGORITHMS, algorithm
from convlab.experiments import Experiment, Settings, cases, compare_case, named, one_pass
from convlab.problem import ConvProblem
from convlab.problems import thread_problem

QUICK = Settings(quick=True)
SMALL = ConvProblem(2, 3, 4, 8, 8, kernel_size=3, padding=1)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Three rounds for everything that is measured here."""
    options = {"seconds": 0.01, "min_rounds": 3, "max_rounds": 3}
    monkeypatch.setattr(Settings, "options", options)


# Names and settings


def test_an_unknown_experiment_is_named():
    with pytest.raises(ValueError, match=r"storage.*'stroage'"):
        experiments.plan(["storage", "stroage"], QUICK)


@pytest.mark.parametrize("device", ["tpu", "", "cpu:x", "meta", None])
def test_an_unknown_device_is_named(device):
    with pytest.raises(ValueError, match=f"device must be 'cpu' or 'cuda', got {device!r}"):
        Settings(device)


@pytest.mark.parametrize("visits", [0, -1, True, 2.0, "3", None], ids=repr)
def test_a_bad_number_of_visits_is_named(visits):
    with pytest.raises(ValueError, match=rf"visits must be .* at least 1, got {visits!r}"):
        Settings(visits=visits)


@pytest.mark.parametrize("limit", [0, -1, -0.5, True, math.nan, "1 GB"], ids=repr)
def test_a_bad_memory_limit_is_named(limit):
    with pytest.raises(
        ValueError, match=f"memory_limit must be None or bytes above 0, got {limit!r}"
    ):
        Settings(memory_limit=limit)


def test_a_case_may_use_nine_tenths_of_what_is_free_or_less(monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1000)
    assert Settings().memory == 900
    assert Settings(memory_limit=5000).memory == 900
    assert Settings(memory_limit=10).memory == 10


def test_quick_takes_an_eighth_of_large_batches():
    assert [QUICK.batch(n) for n in (2, 64, 256, 512)] == [2, 64, 32, 64]
    assert [Settings().batch(n) for n in (2, 64, 256, 512)] == [2, 64, 256, 512]


def test_the_brief_options_are_no_longer_than_the_usual_ones(monkeypatch):
    monkeypatch.undo()  # the options of this file
    for settings in (QUICK, Settings()):
        assert settings.brief.keys() == settings.options.keys()
        assert all(settings.brief[name] <= settings.options[name] for name in settings.brief)


def test_every_case_has_a_name_of_its_own():
    for settings in (QUICK, Settings()):
        names = [case.name for case in experiments.plan(experiments.EXPERIMENTS, settings)]
        assert len(set(names)) == len(names)


# Real measurements


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The cheap cases of the quick plan, really run → the rows by case."""
    path = tmp_path_factory.mktemp("records") / "rows.jsonl"
    chosen = {
        "storage": experiments.EXPERIMENTS["storage"],
        "photographs": Experiment("Forward only", lambda s: named._photographs(s)[:1]),
        "layer": Experiment("Two images", lambda s: named._layer(s)[:2]),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, experiment in chosen.items():
            patch.setitem(experiments.EXPERIMENTS, name, experiment)
        patch.setattr(Settings, "options", {"seconds": 0.1, "min_rounds": 3, "max_rounds": 9})
        done = list(experiments.run(chosen, QUICK, path))
    assert records.read(path) == [row for d in done for row in d.rows]
    return {d.case.name: d.rows for d in done}


def test_the_quick_plan_measures_what_it_names(measured):
    assert list(measured) == [
        "storage",
        "photographs/b64-3to16-64x64/forward",
        "layer/b2-10to15-50x50/forward",
        "layer/b2-10to15-50x50/train",
    ]
    for name, rows in measured.items():
        assert {(r.status, r.case, r.rows_in_case) for r in rows} == {("ok", name, len(rows))}
        assert {r.problem["batch"] for r in rows} == {64 if "b64" in name else 2}


def test_rows_of_a_case_can_be_compared(measured):
    for name, rows in list(measured.items())[1:]:
        assert len({len(r.samples) for r in rows}) == 1, name
        assert {r.pass_ for r in rows} == {name.rsplit("/", 1)[1]}
        for r in rows:
            assert 0 <= r.error < 1e-4, r.algorithm
            assert r.peak_bytes > 0
            assert r.q25 <= r.median <= r.q75
        table = timing.ratios(experiments.measured(rows), "native")
        assert table.loc["native", "ratio"] == 1
        assert ((table.ratio_low <= table.ratio) & (table.ratio <= table.ratio_high)).all()
    assert [r.algorithm for r in measured["layer/b2-10to15-50x50/train"]] == [*experiments.LAYER]


def test_storage_tells_views_from_copies(measured):
    facts = thread.storage(measured["storage"])
    assert {part: fact["view"] for part, fact in facts.items()} == {
        "F.unfold": False,
        "F.fold": False,
        "Tensor.unfold": True,
        "Tensor.view": True,
    }
    assert facts["F.unfold"]["bytes_written"] == 9 * facts["F.unfold"]["bytes_in"]
    assert facts["F.fold"]["bytes_written"] == facts["F.fold"]["bytes_in"]
    assert facts["Tensor.view"]["bytes_written"] == 0


def test_stages_are_measured_in_the_same_rounds():
    case = experiments.stages_case(SMALL, "thread", QUICK)
    rows = experiments.run_case(case, "now")
    parts = ["unfold", "product", "fold", "remainder", "total"]
    assert sorted((r.pass_, r.part) for r in rows) == sorted(
        (q, part) for q in ("forward", "backward") for part in parts
    )
    assert {len(r.samples) for r in rows} == {3}


def test_ceilings_come_from_their_rows():
    with pytest.raises(ValueError, match="'ceilings'"):
        experiments.ceilings_of([])
    rows = [
        records.row("ceilings", "", None, "", part=part, median=2.0, extra={amount: 10.0})
        for part, amount in (("product", "flops"), ("copy", "bytes"))
    ]
    found = experiments.ceilings_of(rows)
    assert (found.flops_per_second, found.bytes_per_second) == (5, 5)


def test_the_fastest_product_is_the_ceiling():
    """Of three kernels; the FLOPs of each are its own."""
    rows = experiments.run_case(experiments.ceilings_case(QUICK), "now")
    amounts = {row.part: row.extra for row in rows}
    product, copy = {"flops": 2 * 2048**3}, {"bytes": 2 * 4 * 2**26}
    convolution = {"flops": 2 * (32 * 128 * 28 * 28) * (128 * 9)}
    assert amounts == {
        "product": product,
        "product as a convolution": product,
        "convolution": convolution,
        "copy": copy,
    }
    rates = [row.extra["flops"] / row.median for row in rows if "flops" in row.extra]
    assert experiments.ceilings_of(rows).flops_per_second == max(rates)


# Cases


def test_a_case_says_what_it_compares_and_under_which_flags():
    names = ("native", "thread")
    case = compare_case("step", SMALL, names, "train", QUICK, flags={"threads": 1})
    assert case.name == "step/b2-3to4-8x8/train/1 thread"
    assert (case.experiment, case.algorithms, case.flags) == ("step", names, {"threads": 1})
    assert compare_case("step", SMALL, names, "train", QUICK).flags == {}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "b2-3to4-8x8"),
        ({"kernel_size": 1, "padding": 0}, "b2-3to4-8x8-k1"),
        ({"kernel_size": (3, 1)}, "b2-3to4-8x8-k3x1"),
        ({"stride": 2}, "b2-3to4-8x8-s2"),
        ({"dilation": (1, 2)}, "b2-3to4-8x8-d1x2"),
        ({"in_channels": 4, "groups": 4}, "b2-4to4-8x8-g4"),
    ],
    ids=str,
)
def test_a_short_name_tells_problems_apart(changes, name):
    assert experiments.short_name(SMALL.replace(**changes)) == name


def test_the_thought_time_of_a_case_grows_with_its_work():
    once = {"seconds": 0.0, "min_rounds": 1, "max_rounds": 1}

    def seconds(*names, batch=512, pass_="train"):
        case = compare_case("step", thread_problem(batch), names, pass_, Settings(), options=once)
        return case.seconds

    assert 0 < seconds("native", batch=2) < seconds("native") < seconds("native", "thread")
    assert seconds("thread", pass_="forward") < seconds("thread")
    assert all(case.seconds > 0 for case in experiments.plan(experiments.EXPERIMENTS, Settings()))


@pytest.mark.parametrize("faults", [False, True])
def test_rows_hold_the_page_faults_of_one_call_where_they_are_asked_for(monkeypatch, faults):
    monkeypatch.setattr(timing, "page_faults", lambda fn: 7)
    case = compare_case("step", SMALL, ("native", "thread"), "forward", QUICK, faults=faults)
    rows = experiments.run_case(case)
    assert [row.extra for row in rows] == [{"page_faults": 7} if faults else {}] * 2


def test_page_faults_are_asked_for_where_the_batch_grows():
    """And only there: each costs one more call."""
    plan = experiments.plan(["scale_batch", "batch_settings", "scale_kernel"], QUICK)
    asked = {case.experiment: case.run.args[-1] for case in plan}
    assert asked == {"scale_batch": True, "batch_settings": True, "scale_kernel": False}


def test_the_memory_experiment_stays_under_its_budget():
    for settings, budget in (
        (Settings(), named.BUDGET),
        (Settings(memory_limit=1000), 1000),
        (Settings(memory_limit=named.BUDGET * 2), named.BUDGET),
    ):
        plan = experiments.plan(["memory"], settings)
        assert {case.run.args[4].memory_limit for case in plan} == {budget}


def test_on_the_cpu_a_gpus_mistakes_are_not_looked_for():
    assert experiments.plan(["pitfalls"], Settings()) == []
    assert experiments.latest(["pitfalls"], Settings(), "nowhere.jsonl") == []


# What has no time


def compared(*names, problem=SMALL, candidate=None, pass_="forward", settings=QUICK):
    """The rows of one case, by algorithm; all of them can be written."""
    case = compare_case("layer", problem, names, pass_, settings, candidate)
    rows = experiments.run_case(case, "now")
    for row in rows:
        json.loads(row.as_json())
    assert {row.rows_in_case for row in rows} == {len(names)}
    return {row.algorithm: row for row in rows}


def has_no_time(row):
    return row.median is None and row.samples == [] and row.peak_bytes is None


@pytest.fixture
def timed(monkeypatch):
    """The names that reached the clock."""
    found = []
    measure = timing.interleaved

    def watched(functions, *args, **options):
        found.extend(functions)
        return measure(functions, *args, **options)

    monkeypatch.setattr(timing, "interleaved", watched)
    return found


def add(monkeypatch, name, function, **options):
    """Put an algorithm made of `function(x, weight, bias)` into the registry for this test."""

    def named(x, weight, bias, stride, padding, dilation, groups):
        return function(F.conv2d(x, weight, bias, stride, padding, dilation, groups))

    named.__name__ = name
    monkeypatch.setitem(ALGORITHMS, name, algorithm("Made up.", **options)(named))


@pytest.mark.parametrize(
    ("broken", "error", "reason"),
    [
        (lambda y: y * 1.001, pytest.approx(1e-3, rel=0.01), "y differs"),
        (lambda y: y.detach(), pytest.approx(0, abs=1e-6), "gradient of x differs"),
        (lambda y: y[..., 1:], None, "y has shape"),
        (lambda y: y * math.nan, None, "y differs"),
    ],
    ids=["values", "gradients", "shape", "nan"],
)
def test_a_wrong_algorithm_gets_an_error_and_no_time(monkeypatch, timed, broken, error, reason):
    add(monkeypatch, "broken", broken)
    rows = compared("native", "broken")
    assert rows["broken"].status == "wrong"
    assert rows["broken"].error == error
    assert rows["broken"].extra["reason"].startswith(reason)
    assert has_no_time(rows["broken"])
    assert rows["native"].status == "ok"
    assert timed == ["native"]


def test_an_unsupported_algorithm_says_why(monkeypatch, timed):
    add(monkeypatch, "picky", lambda y: y, limits=lambda problem, device: "picky needs 1 image.")
    row = compared("native", "picky")["picky"]
    assert (row.status, row.extra) == ("unsupported", {"reason": "picky needs 1 image."})
    assert has_no_time(row)
    assert timed == ["native"]


def never(*arguments):
    raise AssertionError("this was not to be called")


def limit_between(problem, small, large, pass_="forward"):
    """Settings whose memory suffices for one algorithm and not for the other."""
    needs = [cases.needed_bytes(name, problem, pass_) for name in (small, large)]
    assert needs[0] < needs[1]
    return Settings(quick=True, memory_limit=sum(needs) // 2)


@pytest.mark.parametrize("pass_", ["forward", "train"])
def test_what_will_not_fit_into_memory_is_not_tried(timed, pass_):
    problem = thread_problem(2)
    settings = limit_between(problem, "native", "unfold", pass_)
    names = ("native", "thread", "unfold")
    rows = compared(*names, problem=problem, pass_=pass_, settings=settings)
    for name in ("thread", "unfold"):
        assert rows[name].status == "out of memory (predicted)" == records.PREDICTED
        extra = rows[name].extra
        assert extra["predicted_bytes"] == cases.needed_bytes(name, problem, pass_)
        assert extra["predicted_bytes"] > extra["free_bytes"] == settings.memory_limit
        assert has_no_time(rows[name])
    assert rows["native"].status == "ok"
    assert len(rows["native"].samples) == 3
    assert timed == ["native"]


@pytest.mark.parametrize("pass_", ["forward", "train"])
def test_under_a_memory_limit_nothing_is_run(monkeypatch, timed, pass_):
    add(monkeypatch, "greedy", never)
    monkeypatch.setattr(ConvProblem, "inputs", never)
    settings = Settings(memory_limit=1)
    names = [name for name, a in ALGORITHMS.items() if a.supports(SMALL) is None]
    rows = compared(*names, pass_=pass_, settings=settings, candidate=never)
    assert [*rows] == names
    assert {row.status for row in rows.values()} == {records.PREDICTED}
    assert all(has_no_time(row) for row in rows.values())
    assert timed == []


def test_free_memory_limits_what_is_tried(monkeypatch, timed):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1000)
    row = compared("thread")["thread"]
    assert (row.status, row.extra["free_bytes"]) == (records.PREDICTED, 900)
    assert timed == []


def test_stages_that_will_not_fit_are_one_row():
    settings = Settings(quick=True, memory_limit=1000)
    (row,) = experiments.run_case(experiments.stages_case(SMALL, "thread", settings))
    assert row.status == records.PREDICTED
    assert has_no_time(row)


@pytest.mark.parametrize("name", ["thread", "unfold"])
@pytest.mark.parametrize("pass_", ["forward", "train"])
def test_what_is_predicted_suffices(name, pass_):
    """What a pass allocates beside its input, its weight and its bias, and what these are."""
    problem = thread_problem(3)
    own = sum(t.nbytes for t in problem.inputs())
    allocated = timing.peak_bytes(one_pass(name, problem, pass_, "cpu"))
    assert own + allocated <= cases.needed_bytes(name, problem, pass_) < 1.5 * (own + allocated)


@pytest.fixture
def exhausted():
    """What PyTorch raises on this system when it asks for 2⁵⁵ bytes."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55, dtype=torch.int8)
    return raised.value


def test_running_out_of_memory_is_told_from_other_errors(exhausted):
    status, values = cases.memory_error(exhausted)
    assert status == "out of memory"
    assert values["extra"]["reason"] == str(exhausted).splitlines()[0]
    for text in ("CUDA out of memory. Tried to allocate 2 GiB.\nSee below", "out of memory"):
        status, values = cases.memory_error(torch.OutOfMemoryError(text))
        assert (status, values["extra"]["reason"]) == ("out of memory", text.splitlines()[0])
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        cases.memory_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("when", ["checked", "prepared", "first called"])
def test_an_algorithm_that_runs_out_of_memory_gets_no_time(monkeypatch, timed, exhausted, when):
    def fail(*arguments):
        raise exhausted

    def candidate(name, problem, pass_, device):
        if name == "thread" and when == "prepared":
            fail()
        return fail if name == "thread" and when == "first called" else lambda: None

    add(monkeypatch, "greedy", fail)
    failing = "greedy" if when == "checked" else "thread"
    rows = compared("native", failing, candidate=candidate)
    assert rows[failing].status == "out of memory"
    assert "allocate" in rows[failing].extra["reason"]
    assert has_no_time(rows[failing])
    assert rows["native"].status == "ok"
    assert timed == ["native"]


@pytest.mark.parametrize("when", ["checked", "called"])
def test_any_other_error_ends_the_run(monkeypatch, when):
    def fail(*arguments):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    add(monkeypatch, "buggy", fail if when == "checked" else lambda y: y)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        compared("buggy", candidate=lambda *arguments: fail)


def test_nothing_left_to_time(monkeypatch, timed):
    add(monkeypatch, "broken", lambda y: y + 1)
    assert {row.status for row in compared("broken").values()} == {"wrong"}
    assert timed == []
    assert timing.interleaved({}) == {}


def test_a_clock_too_coarse_says_nothing_about_a_ratio(recwarn):
    assert timing.ratio_interval([1.0] * 3, [0.0] * 3) == (0, math.inf)
    assert timing.ratio_interval([0.0] * 3, [0.0] * 3) == (0, math.inf)
    assert timing.ratio_interval([0.0] * 3, [1.0] * 3) == (0, 0)
    zero = timing.Measurement((0.0,) * 3, 1, None, "cpu", {}, "clock", 1.0)
    table = timing.ratios({"a": zero, "b": zero}, "a")
    assert table.ratio_high.tolist() == [math.inf] * 2
    assert not recwarn.list


# The functions that are timed


@pytest.mark.parametrize("name", ["native", "native_channels_last", "thread"])
def test_one_pass_makes_the_pass_that_it_names(name):
    x, weight, bias = SMALL.inputs(requires_grad=True)
    y = F.conv2d(x, weight, bias, padding=1)
    forward, train, backward = (
        one_pass(name, SMALL, pass_, "cpu")() for pass_ in ("forward", "train", "backward")
    )
    assert not forward.requires_grad
    assert (forward - y).abs().max() < 1e-5
    y.sum().backward()
    for gradients in (train, backward):
        for found, expected in zip(gradients, (x.grad, weight.grad, bias.grad)):
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_photographs_are_what_is_timed(measured):
    batch = named._photo_batch(SMALL)
    assert batch.shape == SMALL.input_shape
    y = one_pass("native", SMALL, "forward", "cpu", images=lambda p: batch)()
    _, weight, bias = SMALL.inputs()
    assert (y - F.conv2d(batch, weight, bias, padding=1)).abs().max() < 1e-5


def test_a_training_step_changes_the_weight(monkeypatch):
    seen = []
    inputs = ConvProblem.inputs

    def watched(self, *args, **kwargs):
        seen.extend(inputs(self, *args, **kwargs))
        return tuple(seen)

    monkeypatch.setattr(ConvProblem, "inputs", watched)
    step = experiments.training_step("thread", SMALL, "train", "cpu")
    x, weight, bias = (t.detach().clone() for t in seen)
    step()
    assert not (seen[1] == weight).all()
    assert not (seen[2] == bias).all()
    assert (seen[0] == x).all()
    gradient = seen[0].grad.clone()
    step()
    assert seen[0].grad.abs().max() < 1.5 * gradient.abs().max(), "gradients were added up"
