"""A case: algorithms checked against float64, then compared on one problem and one pass."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from convlab import cost, machine, oracle, records, timing
from convlab.algorithms import Algorithm
from convlab.oracle import checked_part
from convlab.peers import find
from convlab.problem import ConvProblem, parse_device
from convlab.records import Row
from convlab.timing import Function

IN_PLACE = ("native", "native_channels_last", "auto", "implicit_gemm")
IN_CHUNKS = (
    *("unfold_chunked", "unfold_recompute", "windows_chunked"),
    *("row_windows", "shifts", "winograd", "fused"),
)
CHUNK = 2**26  # bytes that one of these has at hand at a time, or two images per thread
KEPT = {"allocator": f"glibc, {machine.KEEP_FREED}"}
ROUNDS = 6  # at least: their range holds the true median in 97 of 100 cases, that of three in 75
GUESS = cost.Ceilings(flops_per_second=5e10, bytes_per_second=3e9)  # of a laptop, to plan with


@dataclass(frozen=True)
class Settings:
    """How experiments run.

    Attributes:
        device: "cpu" or "cuda".
        quick: fewer rounds, and 32 and 64 images in place of 256 and 512.
        visits: how often the verdicts' experiments are repeated, spread over the whole run: a
            machine changes from minute to minute, and an interval has to know that.
        memory_limit: bytes; what would need more is not started. At most nine tenths of what is
            free in any case.
    """

    device: str = "cpu"
    quick: bool = False
    visits: int = 1
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", str(parse_device(self.device)))
        if type(self.visits) is not int or self.visits < 1:
            raise ValueError(f"visits must be an integer of at least 1, got {self.visits!r}")
        limit = self.memory_limit
        if limit is not None and (type(limit) not in (int, float) or not limit > 0):
            raise ValueError(f"memory_limit must be None or bytes above 0, got {limit!r}")

    @property
    def options(self) -> dict:
        """Options of `timing.interleaved`."""
        if self.quick:
            return {"seconds": 0.4, "min_rounds": 5, "max_rounds": 15}
        if self.on_gpu:  # calls are a hundred times shorter
            return {"seconds": 0.8, "min_rounds": ROUNDS, "max_rounds": 40}
        return {"seconds": 2.0, "min_rounds": ROUNDS, "max_rounds": 40}

    @property
    def brief(self) -> dict:
        """The same for experiments of many cases, whose picture counts and not one ratio."""
        seconds, rounds = (0.1, 3) if self.quick else (0.3 if self.on_gpu else 0.4, ROUNDS)
        least = {"seconds": seconds, "min_rounds": rounds}
        return {name: min(value, least.get(name, value)) for name, value in self.options.items()}

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def memory(self) -> float:
        """Bytes that a case may use."""
        free = 0.9 * machine.free_bytes(self.device)
        return free if self.memory_limit is None else min(free, self.memory_limit)

    def batch(self, images: int) -> int:
        """`images`, or an eighth of it where it is large and time is short."""
        return images // 8 if self.quick and images >= 256 else images


@dataclass(frozen=True)
class Case:
    """Rows that are measured together.

    Attributes:
        run: measures; returns the rows.
        algorithms: those that have a row in it; empty if that is not known before.
        flags: set around it (`machine.setting`).
        visit: 0, 1, …: all cases of one visit are run before those of the next.
        seconds: about how long it takes on a laptop, to tell how much is left.
    """

    experiment: str
    name: str
    run: Callable[[], list[Row]]
    algorithms: tuple[str, ...] = ()
    flags: dict = field(default_factory=dict)
    visit: int = 0
    seconds: float = 1.0


def compare_case(
    experiment: str,
    problem: ConvProblem,
    algorithms: Sequence[str],
    pass_: str,
    settings: Settings,
    candidate: Callable[..., Function] | None = None,
    *,
    options: dict | None = None,
    faults: bool = False,
    flags: dict | None = None,
) -> Case:
    """The algorithms on one problem, one pass ("forward", "backward" or "train").

    Each is checked against float64 first; one that fails gets a row with its error and no time.

    Args:
        candidate: `candidate(name, problem, pass_, device)` makes the function to time; `one_pass`
            if None.
        options: of `timing.interleaved`; `settings.options` if None.
        faults: whether the rows say how many page faults one call makes (`extra`).
        flags: set while the case runs.
    """
    candidate, options = candidate or one_pass, options or settings.options
    name = f"{experiment}/{short_name(problem)}/{pass_}" + marks(flags)
    run = functools.partial(
        _compare, experiment, problem, algorithms, pass_, settings, candidate, options, faults
    )
    calls = (1 if pass_ == "forward" else 3) * (options["min_rounds"] + 4)
    longest = calls * sum(_guessed(a, problem) for a in algorithms)
    seconds = 0.3 + max(longest, options["seconds"] * 1.5)
    return Case(experiment, name, run, tuple(algorithms), flags or {}, seconds=seconds)


def _guessed(name: str, problem: ConvProblem) -> float:
    """Seconds of one forward pass, for planning only."""
    if find(name).library:
        return cost.floor_seconds(problem, GUESS)
    return cost.predicted_seconds("thread", problem, GUESS)


def marks(flags: dict | None) -> str:
    """What a case's name says about flags that only it has."""
    words = {"allocator": "memory kept", "threads": "{} thread"}
    return "".join(f"/{words[k].format(v)}" for k, v in (flags or {}).items())


def short_name(p: ConvProblem) -> str:
    """The sizes that tell a project's problems apart, for case names."""
    name = f"b{p.batch}-{p.in_channels}to{p.out_channels}-{p.height}x{p.width}"
    for letter, value, usual in (
        ("k", p.kernel_size, (3, 3)),
        ("s", p.stride, (1, 1)),
        ("d", p.dilation, (1, 1)),
    ):
        if value != usual:
            name += f"-{letter}{value[0]}" + (f"x{value[1]}" if value[0] != value[1] else "")
    return name if p.groups == 1 else f"{name}-g{p.groups}"


def _compare(
    experiment, problem, algorithms, pass_, settings, candidate, options, faults
) -> list[Row]:
    rows, functions, errors, known = [], {}, {}, {}
    device = settings.device
    for name in algorithms:
        status, values = judge(name, problem, settings, pass_)
        if status == "ok":
            try:
                functions[name] = candidate(name, problem, pass_, device)
                known[name] = timing.once(functions[name], device)
                errors[name] = values["error"]
            except RuntimeError as error:
                functions.pop(name, None)
                status, values = memory_error(error)
        if status != "ok":
            values |= {"status": status, "device": device}
            rows.append(records.row(experiment, name, problem, pass_, **values))
    found = timing.interleaved(functions, device, known=known, **options)
    for name, m in found.items():
        values = {
            "device": device,
            "layout": "NHWC" if name == "native_channels_last" else "NCHW",
            "launches": None if device == "cpu" else timing.launches(functions[name]),
            "error": errors[name],
        }
        if faults:
            functions[name]()  # the others' memory is out of the way
            values["extra"] = {"page_faults": timing.page_faults(functions[name])}
        rows.append(records.row(experiment, name, problem, pass_, m, **values))
    return rows


def judge(
    name: str, problem: ConvProblem, settings: Settings, pass_: str = "train"
) -> tuple[str, dict]:
    """The status of `name` on `problem` before it is timed, and what its row says about it."""
    device = settings.device
    reason = find(name).supports(problem, device)
    if reason:
        return "unsupported", {"extra": {"reason": reason}}
    needed, free = needed_bytes(name, problem, pass_), settings.memory
    if needed > free:
        values = {"predicted_bytes": needed, "free_bytes": int(free)}
        return records.PREDICTED, {"extra": values}
    try:
        found = _checked(find(name), checked_part(problem), device, _flags())
    except RuntimeError as error:
        return memory_error(error)
    return outcome(found)


def outcome(found: oracle.Check) -> tuple[str, dict]:
    """Status and row values from what `oracle.check` found."""
    finite = math.isfinite(found.max_error)
    error = records.round_digits(found.max_error) if finite else None
    if found.ok:
        return "ok", {"error": error}
    return "wrong", {"error": error, "extra": {"reason": found.reason}}


def needed_bytes(name: str, problem: ConvProblem, pass_: str) -> int:
    """Bytes that a float32 pass needs, its input included; a guess from above if not counted."""
    s = cost.Sizes.of(problem)
    tensors = 4 * (s.x + s.weight + s.y)
    if name in IN_PLACE + IN_CHUNKS:
        chunk = 8 * s.columns * torch.get_num_threads() // max(problem.batch, 1)
        copies = 3 if pass_ == "forward" else 5
        return copies * tensors + (max(chunk, CHUNK) if name in IN_CHUNKS else 0)
    if name in ("fft", "fft_conv"):
        spectra = 2 * sum(step.written for step in cost.steps("fft", problem))
        return tensors + (spectra if pass_ == "forward" else 3 * spectra)
    direction = "forward" if pass_ == "forward" else "train"
    return tensors + cost.peak_bytes(
        "unfold" if name == "unfold" else "thread", problem, 4, direction
    )


def _flags() -> str:
    return json.dumps(machine.flags())


@functools.lru_cache(maxsize=256)
def _checked(algorithm: Algorithm, problem: ConvProblem, device: str, flags: str) -> oracle.Check:
    """`oracle.check`, once for all passes under the same flags."""
    return oracle.check(algorithm, problem, device)


def memory_error(error: RuntimeError) -> tuple[str, dict]:
    """The status of an algorithm that ran out of memory; any other error is raised again."""
    text = str(error)  # on the CPU a plain RuntimeError, worded by the operating system
    on_cpu = "not enough memory" in text or "allocate memory" in text
    if isinstance(error, torch.OutOfMemoryError) or on_cpu:
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
        return find(name)(*tensors, **problem.kwargs)

    if pass_ == "forward":
        return torch.no_grad()(forward)
    grad = torch.ones(problem.output_shape, device=device)
    if pass_ == "train":
        return lambda: torch.autograd.grad(forward(), tensors, grad)
    y = forward()
    return lambda: torch.autograd.grad(y, tensors, grad, retain_graph=True)


def prepared_pass(
    convolution: Callable[..., Tensor],
    problem: ConvProblem,
    pass_: str,
    device: str,
    dtype: str = "float32",
    nhwc: bool = False,
) -> Function:
    """Like `one_pass`, "forward" or "train", in any format and layout.

    Args:
        convolution: takes x, weight, bias, stride, padding, dilation and groups.
    """
    x, weight, bias = problem.inputs(device, dtype)
    if nhwc:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    sizes = problem.stride, problem.padding, problem.dilation, problem.groups

    def forward() -> Tensor:
        return convolution(*tensors, *sizes)

    if pass_ == "forward":
        return torch.no_grad()(forward)
    grad = torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), tensors, grad)


def training_step(name: str, problem: ConvProblem, pass_: str, device: str) -> Function:
    """What a training loop does per batch: forward, loss, backward, SGD step."""
    x, weight, bias = problem.inputs(device, requires_grad=True)
    optimiser = torch.optim.SGD([weight, bias], lr=1e-3)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        x.grad = None
        loss = find(name)(x, weight, bias, **problem.kwargs).square().mean()
        loss.backward()
        optimiser.step()

    return step


def measured(rows: Iterable[Row]) -> dict[str, timing.Measurement]:
    """Algorithm → `Measurement`, from the rows of one case, for `timing.ratios`."""
    return {
        r.algorithm: timing.Measurement(
            tuple(r.samples), 1, r.peak_bytes, r.device, r.flags, *timing.clock(r.device)
        )
        for r in rows
        if r.status == "ok"
    }
