"""Running experiments: case by case, each on disk before the next, going on where one stopped."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from convlab import machine, records
from convlab.experiments.cases import Case, Settings
from convlab.experiments.named import EXPERIMENTS, REPEATED
from convlab.records import Row


@dataclass(frozen=True)
class Progress:
    """A case just done, or found done (`resumed`)."""

    case: Case
    rows: list[Row]
    index: int
    total: int
    resumed: bool


def plan(names: Iterable[str], settings: Settings) -> list[Case]:
    """The cases of the named experiments, in the order in which they are run.

    Repeated visits lie as far apart as they can.

    Raises:
        ValueError: a name that is not in `EXPERIMENTS`.
    """
    names, cases = list(names), []
    for name in names:
        if name not in EXPERIMENTS:
            raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
        cases += EXPERIMENTS[name].cases(settings)
    return _with_visits(cases, settings.visits)


def _with_visits(cases: Sequence[Case], visits: int) -> list[Case]:
    """The repeated experiments at the beginning, at the end, and evenly in between."""
    repeated = [case for case in cases if case.experiment in REPEATED]
    others = [case for case in cases if case.experiment not in REPEATED]
    if visits == 1 or not repeated:
        return list(cases)
    planned = []
    for visit in range(visits):
        start, end = (len(others) * i // (visits - 1) for i in (visit - 1, visit))
        planned += others[max(start, 0) : end] if visit else []
        planned += [
            replace(case, name=f"{case.name} #{visit + 1}", visit=visit) if visit else case
            for case in repeated
        ]
    return planned


def run(
    names: Iterable[str], settings: Settings, path: str | Path, fresh: bool = False
) -> Iterator[Progress]:
    """Run the named experiments, appending each case's rows to `path` as soon as it is measured.

    If the last session in the file with this plan, device, flags and versions is not finished, it
    is continued: its cases are not measured again, unless `fresh`.
    """
    cases = plan(names, settings)
    mark = f"{_fingerprint(settings)}-{_digest([case.name for case in cases])}"
    session, done = _unfinished(records.read(path), cases, mark)
    if fresh or session is None:
        session, done = f"{records.now()} {mark}", {}
    for index, case in enumerate(cases):
        rows = done.get(case.name)
        if rows is None:
            rows = run_case(case, session)
            records.append(path, rows)
        yield Progress(case, rows, index, len(cases), case.name in done)


def run_case(case: Case, session: str = "") -> list[Row]:
    """The case's rows, stamped with the session and the case."""
    rows = _in_own_process(case) if "allocator" in case.flags else _with_flags(case)
    stamp = {"session": session, "case": case.name, "rows_in_case": len(rows)}
    return [replace(row, **stamp) for row in rows]


def _with_flags(case: Case) -> list[Row]:
    with machine.setting(**case.flags):
        return case.run()


def _in_own_process(case: Case) -> list[Row]:
    """What malloc has kept shapes everything after it, so this heap is new and is given up.

    Raises:
        RuntimeError: the process ended without an answer; anything that the case raises.
    """
    task = pickle.dumps((case, machine.flags()["threads"]))
    command = [sys.executable, "-c", f"import {__name__} as sessions; sessions._answer()"]
    done = subprocess.run(command, input=task, capture_output=True)
    try:
        answer = pickle.loads(done.stdout)
    except (EOFError, pickle.UnpicklingError):
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise RuntimeError(
            f"the process for {case.name} ended with code {done.returncode}, saying: {said[-1]}"
        ) from None
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _answer() -> None:
    """In the new process: the case from stdin, its rows or its error to stdout."""
    case, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    try:
        answer = _with_flags(case)
    except BaseException as error:
        answer = error
    sys.stdout.buffer.write(pickle.dumps(answer))


def _fingerprint(settings: Settings) -> str:
    versions = machine.versions()
    if not settings.on_gpu:  # on the CPU nothing that is timed uses it
        versions.pop("triton", None)
    facts = [settings.device, machine.flags(), versions, machine.name(settings.device)]
    if settings.memory_limit is not None:
        facts.append(settings.memory_limit)
    return ("quick-" if settings.quick else "full-") + _digest(facts)


def _digest(facts: list) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


def _unfinished(
    rows: Sequence[Row], cases: Sequence[Case], mark: str
) -> tuple[str | None, Mapping[str, list[Row]]]:
    """The last session with this mark and its finished cases, if some of its cases are missing."""
    session = next((r.session for r in reversed(rows) if r.session.endswith(f" {mark}")), None)
    done = _done([r for r in rows if r.session == session], cases)
    if session is None or len(done) == len(cases):
        return None, {}
    return session, done


def _done(rows: Sequence[Row], cases: Sequence[Case]) -> dict[str, list[Row]]:
    """The cases that the rows of one session hold, each with its rows."""
    found: dict[str, list[Row]] = {}
    for r in rows:
        found.setdefault(r.case, []).append(r)
    wholes = {case.name: _whole(found.get(case.name, []), case) for case in cases}
    return {name: whole for name, whole in wholes.items() if whole}


def _whole(rows: Sequence[Row], case: Case) -> list[Row]:
    """The newest complete measurement of a case, [] if there is none.

    A run that was killed while it wrote leaves the first rows of a case, and the case is then
    measured again; rows of two such beginnings are no whole.
    """
    if not rows:
        return []
    newest = rows[-rows[-1].rows_in_case :]
    different = {(r.algorithm, r.pass_, r.part) for r in newest}
    if len(different) < rows[-1].rows_in_case:
        return []
    expected = sorted(case.algorithms or (r.algorithm for r in newest))
    return list(newest) if sorted(r.algorithm for r in newest) == expected else []


def last_session(rows: Iterable[Row], experiment: str | None = None) -> list[Row]:
    """The rows of the newest session, or of the newest one that holds `experiment`."""
    rows = list(rows)
    having = [r.session for r in rows if experiment in (None, r.experiment)]
    newest = max(having or [r.session for r in rows], default=None)
    return [r for r in rows if r.session == newest]


def by_machine(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """(machine, device) → its rows, in the order in which the machines first appear."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.machine, row.device), []).append(row)
    return found


def latest(
    names: Sequence[str], settings: Settings, *paths: str | Path, progress: bool = False
) -> list[Row]:
    """The rows of the newest session that holds all these experiments; measured now if none does.

    For notebooks: what `reproduce` or `record` measured on this machine, under these flags, is not
    measured again. All visits of that session come along.

    Args:
        paths: record files to look into; new rows go to the first. Default: this machine's own
            runs, then its recorded ones.
    """
    paths = paths or (records.local_file(settings.device), records.recorded_file(settings.device))
    cases, mark = plan(names, settings), f" {_fingerprint(settings)}"  # whatever its plan was
    sessions: dict[str, list[Row]] = {}
    for path in paths:
        for row in records.read(path):
            if mark in row.session:
                sessions.setdefault(row.session, []).append(row)
    for session in sorted(sessions, reverse=True):
        found = sessions[session]
        done = _done(found, cases)
        if len(done) == len(cases):
            visits = dict.fromkeys(r.case for r in found if r.case.partition(" #")[0] in done)
            planned = {case.name: case for case in cases}
            more = [replace(planned[name.partition(" #")[0]], name=name) for name in visits]
            return [row for rows in _done(found, more).values() for row in rows]
    steps = run(names, settings, paths[0])
    if progress:
        from rich.progress import track

        steps = track(steps, "Measuring", total=len(cases), transient=True)
    return [row for done in steps for row in done.rows]
