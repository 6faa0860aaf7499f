"""`auto` takes the fastest of the correct algorithms, remembers it, and disturbs nobody."""

import json
import os
import random
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convlab import ALGORITHMS, Conv2d, ConvProblem, auto, explain, machine, timing
from convlab.algorithms import algorithm
from convlab.auto import measuring, memory

TIMED = measuring.rounds  # conftest.py puts made-up ones in its place
P = ConvProblem(2, 2, 4, 6, 5, kernel_size=3, padding=1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The file of choices; none at first."""
    monkeypatch.setenv("CONVLAB_CACHE", str(tmp_path / "cache"))
    auto.forget()
    yield tmp_path / "cache" / "auto.json"
    monkeypatch.setenv("CONVLAB_CACHE", "")
    auto.forget()


class Rounds:
    """Made-up rounds: calls every candidate once; `seconds` says what each takes, 1 if nothing."""

    def __init__(self):
        self.timed, self.seconds = [], {}

    def __call__(self, functions, device):
        for function in functions.values():
            function()
        self.timed.append(list(functions))
        return {name: [self.seconds.get(name, 1.0)] * 9 for name in functions}, {}


@pytest.fixture
def rounds(monkeypatch):
    made_up = Rounds()
    monkeypatch.setattr(measuring, "rounds", made_up)
    return made_up


def call(problem=P, *, bias=True, needs=(True, True, True), layout=None, dtype=torch.float32):
    x, weight, b = (t.requires_grad_(n) for t, n in zip(problem.inputs(dtype=dtype), needs))
    return run(layout(x) if layout else x, weight, b if bias else None, problem)


def run(x, weight, bias=None, problem=P):
    return ALGORITHMS["auto"](x, weight, bias, **problem.kwargs)


def saved(cache):
    return json.loads(cache.read_text())["choices"]


def chosen():
    """The algorithm of the latest choice."""
    return list(memory._choices.values())[-1].algorithm


def add(monkeypatch, name, function, **options):
    """Make `function(x, weight, bias, *sizes)` an algorithm, and a candidate."""

    def named(x, weight, bias, stride, padding, dilation, groups):
        return function(x, weight, bias, stride, padding, dilation, groups)

    named.__name__ = name
    monkeypatch.setitem(ALGORITHMS, name, algorithm("Made up.", **options)(named))
    monkeypatch.setattr(auto, "CANDIDATES", (*auto.CANDIDATES, name))


# Once per kind


def test_a_kind_is_measured_once(rounds):
    first = call()
    assert len(rounds.timed) == 1
    torch.testing.assert_close(first, F.conv2d(*P.inputs(), padding=1))
    x, weight, bias = P.inputs(seed=1, requires_grad=True)
    torch.testing.assert_close(run(x, weight, bias), F.conv2d(x, weight, bias, padding=1))
    run(x.detach().requires_grad_(), weight, bias)
    assert len(rounds.timed) == 1


def transposed(tensor):
    return tensor.mT.contiguous().mT


def nhwc(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def nhwc_weight(x, weight, bias):
    return run(x, nhwc(weight), bias)


CALLS = {
    "batch": lambda: call(P.replace(batch=3)),
    "width": lambda: call(P.replace(width=7)),
    "stride": lambda: call(P.replace(stride=2)),
    "padding": lambda: call(P.replace(padding=2)),
    "dilation": lambda: call(P.replace(dilation=2)),
    "groups": lambda: call(P.replace(groups=2)),
    "no bias": lambda: call(bias=False),
    "float64": lambda: call(dtype=torch.float64),
    "bfloat16": lambda: call(dtype=torch.bfloat16),
    "no gradients": lambda: call(needs=(False, False, False)),
    "gradients of the parameters": lambda: call(needs=(False, True, True)),
    "gradient of x": lambda: call(needs=(True, False, False)),
    "no_grad": torch.no_grad()(call),
    "channels_last": lambda: call(layout=nhwc),
    "strided": lambda: call(layout=transposed),
    "channels_last weight": lambda: nhwc_weight(*P.inputs(requires_grad=True)),
}


@pytest.mark.parametrize("other", CALLS.values(), ids=list(CALLS))
def test_another_kind_of_call_is_measured_anew(rounds, cache, other):
    call()
    for _ in range(2):
        other()
    assert len(rounds.timed) == 2
    assert len(saved(cache)) == 2


FLAGS = {
    **{"threads": 2, "onednn": False, "cudnn": False, "cudnn_benchmark": True},
    **{"cudnn_deterministic": True, "cudnn_tf32": False, "matmul_precision": "high"},
}


@pytest.mark.parametrize("flag", FLAGS)
def test_another_flag_is_measured_anew(rounds, cache, flag):
    call()
    before = machine.flags()
    with machine.setting(**{flag: FLAGS[flag]}):
        inside = machine.flags()
        assert inside != before
        call()
        call()
        assert machine.flags() == inside
    call()
    assert len(rounds.timed) == 2
    assert [c["kind"]["flags"][flag] for c in saved(cache)] == [before[flag], inside[flag]]


def test_the_allocator_is_part_of_the_kind(rounds, monkeypatch):
    call()
    monkeypatch.setattr(machine, "_allocator_kept", not machine._allocator_kept)
    call()
    assert len(rounds.timed) == 2


def test_deterministic_algorithms_are_a_kind_of_their_own(rounds):
    call()
    torch.use_deterministic_algorithms(True)
    try:
        call()
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(rounds.timed) == 2


def test_pass_and_gradients_are_those_that_are_needed(rounds, cache):
    call()
    call(needs=(False, True, False))
    torch.no_grad()(call)()
    found = [(c["kind"]["pass"], c["kind"]["gradients"]) for c in saved(cache)]
    assert found == [("train", ["x", "weight", "bias"]), ("train", ["weight"]), ("forward", [])]


@pytest.mark.parametrize("layout", [nhwc, transposed, lambda x: x[:, :1].expand_as(x), None])
def test_what_is_timed_is_like_the_call(monkeypatch, layout):
    """Shapes, strides, dtype and wanted gradients are the call's; the numbers are not."""
    seen = []

    def watch(x, weight, bias, *sizes):
        seen.append((x, weight, bias, torch.is_grad_enabled()))
        return F.conv2d(x, weight, bias, *sizes)

    def look(functions, device):
        seen.clear()
        functions["watched"]()
        return {name: [1.0] * 9 for name in functions}, {}

    add(monkeypatch, "watched", watch)
    monkeypatch.setattr(measuring, "rounds", look)
    x, weight, bias = P.inputs(dtype=torch.float64)
    x = layout(x) if layout else x
    weight.requires_grad_()
    run(x, weight, bias)
    ((*like, grad_on),) = seen
    assert grad_on
    for own, given in zip(like, (x, weight, bias)):
        assert own.shape == given.shape
        assert own.stride() == given.stride()
        assert own.dtype == given.dtype
        assert own.requires_grad == given.requires_grad
        assert own.data_ptr() != given.data_ptr()
        assert not torch.equal(own, given)


# Which one


def test_the_fastest_is_called(monkeypatch, rounds):
    calls = []

    def quick(*arguments):
        calls.append(1)
        return F.conv2d(*arguments)

    add(monkeypatch, "quick", quick)
    rounds.seconds["quick"] = 0.9
    call()
    before = len(calls)
    call()
    assert len(calls) == before + 1
    assert chosen() == "quick"


@pytest.mark.parametrize("others", [1.0, 1.1])
def test_native_wins_ties(rounds, others):
    rounds.seconds = dict.fromkeys(ALGORITHMS, others) | {"native": 1.0}
    call()
    assert chosen() == "native"


def test_another_must_be_faster_with_its_whole_interval(monkeypatch):
    def noisy(functions, device):
        samples = {name: [2.0] * 9 for name in functions} | {"native": [1.0] * 9}
        return samples | {"windows": [0.7, 1.3, 0.8, 1.2, 0.9, 0.9, 1.3, 0.7, 0.95]}, {}

    monkeypatch.setattr(measuring, "rounds", noisy)
    call()
    assert chosen() == "native"


def broken_value(x, weight, bias, *sizes):
    return F.conv2d(x, weight, bias, *sizes) * 1.001


def broken_gradient(x, weight, bias, *sizes):
    return F.conv2d(x, weight.detach(), bias, *sizes)


def broken_in_nhwc(x, weight, bias, *sizes):
    y = F.conv2d(x, weight, bias, *sizes)
    return y if x.is_contiguous() else y * 2


@pytest.mark.parametrize("broken", [broken_value, broken_gradient, broken_in_nhwc])
def test_a_wrong_candidate_is_never_chosen(monkeypatch, rounds, broken):
    add(monkeypatch, "broken", broken)
    rounds.seconds["broken"] = 0.01
    y = call(layout=nhwc)
    assert chosen() == "native"
    assert "broken" not in rounds.timed[0]
    torch.testing.assert_close(y, F.conv2d(*P.inputs(), padding=1))
    wrong = list(memory._choices.values())[-1].skipped["broken"]
    assert wrong.startswith("wrong: ")


def out_of_memory(*arguments):
    raise torch.OutOfMemoryError("no memory\nsecond line")


def test_what_cannot_be_timed_is_skipped_with_its_reason(monkeypatch, rounds):
    add(monkeypatch, "picky", F.conv2d, limits=lambda problem, device: "picky takes 1 image.")
    add(monkeypatch, "greedy", out_of_memory)
    monkeypatch.setattr(auto, "CANDIDATES", (*auto.CANDIDATES, "unknown"))
    rounds.seconds |= {"picky": 0.1, "greedy": 0.1}
    call()
    assert chosen() == "native"
    text = explain(P)
    assert "picky takes 1 image." in text
    assert "skipped: OutOfMemoryError: no memory\n" in text + "\n"
    assert "unknown" not in text
    assert not {"picky", "greedy", "unknown", "auto"} & set(rounds.timed[0])


def test_what_does_not_fit_into_memory_is_not_tried(monkeypatch, rounds):
    monkeypatch.setattr(machine, "free_bytes", lambda: 1000)
    call()
    assert rounds.timed == []
    assert "native" in explain(P).splitlines()[0]
    assert "unfold                skipped: needs about " in explain(P)


def test_where_native_fails_the_others_are_compared_with_each_other(monkeypatch, rounds):
    native = ALGORITHMS["native"]
    monkeypatch.setattr(native, "function", out_of_memory)
    rounds.seconds["windows"] = 0.5
    call()
    assert chosen() == "windows"


def test_failed_rounds_leave_native(monkeypatch, cache):
    def fail(functions, device):
        raise timing.UnfairComparison("somebody changed a flag")

    monkeypatch.setattr(measuring, "rounds", fail)
    torch.testing.assert_close(call(), F.conv2d(*P.inputs(), padding=1))
    assert chosen() == "native"
    assert "somebody changed a flag" in explain(P)
    assert not cache.exists(), "it may work the next time"


def test_an_interruption_leaves_nothing_locked(monkeypatch, rounds):
    def interrupt(functions, device):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "rounds", interrupt)
        with pytest.raises(KeyboardInterrupt):
            call()
    call()
    assert len(rounds.timed) == 1


@pytest.mark.parametrize("inner", ["as a candidate", "inside a candidate"])
def test_auto_never_measures_itself(monkeypatch, rounds, inner):
    if inner == "as a candidate":
        monkeypatch.setattr(auto, "CANDIDATES", ("auto", *auto.CANDIDATES))
    else:
        add(monkeypatch, "outer", ALGORITHMS["auto"].function)
    call()
    assert len(rounds.timed) == 1
    assert "auto" not in rounds.timed[0]
    assert inner == "as a candidate" or "outer" in rounds.timed[0]


@pytest.mark.parametrize("name", auto.CANDIDATES)
@pytest.mark.parametrize("layout", [nhwc, transposed, None])
def test_the_output_lies_in_memory_as_that_of_native(rounds, name, layout):
    rounds.seconds[name] = 0.5
    y = call(layout=layout)
    assert chosen() == name
    x, weight, bias = P.inputs()
    x = layout(x) if layout else x
    assert y.stride() == F.conv2d(x, weight, bias, padding=1).stride()


def test_flags_that_cannot_be_read_leave_native(rounds, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch._C, "_get_cublas_allow_tf32", refuse)
    torch.testing.assert_close(call(), F.conv2d(*P.inputs(), padding=1))
    assert rounds.timed == []


# Rounds


class Clock:
    """Stands in for `timing`: candidate → seconds per call; notes who was in each batch."""

    def __init__(self, monkeypatch, seconds, spread=0.0):
        self.seconds, self.spread, self.batches, self.noise = seconds, spread, [], random.Random(1)
        self.patterns = {}
        monkeypatch.setattr(timing, "once", lambda function, device: function())
        monkeypatch.setattr(timing, "interleaved", self.interleaved)

    def functions(self):
        return {name: lambda s=s: s for name, s in self.seconds.items()}

    def interleaved(self, functions, device, **options):
        self.batches.append(sorted(functions))
        return {name: self.measured(name) for name in functions}

    def measured(self, name):
        noise = (self.spread * self.noise.uniform(-1, 1) for _ in range(5))
        samples = tuple(self.seconds[name] * (1 + n) for n in noise)
        samples = self.patterns.get(name, samples)
        return timing.Measurement(samples, 1, None, "cpu", {}, "made up", 0.0)


CPU = torch.device("cpu")


def test_what_is_slow_at_once_gets_no_rounds(monkeypatch):
    clock = Clock(monkeypatch, {"native": 0.02, "a": 0.01, "b": 0.0301, "c": 0.0299})
    samples, slow = TIMED(clock.functions(), CPU)
    assert clock.batches[0] == ["a", "c", "native"]
    assert slow == {"b": "its first calls took 30.1 ms"}
    assert measuring.winner(samples) == "a"


def test_native_gets_rounds_however_slow_it_is(monkeypatch):
    clock = Clock(monkeypatch, {"native": 0.5, "a": 0.01, "b": 0.1})
    samples, slow = TIMED(clock.functions(), CPU)
    assert all("native" in batch for batch in clock.batches)
    assert slow.keys() == {"b"}
    assert measuring.winner(samples) == "a"


def test_close_ones_get_more_rounds_than_those_behind(monkeypatch):
    clock = Clock(monkeypatch, {"native": 1.0, "a": 0.8, "b": 0.79, "c": 1.5}, spread=0.1)
    samples, _ = TIMED(clock.functions(), CPU)
    assert "c" in clock.batches[0]
    assert "c" not in clock.batches[1]
    assert len(samples["c"]) == 5
    assert len(samples["native"]) >= measuring.ENOUGH
    assert measuring.winner(samples) in ("a", "b")


def test_native_alone_needs_no_more_rounds(monkeypatch):
    clock = Clock(monkeypatch, {"native": 1.0, "a": 1.5, "b": 2.0})
    samples, _ = TIMED(clock.functions(), CPU)
    assert clock.batches == [["a", "b", "native"]]
    assert measuring.winner(samples) == "native"


def test_rounds_end_when_their_time_is_over(monkeypatch):
    clock = Clock(monkeypatch, {"native": 1.0, "a": 1.0})
    clock.patterns["a"] = 0.5, 1.5, 0.6, 1.4, 1.0  # never settled
    monkeypatch.setattr(measuring, "SECONDS", 0.02)
    samples, _ = TIMED(clock.functions(), CPU)
    assert measuring.ENOUGH <= len(samples["native"]) == len(samples["a"])


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_within_three_percent_of_the_best(monkeypatch, seed):
    draw = random.Random(seed)
    seconds = {name: draw.uniform(0.8, 1.2) for name in "abcdef"} | {"native": 1.0}
    clock = Clock(monkeypatch, seconds, spread=0.03)
    samples, _ = TIMED(clock.functions(), CPU)
    assert seconds[measuring.winner(samples)] <= 1.03 * min(seconds.values())


def test_an_early_round_of_good_luck_does_not_count(monkeypatch):
    """The machine was faster when what dropped out was timed: ratios are of common rounds."""
    samples = {"native": [1.0] * 3 + [2.0] * 6, "a": [0.9] * 3 + [1.8] * 6, "b": [0.95] * 3}
    assert measuring.winner(samples) == "a"


def test_a_candidate_that_fails_at_full_size_is_skipped(monkeypatch):
    clock = Clock(monkeypatch, {"native": 1.0, "a": 0.9})
    samples, slow = TIMED({**clock.functions(), "b": out_of_memory}, CPU)
    assert samples.keys() == {"native", "a"}
    assert slow == {"b": "OutOfMemoryError: no memory"}


def test_if_all_fail_there_are_no_times():
    assert TIMED({"native": out_of_memory}, CPU) == ({}, {"native": "OutOfMemoryError: no memory"})


def test_really_timed(monkeypatch, cache):
    monkeypatch.setattr(measuring, "rounds", TIMED)
    monkeypatch.setattr(measuring, "SECONDS", 0.02)
    x, weight, bias = P.inputs(requires_grad=True)
    torch.testing.assert_close(run(x, weight, bias), F.conv2d(x, weight, bias, padding=1))
    (choice,) = saved(cache)
    assert choice["seconds"]["native"] > 0
    assert choice["algorithm"] in choice["seconds"]
    assert choice["seconds"].keys() | choice["skipped"].keys() == set(choice["kind"]["candidates"])


# The file

PROCESS = """
import json, sys
from convlab import ALGORITHMS, ConvProblem
from convlab.auto import measuring

count = 0

def rounds(functions, device):
    global count
    count += 1
    return {name: [0.5 if name == "windows" else 1.0] * 9 for name in functions}, {}

measuring.rounds = rounds
for batch in json.loads(sys.argv[1]):
    problem = ConvProblem(batch, 2, 4, 6, 5, kernel_size=3, padding=1)
    import torch
    torch.set_num_threads(1)
    ALGORITHMS["auto"](*problem.inputs(requires_grad=True), padding=1)
print(count)
"""


def process(*batches):
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, json.dumps(batches)], stdout=subprocess.PIPE, text=True
    )


def test_another_process_knows_the_choice(rounds, cache):
    assert process(2, 3).communicate()[0] == "2\n"
    assert [c["algorithm"] for c in saved(cache)] == ["windows", "windows"]
    assert process(2, 3).communicate()[0] == "0\n"
    call()
    assert rounds.timed == []
    assert chosen() == "windows"
    assert f"read from {cache}" in explain(P)


def test_processes_that_write_at_once_lose_nothing(cache):
    writers = [process(*range(first, 17, 4)) for first in (1, 2, 3, 4)]
    assert [w.communicate()[0] for w in writers] == ["4\n"] * 4
    assert sorted(c["kind"]["problem"]["batch"] for c in saved(cache)) == list(range(1, 17))
    assert {p.name for p in cache.parent.iterdir()} <= {"auto.json", "auto.json.lock"}


def test_what_others_wrote_is_known_after_a_write(rounds, cache):
    call()
    choice = saved(cache)[0]
    choice["kind"]["problem"]["batch"] = 7
    write(cache, [choice])
    call(P.replace(batch=3))
    call(P.replace(batch=7))
    assert len(rounds.timed) == 2
    assert [c["kind"]["problem"]["batch"] for c in saved(cache)] == [7, 3]


def write(cache, choices, version=memory.FORMAT):
    cache.parent.mkdir(exist_ok=True)
    cache.write_text(json.dumps({"format": version, "choices": choices}))


def test_the_file_is_read_once(rounds, cache, monkeypatch):
    reads, read = [], memory._read
    monkeypatch.setattr(memory, "_read", lambda path: reads.append(path) or read(path))
    call()
    assert len(reads) == 2, "before measuring, and when it is written"
    call()
    with torch.no_grad():
        call()
    assert len(reads) == 3


CORRUPTED = {
    "empty": b"",
    "half written": None,
    "text": b"hello",
    "bytes": b"\xff\xfe\x00",
    "a list": b"[]",
    "a number": b"1",
    "deep": b"[" * 100_000,
    "no choices": b'{"format": 1}',
    "another format": b'{"format": 999, "choices": []}',
    "choices of another kind": b'{"format": 1, "choices": [{"kind": {}}]}',
    "choices of text": b'{"format": 1, "choices": "abc"}',
    "numbers of text": b'{"format": 1, "choices": [{"kind": {}, "algorithm": "unfold", "seconds": '
    b'{"unfold": "x"}, "rounds": {}, "ratios": {}, "skipped": {}, "time": ""}]}',
}


@pytest.mark.parametrize("name", CORRUPTED)
def test_a_corrupted_file_is_told_once_and_replaced(rounds, cache, name):
    call()
    content = CORRUPTED[name] or cache.read_bytes()[:-20]
    auto.forget()
    cache.write_bytes(content)
    with pytest.warns(UserWarning, match=r"auto\.json: not as convlab\.auto writes it") as told:
        y, _ = call(), call(P.replace(batch=3))
    assert len(told) == 1
    torch.testing.assert_close(y, F.conv2d(*P.inputs(), padding=1))
    assert len(saved(cache)) == 2
    assert len(rounds.timed) == 3


@pytest.mark.parametrize("name", ["thread", "auto", "gone"])
def test_a_choice_that_is_no_candidate_is_not_followed(rounds, cache, name):
    call()
    choice = saved(cache)[0] | {"algorithm": name}
    auto.forget()
    write(cache, [choice])
    call()
    assert chosen() == "native"
    assert [c["algorithm"] for c in saved(cache)] == ["native"]


def unreadable(monkeypatch, cache):
    cache.parent.mkdir()
    cache.write_text("{}")

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)


def a_file_in_place_of_the_folder(monkeypatch, cache):
    cache.parent.write_text("")


def a_folder_in_place_of_the_file(monkeypatch, cache):
    cache.mkdir(parents=True)


def no_space(monkeypatch, cache):
    def refuse(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)


def locked(monkeypatch, cache):
    import filelock

    def refuse(*arguments, **options):
        raise filelock.Timeout("auto.json.lock")

    monkeypatch.setattr(filelock, "FileLock", refuse)


@pytest.mark.parametrize(
    "trouble",
    [unreadable, a_file_in_place_of_the_folder, a_folder_in_place_of_the_file, no_space, locked],
)
def test_a_file_that_cannot_be_used_is_told_once(rounds, cache, monkeypatch, trouble):
    with monkeypatch.context() as patch:
        trouble(patch, cache)
        with pytest.warns(UserWarning, match=r"auto\.json: ") as told:
            y, *_ = call(), call(), call(P.replace(batch=3))
    assert len(told) == 1
    torch.testing.assert_close(y, F.conv2d(*P.inputs(), padding=1))
    assert len(rounds.timed) == 2
    if trouble is unreadable:
        assert cache.read_text() == "{}"
    if trouble is a_folder_in_place_of_the_file:
        cache.rmdir()


def test_a_write_that_fails_leaves_the_file_as_it_was(rounds, cache, monkeypatch):
    call()
    before = cache.read_bytes()
    write_text = Path.write_text

    def half(path, text, *arguments):
        write_text(path, text[: len(text) // 2], *arguments)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.warns(UserWarning, match="No space left on device; choices are kept in memory"):
            call(P.replace(batch=3))
    assert cache.read_bytes() == before
    assert {p.name for p in cache.parent.iterdir()} <= {"auto.json", "auto.json.lock"}


def test_no_file_is_kept_if_asked(rounds, cache, monkeypatch):
    monkeypatch.setenv("CONVLAB_CACHE", "")
    assert memory.cache_file() is None
    call()
    call()
    assert len(rounds.timed) == 1
    assert not cache.parent.exists()


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/convlab/auto.json"),
        ("linux", {"XDG_CACHE_HOME": ""}, "/home/me/.cache/convlab/auto.json"),
        ("darwin", {"XDG_CACHE_HOME": "/xdg"}, "/home/me/Library/Caches/convlab/auto.json"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/convlab/auto.json"),
        ("win32", {"LOCALAPPDATA": ""}, "/home/me/AppData/Local/convlab/auto.json"),
    ],
)
def test_the_file_lies_in_the_users_cache_folder(monkeypatch, platform, variables, expected):
    with monkeypatch.context() as patch:
        patch.delenv("CONVLAB_CACHE")
        patch.setattr(sys, "platform", platform)
        patch.setattr(os.path, "expanduser", lambda path: path.replace("~", "/home/me"))
        for name, value in variables.items():
            patch.setenv(name, value)
        assert memory.cache_file() == Path(expected)


def test_forget(rounds, cache):
    call()
    assert cache.exists()
    auto.forget()
    assert not cache.exists()
    auto.forget()
    call()
    assert len(rounds.timed) == 2


# The caller is not disturbed


def test_random_numbers_go_on_as_if_nothing_had_been_measured(monkeypatch):
    monkeypatch.setattr(measuring, "rounds", TIMED)
    monkeypatch.setattr(measuring, "SECONDS", 0.02)

    def draws():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: NPY002

    found = []
    for measure in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        if measure:
            call(layout=nhwc)
        found.append(draws())
    assert found[0] == found[1]


def test_gradients_of_the_caller_are_not_touched(rounds):
    x, weight, bias = P.inputs(requires_grad=True)
    y = run(x, weight, bias)
    assert all(t.grad is None for t in (x, weight, bias))
    y.sum().backward()
    before = [t.grad.clone() for t in (x, weight, bias)]
    auto.forget()
    run(x, weight, bias)
    assert len(rounds.timed) == 2
    for tensor, grad in zip((x, weight, bias), before):
        assert torch.equal(tensor.grad, grad)


def test_the_modes_of_the_caller_are_as_before(rounds):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call().dtype == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled()
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with torch.no_grad():
        call()
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert call(P.replace(batch=3), needs=(False,) * 3).is_inference()
        assert torch.is_inference_mode_enabled()
    assert len(rounds.timed) == 3
    assert call(P.replace(batch=3)).requires_grad


def test_autocast_measures_the_format_it_casts_to(rounds, cache):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call()
    call(dtype=torch.bfloat16)
    assert [c["kind"]["dtype"] for c in saved(cache)] == ["bfloat16"]
    assert len(rounds.timed) == 1


def test_nothing_is_cast_while_measuring(monkeypatch):
    seen = []

    def look(functions, device):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return {name: [1.0] * 9 for name in functions}, {}

    monkeypatch.setattr(measuring, "rounds", look)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call()
        torch.no_grad()(call)()
    assert seen == [(False, True), (False, False)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_formats(rounds, dtype):
    y = call(dtype=dtype)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.conv2d(*P.inputs(dtype=dtype), padding=1))
    assert "windows" in rounds.timed[0]


def test_a_default_device_does_not_reach_the_check(rounds):
    tensors = P.inputs(requires_grad=True)
    torch.set_default_device("meta")
    try:
        run(*tensors)
    finally:
        torch.set_default_device(None)
    assert "windows" in rounds.timed[0]


def test_checkpointing_sees_only_what_the_call_saves(rounds):
    x, weight, bias = P.inputs(requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(run, x, weight, bias, use_reentrant=False)
    assert len(rounds.timed) == 1
    found = torch.autograd.grad(y.sum(), (x, weight, bias))
    expected = F.conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), (x, weight, bias)))


# Where nothing is measured


def test_an_empty_batch_is_not_measured(rounds, cache):
    empty = P.replace(batch=0)
    y = call(empty)
    assert y.shape == (0, 4, 6, 5)
    y.sum().backward()
    assert "empty batch" in explain(empty)
    assert rounds.timed == []
    assert not cache.exists()


@pytest.mark.parametrize("name", ["torch.compiler.is_compiling", "torch.jit.is_tracing"])
def test_nothing_is_measured_while_compiling(rounds, monkeypatch, name):
    monkeypatch.setattr(name, lambda: True)
    torch.testing.assert_close(call(), F.conv2d(*P.inputs(), padding=1))
    assert rounds.timed == []


def test_torch_compile(rounds):
    layer = Conv2d(2, 4, 3, padding=1, algorithm="auto")
    x = P.inputs()[0]
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(x), layer.double()(x.double()).float())
    assert len(rounds.timed) == 1, "only by the layer itself"


@pytest.mark.parametrize("known", [False, True])
def test_under_torch_func_it_is_native(rounds, known):
    rounds.seconds["windows"] = 0.5
    x, weight, bias = P.inputs()
    expected = F.conv2d(x, weight, bias, padding=1)
    if known:
        run(x, weight, bias)
        run(x[:1], weight, bias)
        rounds.timed.clear()
    one = torch.func.vmap(lambda image: run(image, weight, bias))
    torch.testing.assert_close(one(x), expected)
    gradient = torch.func.grad(lambda w: run(x, w, bias).sum())(weight)
    assert gradient.shape == weight.shape
    assert rounds.timed == []


def test_fake_tensors_are_not_measured(rounds):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x, weight, bias = (mode.from_tensor(t) for t in P.inputs())
        assert run(x, weight, bias).shape == P.output_shape
    pairs = (1, 1), (1, 1), (1, 1)
    y = ALGORITHMS["auto"].function(*(t.to("meta") for t in P.inputs()), *pairs, 1)
    assert y.shape == P.output_shape
    assert rounds.timed == []


# In use


def test_a_training_step_is_that_of_nn_conv2d(rounds):
    rounds.seconds["windows"] = 0.5
    reference = nn.Conv2d(2, 4, 3, padding=1)
    ours = Conv2d(2, 4, 3, padding=1, algorithm="auto")
    ours.load_state_dict(reference.state_dict())
    x = P.inputs()[0]
    for layer in (reference, ours):
        optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            layer(x).square().mean().backward()
            optimiser.step()
    torch.testing.assert_close(ours.state_dict(), reference.state_dict())
    assert chosen() == "windows"
    for layer in (reference, ours):
        layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), reference(x))
    assert len(rounds.timed) == 2


def test_double_backward(rounds):
    rounds.seconds["windows"] = 0.5
    tensors = P.inputs(dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(run, tensors)
    assert chosen() == "windows"


class Convolved(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        torch.manual_seed(0)
        with torch.no_grad():
            return Conv2d(2, 4, 3, padding=1, algorithm="auto")(P.inputs()[0])


def test_in_the_workers_of_a_data_loader(rounds, cache):
    found = list(torch.utils.data.DataLoader(Convolved(), num_workers=1))
    torch.testing.assert_close(found[0][0], Convolved()[0])
    assert len(saved(cache)) >= 1


def test_threads_measure_once(rounds, monkeypatch):
    errors, start = [], threading.Barrier(4)

    def work():
        try:
            start.wait()
            for batch in (2, 3):
                problem = P.replace(batch=batch)
                y = call(problem)
                torch.testing.assert_close(y, F.conv2d(*problem.inputs(), padding=1))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(rounds.timed) == 2


def test_a_thread_does_not_wait_for_ever(rounds, monkeypatch):
    monkeypatch.setattr(auto, "WAIT_SECONDS", 0.01)
    with auto._lock:
        torch.testing.assert_close(call(), F.conv2d(*P.inputs(), padding=1))
    assert rounds.timed == []
    call()
    assert len(rounds.timed) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_on_the_gpu(monkeypatch, cache, dtype):
    monkeypatch.setattr(measuring, "rounds", TIMED)
    problem = ConvProblem(4, 16, 32, 28, 28, kernel_size=3, padding=1)
    x, weight, bias = problem.inputs("cuda", dtype, requires_grad=True)
    y = run(x, weight, bias, problem)
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, padding=1), rtol=1e-2, atol=1e-2)
    (choice,) = saved(cache)
    assert choice["kind"]["machine"] == torch.cuda.get_device_name()
    assert choice["algorithm"] in explain(problem, "cuda", dtype)


# explain


def test_explain_tells_what_was_measured(rounds, cache):
    rounds.seconds = {"windows": 0.5e-3, "native": 1e-3, "unfold": 2e-3}
    text = explain(P)
    lines = text.splitlines()
    assert lines[0] == f"windows: {P}"
    assert f"{machine.name()}, cpu, float32, train, 1 thread" == lines[1]
    assert "measured 20" in lines[2]
    assert "in this process" in lines[2]
    assert lines[3].split() == ["windows", "500", "µs", "[0.5", "…", "0.5]", "9", "rounds"]
    assert lines[4].split() == ["native", "1", "ms", "9", "rounds"]
    assert explain(P) == text
    assert len(rounds.timed) == 1
    memory._choices.clear()
    memory._done.clear()
    assert explain(P) == text.replace("in this process", f"read from {cache}")
    assert len(rounds.timed) == 1


@pytest.mark.parametrize("padding", [1, "valid", "same"])
@pytest.mark.parametrize("kernel_size", [3, (2, 3)])
def test_explain_and_calls_share_what_they_measure(rounds, padding, kernel_size):
    problem = P.replace(kernel_size=kernel_size, padding=padding)
    explain(problem)
    call(problem)
    assert len(rounds.timed) == 1
    torch.no_grad()(call)(problem)
    explain(problem, pass_="forward")
    assert len(rounds.timed) == 2
    with torch.inference_mode():
        explain(problem)
        explain(problem, pass_="forward")
    assert len(rounds.timed) == 2
    explain(problem, dtype="float64")
    assert len(rounds.timed) == 3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"problem": "thread_b2"}, ["problem", "ConvProblem", "'thread_b2'"]),
        ({"device": "tpu"}, ["device", "'tpu'"]),
        ({"dtype": "int8"}, ["dtype", "float32", "'int8'"]),
        ({"pass_": "backward"}, ["pass_", "'forward' or 'train'", "'backward'"]),
    ],
    ids=str,
)
def test_bad_arguments_of_explain_are_named(arguments, named):
    with pytest.raises(ValueError, match=".*".join(named)):
        explain(**{"problem": P} | arguments)


def test_nothing_warns(rounds):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
        explain(P)
