"""`python -m convlab reproduce / record / verdicts / diagnose`."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from convlab import experiments, machine, records, thread
from convlab.experiments import Case, Settings
from convlab.records import RecordError, Row

STYLES = {thread.HOLDS: "green", thread.FAILS: "red", thread.DEPENDS: "yellow"}
INTERRUPTED, BAD_INPUT = 130, 2
VISITS = 5  # of a recording to the experiments that decide a claim


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one sentence on bad input, or 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal or a pipe that cannot show "×"
    options = _parser().parse_args(arguments)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        return options.command(options)
    except (ValueError, RecordError) as error:
        print(f"convlab: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return INTERRUPTED


class _Parser(argparse.ArgumentParser):
    """Bad input gets one sentence, as everywhere else."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"convlab: {message}; {self.prog} --help lists what there is\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m convlab", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        ("reproduce", reproduce, "the thread's analysis on this machine, ending with the verdicts"),
        ("record", record, "all experiments, into data/records/ to be committed"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("--device", default="cpu", help="cpu (default) or cuda")
        sub.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's choice")
        sub.add_argument("--quick", action="store_true", help="fewer rounds, smaller batches")
        sub.add_argument("--fresh", action="store_true", help="do not go on with a stopped run")
        sub.add_argument("--output", type=Path, help="the record file (JSON Lines) to append to")
    text = "only these experiments, separated by commas; default: all"
    sub.add_argument("--only", type=_names, default=tuple(experiments.EXPERIMENTS), help=text)
    text = f"of {', '.join(experiments.REPEATED)}, spread over the run; default: {VISITS}"
    sub.add_argument("--visits", type=_visits, default=VISITS, metavar="N", help=text)
    text = "the verdict on every claim from what is recorded"
    sub = commands.add_parser("verdicts", help=text, description=text)
    sub.set_defaults(command=verdicts)
    sub.add_argument("--machine", help="only machines whose name contains this")
    sub.add_argument("files", nargs="*", type=Path, help="record files; default: data/records/")
    text = "where the time of your own layer goes, why, and what to try first"
    sub = commands.add_parser("diagnose", help=text, description=text)
    sub.set_defaults(command=diagnose)
    sub.add_argument("target", help="FILE.py:LAYER or PACKAGE.MODULE:LAYER")
    sub.add_argument("--input", type=_shape, required=True, help="N,C,H,W of the images")
    text = "of the constructor, as in a call: --args '16, 32, kernel_size=3'"
    sub.add_argument("--args", default="", metavar="ARGUMENTS", help=text)
    sub.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    sub.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's choice")
    sub.add_argument("--eval", action="store_true", help="in eval mode; default: in train mode")
    sub.add_argument("--quick", action="store_true", help="fewer rounds")
    sub.add_argument("--html", type=Path, metavar="FILE", help="also as a page with figures")
    return parser


def _visits(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    """ "256,64,32,32" → sizes of a batch of images."""
    sizes = text.split(",")
    if len(sizes) != 4 or not all(s.strip().isdecimal() and int(s) > 0 for s in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is no N,C,H,W of four positive integers")
    return tuple(map(int, sizes))


def _names(text: str) -> tuple[str, ...]:
    """Names of experiments in the order in which `record` runs them."""
    wanted = set(text.split(","))
    if unknown := wanted - experiments.EXPERIMENTS.keys():
        known = ", ".join(experiments.EXPERIMENTS)
        raise argparse.ArgumentTypeError(f"{min(unknown)!r} is none of {known}")
    return tuple(name for name in experiments.EXPERIMENTS if name in wanted)


def reproduce(options: argparse.Namespace) -> int:
    """Measure the thread's experiments here and judge its claims."""
    settings = Settings(options.device, options.quick)
    code, rows, path = _measure(options, settings, experiments.REPRODUCE, records.local_file)
    if code == 0:
        console = Console()
        console.print(verdict_table(rows))
        console.print(f"Rows: {escape(_short(path))}", soft_wrap=True, highlight=False)
        console.print(
            "Next: make lab, then notebooks/00_start_here.ipynb: the same claims, explained.",
            soft_wrap=True,
            highlight=False,
        )
    return code


def record(options: argparse.Namespace) -> int:
    """Measure every experiment and keep the rows in data/records/."""
    settings = Settings(options.device, options.quick, 1 if options.quick else options.visits)
    code, rows, path = _measure(options, settings, options.only, records.recorded_file)
    if code == 0:
        Console().print(
            f"{len(rows)} rows: {escape(_short(path))}", soft_wrap=True, highlight=False
        )
    return code


def verdicts(options: argparse.Namespace) -> int:
    """Judge the claims from recorded rows, one table per machine and device."""
    for path in options.files:
        if not path.is_file():
            raise ValueError(f"files must be existing record files, got {str(path)!r}")
    rows = [row for path in options.files or records.files() for row in records.read(path)]
    wanted = (options.machine or "").lower()
    groups = experiments.by_machine(row for row in rows if wanted in row.machine.lower())
    if not groups:
        known = ", ".join(sorted({row.machine for row in rows})) or "none yet"
        asked = f" for --machine {options.machine!r}" if options.machine else ""
        raise ValueError(f"there are no records{asked}; machines recorded: {known}")
    for found in groups.values():
        Console().print(verdict_table(experiments.last_session(found, "step")))
    return 0


def diagnose(options: argparse.Namespace) -> int:
    """Diagnose a layer of the reader's own on random images."""
    import torch

    from convlab import diagnosing
    from convlab.diagnosing.loading import load
    from convlab.problem import parse_device

    _set_threads(options.threads)
    device = parse_device(options.device)
    if options.html and not options.html.absolute().parent.is_dir():
        raise ValueError(f"--html must lie in an existing folder, got {str(options.html)!r}")
    torch.manual_seed(0)
    layer = load(options.target, options.args).to(device).train(not options.eval)
    x = torch.randn(options.input, device=device)
    console = Console(stderr=True)
    found = diagnosing.diagnose(
        layer,
        x,
        quick=options.quick,
        progress=lambda text: console.print(f"{text} …", soft_wrap=True, highlight=False),
    )
    Console().print(found)
    if options.html:
        found.save_html(options.html)
        console.print(f"Page: {escape(_short(options.html))}", soft_wrap=True, highlight=False)
    return 0


def verdict_table(rows: Sequence[Row]) -> Table:
    """Claim, the thread's figure, this machine's figure with its interval, verdict and reason."""
    table = Table(title=escape(thread.title(rows)), show_lines=True, title_justify="left")
    for name, ratio in (("claim", 4), ("the thread", 3), ("measured here", 6), ("verdict", 5)):
        table.add_column(name, ratio=ratio)
    for claim in thread.table(rows).to_dict("records"):
        style = STYLES.get(claim["verdict"], "dim")
        table.add_row(
            escape(claim["claim"]),
            escape(claim["the thread"]),
            escape(claim["measured"]),
            f"[bold {style}]{claim['verdict']}[/]\n{escape(claim['reason'])}",
        )
    return table


def _measure(options, settings, names, default_file) -> tuple[int, list[Row], Path]:
    _set_threads(options.threads)
    path = options.output or default_file(settings.device)
    console = Console(stderr=True)
    console.print(
        f"{escape(machine.name(settings.device))}, {len(names)} experiments", highlight=False
    )
    rows: list[Row] = []
    start = time.perf_counter()
    try:
        rows = _run_with_progress(names, settings, path, options.fresh, console)
    except KeyboardInterrupt:
        print(
            f"\nStopped. What was measured is in {_short(path)}; the same command goes on from "
            "there, with --fresh it starts anew.",
            file=sys.stderr,
        )
        return INTERRUPTED, rows, path
    console.print(f"Measured in {time.perf_counter() - start:.0f} s.", highlight=False)
    return 0, rows, path


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    cores = os.cpu_count() or 1
    if not 1 <= threads <= cores:
        raise ValueError(f"--threads must be between 1 and {cores}, got {threads}")
    import torch

    torch.set_num_threads(threads)


def _run_with_progress(names, settings, path, fresh, console) -> list[Row]:
    cases = experiments.plan(names, settings)
    left, pace, rows = sum(case.seconds for case in cases), _Pace(), []
    display = _bar if console.is_terminal else _lines
    with display(cases, _left(len(cases), left), console) as show:
        for done in experiments.run(names, settings, path, fresh):
            rows += done.rows
            if done.resumed and done.index == 0:
                console.print("Going on with the run that was stopped.")
            left -= done.case.seconds
            pace.add(done)
            show(done, _left(len(cases) - done.index - 1, left * pace.factor))
    return rows


Show = Callable[[experiments.Progress, str], None]


@contextlib.contextmanager
def _bar(cases: Sequence[Case], left: str, console: Console) -> Iterator[Show]:
    """A bar, the next case's name and what is left; moves on with every case."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    following = [case.name[:40] for case in cases[1:]] + ["done"]
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        total = sum(case.seconds for case in cases)
        task = progress.add_task(cases[0].name[:40], total=total, left=left)
        yield lambda done, left: progress.update(
            task, advance=done.case.seconds, description=following[done.index], left=left
        )


@contextlib.contextmanager
def _lines(cases: Sequence[Case], left: str, console: Console) -> Iterator[Show]:
    """For a file or a pipe: a line at the start and whenever the experiment changes."""
    planned = Counter(case.experiment for case in cases)
    finished: Counter[str] = Counter()
    following = [case.experiment for case in cases[1:]] + [None]
    console.print(left, soft_wrap=True, highlight=False)

    def show(done: experiments.Progress, left: str) -> None:
        name = done.case.experiment
        finished[name] += 1
        if name != following[done.index]:
            text = f"{name}: {finished[name]} of {_cases(planned[name])} done; {left}"
            console.print(escape(text), soft_wrap=True, highlight=False)

    yield show


class _Pace:
    """How long cases took, over how long they were thought to take."""

    def __init__(self) -> None:
        self.taken = self.thought = 0.0
        self.last = time.perf_counter()

    def add(self, done: experiments.Progress) -> None:
        now = time.perf_counter()
        if not done.resumed:
            self.taken += now - self.last
            self.thought += done.case.seconds
        self.last = now

    @property
    def factor(self) -> float:
        """1 until something was measured."""
        return self.taken / self.thought if self.thought else 1.0


def _left(cases: int, seconds: float) -> str:
    about = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(seconds, 1):.0f} s"
    return f"{_cases(cases)} left, about {about}" if cases else "nothing left"


def _cases(count: int) -> str:
    return f"{count} case{'s' if count != 1 else ''}"


def _short(path: Path) -> str:
    """`path` relative to the current folder where it lies below it."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    sys.exit(main())
