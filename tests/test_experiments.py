"""A stopped run goes on where it stopped; what is wrong, unsupported or too large has no time."""

import functools
import json
import math

import pytest
import torch.nn.functional as F

from convlab import experiments, machine, records, thread, timing
from convlab.algorithms import ALGORITHMS, algorithm
from convlab.experiments import Case, Experiment, Settings, compare_case, one_pass
from convlab.problem import ConvProblem
from convlab.problems import thread_problem

QUICK = Settings(quick=True)
SMALL = ConvProblem(2, 3, 4, 8, 8, kernel_size=3, padding=1)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Three rounds for everything that is measured here."""
    options = {"seconds": 0.01, "min_rounds": 3, "max_rounds": 3}
    monkeypatch.setattr(Settings, "options", options)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


class Tiny:
    """An experiment "tiny" of four cases with two rows each; counts what is run."""

    def __init__(self):
        self.ran, self.stop_before, self.error, self.names = [], None, KeyboardInterrupt, "abcd"

    def cases(self, settings):
        return [Case("tiny", f"tiny/{n}", functools.partial(self.run, n)) for n in self.names]

    def run(self, name):
        if name == self.stop_before:
            raise self.error
        self.ran.append(name)
        one = functools.partial(records.row, "tiny", pass_="forward", problem=SMALL)
        return [one(algorithm=a, extra={"run": len(self.ran)}) for a in ("native", "thread")]


@pytest.fixture
def tiny(monkeypatch):
    found = Tiny()
    monkeypatch.setitem(experiments.EXPERIMENTS, "tiny", Experiment("Is it?", found.cases))
    return found


def run(path, settings=QUICK, **options):
    return list(experiments.run(["tiny"], settings, path, **options))


def stopped(tiny, path, before="c", error=KeyboardInterrupt):
    """Run until `before`; then forget what was run."""
    tiny.stop_before, tiny.error = before, error
    with pytest.raises(error):
        run(path)
    tiny.stop_before = None
    tiny.ran.clear()


def sessions(path):
    """The sessions in the file, in order, each once."""
    return list(dict.fromkeys(row.session for row in records.read(path)))


# Going on


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("before", "bcd")
def test_a_stopped_run_goes_on(tiny, path, before, error):
    stopped(tiny, path, before, error)
    kept = records.read(path)
    assert len(kept) == 2 * "abcd".index(before)
    done = run(path)
    assert tiny.ran == list("abcd"["abcd".index(before) :])
    assert [d.resumed for d in done] == [name < before for name in "abcd"]
    assert [(d.index, d.total, d.case.name) for d in done] == [
        (i, 4, f"tiny/{name}") for i, name in enumerate("abcd")
    ]
    rows = records.read(path)
    assert rows[: len(kept)] == kept
    assert rows == [row for d in done for row in d.rows]
    assert len(sessions(path)) == 1


def test_rows_are_on_disk_before_the_next_case_begins(tiny, path):
    for index, done in enumerate(experiments.run(["tiny"], QUICK, path)):
        assert records.read(path)[-2:] == done.rows
        assert {(r.case, r.rows_in_case) for r in done.rows} == {(f"tiny/{'abcd'[index]}", 2)}


def test_fresh_starts_anew(tiny, path):
    stopped(tiny, path)
    assert not any(done.resumed for done in run(path, fresh=True))
    assert tiny.ran == list("abcd")
    assert len(sessions(path)) == 2


def test_a_finished_session_is_not_gone_on_with(tiny, path):
    run(path)
    run(path)
    assert tiny.ran == list("abcdabcd")
    first, second = sessions(path)
    assert first < second
    assert {r.session for r in experiments.last_session(records.read(path))} == {second}


def test_an_older_stopped_session_stays_stopped(tiny, path):
    stopped(tiny, path)
    run(path, fresh=True)
    tiny.ran.clear()
    run(path)
    assert tiny.ran == list("abcd")
    assert len(sessions(path)) == 3


def test_other_settings_do_not_go_on(monkeypatch, tiny, path):
    def other_flag():
        with machine.setting(cudnn_benchmark=not machine.flags()["cudnn_benchmark"]):
            run(path)

    def other_threads():
        with machine.setting(threads=machine.flags()["threads"] + 1):
            run(path)

    def other_plan():
        monkeypatch.setattr(tiny, "names", "abcde")
        run(path)
        monkeypatch.setattr(tiny, "names", "abcd")

    def other_versions():
        with monkeypatch.context() as patch:
            patch.setattr(machine, "versions", lambda: {"torch": "0.1"})
            run(path)

    def other_device():
        name = machine.name()
        with monkeypatch.context() as patch:
            patch.setattr(experiments, "parse_device", str)
            patch.setattr(machine, "name", lambda device: name)
            run(path, Settings("cuda", quick=True))

    stopped(tiny, path)
    others = [other_flag, other_threads, other_plan, other_versions, other_device]
    others.append(lambda: run(path, Settings(quick=False)))
    for index, other in enumerate(others):
        tiny.ran.clear()
        other()
        assert tiny.ran[:4] == list("abcd"), other
        assert len(sessions(path)) == 2 + index
    tiny.ran.clear()
    run(path)
    assert tiny.ran == list("cd")


@pytest.mark.parametrize("left", [1, 3])
def test_a_half_written_case_is_measured_again(tiny, path, left):
    stopped(tiny, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:left]))
    run(path)
    assert tiny.ran == list("abcd"[left // 2 :])
    tiny.ran.clear()
    run(path)
    assert tiny.ran == list("abcd"), "the session was not taken for finished"


def test_two_beginnings_of_a_case_are_no_whole(tiny, path):
    stopped(tiny, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], lines[2]]))
    done = run(path)
    assert tiny.ran == list("bcd")
    assert {r.algorithm for r in done[1].rows} == {"native", "thread"}


def test_what_a_half_written_case_left_is_no_part_of_it(tiny, path):
    stopped(tiny, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3] + lines[2:]))
    done = run(path)
    assert tiny.ran == list("cd")
    assert [r.algorithm for r in done[1].rows] == ["native", "thread"]


def test_a_bad_line_is_found_before_anything_is_measured(tiny, path):
    path.write_text("hello\n")
    with pytest.raises(records.RecordError, match="line 1"):
        run(path)
    assert tiny.ran == []


def test_the_latest_finished_session_is_not_measured_again(tiny, path):
    rows = experiments.latest(["tiny"], QUICK, path)
    assert experiments.latest(["tiny"], QUICK, path) == rows
    assert tiny.ran == list("abcd")
    with machine.setting(threads=machine.flags()["threads"] + 1):
        experiments.latest(["tiny"], QUICK, path)
    assert tiny.ran == list("abcdabcd")
    assert experiments.latest(["tiny"], QUICK, path) == rows


# Names and settings


def test_an_unknown_experiment_is_named():
    with pytest.raises(ValueError, match=r"storage.*'stroage'"):
        experiments.plan(["storage", "stroage"], QUICK)


@pytest.mark.parametrize("device", ["tpu", "", "cpu:x", "meta", None])
def test_an_unknown_device_is_named(device):
    with pytest.raises(ValueError, match=f"device must be 'cpu' or 'cuda', got {device!r}"):
        Settings(device)


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
        "photographs": Experiment("Forward only", lambda s: experiments._photographs(s)[:1]),
        "layer": Experiment("Two images", lambda s: experiments._layer(s)[:2]),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "EXPERIMENTS", chosen)
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


# What has no time


def compared(*names, problem=SMALL, candidate=None, pass_="forward"):
    """The rows of one case, by algorithm; all of them can be written."""
    case = compare_case("layer", problem, names, pass_, QUICK, candidate)
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


def test_what_will_not_fit_into_memory_is_not_tried(monkeypatch, timed):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1000)
    rows = compared("native", "thread", "unfold", problem=thread_problem(2))
    for name in ("thread", "unfold"):
        assert rows[name].status == "out of memory"
        assert rows[name].extra["predicted_bytes"] > rows[name].extra["free_bytes"] == 1000
        assert has_no_time(rows[name])
    assert rows["native"].status == "ok"
    assert len(rows["native"].samples) == 3
    assert timed == ["native"]


def test_stages_that_will_not_fit_are_one_row(monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1000)
    (row,) = experiments.run_case(experiments.stages_case(SMALL, "thread", QUICK))
    assert row.status == "out of memory"
    assert has_no_time(row)


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
    batch = experiments._photo_batch(SMALL)
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
