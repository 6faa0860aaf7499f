"""`measure` and `compare`: what was timed, on which clock, under which flags. Never how fast."""

import itertools
import mmap
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils import benchmark

from convlab import PROBLEMS, compare, machine, measure, timing
from convlab.timing import Candidate, UnfairComparison, interleaved, ratio_interval


def add():
    return sum(range(300))


def matmul():
    a = torch.ones(128, 128)
    return lambda: a @ a


def convolution():
    x, weight, bias = PROBLEMS["thread_b2"].inputs()
    return lambda: F.conv2d(x, weight, bias, padding=1)


@pytest.mark.parametrize("make", [matmul, convolution])
def test_measure_agrees_with_pytorchs_own_timer(make):
    fn = make()
    timer = benchmark.Timer("fn()", globals={"fn": fn}, num_threads=1)
    seen = []
    for _ in range(3):  # machines are noisy; a clock that is wrong is wrong every time
        theirs = np.quantile(timer.blocked_autorange(min_run_time=0.3).times, [0.25, 0.75])
        with machine.setting(threads=1):
            ours = measure(fn, min_seconds=0.3, peak=False)
        seen.append((ours.q25, ours.q75, *theirs.tolist()))
        if ours.q25 <= theirs[1] and theirs[0] <= ours.q75:
            return
    pytest.fail(f"quartiles do not overlap: {seen}")


def test_measure_of_a_known_time():
    found = measure(lambda: time.sleep(0.005), min_seconds=0, min_samples=5, peak=False)
    assert found.samples[0] >= 0.005
    assert found.q25 <= found.median <= found.q75
    assert len(found.samples) >= 5
    assert found.peak_bytes is None
    assert (found.device, found.flags) == ("cpu", machine.flags())
    assert found.clock == "perf_counter"
    assert 0 < found.resolution < 1e-3


def test_measure_takes_its_samples_of_a_function_that_becomes_slower():
    calls = itertools.count()
    fn = lambda: time.sleep(0.001 if next(calls) < 3 else 0.03)
    assert len(measure(fn, min_seconds=0, min_samples=7, peak=False).samples) >= 7


def test_measure_ends_after_the_longest_time():
    calls = []
    fn = lambda: (calls.append(0), time.sleep(0.02))
    found = measure(fn, min_seconds=60, min_samples=1000, max_seconds=0.1, warmup=1, peak=False)
    assert 1 <= len(found.samples) <= 6
    assert len(calls) <= 20


@pytest.mark.parametrize("device", ["tpu", "mps"])
def test_a_bad_device_is_named(device):
    for call in (
        lambda: measure(add, device),
        lambda: compare({"a": add}, "a", device),
        lambda: timing.peak_bytes(add, device),
    ):
        with pytest.raises(ValueError, match=f"device .*{device}"):
            call()


QUICK = {"min_rounds": 9, "max_rounds": 9, "peak": False}


def test_a_function_compared_with_itself_is_as_fast():
    contained = 0
    for seed in range(20):
        table = compare({"a": add, "b": add}, baseline="a", seed=seed, **QUICK)
        contained += table.ratio_low["b"] <= 1 <= table.ratio_high["b"]
    assert contained >= 15


def test_the_table_of_compare():
    table = compare({"a": add, "b": matmul()}, baseline="b", **QUICK | {"peak": True})
    assert list(table.index) == ["a", "b"]
    assert list(table.columns) == [
        *("median", "q25", "q75", "ratio", "ratio_low", "ratio_high", "rounds", "peak_bytes")
    ]
    assert list(table.peak_bytes) == [0, 128 * 128 * 4]
    assert list(table.rounds) == [9, 9]
    assert list(table.loc["b", ["ratio", "ratio_low", "ratio_high"]]) == [1, 1, 1]
    assert table.ratio["a"] == table["median"]["a"] / table["median"]["b"]


def test_rounds_are_paired_and_their_order_is_random(monkeypatch):
    monkeypatch.setattr(machine, "stolen_seconds", lambda: 0.0)  # else a sample may be taken again
    order = []
    slow = {name: lambda name=name: (order.append(name), time.sleep(0.002)) for name in "abc"}
    interleaved(slow, max_rounds=20, min_rounds=20, peak=False)
    each = timing.SETTLING_CALLS + 1
    turns = order[-60 * each :: each]
    rounds = list(zip(*[iter(turns)] * 3, strict=True))
    assert [name for name in turns for _ in range(each)] == order[-60 * each :]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 3

    again = order.copy()
    order.clear()
    interleaved(slow, max_rounds=20, min_rounds=20, peak=False)
    assert order == again, "the order is drawn from the seed"


@pytest.mark.parametrize(
    ("known", "repeated"), [({"a": 2.0}, False), ({"a": 0.9}, True), ({}, True)]
)
def test_a_first_call_that_took_long_is_not_repeated_to_learn_how_long(known, repeated):
    calls = []
    one_round = {"seconds": 0, "min_rounds": 1, "max_rounds": 1, "peak": False}
    found = interleaved({"a": lambda: calls.append(time.sleep(0.06))}, known=known, **one_round)
    assert len(calls) == (2 if repeated else 1)
    assert len(found["a"].samples) == 1


def test_one_call_takes_as_long_as_it_takes():
    assert timing.once(lambda: time.sleep(0.01), "cpu") >= 0.01
    assert timing.once(lambda: None, "cpu") > 0


def test_an_interval_by_hand():
    assert ratio_interval([3.0] * 5, [2.0] * 7) == (1.5, 1.5)
    low, high = ratio_interval([1, 2, 3, 4, 5], [1.0] * 6)
    assert (low, high) == ratio_interval([1, 2, 3, 4, 5], [1.0] * 6)
    assert 1 <= low < 3 < high <= 5


def test_a_drift_that_both_share_leaves_the_ratio_exact():
    drift = np.random.default_rng(0).uniform(1, 10, size=11)
    assert ratio_interval(drift, 2 * drift) == (0.5, 0.5)
    low, high = ratio_interval(drift, 2 * drift[1:])
    assert low < 0.5 < high, "samples that are not paired cannot know of the drift"


def test_the_interval_covers_the_true_ratio_as_often_as_it_says():
    generator = np.random.default_rng(1)
    contained = 0
    for _ in range(200):
        a, b = generator.lognormal(sigma=0.1, size=(2, 15))
        low, high = ratio_interval(3 * a, b)
        contained += low <= 3 <= high
    assert contained >= 180


def test_different_flags_are_refused_by_name_unless_they_are_what_is_compared():
    threads = torch.get_num_threads()
    pair = {"all": add, "more": Candidate(add, {"threads": threads + 1})}
    with pytest.raises(UnfairComparison, match=rf"threads is {threads} and {threads + 1}"):
        compare(pair, baseline="all", **QUICK)
    table = compare(pair, baseline="all", across=("threads",), **QUICK)
    assert list(table.index) == ["all", "more"]
    assert torch.get_num_threads() == threads


def test_candidates_run_under_their_flags():
    threads = torch.get_num_threads()
    seen = {"all": set(), "more": set()}
    fns = {name: lambda name=name: seen[name].add(torch.get_num_threads()) for name in seen}
    found = interleaved({**fns, "more": Candidate(fns["more"], {"threads": threads + 1})}, **QUICK)
    assert seen == {"all": {threads}, "more": {threads + 1}}
    assert found["more"].flags == found["all"].flags | {"threads": threads + 1}


@pytest.mark.skipif(not machine.can_keep_freed_memory(), reason="needs glibc's malloc as it is")
def test_flags_have_taken_effect_when_a_sample_is_taken():
    """malloc told to keep memory has some to keep: the timed call, the last, has no page faults."""
    resource = pytest.importorskip("resource")
    faults, count = np.zeros(1000, int), itertools.count()  # a list would grow, and so use malloc

    def allocate():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**23)
        faults[next(count)] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        time.sleep(0.002)  # so that a sample is one call

    kept = Candidate(allocate, {"allocator": f"glibc, {machine.KEEP_FREED}"})
    found = interleaved({"kept": kept}, **QUICK)["kept"]
    assert found.calls == 1
    timed = faults[: next(count)][:: -(timing.AFTER_FLAGS + 1)][:9]
    assert np.median(timed) < 100 < faults.max()


@pytest.mark.parametrize("run", [measure, lambda fn: compare({"a": fn}, "a", **QUICK)])
def test_a_function_that_changes_a_flag_is_refused(run):
    before = torch.get_float32_matmul_precision()
    other = "high" if before == "highest" else "highest"
    try:
        with pytest.raises(UnfairComparison, match="matmul_"):
            run(lambda: torch.set_float32_matmul_precision(other))
    finally:
        torch.set_float32_matmul_precision(before)


def test_bad_names_are_named():
    with pytest.raises(ValueError, match="baseline must be one of a, b, got 'c'"):
        compare({"a": add, "b": add}, baseline="c")
    with pytest.raises(ValueError, match="'thread'"):
        compare({"a": Candidate(add, {"thread": 1})}, baseline="a")
    with pytest.raises(ValueError, match="'thread'"):
        compare({"a": add}, baseline="a", across=("thread",), **QUICK)


@pytest.mark.parametrize(
    ("fn", "peak"),
    [
        (lambda: torch.empty(1000), 4000),
        (lambda: torch.empty(1000, dtype=torch.float64), 8000),
        (lambda: [torch.empty(1000), torch.empty(500)], 6000),
        (lambda: torch.empty(1000) + torch.empty(1000), 12000),
        (lambda: tuple(torch.empty(1000) for _ in range(10)), 40000),
        (lambda: [torch.empty(n).numel() for n in (10, 5000, 20)], 20000),
        (lambda: BUFFER.add_(BUFFER), 0),
        (lambda: BUFFER.view(10, 10).t(), 0),
        (lambda: None, 0),
    ],
)
def test_peak_memory_is_exact(fn, peak):
    assert timing.peak_bytes(fn) == peak


BUFFER = torch.zeros(100)


def test_all_allocations_add_up():
    assert timing.allocated_bytes(lambda: [torch.empty(10).numel() for _ in range(5)]) == 200
    assert timing.allocated_bytes(lambda: (torch.empty(10), torch.empty(20))) == 120


def written(pages):
    """A function that writes into so many pages that it has just been given."""

    def fn():
        memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        for page in range(pages):
            memory[page * mmap.PAGESIZE] = 1
        memory.close()

    return fn


@pytest.mark.skipif(sys.platform != "linux", reason="counted as Linux counts")
def test_every_page_that_is_first_written_is_a_page_fault():
    fn = written(2000)
    assert 2000 <= timing.page_faults(fn) < 3000
    assert timing.page_faults(written(10)) < 1000


@pytest.mark.skipif(
    machine.allocator() != "glibc, default" or machine.describe()["huge_pages"] == "always",
    reason="needs glibc's malloc as it is, and small pages",
)
def test_a_large_tensor_page_faults_anew_in_every_call():
    """Above 32 MiB malloc never keeps memory; in a process of its own, where none was kept."""
    code = """
import mmap, torch
from convlab import timing
print(*[timing.page_faults(lambda: torch.ones(2**24)) - 2**26 // mmap.PAGESIZE for _ in "123"])
buffer = torch.ones(2**24)
print(timing.page_faults(lambda: buffer.add_(1)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    more, again = done.stdout.splitlines()
    assert all(int(faults) >= 0 for faults in more.split())
    assert int(again) < 1000


def test_where_the_system_does_not_count_page_faults_there_are_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert timing.page_faults(written(10)) is None


def test_the_profiler_writes_nothing():
    """In a process of its own, because PyTorch's profiler logs when it is first used."""
    code = "import torch; from convlab.timing import profile; profile(lambda: torch.ones(3))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")


def test_an_error_in_the_function_passes_through_and_the_profiler_ends():
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            timing.profile(lambda: 1 / 0)
    sys.stderr.write("still there")
    assert timing.peak_bytes(lambda: torch.empty(10)) == 40


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.0, "2 s"),
        (123.4, "123 s"),
        (0.0123456, "12.3 ms"),
        (1e-3, "1 ms"),
        (4.5678e-6, "4.57 µs"),
        (12e-9, "12 ns"),
        (0.0, "0 ns"),
    ],
)
def test_a_time_in_words(value, text):
    assert timing.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234567, "1.23 MB"), (-2.5e9, "-2.5 GB")],
)
def test_bytes_in_words(value, text):
    assert timing.size(value) == text


def test_a_measurement_in_words():
    found = timing.Measurement((1e-3, 2e-3, 3e-3), 4, 5000, "cpu", {}, "perf_counter", 1e-9)
    assert str(found) == "2 ms [1.5 ms … 2.5 ms], 3 samples of 4 calls, peak 5 kB"


@pytest.mark.gpu
def test_on_the_gpu():
    a = torch.ones(2048, 2048, device="cuda")
    found = measure(lambda: a @ a, "cuda")
    assert (found.clock, found.calls) == ("CUDA events", 1)
    assert found.peak_bytes >= a.nbytes
    assert timing.peak_bytes(lambda: torch.empty(2**20, device="cuda"), "cuda") == 2**22
    assert timing.launches(lambda: a + a) == 1


@pytest.mark.parametrize(
    ("stolen", "taken", "calls"),
    [
        ([0.0, 0.0], "first", 1),
        ([0.0, 9.0, 9.0, 9.0], "second", 2),
        ([0.0, 9.0, 9.0, 11.0, 11.0, 15.0], "second", 3),
    ],
    ids=["undisturbed", "once", "always: the least"],
)
def test_a_sample_that_the_host_disturbed_is_taken_again(monkeypatch, stolen, taken, calls):
    counted, made = iter(stolen), iter(["first", "second", "third"])
    monkeypatch.setattr(machine, "stolen_seconds", lambda: next(counted))
    assert timing.undisturbed(lambda: next(made)) == taken
    assert len(list(made)) == 3 - calls


def test_stolen_seconds_never_run_backwards():
    first = machine.stolen_seconds()
    assert 0 <= first <= machine.stolen_seconds()


def test_the_heap_grows_until_a_round_hands_out_few_pages(monkeypatch):
    faults, calls = iter([90_000, 5_000, 12]), []
    monkeypatch.setattr(timing, "page_faults", lambda fn: (fn() and None) or next(faults))
    timing.grow_heap([lambda: calls.append("a"), lambda: calls.append("b")])
    assert calls == ["a", "b"] * 3


def test_the_heap_is_not_grown_forever(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "page_faults", lambda fn: (fn() and None) or 10**6)
    timing.grow_heap([lambda: calls.append(1)])
    assert len(calls) == timing.HEAP_ROUNDS


def test_rounds_that_grow_the_heap_are_not_sampled(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "grow_heap", lambda functions: [f() for f in functions * 100])
    monkeypatch.setattr(timing.machine, "keeps_freed_memory", lambda: True)
    found = timing.interleaved(
        {"a": lambda: calls.append(1)}, seconds=0.01, min_rounds=2, max_rounds=2, peak=False
    )
    assert len(calls) > 100
    assert len(found["a"].samples) == 2
