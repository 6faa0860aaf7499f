"""Timers that are wrong on purpose, one per mistake, each called like `timing.measure`.

`PITFALLS` maps a timer's name to the timer; each knows its mistake in one sentence and its remedy
in another. Those that compare take what `timing.compare` takes. `contrast` puts a number on a
mistake. `ModelQueue` is a *model* of a GPU, for machines that have none.
"""

from __future__ import annotations

import functools
import inspect
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.benchmark import Timer

from convlab import machine, timing
from convlab.problem import parse_device
from convlab.timing import Function, Measurement

if TYPE_CHECKING:
    import pandas as pd

EVICTION_BYTES = 2**28  # well above the last-level cache that one core of today's CPUs sees
LOAD_SECONDS = 120.0  # a background load ends by itself, should its parent have been killed


class ModelQueue:
    """A model of a GPU, made of one worker thread: `submit` returns at once, work is done in order.

    It models one thing only, that the host runs ahead of the device, and no speed of any GPU.
    Use it in a `with` block, which stops the thread.

    Attributes:
        log: (start, end) of each piece of work, by `time.perf_counter`.
    """

    def __init__(self) -> None:
        self.log: list[tuple[float, float]] = []
        self._work: queue.Queue[Function | None] = queue.Queue()
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="model queue", daemon=True)
        self._thread.start()

    def submit(self, fn: Function) -> None:
        """Append `fn()` to the queue and return without waiting, as a kernel launch does."""
        if not callable(fn):
            raise ValueError(f"fn must be a function without arguments, got {fn!r}")
        if self._closed:
            raise RuntimeError("this ModelQueue is closed: submit inside its `with` block")
        self._work.put(fn)

    def synchronize(self) -> None:
        """Wait until all submitted work is done; raises the first error that occurred in it."""
        self._work.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        while (fn := self._work.get()) is not None:
            start = time.perf_counter()
            try:
                if self._error is None:  # as on a GPU, nothing more is done after an error
                    fn()
            except BaseException as error:
                self._error = error
            self.log.append((start, time.perf_counter()))
            self._work.task_done()
        self._work.task_done()

    def __enter__(self) -> ModelQueue:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if not self._closed:
            self._closed = True
            self._work.put(None)
            self._thread.join()
        if kind is None:
            self.synchronize()

    def __str__(self) -> str:
        return "model queue (not a GPU)"

    __repr__ = __str__


Device = str | torch.device | ModelQueue


class Pitfall:
    """A wrong timer, called like `timing.measure` (or, if it compares, like `timing.compare`).

    Attributes:
        name: its key in `PITFALLS`.
        mistake, remedy: one sentence each.
        needs: None, or "cuda" where the mistake cannot be made without a GPU (some of these take
            a `ModelQueue` as `device` instead).
        compares: True where it takes candidates and a baseline.
    """

    def __init__(
        self, timer: Callable[..., Measurement | pd.DataFrame], mistake: str, remedy: str, needs
    ) -> None:
        self.name = timer.__name__
        self.mistake, self.remedy, self.needs = mistake, remedy, needs
        self.compares = "candidates" in inspect.signature(timer).parameters
        functools.update_wrapper(self, timer)

    def __call__(self, *args, **kwargs) -> Measurement | pd.DataFrame:
        bound = inspect.signature(self.__wrapped__).bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if name in _CHECKS:
                bound.arguments[name] = _CHECKS[name](name, value)
        if self.compares and bound.arguments["baseline"] not in bound.arguments["candidates"]:
            names = ", ".join(bound.arguments["candidates"])
            raise ValueError(
                f"baseline must be one of {names}, got {bound.arguments['baseline']!r}"
            )
        device = bound.arguments["device"]
        if self.needs == "cuda" and isinstance(device, torch.device) and device.type != "cuda":
            raise ValueError(f"device must be 'cuda' for {self.name}, got {str(device)!r}")
        return self.__wrapped__(*bound.args, **bound.kwargs)

    def __repr__(self) -> str:
        return f"<convlab pitfall {self.name}: {self.mistake}>"


PITFALLS: dict[str, Pitfall] = {}


def pitfall(mistake: str, remedy: str, needs: str | None = None):
    """Decorator: registers a wrong timer in `PITFALLS` and checks its arguments at each call."""

    def register(timer: Callable) -> Pitfall:
        PITFALLS[timer.__name__] = Pitfall(timer, mistake, remedy, needs)
        return PITFALLS[timer.__name__]

    return register


# ---------------------------------------------------------------- a device that works by itself


@pitfall(
    "The clock is read while the device is still working: only the launch was timed.",
    "Wait for the device before each reading of the clock.",
    needs="cuda",
)
def no_synchronization(fn: Function, device: Device = "cuda", *, samples: int = 7) -> Measurement:
    """`fn` queues work on `device` and returns."""
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    _wait(device)  # too late for the numbers; only leaves the device idle for what comes next
    return _measurement(times, device)


@pitfall(
    "The device is waited for, but only after the clock was read.",
    "Read the clock after the wait, not before it.",
    needs="cuda",
)
def synchronization_after_the_clock(
    fn: Function, device: Device = "cuda", *, samples: int = 7
) -> Measurement:
    """`fn` queues work on `device` and returns."""
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        fn()
        stop = time.perf_counter()
        _wait(device)
        times.append(stop - start)
    return _measurement(times, device)


def synchronized(fn: Function, device: Device = "cuda", *, samples: int = 7) -> Measurement:
    """The two timers above, repaired: the device is idle at both readings of the clock."""
    times = []
    for _ in range(samples):
        _wait(device)
        start = time.perf_counter()
        fn()
        _wait(device)
        times.append(time.perf_counter() - start)
    return _measurement(times, device)


# ---------------------------------------------------------------- what is inside the timed region


@pitfall(
    "The first call is timed, and with it everything that is done only once.",
    "Call the function a few times before the first sample.",
)
def first_call(fn: Function, device: Device = "cpu") -> Measurement:
    """`fn` must not have been called before."""
    start = time.perf_counter()
    fn()
    _wait(device)
    return _measurement([time.perf_counter() - start], device)


@pitfall(
    "What is needed once, such as drawing the input, is built inside the timed region.",
    "Build everything before the clock starts; time the call alone.",
)
def setup_inside(
    fn: Function, device: Device = "cpu", *, setup: Function, samples: int = 7
) -> Measurement:
    """`setup()` is what should have been done beforehand."""
    fn()
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        setup()
        fn()
        _wait(device)
        times.append(time.perf_counter() - start)
    return _measurement(times, device)


@pitfall(
    "The next batch is loaded between two steps, while the device waits: loading is timed too.",
    "Let a DataLoader's workers load it during the step, or time the step alone.",
)
def loading_inside(
    fn: Function, device: Device = "cpu", *, load: Function, samples: int = 7
) -> Measurement:
    """`load()` makes the next batch, `fn()` is the step; a loop of the two, one after the other."""
    fn()
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        load()
        fn()
        _wait(device)
        times.append(time.perf_counter() - start)
    return _measurement(times, device)


def loading_meanwhile(
    fn: Function, device: Device = "cpu", *, load: Function, samples: int = 7
) -> Measurement:
    """The same loop with loading in a thread: it shows only where it takes longer than the step.

    On a CPU the two share the cores that the step would have for itself.
    """
    from concurrent.futures import ThreadPoolExecutor

    fn()
    times = []
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(load)
        batch.result()
        for _ in range(samples):
            start = time.perf_counter()
            batch.result()
            batch = pool.submit(load)
            fn()
            _wait(device)
            times.append(time.perf_counter() - start)
        batch.result()
    return _measurement(times, device)


@pitfall(
    "The timed function prints, and printing takes time of its own.",
    "Store times in a list and print them after the last reading of the clock.",
)
def printing_inside(
    fn: Function, device: Device = "cpu", *, lines: int = 3, samples: int = 7
) -> Measurement:
    """`lines` lines are printed per call, as the thread's layer printed one per stage."""
    fn()
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        fn()
        for stage in range(lines):
            print(" stage", stage, time.perf_counter() - start)
        _wait(device)
        times.append(time.perf_counter() - start)
    return _measurement(times, device)


@pitfall(
    "Autograd records a graph although only inference is meant.",
    "Run inference under torch.inference_mode() or torch.no_grad().",
)
def recording_gradients(
    fn: Function, device: Device = "cpu", *, min_seconds: float = 0.1
) -> Measurement:
    """`fn` uses parameters that require gradients."""
    with torch.enable_grad():
        return timing.measure(fn, device, min_seconds=min_seconds)


# ---------------------------------------------------------------- one number from many


@pitfall(
    "One call is timed: the number is whatever happened during that call.",
    "Take many samples and state their median and spread.",
)
def single_call(fn: Function, device: Device = "cpu") -> Measurement:
    fn()  # warmed up at least
    _wait(device)
    return first_call(fn, device)


@pitfall(
    "The samples are averaged, so that one outlier, such as the first call, moves the result.",
    "Leave the warm-up out and take the median.",
)
def mean_with_outlier(fn: Function, device: Device = "cpu", *, samples: int = 7) -> Measurement:
    """The mean of the samples, as a measurement of one sample."""
    times = [first_call(fn, device).median for _ in range(samples)]
    return _measurement([sum(times) / len(times)], device)


# ---------------------------------------------------------------- memory


@pitfall(
    "Every call gets fresh memory from the operating system or the driver.",
    "State the allocator's setting beside the number; on CUDA never empty the cache in between.",
)
def fresh_memory(fn: Function, device: Device = "cpu", *, samples: int = 7) -> Measurement:
    """CPU: glibc as it comes, where this can be set. CUDA: the allocator's cache emptied.

    Right on the CPU only in a process whose glibc has not been set otherwise before.
    """
    if isinstance(device, torch.device) and device.type == "cuda":
        return single_calls(lambda: (torch.cuda.empty_cache(), fn()), device, samples=samples)
    if not machine.can_keep_freed_memory():
        return single_calls(fn, device, samples=samples)
    with machine.setting(allocator="glibc, default"):
        return single_calls(fn, device, samples=samples)


@pitfall(
    "The same small input is used again and again and never leaves the CPU's cache.",
    "Clear the cache between calls, or say that the input was in it.",
)
def hot_cache(fn: Function, device: Device = "cpu", *, samples: int = 7) -> Measurement:
    return single_calls(fn, device, samples=samples)


def cold_cache(fn: Function, device: Device = "cpu", *, samples: int = 7) -> Measurement:
    """The timer above, repaired: other memory is written through the cache before each call."""
    other = torch.zeros(EVICTION_BYTES // 4, device="cpu" if _is_model(device) else device)
    return single_calls(fn, device, samples=samples, before=lambda: other.add_(1))


def single_calls(
    fn: Function,
    device: Device = "cpu",
    *,
    samples: int = 7,
    before: Function = lambda: None,
) -> Measurement:
    """Warmed-up calls, one per sample, each after an untimed `before()`."""
    fn()
    times = []
    for _ in range(samples):
        before()
        _wait(device)
        start = time.perf_counter()
        fn()
        _wait(device)
        times.append(time.perf_counter() - start)
    return _measurement(times, device)


# ---------------------------------------------------------------- two numbers beside each other


@pitfall(
    "Candidates are measured one after the other, on a machine that changes meanwhile.",
    "Measure all candidates once per round, in random order, for many rounds.",
)
def one_after_the_other(
    candidates: Mapping[str, Function],
    baseline: str,
    device: Device = "cpu",
    *,
    seconds: float = 2.0,
) -> pd.DataFrame:
    """The table of `timing.compare`, each candidate getting its share of `seconds` at once."""
    share = seconds / len(candidates)
    measured = {
        name: timing.measure(fn, device, min_seconds=share, peak=False)
        for name, fn in candidates.items()
    }
    return timing.ratios(measured, baseline)


@pitfall(
    "torch.utils.benchmark.Timer runs on one thread unless told otherwise; the rest uses all.",
    "Pass num_threads=torch.get_num_threads(), and state the number of threads.",
)
def one_thread_by_default(
    fn: Function, device: Device = "cpu", *, min_seconds: float = 0.1
) -> Measurement:
    """Its flags say what Timer did, so that `timing.ratios` can refuse the comparison."""
    timer = Timer("fn()", globals={"fn": fn})  # num_threads=1
    found = timer.blocked_autorange(min_run_time=min_seconds)
    return _measurement(found.times, device, found.number_per_run, threads=1)


@pitfall(
    "One side rounds float32 to TF32 and the other does not: PyTorch's own default on CUDA.",
    "Set torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32 alike.",
    needs="cuda",
)
def tf32_on_one_side(
    candidates: Mapping[str, Function], baseline: str, device: Device = "cuda", **options
) -> pd.DataFrame:
    """The table of `timing.compare`; no guard can see that only convolutions obey the one flag."""
    with machine.setting(cudnn_tf32=True, matmul_tf32=False):
        return timing.compare(candidates, baseline, device, **options)


# ---------------------------------------------------------------- the size of a mistake


@dataclass(frozen=True)
class Contrast:
    """The wrong and the right number of several repetitions, in seconds or as ratios."""

    wrong: tuple[float, ...]
    right: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("wrong", "right"):
            values = tuple(getattr(self, name))
            if not values or not all(v > 0 for v in values):
                raise ValueError(f"{name} must be numbers above 0, got {values}")
            object.__setattr__(self, name, values)
        if len(self.wrong) != len(self.right):
            raise ValueError(
                f"wrong and right must be equally many, got {len(self.wrong)} and {len(self.right)}"
            )

    @property
    def median_wrong(self) -> float:
        return float(np.median(self.wrong))

    @property
    def median_right(self) -> float:
        return float(np.median(self.right))

    @property
    def factors(self) -> tuple[float, ...]:
        """wrong / right, repetition by repetition."""
        return tuple(w / r for w, r in zip(self.wrong, self.right, strict=True))

    @property
    def factor(self) -> float:
        """The median of `factors`: 1 is no error, below 1 is too fast, above 1 too slow."""
        return float(np.median(self.factors))

    @property
    def low(self) -> float:
        return min(self.factors)

    @property
    def high(self) -> float:
        return max(self.factors)

    @property
    def span(self) -> float:
        """high / low: 1 if all repetitions agree; of a single call this spread is the error."""
        return self.high / self.low

    @property
    def noticeable(self) -> bool:
        """Whether every repetition was wrong in the same direction."""
        return not self.low <= 1 <= self.high

    def __str__(self) -> str:
        low, high, factor = map(factor_text, (self.low, self.high, self.factor))
        spread = f"from {low} to {high} in {len(self.factors)} repetitions"
        if not self.noticeable:
            return f"no error that stands out, wrong / right went {spread}"
        return f"{factor} {'times' if self.factor >= 0.095 else 'of'} the right number ({spread})"


def factor_text(value: float) -> str:
    """A factor with three significant digits, below 1/10 as a fraction."""
    if value < 0.095:
        return f"1/{factor_text(1 / value)}"
    return f"{value:.3g}" if value < 999.5 else f"{float(f'{value:.3g}'):,.0f}"


def contrast(
    wrong: Callable[[], Measurement | float],
    right: Callable[[], Measurement | float],
    repeats: int = 5,
) -> Contrast:
    """Take the wrong and the right number in turn, `repeats` times."""
    repeats = _at_least_one("repeats", repeats)
    pairs = [(_number(wrong()), _number(right())) for _ in range(repeats)]
    return Contrast(*zip(*pairs, strict=True))


def recorded(rows: pd.DataFrame) -> pd.DataFrame:
    """The newest run of the mistakes on a GPU, its wrong medians beside the right ones.

    Args:
        rows: of `records.load`, whatever they measured.

    Returns:
        One row per mistake, layer ("conv" or "custom") and batch: wrong, right, wrong / right and
        where (GPU and date), of TF32 also "on both sides". Without such rows it is empty.
    """
    import pandas as pd

    rows = rows[(rows["experiment"] == "pitfalls") & (rows["status"] == "ok")]
    rows = rows[rows["device"].astype(str).str.startswith("cuda")]
    rows = rows[rows["session"] == rows["session"].max()]
    found: dict[tuple[str, str, int], dict] = {}
    for r in rows.itertuples():
        layer, _, part = r.part.rpartition(", ")
        layer = _LAYERS[layer or _TIMED.get(r.algorithm, "thread")]
        values = found.setdefault((r.algorithm, layer, int(r.batch)), {})
        values[_SIDES.get(part, part)] = r.median
        values["where"] = f"{r.machine}, {r.time[:10]}"
    index = pd.MultiIndex.from_tuples(list(found), names=["mistake", "layer", "batch"])
    columns = ["wrong", "on both sides", "right", "where"]
    table = pd.DataFrame(list(found.values()), index, columns)
    table.insert(3, "wrong / right", table["wrong"] / table["right"])
    return table


_LAYERS = {"native": "conv", "thread": "custom"}
_TIMED = {"first_call": "native", "hot_cache": "native"}  # what these timed; the others: the layer
_SIDES = {"launched": "wrong", "graph": "right", "defaults": "wrong", "on neither side": "right"}


@contextmanager
def background_load(after: float = 0.0, processes: int | None = None) -> Iterator[None]:
    """Other programs that keep the CPU busy from `after` seconds on until the block ends.

    Args:
        processes: one per core if None.
    """
    if not (isinstance(after, int | float) and 0 <= after < LOAD_SECONDS):
        raise ValueError(f"after must be seconds in 0 … {LOAD_SECONDS:g}, got {after!r}")
    count = _at_least_one("processes", os.cpu_count() if processes is None else processes)
    busy = (
        f"import time; time.sleep({after}); end = time.monotonic() + {LOAD_SECONDS}\n"
        "while time.monotonic() < end: pass"
    )
    load = [subprocess.Popen([sys.executable, "-I", "-S", "-c", busy]) for _ in range(count)]
    try:
        yield
    finally:
        for process in load:
            process.kill()
            process.wait()


def _measurement(times, device: Device, calls: int = 1, **flags) -> Measurement:
    resolution = time.get_clock_info("perf_counter").resolution
    flags = machine.flags() | flags
    return Measurement(tuple(times), calls, None, str(device), flags, "perf_counter", resolution)


def _wait(device: Device) -> None:
    if _is_model(device):
        device.synchronize()
    else:
        timing.synchronize(device)


def _is_model(device: Device) -> bool:
    return isinstance(device, ModelQueue)


def _number(value: Measurement | float) -> float:
    return value.median if isinstance(value, Measurement) else float(value)


def _function(name: str, value: object) -> Function:
    if not callable(value):
        raise ValueError(f"{name} must be a function without arguments, got {value!r}")
    return value


def _at_least_one(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


def _positive(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return value


def _device(name: str, value: Device) -> torch.device | ModelQueue:
    return value if _is_model(value) else parse_device(value)


def _candidates(name: str, value: object) -> Mapping[str, Function]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{name} must map names to functions, got {value!r}")
    for fn in value.values():
        _function(f"every one of {name}", fn)
    return value


_CHECKS = {
    "fn": _function,
    "setup": _function,
    "load": _function,
    "device": _device,
    "candidates": _candidates,
    "samples": _at_least_one,
    "lines": _at_least_one,
    "seconds": _positive,
    "min_seconds": _positive,
}
