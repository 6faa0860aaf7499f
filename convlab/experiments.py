"""The named experiments; notebooks, `reproduce` and `record` run these and nothing else.

An experiment is a list of cases. A case measures everything that is to be compared, together, in
interleaved rounds, and its rows are written at once: what was measured is on disk before the next
case begins.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from convlab import cost, machine, oracle, records, stages, timing
from convlab.algorithms import ALGORITHMS, Algorithm
from convlab.problem import ConvProblem, parse_device, thread_problem
from convlab.records import Row
from convlab.timing import Function

CHECK_BATCH = 16  # images on which an algorithm is checked before it is timed
LAYER = ("native", "native_channels_last", "native_no_library", "thread", "unfold", "windows")
STEP = ("native", "native_no_library", "thread", "unfold", "windows")
PAIR = ("native", "thread")


@dataclass(frozen=True)
class Settings:
    """How experiments run.

    Attributes:
        device: "cpu" or "cuda".
        quick: fewer rounds, and 32 and 64 images in place of 256 and 512.
    """

    device: str = "cpu"
    quick: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", str(parse_device(self.device)))

    @property
    def options(self) -> dict:
        """Options of `timing.interleaved`."""
        if self.quick:
            return {"seconds": 0.4, "min_rounds": 5, "max_rounds": 15}
        return {"seconds": 2.0, "min_rounds": 5, "max_rounds": 40}

    def batch(self, images: int) -> int:
        """`images`, or an eighth of it where it is large and time is short."""
        return images // 8 if self.quick and images >= 256 else images


@dataclass(frozen=True)
class Case:
    """Rows that are measured together."""

    experiment: str
    name: str
    run: Callable[[], list[Row]]


@dataclass(frozen=True)
class Experiment:
    """A question and the cases that answer it."""

    question: str
    cases: Callable[[Settings], list[Case]]


# Cases: candidates compared on one problem


def compare_case(
    experiment: str,
    problem: ConvProblem,
    algorithms: Sequence[str],
    pass_: str,
    settings: Settings,
    candidate: Callable[..., Function] | None = None,
) -> Case:
    """The algorithms on one problem, one pass ("forward", "backward" or "train").

    Each is checked against float64 first; one that fails gets a row with its error and no time.
    `candidate(name, problem, pass_, device)` makes the function to time; `one_pass` if None.
    """
    name = f"{experiment}/{short_name(problem)}/{pass_}"
    candidate = candidate or one_pass
    run = functools.partial(_compare, experiment, problem, algorithms, pass_, settings, candidate)
    return Case(experiment, name, run)


def short_name(p: ConvProblem) -> str:
    """The sizes that tell a project's problems apart, for case names."""
    return f"b{p.batch}-{p.in_channels}to{p.out_channels}-{p.height}x{p.width}"


def _compare(experiment, problem, algorithms, pass_, settings, candidate) -> list[Row]:
    rows, functions, errors = [], {}, {}
    device = settings.device
    for name in algorithms:
        status, values = _judge(name, problem, device)
        if status == "ok":
            try:
                functions[name] = candidate(name, problem, pass_, device)
                functions[name]()
                errors[name] = values["error"]
            except RuntimeError as error:
                functions.pop(name, None)
                status, values = _memory_error(error)
        if status != "ok":
            values |= {"status": status, "device": device}
            rows.append(records.row(experiment, name, problem, pass_, **values))
    measured = timing.interleaved(functions, device, **settings.options)
    for name, m in measured.items():
        values = {
            "device": device,
            "layout": "NHWC" if name == "native_channels_last" else "NCHW",
            "launches": None if device == "cpu" else timing.launches(functions[name]),
            "error": errors[name],
        }
        rows.append(records.row(experiment, name, problem, pass_, m, **values))
    return rows


def _judge(name: str, problem: ConvProblem, device: str) -> tuple[str, dict]:
    """The status of `name` on `problem` before it is timed, and what its row says about it."""
    reason = ALGORITHMS[name].supports(problem, device)
    if reason:
        return "unsupported", {"extra": {"reason": reason}}
    needed = 3 * cost.peak_bytes("thread", problem)  # forward, its gradients, and their copies
    free = machine.free_bytes(device)
    if not ALGORITHMS[name].library and needed > 0.9 * free:
        return "out of memory", {"extra": {"predicted_bytes": needed, "free_bytes": free}}
    small = problem.replace(batch=min(problem.batch, CHECK_BATCH))
    try:
        found = _checked(ALGORITHMS[name], small, device, json.dumps(machine.flags()))
    except RuntimeError as error:
        return _memory_error(error)
    finite = math.isfinite(found.max_error)
    error = records.round_digits(found.max_error) if finite else None
    if found.ok:
        return "ok", {"error": error}
    return "wrong", {"error": error, "extra": {"reason": found.reason}}


@functools.lru_cache(maxsize=256)
def _checked(algorithm: Algorithm, problem: ConvProblem, device: str, flags: str) -> oracle.Check:
    """`oracle.check`, once for all passes under the same flags."""
    return oracle.check(algorithm, problem, device)


def _memory_error(error: RuntimeError) -> tuple[str, dict]:
    """The status of an algorithm that ran out of memory; any other error is raised again."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in text:
        return "out of memory", {"extra": {"reason": text.splitlines()[0]}}
    raise error


def one_pass(
    name: str,
    problem: ConvProblem,
    pass_: str,
    device: str,
    images: Callable[[ConvProblem], Tensor] | None = None,
) -> Function:
    """A function of no arguments that makes one pass; `images` makes x, random numbers if None."""
    x, weight, bias = problem.inputs(device)
    x = x if images is None else images(problem).to(device)
    if name == "native_channels_last":
        nhwc = torch.channels_last
        x, weight = x.contiguous(memory_format=nhwc), weight.contiguous(memory_format=nhwc)
    tensors = [t.detach().requires_grad_() for t in (x, weight, bias)]

    def forward() -> Tensor:
        return ALGORITHMS[name](*tensors, **problem.kwargs)

    if pass_ == "forward":
        return torch.no_grad()(forward)
    grad = torch.ones(problem.output_shape, device=device)
    if pass_ == "train":
        return lambda: torch.autograd.grad(forward(), tensors, grad)
    y = forward()
    return lambda: torch.autograd.grad(y, tensors, grad, retain_graph=True)


def training_step(name: str, problem: ConvProblem, pass_: str, device: str) -> Function:
    """What a training loop does per batch: forward, loss, backward, SGD step."""
    x, weight, bias = problem.inputs(device, requires_grad=True)
    optimiser = torch.optim.SGD([weight, bias], lr=1e-3)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        x.grad = None
        loss = ALGORITHMS[name](x, weight, bias, **problem.kwargs).square().mean()
        loss.backward()
        optimiser.step()

    return step


# Cases: stages, storage, ceilings


def stages_case(problem: ConvProblem, algorithm: str, settings: Settings) -> Case:
    """Time of each stage, forward and backward, and of the whole pass without marks."""
    name = f"stages/{short_name(problem)}/{algorithm}"
    return Case("stages", name, functools.partial(_stages, problem, algorithm, settings))


def _stages(problem, algorithm, settings) -> list[Row]:
    device = settings.device
    status, values = _judge(algorithm, problem, device)
    values["device"] = device
    if status != "ok":
        return [records.row("stages", algorithm, problem, "", status=status, **values)]
    times = stages.stage_times(problem, algorithm, device, **settings.options)
    rows = []
    for (direction, part), group in times.groupby(["direction", "part"], sort=False):
        samples = tuple(group.sort_values("round")["seconds"])
        m = timing.Measurement(samples, 1, None, device, machine.flags(), *timing.clock(device))
        rows.append(records.row("stages", algorithm, problem, direction, m, part=part, **values))
    return rows


def storage_case(settings: Settings) -> Case:
    """Does each operation return a view of its input or memory of its own, and how much?"""
    return Case("storage", "storage", functools.partial(_storage, settings))


def _storage(settings: Settings) -> list[Row]:
    problem = thread_problem(2)
    x, weight, _ = problem.inputs(settings.device)
    columns = F.unfold(x, 3, padding=1)
    product = (columns.transpose(1, 2) @ weight.flatten(1).t()).transpose(1, 2)
    operations = {
        "F.unfold": (x, lambda: F.unfold(x, 3, padding=1)),
        "F.fold": (product, lambda: F.fold(product, (50, 50), kernel_size=1)),
        "Tensor.unfold": (x, lambda: x.unfold(2, 3, 1).unfold(3, 3, 1)),
        "Tensor.view": (x, lambda: x.view(2, 10, -1)),
    }
    rows = []
    for name, (source, operation) in operations.items():
        result = operation()
        shares = source.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
        written = 0 if shares else result.nbytes
        extra = {"view": shares, "bytes_in": source.nbytes, "bytes_written": written}
        values = {"device": settings.device, "part": name, "extra": extra}
        rows.append(records.row("storage", "thread", problem, "forward", **values))
    return rows


def ceilings_case(settings: Settings) -> Case:
    """FLOP/s of a large matrix product and bytes/s of a large copy: the roofline's two lines."""
    return Case("ceilings", "ceilings", functools.partial(_ceilings, settings))


def _ceilings(settings: Settings) -> list[Row]:
    device = settings.device
    side, values = (2048, 2**26) if device == "cpu" else (8192, 2**29)
    a, b, c = (torch.randn(side, side, device=device) for _ in range(3))
    source = torch.randn(values, device=device)
    target = torch.empty_like(source)
    functions = {
        "product": lambda: torch.mm(a, b, out=c),
        "copy": lambda: target.copy_(source),
    }
    measured = timing.interleaved(functions, device, peak=False, **settings.options)
    amounts = {"product": {"flops": 2 * side**3}, "copy": {"bytes": 2 * source.nbytes}}
    return [
        records.row("ceilings", "", None, "", m, device=device, part=part, extra=amounts[part])
        for part, m in measured.items()
    ]


def ceilings_of(rows: Iterable[Row]) -> cost.Ceilings:
    """`cost.Ceilings` from the rows of the experiment "ceilings"; ValueError if there are none."""
    found = {r.part: r for r in rows if r.experiment == "ceilings"}
    if found.keys() < {"product", "copy"}:
        raise ValueError("rows must hold the experiment 'ceilings', got none of it")
    return cost.Ceilings(
        flops_per_second=found["product"].extra["flops"] / found["product"].median,
        bytes_per_second=found["copy"].extra["bytes"] / found["copy"].median,
    )


# The experiments


def _layer(s: Settings) -> list[Case]:
    problems = [thread_problem(s.batch(n)) for n in (2, 512)]
    return [compare_case("layer", p, LAYER, q, s) for p in problems for q in ("forward", "train")]


def _steps(s: Settings) -> list[Case]:
    p = thread_problem(s.batch(256))
    return [
        compare_case("step", p, STEP, "train", s, training_step),
        compare_case("step", p, STEP, "forward", s),
    ]


def _batches(s: Settings) -> list[Case]:
    sizes = (1, 8, 32) if s.quick else (1, 4, 16, 64, 256)
    problems = map(thread_problem, sizes)
    return [compare_case("batch", p, PAIR, q, s) for p in problems for q in ("forward", "train")]


def _stage_cases(s: Settings) -> list[Case]:
    sizes = (2, 32) if s.quick else (2, 64, 256, 512)
    return [stages_case(thread_problem(n), "thread", s) for n in sizes]


def _photographs(s: Settings) -> list[Case]:
    p = ConvProblem(64, 3, 16, 64, 64, kernel_size=3, padding=1)
    candidate = functools.partial(one_pass, images=_photo_batch)
    names = (*PAIR, "unfold")
    return [compare_case("photographs", p, names, q, s, candidate) for q in ("forward", "train")]


def _photo_batch(p: ConvProblem) -> Tensor:
    from convlab.images import photo_batch

    return photo_batch(p.batch, p.height)


EXPERIMENTS: dict[str, Experiment] = {
    "storage": Experiment("Which operations copy?", lambda s: [storage_case(s)]),
    "ceilings": Experiment("How fast can this machine be?", lambda s: [ceilings_case(s)]),
    "layer": Experiment("The thread's layer on 2 and on 512 images", _layer),
    "step": Experiment("A training step and inference at batch 256", _steps),
    "stages": Experiment("What does each stage cost, forward and backward?", _stage_cases),
    "batch": Experiment("How does the ratio change with the batch?", _batches),
    "photographs": Experiment("Is it the same on real photographs?", _photographs),
}
REPRODUCE = tuple(EXPERIMENTS)


# Running them


@dataclass(frozen=True)
class Progress:
    """A case just done, or found done (`resumed`)."""

    case: Case
    rows: list[Row]
    index: int
    total: int
    resumed: bool


def plan(names: Iterable[str], settings: Settings) -> list[Case]:
    """The cases of the named experiments, in order.

    Raises:
        ValueError: a name that is not in `EXPERIMENTS`.
    """
    cases = []
    for name in names:
        if name not in EXPERIMENTS:
            raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
        cases += EXPERIMENTS[name].cases(settings)
    return cases


def run(
    names: Iterable[str], settings: Settings, path: str | Path, fresh: bool = False
) -> Iterator[Progress]:
    """Run the named experiments, appending each case's rows to `path` as soon as it is measured.

    If the last session in the file has the same plan, device, flags and versions and is not
    finished, it is continued: its cases are not measured again, unless `fresh`.
    """
    cases = plan(names, settings)
    mark = _fingerprint(cases, settings)
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
    rows = case.run()
    stamp = {"session": session, "case": case.name, "rows_in_case": len(rows)}
    return [replace(row, **stamp) for row in rows]


def _fingerprint(cases: Sequence[Case], settings: Settings) -> str:
    facts = [[c.name for c in cases], settings.device, settings.quick, machine.flags()]
    text = json.dumps([*facts, machine.versions(), machine.name(settings.device)])
    return ("quick-" if settings.quick else "full-") + hashlib.sha256(text.encode()).hexdigest()[:8]


def _unfinished(
    rows: Sequence[Row], cases: Sequence[Case], mark: str
) -> tuple[str | None, Mapping[str, list[Row]]]:
    """The last session with this mark and its finished cases, if some of its cases are missing."""
    session = next((r.session for r in reversed(rows) if r.session.endswith(f" {mark}")), None)
    found: dict[str, list[Row]] = {}
    for r in rows:
        if r.session == session:
            found.setdefault(r.case, []).append(r)
    done = {name: whole for name, group in found.items() if (whole := _whole(group))}
    if session is None or all(case.name in done for case in cases):
        return None, {}
    return session, done


def _whole(rows: Sequence[Row]) -> list[Row]:
    """The newest complete measurement of a case, [] if there is none.

    A run that was killed while it wrote leaves the first rows of a case, and the case is then
    measured again; rows of two such beginnings are no whole.
    """
    count = rows[-1].rows_in_case
    newest = rows[-count:]
    different = {(r.algorithm, r.pass_, r.part) for r in newest}
    return list(newest) if len(different) == count else []


def last_session(rows: Iterable[Row]) -> list[Row]:
    """The rows of the newest session."""
    rows = list(rows)
    newest = max((r.session for r in rows), default=None)
    return [r for r in rows if r.session == newest]


def latest(names: Sequence[str], settings: Settings, path: str | Path) -> list[Row]:
    """The rows of the newest finished session with these settings, measured now if there is none.

    For notebooks: what `reproduce` measured on this machine, under these flags, is not measured
    again.
    """
    cases = plan(names, settings)
    mark = _fingerprint(cases, settings)
    rows = [r for r in records.read(path) if r.session.endswith(f" {mark}")]
    if rows and _unfinished(rows, cases, mark)[0] is None:
        return last_session(rows)
    return [row for done in run(names, settings, path) for row in done.rows]


def measured(rows: Iterable[Row]) -> dict[str, timing.Measurement]:
    """Algorithm → `Measurement`, from the rows of one case, for `timing.ratios`."""
    return {
        r.algorithm: timing.Measurement(
            tuple(r.samples), 1, r.peak_bytes, r.device, r.flags, *timing.clock(r.device)
        )
        for r in rows
        if r.status == "ok"
    }
