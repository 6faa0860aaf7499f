"""`measure` and `compare`: how long a function takes, its spread, its peak memory, its flags.

On the CPU the clock is `time.perf_counter`, through `torch.utils.benchmark`; on CUDA it is a pair
of events on the stream, with the L2 cache cleared between samples.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import sys
import time
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from convlab import machine
from convlab.problem import parse_device

if TYPE_CHECKING:
    import pandas as pd

Function = Callable[[], object]
Result = TypeVar("Result")

BLOCK_SECONDS = 2e-3  # a CPU sample lasts at least this long: 10,000 ticks of a 0.2 µs clock call
EVENT_RESOLUTION = 0.5e-6  # seconds, documented for cudaEventElapsedTime
VERY_LONG_SECONDS = 1.0  # one call more is felt
LONG_SECONDS = 0.05  # calls this long are not settled: what ran before is small beside them
SETTLING_CALLS = 2  # untimed, before each sample: see `interleaved`
AFTER_FLAGS = 3  # the same after flags were set: malloc and the thread pool start anew
HEAP_ROUNDS, FEW_FAULTS = 6, 1000  # 4 MB in pages of 4 KiB: below a millisecond
LEAD_CYCLES = 400_000  # of a GPU's clock, about 0.2 ms: what a launch from Python takes
STOLEN_SHARE = 0.05  # of a sample's time, in CPU seconds: more, and the sample is taken again
ATTEMPTS = 3
CONFIDENCE = 0.95
RESAMPLES = 2000


class UnfairComparison(ValueError):
    """Two things measured under different flags; the message names the flag."""


@dataclass(frozen=True)
class Measurement:
    """Seconds per call.

    Attributes:
        samples: seconds per call, one number per block of `calls` calls.
        peak_bytes: memory above what was in use before the call, at its highest; None if not asked.
        device, flags: where and how it ran (`machine.flags`).
        clock, resolution: which clock, and its resolution in seconds.
    """

    samples: tuple[float, ...]
    calls: int
    peak_bytes: int | None
    device: str
    flags: dict
    clock: str
    resolution: float

    def _quantile(self, q: float) -> float:
        return float(np.quantile(self.samples, q))

    @property
    def median(self) -> float:
        return self._quantile(0.5)

    @property
    def q25(self) -> float:
        return self._quantile(0.25)

    @property
    def q75(self) -> float:
        return self._quantile(0.75)

    def __str__(self) -> str:
        text = f"{seconds(self.median)} [{seconds(self.q25)} … {seconds(self.q75)}]"
        text += f", {len(self.samples)} samples of {self.calls} calls"
        if self.peak_bytes is not None:
            text += f", peak {size(self.peak_bytes)}"
        return text


def measure(
    fn: Function,
    device: str | torch.device = "cpu",
    *,
    min_seconds: float = 0.3,
    min_samples: int = 7,
    max_seconds: float = 30.0,
    warmup: int = 2,
    clear_cache: bool = True,
    queued: bool = True,
    peak: bool = True,
) -> Measurement:
    """Time `fn()` after warming up; its return value is dropped.

    Args:
        fn: takes no arguments; on CUDA it may return before its work is done.
        min_seconds, min_samples: sampling goes on until both are reached …
        max_seconds: … or until this much time has gone into samples (at least one is taken).
        warmup: untimed calls before the first sample.
        clear_cache: CUDA only: write over the L2 cache before every sample.
        queued: CUDA only: the GPU waits for 0.2 ms before every sample, so that the host is ahead,
            as in a network whose GPU has work to do; else short calls show what launching takes.
        peak: run `fn` once more to find its peak memory.
    """
    device = parse_device(device)
    before = machine.flags()
    for _ in range(warmup):
        fn()
    taken = once(fn, device)
    wanted = min(max(min_seconds, min_samples * max(taken, BLOCK_SECONDS)), max_seconds)
    if device.type == "cpu":
        samples, calls = _cpu_samples(fn, wanted, min_samples, max_seconds)
    else:
        count = max(min_samples, int(wanted / max(taken, 1e-5)))
        samples, calls = _cuda_samples(fn, device, min(count, 1000), clear_cache, queued), 1
    peak_found = peak_bytes(fn, device) if peak else None
    changed = _differing(before, machine.flags())
    if changed:
        raise UnfairComparison(f"the function changed the flag {changed} while it was measured")
    return Measurement(tuple(samples), calls, peak_found, str(device), before, *clock(device))


@dataclass(frozen=True)
class Candidate:
    """A function for `compare` with flags of its own, set around each of its samples."""

    fn: Function
    flags: dict = field(default_factory=dict)

    def __call__(self) -> object:
        return self.fn()


def compare(
    candidates: Mapping[str, Function | Candidate],
    baseline: str,
    device: str | torch.device = "cpu",
    *,
    across: Iterable[str] = (),
    **options,
) -> pd.DataFrame:
    """Time the candidates in interleaved rounds; ratios to `baseline` with intervals.

    Args:
        candidates: name → function, or `Candidate(function, {"threads": 1})`.
        baseline: the name whose ratio is 1.
        across: flags that may differ, because their effect is what is being compared.
        options: `seconds`, `min_rounds`, `max_rounds`, `clear_cache`, `queued`, `peak`, `seed` of
            `interleaved`.

    Returns:
        One row per candidate: median, q25, q75 (seconds), ratio = median / baseline's median with
        its 95 % bootstrap interval ratio_low … ratio_high, rounds, peak_bytes.

    Raises:
        UnfairComparison: the candidates ran under different flags; names the flag.
        ValueError: `baseline` is not among the candidates.
    """
    if baseline not in candidates:
        raise ValueError(f"baseline must be one of {', '.join(candidates)}, got {baseline!r}")
    return ratios(interleaved(candidates, device, **options), baseline, across)


def ratios(
    measured: Mapping[str, Measurement], baseline: str, across: Iterable[str] = ()
) -> pd.DataFrame:
    """The table of `compare` from measurements whose samples belong to the same rounds."""
    import pandas as pd

    same_flags({name: m.flags for name, m in measured.items()}, across)
    base = measured[baseline]
    table = {}
    for name, m in measured.items():
        low, high = ratio_interval(m.samples, base.samples)
        table[name] = {
            "median": m.median,
            "q25": m.q25,
            "q75": m.q75,
            "ratio": m.median / base.median if base.median else float("nan"),
            "ratio_low": low,
            "ratio_high": high,
            "rounds": len(m.samples),
            "peak_bytes": m.peak_bytes,
        }
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("candidate")


def interleaved(
    candidates: Mapping[str, Function | Candidate],
    device: str | torch.device = "cpu",
    *,
    seconds: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 50,
    clear_cache: bool = True,
    queued: bool = True,
    peak: bool = True,
    seed: int = 0,
    known: Mapping[str, float] | None = None,
) -> dict[str, Measurement]:
    """Measure every candidate once per round, in a new random order each round.

    What drifts (clock frequency, heat, other programs) then falls on all candidates alike. The
    samples with the same index come from the same round. Before each sample the candidate runs
    untimed, unless it is long: another's large tensors leave caches and the C library's heap in a
    state that its first calls would pay for, and that `measure` never sees. A sample during which
    the host of a virtual machine took the CPU away is taken again (`undisturbed`).

    Args:
        seconds: about how long the rounds take together, within `min_rounds` … `max_rounds`.
        known: name → seconds of a first call that has been made already; a long one is not
            repeated to find out how long it takes.
    """
    device = parse_device(device)
    if not candidates:
        return {}
    items = {k: c if isinstance(c, Candidate) else Candidate(c) for k, c in candidates.items()}
    settle, flags, calls, round_seconds = {}, {}, {}, 0.0
    for name, item in items.items():
        with machine.setting(**item.flags):
            flags[name] = machine.flags()
            taken = (known or {}).get(name, 0.0)
            if taken < VERY_LONG_SECONDS:
                taken = once(item.fn, device)
            if taken < LONG_SECONDS:  # else what the first call costs once is small beside it
                taken = once(item.fn, device)
            calls[name] = max(1, round(BLOCK_SECONDS / taken)) if device.type == "cpu" else 1
            settle[name] = AFTER_FLAGS if item.flags else SETTLING_CALLS
            if taken >= LONG_SECONDS and not item.flags:
                settle[name] = 0
            round_seconds += taken * (calls[name] + settle[name])
    if machine.keeps_freed_memory():
        grow_heap([item.fn for item in items.values()])
    rounds = int(min(max(seconds / round_seconds, min_rounds), max_rounds))
    order, samples = list(items), {name: [] for name in items}
    shuffle = random.Random(seed).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            with machine.setting(**items[name].flags):
                for _ in range(settle[name]):
                    items[name]()
                how = calls[name], clear_cache, queued
                take = functools.partial(_sample, items[name].fn, device, *how)
                found = undisturbed(take)
                changed = _differing(flags[name], machine.flags())
            if changed:
                raise UnfairComparison(f"candidate {name!r} changed the flag {changed}")
            samples[name].append(found)
    measured = {}
    for name, item in items.items():
        with machine.setting(**item.flags):
            top = peak_bytes(item.fn, device) if peak else None
        measured[name] = Measurement(
            tuple(samples[name]), calls[name], top, str(device), flags[name], *clock(device)
        )
    return measured


def grow_heap(functions: Sequence[Function]) -> None:
    """Call all in turn until they find what memory they need in the heap, at most six times.

    Where freed memory is kept, a heap still grows for some rounds, until its free blocks fit
    whatever is asked for; those rounds page-fault like no later one.
    """
    for _ in range(HEAP_ROUNDS):
        if (page_faults(lambda: [fn() for fn in functions]) or 0) <= FEW_FAULTS:
            return


def undisturbed(take: Callable[[], Result]) -> Result:
    """`take()`, again if the host of a virtual machine gave more than 5 % of its time to others.

    Of `ATTEMPTS` disturbed ones the least disturbed. Which one is kept depends on the host's count
    (`machine.stolen_seconds`) and not on what was measured.
    """
    tried = []
    for attempt in range(ATTEMPTS):
        stolen, start = machine.stolen_seconds(), time.perf_counter()
        result = take()
        share = (machine.stolen_seconds() - stolen) / max(time.perf_counter() - start, 1e-9)
        tried.append((share, attempt, result))
        if share <= STOLEN_SHARE:
            break
    return min(tried, key=lambda each: each[:2])[2]


def same_flags(flags: Mapping[str, Mapping], across: Iterable[str] = ()) -> None:
    """UnfairComparison if two of the named sets of flags differ in a flag not in `across`."""
    across = set(across)
    if unknown := across - machine.FLAGS.keys():
        raise ValueError(f"across must name flags of {', '.join(machine.FLAGS)}, got {unknown}")
    (first, reference), *others = flags.items()
    for name, other in others:
        for flag in sorted((reference.keys() | other.keys()) - across):
            if reference.get(flag) != other.get(flag):
                raise UnfairComparison(
                    f"{first!r} and {name!r} were measured under different flags: {flag} is "
                    f"{reference.get(flag)!r} and {other.get(flag)!r}. Set it alike, or name it in "
                    f"across=({flag!r},) if its effect is what you compare."
                )


def ratio_interval(
    a: Sequence[float], b: Sequence[float], seed: int = 0, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Bootstrap interval of median(a) / median(b).

    Samples of equal number are resampled together, round by round; others on their own.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    generator = np.random.default_rng(seed)
    i = generator.integers(len(a), size=(RESAMPLES, len(a)))
    j = i if len(a) == len(b) else generator.integers(len(b), size=(RESAMPLES, len(b)))
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = np.median(a[i], axis=1) / np.median(b[j], axis=1)
    if not np.isfinite(drawn).all():  # a clock too coarse for what it timed shows zero
        return 0.0, float("inf")
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def peak_bytes(fn: Function, device: str | torch.device = "cpu") -> int:
    """Highest memory in use during `fn()` above what was in use before, in bytes.

    CUDA: the caching allocator's statistics. CPU: the allocation events of `torch.profiler`,
    which see PyTorch's tensors and not the scratch memory of the libraries it calls.
    """
    device = parse_device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = fn()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    highest = current = 0
    for change in _allocations(fn):
        current += change
        highest = max(highest, current)
    return highest


def allocated_bytes(fn: Function) -> int:
    """Sum of all CPU allocations PyTorch makes during `fn()`, in bytes."""
    return sum(change for change in _allocations(fn) if change > 0)


def _allocations(fn: Function) -> list[int]:
    """CPU allocations (> 0) and releases (< 0) during `fn()`, in order, in bytes."""
    gc.collect()
    events = profile(fn, profile_memory=True).kineto_results.events()
    memory = [e for e in events if e.name() == "[memory]" and e.device_type().name == "CPU"]
    return [e.nbytes() for e in sorted(memory, key=lambda e: e.start_ns())]


def page_faults(fn: Function) -> int | None:
    """Pages that the operating system hands out during `fn()`; None where it does not say."""
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        return None
    before = getrusage(RUSAGE_SELF).ru_minflt
    fn()
    return getrusage(RUSAGE_SELF).ru_minflt - before


def launches(fn: Function) -> int:
    """Kernel launches on CUDA during `fn()`, as the profiler counts them."""
    events = profile(fn, "cuda").kineto_results.events()
    return sum("LaunchKernel" in e.name() for e in events)


def profile(fn: Function, device: str | torch.device = "cpu", **options):
    """`fn()` once under PyTorch's profiler → its `torch.autograd.profiler.profile`."""
    if torch.device(device).type == "cuda":
        options["use_device"] = "cuda"
    with _stderr_silenced(), torch.autograd.profiler.profile(**options) as profiler:
        result = fn()
        synchronize(device)
        del result  # its release is an event too
    return profiler


@contextlib.contextmanager
def _stderr_silenced() -> Iterator[None]:
    """File descriptor 2 closed to the log lines that PyTorch's profiler writes from C++."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def synchronize(device: str | torch.device) -> None:
    """Wait until `device` has done all its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def once(fn: Function, device: str | torch.device) -> float:
    """Seconds of one call, whatever happens in it: for planning."""
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    return max(time.perf_counter() - start, 1e-7)


def _sample(
    fn: Function, device: torch.device, calls: int, clear_cache: bool, queued: bool
) -> float:
    if device.type == "cuda":
        return _cuda_samples(fn, device, 1, clear_cache, queued)[0]
    return timeit.Timer(fn).timeit(calls) / calls


def _cpu_samples(
    fn: Function, wanted: float, at_least: int, longest: float
) -> tuple[list[float], int]:
    from torch.utils.benchmark import Timer

    timer = Timer("fn()", globals={"fn": fn}, num_threads=torch.get_num_threads())
    found = timer.blocked_autorange(min_run_time=wanted)
    samples, calls = list(found.times), found.number_per_run
    while len(samples) < at_least and sum(samples) * calls < longest:  # it has become slower
        samples.append(timeit.Timer(fn).timeit(calls) / calls)
    return samples, calls


def _cuda_samples(
    fn: Function, device: torch.device, count: int, clear_cache: bool, queued: bool
) -> list[float]:
    scratch = _l2_scratch(device) if clear_cache else None
    events = []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if scratch is not None:
            scratch.zero_()
        if queued:
            torch.cuda._sleep(LEAD_CYCLES)
        start.record()
        fn()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in events]


_scratch: dict[torch.device, torch.Tensor] = {}


def _l2_scratch(device: torch.device) -> torch.Tensor:
    """Four times the L2 cache, kept, so that it does not count as the function's memory."""
    if device not in _scratch:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        _scratch[device] = torch.empty(4 * max(l2, 2**24), dtype=torch.int8, device=device)
    return _scratch[device]


def clock(device: str | torch.device) -> tuple[str, float]:
    """The name of the clock for `device` and its resolution in seconds."""
    if torch.device(device).type == "cuda":
        return "CUDA events", EVENT_RESOLUTION
    info = time.get_clock_info("perf_counter")
    return "perf_counter", info.resolution


def _differing(a: Mapping, b: Mapping) -> str | None:
    return next((k for k in a if a[k] != b.get(k)), None)


def seconds(value: float) -> str:
    """A time with three significant digits and its unit."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1:
            return f"{_digits(value * factor)} {unit}"
    return f"{value * 1e9:.3g} ns"


def size(value: float) -> str:
    """Bytes with three significant digits and a decimal unit."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= factor:
            return f"{_digits(value / factor)} {unit}"
    return f"{value:.0f} B"


def _digits(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{float(f'{value:.3g}'):,.0f}"
