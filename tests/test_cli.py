"""The command line: kills and Ctrl-C lose nothing, bad input gets one sentence and exit code 2."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from convlab import __main__, experiments, machine, records, thread
from convlab.experiments import Case, Experiment
from convlab.problems import thread_problem

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = {f"T{i}" for i in range(1, 13)}

# `python -m convlab` with a plan of eleven cases, each a fraction of a second long.
SHORT = """
import sys
from convlab import __main__, experiments
from convlab.experiments import Experiment, Settings, compare_case, storage_case
from convlab.problems import thread_problem

def layer(settings):
    problems = map(thread_problem, (1, 2, 3, 4, 5))
    names = ("native", "thread")
    passes = ("forward", "train")
    return [compare_case("layer", p, names, q, settings) for p in problems for q in passes]

chosen = {
    "storage": Experiment("Which operations copy?", lambda settings: [storage_case(settings)]),
    "layer": Experiment("A few images", layer),
}
Settings.options = {"seconds": 0.05, "min_rounds": 3, "max_rounds": 3}
experiments.EXPERIMENTS.clear()
experiments.EXPERIMENTS.update(chosen)
experiments.REPRODUCE = tuple(chosen)
sys.exit(__main__.main(sys.argv[1:]))
"""
CASES = 11


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, whose name looks like rich's markup; own runs go there, too."""
    folder = tmp_path / "[bold]"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CONVLAB_DATA", str(folder))
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    return folder


@pytest.fixture
def convlab(folder, monkeypatch, capsys):
    """The command line without the start of a new Python, which takes seconds."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def run(*arguments):
        try:
            code = __main__.main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    return run


def new_python(*arguments):
    """The same in a process of its own."""
    command = [sys.executable, "-m", "convlab", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)


@pytest.fixture
def start(folder):
    """Runs the short plan; what still runs after the test is ended."""
    started = []

    def run(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", SHORT, "reproduce", "--quick", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def wait_for_lines(path, count, process):
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < count):
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()


def ids(text):
    """The claims named at the beginning of a cell."""
    return set(re.findall(r"^│ *(T\d+) ", text, re.MULTILINE))


def refused(done):
    """The one sentence of a run that refused its input."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("convlab: ")
    return sentence


# Killed and interrupted


def test_killed_three_times_and_then_finished(folder, start):
    path = folder / "rows.jsonl"
    delays = random.Random(0)
    kept = []
    for least in (1, 6, 10):  # rows on disk before the clock of the kill starts
        process = start("--output", path)
        wait_for_lines(path, least, process)
        time.sleep(delays.uniform(0, 0.1))
        process.kill()
        process.communicate()
        rows = records.read(path)
        assert rows[: len(kept)] == kept
        assert least <= len(rows) < 4 + 2 * (CASES - 1)
        kept = rows
    process = start("--output", path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err.count("Going on") == 1
    assert ids(out) == CLAIMS
    assert f"Rows: {path.name}" in out
    rows = records.read(path)
    assert rows[: len(kept)] == kept
    assert len({row.session for row in rows}) == 1
    assert len({row.case for row in rows}) == CASES
    assert len(rows) == 4 + 2 * (CASES - 1), "a case was measured twice"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_interrupted_it_says_where_the_rows_are(folder, start):
    path = folder / "local" / f"{machine.slug()}.jsonl"
    process = start()
    wait_for_lines(path, 6, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert err.count("Stopped.") == 1
    assert f"is in local{os.sep}{path.name};" in err
    assert len(records.read(path)) >= 6


def test_interrupted_while_judging(convlab, monkeypatch, recorded):
    def interrupted(rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(thread, "judge", interrupted)
    done = convlab("verdicts", recorded)
    assert (done.returncode, done.stderr.strip()) == (130, "Stopped.")


def only(monkeypatch, chosen):
    """Leave nothing but these experiments in the registry, for this test."""
    monkeypatch.setattr(experiments, "REPRODUCE", tuple(chosen))
    monkeypatch.setattr(experiments.sessions, "EXPERIMENTS", chosen)
    monkeypatch.setattr(experiments, "EXPERIMENTS", chosen)


@pytest.fixture
def only_storage(monkeypatch):
    """A plan that takes no time."""
    only(monkeypatch, {"storage": experiments.EXPERIMENTS["storage"]})


def test_a_truncated_line_is_reported_once(convlab, folder, only_storage):
    path = folder / "rows.jsonl"
    records.append(path, [records.row("storage", "thread", thread_problem(2), "forward")] * 2)
    path.write_bytes(path.read_bytes()[:-20])
    done = convlab("reproduce", "--output", path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning:") == 1
    assert f"warning: {path}, line 2: truncated" in done.stderr
    assert len(records.read(path)) == 1 + 4


@pytest.mark.parametrize("command", ["reproduce", "record"])
def test_where_the_rows_go(convlab, folder, only_storage, command):
    path = folder / "deep" / "[red]" / "rows.jsonl"
    done = convlab(command, "--output", path)
    assert done.returncode == 0, done.stderr
    assert f"ows: {path.relative_to(folder)}\n" in done.stdout
    assert len(records.read(path)) == 4


def test_threads_are_set(convlab, folder, only_storage):
    with machine.setting(threads=2 if os.cpu_count() > 1 else 1):
        assert convlab("reproduce", "--threads", 1, "--output", "rows.jsonl").returncode == 0
    assert {row.flags["threads"] for row in records.read("rows.jsonl")} == {1}


# What is shown while it runs


@pytest.fixture
def planned(monkeypatch):
    """Puts a plan in place: experiment → names of its cases, which take no time."""
    clock = itertools.count()

    def put(seconds=1.0, **names):
        def cases(experiment):
            return lambda settings: [
                Case(experiment, f"{experiment}/{name}", one_row(experiment), seconds=seconds)
                for name in names[experiment]
            ]

        def one_row(experiment):
            return lambda: [records.row(experiment, "native", thread_problem(2), "forward")]

        only(monkeypatch, {name: Experiment("Is it?", cases(name)) for name in names})

    monkeypatch.setattr(__main__, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    return put


def progress_lines(done):
    """What the run wrote, without the machine and the time that it took."""
    first, *lines, last = done.stderr.splitlines()
    assert first.startswith(machine.name())
    assert last.startswith("Measured in")
    return lines


def test_a_pipe_gets_a_line_per_finished_experiment(convlab, folder, planned):
    planned(storage="a", layer="bcd", batch="ef")
    done = convlab("reproduce", "--output", "rows.jsonl")
    assert done.returncode == 0, done.stderr
    assert progress_lines(done) == [
        "6 cases left, about 6 s",
        "storage: 1 of 1 case done; 5 cases left, about 5 s",
        "layer: 3 of 3 cases done; 2 cases left, about 2 s",
        "batch: 2 of 2 cases done; nothing left",
    ]
    assert "\x1b" not in done.stderr


def test_lines_of_a_run_that_goes_on(convlab, folder, planned):
    planned(storage="a", layer="bcd")
    assert convlab("reproduce", "--output", "rows.jsonl").returncode == 0
    path = folder / "rows.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")
    assert progress_lines(convlab("reproduce", "--output", "rows.jsonl")) == [
        "4 cases left, about 4 s",
        "Going on with the run that was stopped.",
        "storage: 1 of 1 case done; 3 cases left, about 3 s",
        "layer: 3 of 3 cases done; nothing left",
    ]
    assert len(records.read("rows.jsonl")) == 4


def test_the_estimate_follows_what_was_measured(convlab, folder, planned):
    """The clock goes on by one second per reading, the cases were thought to take four."""
    planned(storage="a", layer="bcd", seconds=4.0)
    assert progress_lines(convlab("reproduce", "--output", "rows.jsonl"))[:2] == [
        "4 cases left, about 16 s",
        "storage: 1 of 1 case done; 3 cases left, about 3 s",
    ]


def test_a_terminal_gets_a_bar_and_no_lines(convlab, monkeypatch, folder, planned):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    planned(storage="a", layer="bcd")
    done = convlab("reproduce", "--output", "rows.jsonl")
    assert done.returncode == 0, done.stderr
    assert "━" in done.stderr
    assert "nothing left" in done.stderr
    assert "case done" not in done.stderr


@pytest.mark.parametrize(("options", "visits"), [([], 3), (["--quick"], 1)])
def test_record_visits_the_verdicts_experiments_again(
    convlab, monkeypatch, planned, options, visits
):
    monkeypatch.setattr(__main__, "VISITS", 3)
    planned(storage="ab", step="cd")
    done = convlab("record", *options, "--output", "rows.jsonl")
    assert done.returncode == 0, done.stderr
    assert f"{2 + 2 * visits} rows: rows.jsonl" in done.stdout
    names = [row.case for row in records.read("rows.jsonl")]
    again = [f"step/{name} #{visit}" for visit in range(2, visits + 1) for name in "cd"]
    assert sorted(names) == sorted(["storage/a", "storage/b", "step/c", "step/d", *again])
    shown = [line.partition(";")[0] for line in progress_lines(done)[1:]]
    assert shown == (
        [
            *("step: 2 of 6 cases done", "storage: 1 of 2 cases done"),
            *("step: 4 of 6 cases done", "storage: 2 of 2 cases done"),
            "step: 6 of 6 cases done",
        ]
        if visits == 3
        else ["storage: 2 of 2 cases done", "step: 2 of 2 cases done"]
    )


def test_only_some_experiments_are_recorded(convlab, planned):
    planned(storage="ab", step="c", layer="d")
    done = convlab("record", "--quick", "--only", "layer,storage", "--output", "rows.jsonl")
    assert done.returncode == 0, done.stderr
    cases = [row.case for row in records.read("rows.jsonl")]
    assert cases == ["storage/a", "storage/b", "layer/d"]
    for wrong in ("", "layr", "layer,", "layer storage"):
        sentence = refused(convlab("record", "--only", wrong))
        assert "--only" in sentence
        assert "layer" in sentence


def test_reproduce_visits_once(convlab, folder, planned):
    planned(step="ab")
    assert convlab("reproduce", "--output", "rows.jsonl").returncode == 0
    assert [row.case for row in records.read("rows.jsonl")] == ["step/a", "step/b"]


@pytest.mark.parametrize(
    ("cases", "seconds", "text"),
    [
        (0, 0.0, "nothing left"),
        (0, 50.0, "nothing left"),
        (1, 0.0, "1 case left, about 1 s"),
        (1, 1.4, "1 case left, about 1 s"),
        (12, 89.0, "12 cases left, about 89 s"),
        (12, 90.0, "12 cases left, about 2 min"),
        (300, 3600.0, "300 cases left, about 60 min"),
    ],
)
def test_what_is_left_in_words(cases, seconds, text):
    assert __main__._left(cases, seconds) == text


def test_the_pace_is_that_of_what_was_measured_and_not_of_what_was_there(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(__main__, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    pace = __main__._Pace()
    assert pace.factor == 1

    def add(taken, thought, resumed):
        now[0] += taken
        case = Case("tiny", "tiny/a", list, seconds=thought)
        pace.add(experiments.Progress(case, [], 0, 9, resumed))

    add(0.5, 1000.0, resumed=True)
    assert pace.factor == 1
    add(6.0, 2.0, resumed=False)
    assert pace.factor == 3
    add(0.5, 1000.0, resumed=True)
    add(2.0, 2.0, resumed=False)
    assert pace.factor == 2


# Bad input


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["reproduce", "--device", "tpu"], ["device", "'tpu'"]),
        (["reproduce", "--threads", "0"], ["--threads", "0"]),
        (["reproduce", "--threads", "9999"], ["--threads", "9999", str(os.cpu_count())]),
        (["reproduce", "--threads", "x"], ["--threads", "'x'"]),
        (["record", "--threads", "-1"], ["--threads", "-1"]),
        (["reproduce", "--sloppy"], ["--sloppy"]),
        (["reproduec"], ["COMMAND", "'reproduec'"]),
        ([], ["COMMAND"]),
        (["verdicts", "missing.jsonl"], ["files", "'missing.jsonl'"]),
        (["verdicts", "."], ["files", "'.'"]),
        (["reproduce", "--output", "."], ["."]),
        (["record", "--visits", "0"], ["--visits", "'0'", "positive"]),
        (["record", "--visits", "two"], ["--visits", "'two'", "positive"]),
        (["reproduce", "--output", "file/below/rows.jsonl"], [f"file{os.sep}below"]),
    ],
)
def test_bad_input_gets_one_sentence(convlab, folder, arguments, named):
    (folder / "file").touch()
    done = convlab(*arguments)
    if "--output" in arguments:  # the machine and the plan's first case come before it
        done.stderr = done.stderr[done.stderr.index("convlab:") :]
    sentence = refused(done)
    for part in named:
        assert part in sentence
    assert [path.name for path in folder.iterdir()] == ["file"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none(folder):
    sentence = refused(new_python("reproduce", "--device", "cuda"))
    assert "device 'cuda' is not there" in sentence
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("content", ["Dear diary,\nhello\n", "no end of line", '{"a": 1}\n'])
@pytest.mark.parametrize("command", ["reproduce --quick --output", "verdicts"])
def test_a_foreign_file_is_named_and_left_alone(convlab, folder, content, command):
    path = folder / "diary.txt"
    path.write_text(content)
    done = convlab(*command.split(), "diary.txt")
    assert done.returncode == 2
    assert "convlab: diary.txt, line 1: not a record" in done.stderr
    assert path.read_text() == content


# Verdicts


@pytest.fixture
def recorded(folder):
    """A record file with rows of two machines."""
    path = folder / "rows.jsonl"
    rows = [
        records.row(
            "step",
            name,
            thread_problem(256),
            "train",
            machine=where,
            session=f"2030-01-0{day} full-0",
            case="step",
            samples=[seconds] * 5,
            median=seconds,
        )
        for day, where in enumerate(("[bold]Abacus", "Slide Rule"), 1)
        for name, seconds in (("native", 1.0), ("thread", 5.0 + day))
    ]
    records.append(path, rows)
    return path


@pytest.mark.parametrize("columns", [80, 140])
def test_verdicts_show_every_claim(convlab, monkeypatch, recorded, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    done = convlab("verdicts", recorded)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, second = done.stdout.split("Slide Rule, cpu")
    assert first.startswith("[bold]Abacus, cpu")
    assert ids(first) == ids(second) == CLAIMS
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert "images: 6×" in first
    assert "images: 7×" in second


def test_a_pipe_gets_no_colours_and_signs_that_it_can_show(monkeypatch, recorded):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = new_python("verdicts", recorded)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "6? [6 ? 6]" in done.stdout


def test_a_terminal_gets_colours(convlab, monkeypatch, recorded):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b" in convlab("verdicts", recorded).stdout


def test_verdicts_of_one_machine(convlab, recorded):
    done = convlab("verdicts", recorded, "--machine", "slide")
    assert done.returncode == 0
    assert "Slide Rule" in done.stdout
    assert "Abacus" not in done.stdout


def test_verdicts_of_a_machine_that_is_not_there(convlab, recorded):
    sentence = refused(convlab("verdicts", recorded, "--machine", "nothing-like-it"))
    assert "--machine 'nothing-like-it'" in sentence
    assert "Slide Rule" in sentence


def test_verdicts_without_rows(convlab, folder):
    (folder / "empty.jsonl").touch()
    assert "no records" in refused(convlab("verdicts", "empty.jsonl"))


def test_a_row_from_another_version_is_named(convlab, recorded):
    lines = recorded.read_text(encoding="utf-8").splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | {"status": "fast"})
    recorded.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert "rows.jsonl, line 3: " in refused(convlab("verdicts", recorded))


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ([], ["reproduce", "record", "verdicts"]),
        (["reproduce"], ["--device", "--threads", "--quick", "--fresh", "--output"]),
        (
            ["record"],
            ["--device", "--threads", "--quick", "--fresh", "--output", "--only", "--visits"],
        ),
        (["verdicts"], ["--machine", "files"]),
    ],
)
def test_help(convlab, command, options):
    done = convlab(*command, "--help")
    assert done.returncode == 0
    for option in options:
        assert option in done.stdout
