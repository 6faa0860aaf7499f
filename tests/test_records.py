"""Rows survive JSON, kills, full disks and each other; what is no row is named, not repaired."""

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from convlab import machine, records
from convlab.problem import ConvProblem
from convlab.problems import PROBLEMS
from convlab.records import RecordError, Row
from convlab.timing import Measurement

ROOT = Path(__file__).resolve().parent.parent
EVERYONE_MAY_WRITE = hasattr(os, "geteuid") and os.geteuid() == 0  # root ignores permissions


def made_up(index=0, **changes):
    """A row with non-ASCII text, so that a byte offset can fall inside a character."""
    values = {
        "session": f"2030-01-01 quick-{index:08}",
        "machine": "Prüfstand, 2 cores",
        "part": "π×÷",
        "median": 0.5,
        "q25": 0.25,
        "q75": 0.75,
        "samples": [0.25, 0.5, 0.75],
        "peak_bytes": 2**40,
        "error": 1e-7,
        "extra": {"index": index},
    }
    problem = ConvProblem(2, 4, 6, 9, 8, (3, 2), (2, 1), padding="valid")
    return records.row("layer", "thread", problem, "forward", **(values | changes))


def as_bytes(*rows):
    return "".join(r.as_json() + "\n" for r in rows).encode()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new folder" / "machine.jsonl"


@pytest.fixture
def three(path):
    """A file with three rows → the rows."""
    rows = [made_up(i) for i in range(3)]
    records.append(path, rows)
    return rows


# Rows


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pass_": "", "problem": {}, "launches": 3, "peak_bytes": None, "median": 0},
        {"status": "wrong", "median": None, "q25": None, "q75": None, "samples": []},
        {"status": records.PREDICTED, "median": None, "q25": None, "q75": None, "samples": []},
    ],
)
def test_row_to_json_and_back(changes):
    row = dataclasses.replace(made_up(), **changes)
    line = row.as_json()
    assert "\n" not in line
    assert Row.from_json(line) == row


def test_row_spreads_a_measurement_over_its_fields():
    measured = Measurement((0.123456789, 2.0, 3.0), 1, 7, "cpu", {"threads": 5}, "clock", 1e-9)
    row = records.row("layer", "unfold", PROBLEMS["thread_b2"], "train", measured, part="a")
    assert row.samples == [0.12346, 2.0, 3.0]
    assert (row.median, row.q75, row.peak_bytes, row.part) == (2.0, 2.5, 7, "a")
    assert row.flags == {"threads": 5}
    assert (row.machine, row.versions) == (machine.name(), machine.versions())
    assert ConvProblem.from_dict(Row.from_json(row.as_json()).problem) == PROBLEMS["thread_b2"]


@pytest.mark.parametrize("field", ["median", "q25", "q75", "samples"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-9])
def test_a_time_must_be_finite_and_not_negative(field, value):
    with pytest.raises(ValueError, match="finite and not negative"):
        made_up(**{field: [0.5, value] if field == "samples" else value})


@pytest.mark.parametrize("status", records.STATUSES[1:])
@pytest.mark.parametrize("field", ["median", "q25", "q75", "samples"])
def test_a_row_that_is_not_ok_carries_no_time(status, field):
    untimed = {"median": None, "q25": None, "q75": None, "samples": []}
    assert made_up(status=status, **untimed).status == status
    timed = untimed | {field: [0.5] if field == "samples" else 0.5}
    with pytest.raises(ValueError, match="must carry no time"):
        made_up(status=status, **timed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"status": "fast"}, "'fast'"), ({"pass_": "sideways"}, "'sideways'")],
)
def test_an_unknown_status_or_pass_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(made_up(), **changes)


def test_the_schema_explains_every_field_and_every_status():
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`([^`]+)`", text))
    assert {field.name.rstrip("_") for field in dataclasses.fields(Row)} <= explained
    assert set(records.STATUSES) <= explained


# A whole file


def test_append_and_read_keep_the_order(path, three):
    records.append(path, [made_up(3), made_up(4)])
    assert records.read(path) == [*three, made_up_again(path, 3), made_up_again(path, 4)]
    assert [row.extra["index"] for row in records.read(path)] == [0, 1, 2, 3, 4]


def made_up_again(path, index):
    return Row.from_json(path.read_text(encoding="utf-8").splitlines()[index])


def test_no_file_has_no_rows(path):
    assert records.read(path) == []


def test_what_append_leaves_beside_the_records_is_not_for_git(path, three):
    ignored = (ROOT / ".gitignore").read_text().split()
    others = [other.name for other in path.parent.iterdir() if other != path]
    assert all(name.endswith(".lock") for name in others)
    assert "*.lock" in ignored


def damaged(three, change):
    """The three lines with the second one changed."""
    lines = as_bytes(*three).splitlines()
    lines[1] = change(lines[1])
    return b"\n".join(lines) + b"\n"


def with_field(line, **changes):
    values = json.loads(line) | changes
    return json.dumps({k: v for k, v in values.items() if v != "gone"}).encode()


BAD_LINES = {
    "blank": lambda line: b"",
    "text": lambda line: b"hello",
    "cut": lambda line: line[:-9],
    "foreign JSON": lambda line: b'{"a": 1}',
    "array": lambda line: b"[1, 2]",
    "number": lambda line: b"1",
    "deep": lambda line: b"[" * 100_000,
    "not UTF-8": lambda line: line.replace("ü".encode(), b"\xfc"),
    "two rows": lambda line: line + line,
    "missing field": lambda line: with_field(line, machine="gone"),
    "unknown field": lambda line: with_field(line, speed=1),
    "unknown status": lambda line: with_field(line, status="fast"),
    "text for a time": lambda line: with_field(line, median="0.5"),
    "text in samples": lambda line: with_field(line, samples=[0.5, "0.5"]),
    "null for samples": lambda line: with_field(line, samples=None),
    "number for a name": lambda line: with_field(line, machine=5),
    "list for a problem": lambda line: with_field(line, problem=[]),
    "NaN for a time": lambda line: line.replace(b"0.75]", b"NaN]"),
    "infinite error": lambda line: line.replace(b"1e-07", b"Infinity"),
    "huge time": lambda line: line.replace(b'"median": 0.5', b'"median": 1e999'),
}


@pytest.mark.parametrize("change", BAD_LINES.values(), ids=list(BAD_LINES))
def test_a_bad_line_is_named_and_nothing_is_changed(path, three, change):
    content = damaged(three, change)
    assert content != as_bytes(*three)
    path.write_bytes(content)
    with pytest.raises(RecordError, match=f"^{re.escape(str(path))}, line 2: .") as raised:
        records.read(path)
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "end",
    [b"hello", b"  ", b'{"a": 1', b"\xff\xfe", as_bytes(made_up()).replace(b"forward", b"up")[:-1]],
)
def test_a_last_line_that_never_was_a_record_is_not_cut_off(path, three, end):
    content = as_bytes(*three) + end
    path.write_bytes(content)
    for use in (records.read, lambda path: records.append(path, [made_up()])):
        with pytest.raises(RecordError, match=f"^{re.escape(str(path))}, line 4: not a record"):
            use(path)
        assert path.read_bytes() == content


# Killed runs


def test_a_truncated_last_line_is_dropped_with_a_warning_and_then_cut(path, three):
    path.write_bytes(as_bytes(*three)[:-5])
    message = f"^{re.escape(str(path))}, line 3: truncated"
    with pytest.warns(UserWarning, match=message):
        assert records.read(path) == three[:2]
    assert path.read_bytes() == as_bytes(*three)[:-5]
    with pytest.warns(UserWarning, match=message):
        records.append(path, three[:1])
    assert path.read_bytes() == as_bytes(*three[:2], three[0])


def test_a_last_line_that_lacks_only_its_end_is_kept(path, three):
    path.write_bytes(as_bytes(*three)[:-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert records.read(path) == three
        records.append(path, three[:1])
    assert path.read_bytes() == as_bytes(*three, three[0])


def test_python_shows_the_warning_once_per_run(path, three):
    path.write_bytes(as_bytes(*three)[:-5])
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        records.read(path)
        records.append(path, three[:1])
    assert len(shown) == 1


WHOLE = as_bytes(*(made_up(i) for i in range(3)))


@given(st.integers(0, len(WHOLE)))
def test_truncated_anywhere_the_whole_lines_are_read_and_append_goes_on(tmp_path_factory, offset):
    path = tmp_path_factory.mktemp("cut") / "rows.jsonl"
    path.write_bytes(WHOLE[:offset])
    ends = [i for i, byte in enumerate(WHOLE) if byte == ord("\n")]
    whole = sum(offset >= end for end in ends)  # a line is whole without its end, too
    cut = offset > 0 and offset not in ends and WHOLE[offset - 1] != ord("\n")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert [row.extra["index"] for row in records.read(path)] == list(range(whole))
        assert [f"line {whole + 1}" in str(w.message) for w in shown] == [True] * cut
        records.append(path, [made_up(7)])
    assert [row.extra["index"] for row in records.read(path)] == [*range(whole), 7]


# Disks and folders that do not take rows


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_a_full_disk_leaves_the_earlier_rows(monkeypatch, path, three, fails):
    write = os.write
    written = []

    def half(descriptor, data):
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(write(descriptor, data[: len(data) // 2]))
        return written[0]

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, fails, half if fails == "write" else full)
    with pytest.raises(RecordError) as raised:
        records.append(path, [made_up(8), made_up(9)])
    assert str(path) in str(raised.value)
    assert "2 new rows were not written" in str(raised.value)
    assert os.strerror(errno.ENOSPC) in str(raised.value)
    assert path.read_bytes() == as_bytes(*three)
    monkeypatch.undo()
    records.append(path, [made_up(8)])
    assert [row.extra["index"] for row in records.read(path)] == [0, 1, 2, 8]


FILE_LIMIT = """
import resource, signal, sys
from convlab import records
path = sys.argv[1]
rows = records.read(path)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with open(path, "rb") as file:
    size = len(file.read())
resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 2,) * 2)
try:
    records.append(path, rows)
except records.RecordError as error:
    print(error)
"""


def test_a_file_that_may_not_grow_keeps_the_earlier_rows(path, three):
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", FILE_LIMIT, path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path}: {os.strerror(errno.EFBIG)}; 3 new rows were not")
    assert path.read_bytes() == as_bytes(*three)


@pytest.mark.parametrize("use", [records.read, lambda path: records.append(path, [made_up()])])
@pytest.mark.parametrize("target", [".", os.devnull])
def test_a_folder_or_a_device_in_place_of_a_file(tmp_path, use, target):
    path = tmp_path / "rows.jsonl"
    path.symlink_to(target)
    with pytest.raises(RecordError, match=f"^{re.escape(str(path))}: not a regular file"):
        use(path)


def test_a_path_below_a_file(tmp_path):
    (tmp_path / "file").write_text("hello")
    path = tmp_path / "file" / "rows.jsonl"
    with pytest.raises(RecordError, match=f"^{re.escape(str(path))}: .* 1 new rows were not"):
        records.append(path, [made_up()])
    assert (tmp_path / "file").read_text() == "hello"


@pytest.mark.skipif(EVERYONE_MAY_WRITE, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RecordError, match="1 new rows were not"):
            records.append(tmp_path / "rows.jsonl", [made_up()])
    finally:
        tmp_path.chmod(0o700)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_gives_the_lock_back(monkeypatch, path, three):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        records.append(path, [made_up(8)])
    monkeypatch.undo()
    FileLock(f"{path}.lock").acquire(timeout=0)
    assert [row.extra["index"] for row in records.read(path)] == [0, 1, 2, 8]


# Several writers

WRITERS = """
import multiprocessing, sys
from convlab import records

def write(path, writer, barrier):
    barrier.wait()
    for index in range(200):
        extra = {"writer": writer, "index": index, "filling": "x" * (37 * index % 5000)}
        records.append(path, [records.row("layer", "thread", None, "", extra=extra)])

if __name__ == "__main__":
    forks = "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if forks else "spawn")
    barrier = context.Barrier(4)
    writers = [context.Process(target=write, args=(sys.argv[1], i, barrier)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    sys.exit(max(writer.exitcode for writer in writers))
"""


def test_four_processes_neither_mix_nor_lose_rows(path, tmp_path):
    script = tmp_path / "writers.py"
    script.write_text(WRITERS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script, path], env=environment, check=True, timeout=120)
    rows = records.read(path)
    assert len(rows) == 800
    for writer in range(4):
        mine = [row.extra["index"] for row in rows if row.extra["writer"] == writer]
        assert mine == list(range(200))


# Tables


def test_load_spreads_the_problem_over_columns(path, three):
    frame = records.load([path, path])
    assert len(frame) == 6
    assert {"pass", "session", "status", "samples", "batch", "padding"} <= set(frame.columns)
    assert not {"problem", "pass_"} & set(frame.columns)
    first = frame.iloc[0]
    assert (first["pass"], first["batch"], first["padding"]) == ("forward", 2, "valid")
    assert first["samples"] == [0.25, 0.5, 0.75]


def test_an_empty_table_has_the_same_columns(path, three):
    assert list(records.frame([]).columns) == list(records.load([path]).columns)
    assert list(records.load([]).columns) == list(records.load([path]).columns)


def test_a_row_without_a_problem_has_gaps():
    frame = records.frame([made_up(), records.row("ceilings", "", None, "")])
    assert frame["batch"].isna().tolist() == [False, True]


def test_files_are_the_record_files_sorted(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "a.jsonl.lock", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in records.files(tmp_path)] == ["a.jsonl", "b.jsonl"]


def test_own_runs_and_records_to_be_committed_lie_apart(monkeypatch, tmp_path):
    monkeypatch.delenv("CONVLAB_DATA", raising=False)
    assert records.local_file() == ROOT / "data" / "local" / f"{machine.slug()}.jsonl"
    assert records.recorded_file() == ROOT / "data" / "records" / f"{machine.slug()}.jsonl"
    monkeypatch.setenv("CONVLAB_DATA", str(tmp_path))
    assert records.local_file() == tmp_path / "local" / f"{machine.slug()}.jsonl"
