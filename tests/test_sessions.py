"""A stopped run goes on where it stopped; what was measured under other conditions is not used."""

import functools
import operator
import os
import pickle
from pathlib import Path

import pytest

from convlab import experiments, machine, records, thread
from convlab.experiments import Case, Experiment, Settings, cases, named
from convlab.problem import ConvProblem

QUICK = Settings(quick=True)
SMALL = ConvProblem(2, 3, 4, 8, 8, kernel_size=3, padding=1)
KEPT = {"allocator": f"glibc, {machine.KEEP_FREED}"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


class Made:
    """An experiment of cases "a", "b", …; counts what is run.

    Attributes:
        algorithms: those that have a row in each case.
        known: whether the cases say so before they are run.
    """

    def __init__(self, name, names):
        self.name, self.names, self.algorithms, self.known = name, names, ("native", "thread"), True
        self.ran, self.stop_before, self.error = [], None, KeyboardInterrupt

    def cases(self, settings):
        algorithms = self.algorithms if self.known else ()
        return [
            Case(self.name, f"{self.name}/{n}", functools.partial(self.run, n), algorithms)
            for n in self.names
        ]

    def run(self, name):
        if name == self.stop_before:
            raise self.error
        self.ran.append(name)
        one = functools.partial(records.row, self.name, pass_="forward", problem=SMALL)
        return [one(algorithm=a, extra={"run": len(self.ran)}) for a in self.algorithms]


@pytest.fixture
def made(monkeypatch):
    """Puts made-up experiments into the registry: name, names of the cases → `Made`."""

    def add(name, names):
        found = Made(name, names)
        monkeypatch.setitem(experiments.EXPERIMENTS, name, Experiment("Is it?", found.cases))
        return found

    return add


@pytest.fixture
def tiny(made):
    """Four cases with two rows each."""
    return made("tiny", "abcd")


def run(path, settings=QUICK, names=("tiny",), **options):
    return list(experiments.run(names, settings, path, **options))


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


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("before", "bcd")
def test_a_stopped_run_goes_on(tiny, path, before, error, known):
    tiny.known = known
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


@pytest.mark.parametrize("others", ["wxyz", "abc", "abcde", "dcba"])
def test_another_plan_does_not_go_on(tiny, path, others):
    """Not even one that shares cases: the rows of a session are those of one plan."""
    stopped(tiny, path)
    tiny.names = others
    run(path)
    assert tiny.ran == list(others)
    assert len(sessions(path)) == 2
    tiny.ran.clear()
    tiny.names = "abcd"
    assert [d.resumed for d in run(path)] == [True, True, False, False]
    assert tiny.ran == list("cd")
    assert len(sessions(path)) == 2


def other_flag(run):
    with machine.setting(cudnn_benchmark=not machine.flags()["cudnn_benchmark"]):
        run(QUICK)


def other_threads(run):
    with machine.setting(threads=machine.flags()["threads"] + 1):
        run(QUICK)


def other_versions(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "versions", lambda: {"torch": "0.1"})
        run(QUICK)


def other_machine(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "name", lambda device: "Abacus")
        run(QUICK)


def other_device(run):
    name = machine.name()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "parse_device", str)
        patch.setattr(machine, "name", lambda device: name)
        run(Settings("cuda", quick=True))


def all_rounds(run):
    run(Settings(quick=False))


def less_memory(run):
    run(Settings(quick=True, memory_limit=10**9))


OTHERS = [
    *(other_flag, other_threads, other_versions, other_machine, other_device),
    *(all_rounds, less_memory),
]


@pytest.mark.parametrize("other", OTHERS, ids=lambda f: f.__name__)
def test_a_run_under_other_conditions_does_not_go_on(tiny, path, other):
    stopped(tiny, path)
    other(lambda settings: run(path, settings))
    assert tiny.ran == list("abcd")
    assert len(sessions(path)) == 2
    tiny.ran.clear()
    run(path)
    assert tiny.ran == list("cd")
    assert len(sessions(path)) == 2


@pytest.mark.parametrize("left", [1, 3])
@pytest.mark.parametrize("known", [True, False])
def test_a_half_written_case_is_measured_again(tiny, path, left, known):
    tiny.known = known
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


@pytest.mark.parametrize(
    "algorithms", [("native",), ("native", "unfold"), ("native", "thread", "unfold")]
)
def test_a_case_whose_algorithms_changed_in_the_code_is_measured_again(tiny, path, algorithms):
    stopped(tiny, path)
    tiny.algorithms = algorithms
    done = run(path)
    assert tiny.ran == list("abcd")
    assert not any(d.resumed for d in done)
    assert [r.algorithm for r in done[0].rows] == list(algorithms)


def test_rows_that_a_case_did_not_foretell_are_taken_as_they_are(tiny, path):
    tiny.known = False
    stopped(tiny, path)
    tiny.algorithms = ("native",)
    assert [len(d.rows) for d in run(path)] == [2, 2, 1, 1]


def test_a_bad_line_is_found_before_anything_is_measured(tiny, path):
    path.write_text("hello\n")
    with pytest.raises(records.RecordError, match="line 1"):
        run(path)
    assert tiny.ran == []


# What need not be measured again


def test_the_latest_finished_session_is_not_measured_again(tiny, path):
    rows = experiments.latest(["tiny"], QUICK, path)
    assert experiments.latest(["tiny"], QUICK, path) == rows
    assert tiny.ran == list("abcd")
    with machine.setting(threads=machine.flags()["threads"] + 1):
        experiments.latest(["tiny"], QUICK, path)
    assert tiny.ran == list("abcdabcd")
    assert experiments.latest(["tiny"], QUICK, path) == rows


def test_of_several_sessions_the_newest_serves(tiny, path, tmp_path):
    run(path)
    run(tmp_path / "own.jsonl")
    run(path)
    newest = sessions(path)[1]
    for paths in ((path, tmp_path / "own.jsonl"), (tmp_path / "own.jsonl", path)):
        assert {r.session for r in experiments.latest(["tiny"], QUICK, *paths)} == {newest}


@pytest.fixture
def recorded(made, path):
    """A session as `record` makes it: "step" three times, "tiny" and "more" once."""
    found = {name: made(name, names) for name, names in (("step", "ab"), ("tiny", "cd"))}
    found["more"] = made("more", "ef")
    run(path, Settings(quick=True, visits=3), ["more", "step", "tiny"])
    assert [r.case for r in records.read(path)[::2]] == [
        *("step/a", "step/b", "more/e", "more/f", "step/a #2", "step/b #2"),
        *("tiny/c", "tiny/d", "step/a #3", "step/b #3"),
    ]
    for one in found.values():
        one.ran.clear()
    return found


@pytest.mark.parametrize("names", [["tiny"], ["step"], ["tiny", "step"], ["step", "tiny", "more"]])
def test_a_recorded_session_serves_a_smaller_plan(recorded, path, names):
    rows = experiments.latest(names, QUICK, path)
    assert not any(one.ran for one in recorded.values())
    assert rows == [r for r in records.read(path) if r.experiment in names], "with all its visits"
    assert len(sessions(path)) == 1


@pytest.mark.parametrize(("visits", "ran"), [(2, ""), (3, ""), (4, "abababab")])
def test_a_recorded_session_serves_a_plan_of_no_more_visits(recorded, path, visits, ran):
    rows = experiments.latest(["step"], Settings(quick=True, visits=visits), path)
    assert recorded["step"].ran == list(ran)
    assert len(rows) == 4 * max(visits, 3)


def test_a_visit_that_is_not_whole_does_not_come_along(recorded, path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))  # half of "step/b #3" is left
    rows = experiments.latest(["step"], QUICK, path)
    assert [r.case for r in rows[::2]] == [
        *("step/a", "step/b", "step/a #2", "step/b #2", "step/a #3")
    ]
    assert recorded["step"].ran == []


@pytest.mark.parametrize("other", OTHERS, ids=lambda f: f.__name__)
def test_a_session_under_other_conditions_serves_nothing(recorded, path, other):
    other(lambda settings: experiments.latest(["tiny"], settings, path))
    assert recorded["tiny"].ran == list("cd")
    assert len(sessions(path)) == 2


def test_a_quick_session_is_not_used_for_a_full_one_nor_the_other_way_round(recorded, path):
    experiments.latest(["tiny"], Settings(), path)
    assert recorded["tiny"].ran == list("cd")
    quick, full = sessions(path)
    assert (" quick-" in quick, " full-" in full) == (True, True)
    for settings, session in ((QUICK, quick), (Settings(), full)):
        rows = experiments.latest(["tiny"], settings, path)
        assert {row.session for row in rows} == {session}
    assert recorded["tiny"].ran == list("cd")


def test_what_no_session_holds_as_a_whole_is_measured_as_a_whole(recorded, made, path):
    """Rows of two sessions are not put together."""
    made("other", "gh")
    rows = experiments.latest(["tiny", "other"], QUICK, path)
    assert recorded["tiny"].ran == list("cd")
    assert [r.case for r in rows[::2]] == ["tiny/c", "tiny/d", "other/g", "other/h"]
    assert {r.session for r in rows} == {sessions(path)[1]}
    assert len(sessions(path)) == 2


def test_a_recorded_case_whose_algorithms_changed_is_measured_again(recorded, path):
    recorded["tiny"].algorithms = ("native", "thread", "unfold")
    rows = experiments.latest(["tiny"], QUICK, path)
    assert recorded["tiny"].ran == list("cd")
    assert {r.algorithm for r in rows if r.case == "tiny/c"} == {"native", "thread", "unfold"}
    assert experiments.latest(["tiny"], QUICK, path) == rows
    experiments.latest(["step"], QUICK, path)
    assert recorded["step"].ran == []


def test_records_are_looked_into_after_this_machines_own_runs(recorded, path, tmp_path):
    own = tmp_path / "own.jsonl"
    assert experiments.latest(["tiny"], QUICK, own, path) == experiments.latest(
        ["tiny"], QUICK, path
    )
    assert not own.exists()
    with machine.setting(threads=machine.flags()["threads"] + 1):
        experiments.latest(["tiny"], QUICK, own, path)
    assert len(records.read(own)) == 4
    assert len(sessions(path)) == 1


# The order of a plan


def plan(names, visits=1, **settings):
    """Names of the planned cases, in order."""
    return [case.name for case in experiments.plan(names, Settings(visits=visits, **settings))]


def test_one_visit_keeps_the_order_of_the_names(made):
    made("step", "ab"), made("tiny", "cd")
    assert plan(["step", "tiny"]) == ["step/a", "step/b", "tiny/c", "tiny/d"]
    assert plan(["tiny", "step"]) == ["tiny/c", "tiny/d", "step/a", "step/b"]


@pytest.mark.parametrize(
    ("visits", "others", "order"),
    [
        (2, "cdef", ["step/a", "step/b", *"cdef", "step/a #2", "step/b #2"]),
        (3, "cdef", ["step/a", "step/b", *"cd", "step/a #2", "step/b #2", *"ef", "step/a #3"]),
        (3, "cde", ["step/a", "step/b", *"c", "step/a #2", "step/b #2", *"de", "step/a #3"]),
        (3, "", ["step/a", "step/b", "step/a #2", "step/b #2", "step/a #3"]),
        (4, "cde", ["step/a", "step/b", "c", "step/a #2", "step/b #2", "d", "step/a #3"]),
    ],
)
def test_visits_lie_at_the_beginning_at_the_end_and_evenly_between(made, visits, others, order):
    made("tiny", others), made("step", "ab")
    planned = [name.removeprefix("tiny/") for name in plan(["tiny", "step"], visits)]
    assert planned[: len(order)] == order
    assert planned[-2:] == [f"step/a #{visits}", f"step/b #{visits}"]
    assert len(planned) == len(set(planned)) == len(others) + 2 * visits


def test_what_is_not_repeated_comes_once(made):
    made("tiny", "abc")
    assert plan(["tiny"], visits=3) == ["tiny/a", "tiny/b", "tiny/c"]


def test_a_case_knows_its_visit(made):
    made("tiny", "c"), made("stages", "a")
    cases = experiments.plan(["tiny", "stages"], Settings(visits=3))
    assert [(c.name, c.visit) for c in cases] == [
        *(("stages/a", 0), ("stages/a #2", 1), ("tiny/c", 0), ("stages/a #3", 2))
    ]


@pytest.mark.parametrize("quick", [False, True])
def test_every_claim_is_visited_again_and_nothing_else(quick):
    """The experiments that carry intervals of a verdict."""
    settings = Settings(quick=quick, visits=3)
    cases = experiments.plan(experiments.EXPERIMENTS, settings)
    visited = {case.experiment for case in cases if case.visit}
    assert visited == set(named.REPEATED) == {"step", "stages", "batch"}
    for visit in (1, 2):
        again = [c.name for c in cases if c.visit == visit]
        first = [c.name for c in cases if c.experiment in visited and c.visit == 0]
        assert again == [f"{name} #{visit + 1}" for name in first]


# Flags


def test_the_flags_of_a_case_are_set_while_it_runs_and_then_restored():
    before = machine.flags()
    wanted = {"threads": before["threads"] + 1, "cudnn_benchmark": not before["cudnn_benchmark"]}
    seen = []

    def note():
        seen.append(machine.flags())
        return [records.row("tiny", "native", SMALL, "forward")]

    (row,) = experiments.run_case(Case("tiny", "tiny/a", note, flags=wanted), "now")
    assert seen == [before | wanted]
    assert row.flags == before | wanted
    assert (row.session, row.case, row.rows_in_case) == ("now", "tiny/a", 1)
    assert machine.flags() == before


def test_flags_are_restored_after_an_error():
    before = machine.flags()
    flags = {"threads": before["threads"] + 1}
    with pytest.raises(ZeroDivisionError):
        experiments.run_case(Case("tiny", "tiny/a", lambda: 1 / 0, flags=flags))
    assert machine.flags() == before


def test_flags_of_cases_leave_the_session_as_it_is(monkeypatch, path):
    """A run is continued although some of its cases set flags."""
    flags = {"threads": machine.flags()["threads"] + 1}
    ran, stop = [], [True]

    def one(name):
        if name == "c" and stop.pop():
            raise KeyboardInterrupt
        ran.append(name)
        return [records.row("tiny", "native", SMALL, "forward")]

    def three(settings):
        return [Case("tiny", n, functools.partial(one, n), ("native",), flags) for n in "abc"]

    monkeypatch.setitem(experiments.EXPERIMENTS, "tiny", Experiment("Is it?", three))
    with pytest.raises(KeyboardInterrupt):
        run(path)
    stop.append(False)
    run(path)
    assert ran == list("abc")
    assert {row.flags["threads"] for row in records.read(path)} == {flags["threads"]}
    assert len(sessions(path)) == 1


# A process of its own


needs_glibc = pytest.mark.skipif(
    not machine.can_keep_freed_memory(), reason="needs glibc's malloc as it is"
)


def one_row(*extra):
    """Picklable; says in which process and under which flags it was made."""
    found = {"process": os.getpid(), "flags": machine.flags(), "extra": extra}
    return [records.row("tiny", "native", SMALL, "forward", extra=found)]


def alone(fn, *arguments):
    """The rows of a case that keeps freed memory."""
    case = Case("tiny", "tiny/a/memory kept", functools.partial(fn, *arguments), flags=KEPT)
    return experiments.run_case(case, "now")


@needs_glibc
def test_what_keeps_freed_memory_has_a_process_of_its_own(monkeypatch):
    """What malloc has kept cannot be given back, and would change what comes after."""
    folders = str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))
    with machine.setting(threads=machine.flags()["threads"] + 2):  # not a new process's own choice
        before = machine.flags()
        (first,), (second,) = alone(one_row, "first"), alone(one_row, "second")
        assert machine.flags() == before
    assert len({os.getpid(), first.extra["process"], second.extra["process"]}) == 3
    assert first.extra["flags"] == first.flags == before | KEPT
    assert (first.extra["extra"], second.extra["extra"]) == (("first",), ("second",))
    assert (first.session, first.case, first.rows_in_case) == ("now", "tiny/a/memory kept", 1)


@needs_glibc
def test_other_flags_need_no_process():
    case = Case("tiny", "tiny/a", one_row, flags={"threads": machine.flags()["threads"]})
    (row,) = experiments.run_case(case)
    assert row.extra["process"] == os.getpid()


@needs_glibc
def test_a_real_case_with_memory_kept():
    case = cases.compare_case("step", SMALL, ["native", "thread"], "train", QUICK, flags=KEPT)
    assert case.name == "step/b2-3to4-8x8/train/memory kept"
    rows = experiments.run_case(case)
    assert [row.algorithm for row in rows] == ["native", "thread"]
    assert {row.status for row in rows} == {"ok"}
    assert all(thread.kept(row) for row in rows)
    assert machine.allocator() == "glibc, default"


@needs_glibc
def test_every_case_that_keeps_freed_memory_can_be_sent_to_a_process():
    plan = experiments.plan(experiments.EXPERIMENTS, Settings(visits=3))
    kept = [case for case in plan if "allocator" in case.flags]
    assert {case.experiment for case in kept} >= {"step", "stages", "batch_settings"}
    for case in kept:
        assert pickle.loads(pickle.dumps(case)).name == case.name


@needs_glibc
def test_an_error_in_the_process_is_raised_here():
    with pytest.raises(ZeroDivisionError):
        alone(operator.truediv, 1, 0)


@needs_glibc
@pytest.mark.parametrize(
    ("end", "message"),
    [((os._exit, 3), "ended with code 3, saying: nothing"), ((os.abort,), "ended with code -")],
    ids=["ended", "crashed"],
)
def test_a_process_that_ends_without_an_answer_is_named(end, message):
    with pytest.raises(RuntimeError, match=f"the process for tiny/a/memory kept {message}"):
        alone(*end)
