"""Each wrong timer makes its mistake, and says nothing false about how it was run."""

import inspect
import io
import threading
import time
from contextlib import redirect_stdout

import pytest
import torch

from convlab import machine, pitfalls, records, timing
from convlab.pitfalls import PITFALLS, Contrast, ModelQueue, contrast
from convlab.problems import thread_problem

WORK = 0.02  # seconds of a piece of work that is long against everything else

THIRTEEN = {
    "no_synchronization",
    "synchronization_after_the_clock",
    "first_call",
    "single_call",
    "setup_inside",
    "printing_inside",
    "mean_with_outlier",
    "recording_gradients",
    "fresh_memory",
    "hot_cache",
    "one_after_the_other",
    "one_thread_by_default",
    "tf32_on_one_side",
}
NEEDS_OPTIONS = {
    "setup_inside": {"setup": lambda: None},
    "loading_inside": {"load": lambda: None},
}
ON_THE_CPU = sorted(n for n, p in PITFALLS.items() if p.needs is None and not p.compares)


class FirstCallSlow:
    """Takes `WORK` seconds at its first call and no time after it."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.calls == 1:
            time.sleep(WORK)


def nap():
    time.sleep(WORK)


def nothing():
    pass


@pytest.fixture
def device():
    with ModelQueue() as queue:
        yield queue


# ---------------------------------------------------------------- the registry


def test_all_mistakes_are_registered():
    assert set(PITFALLS) >= THIRTEEN


@pytest.mark.parametrize("name", PITFALLS)
def test_a_pitfall_says_what_is_wrong_and_what_to_do(name):
    p = PITFALLS[name]
    assert p.name == name
    assert p is getattr(pitfalls, name)
    for sentence in (p.mistake, p.remedy):
        assert sentence[0].isupper() or sentence.startswith("torch.")
        assert sentence.endswith(".")
    assert p.needs in (None, "cuda")
    assert p.mistake in repr(p)


@pytest.mark.parametrize("name", PITFALLS)
def test_signatures_are_those_of_measure_and_compare(name):
    p = PITFALLS[name]
    honest = timing.compare if p.compares else timing.measure
    expected = [k for k in inspect.signature(honest).parameters if k in positional(honest)]
    assert list(positional(p)) == expected


def positional(function):
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_returns_a_measurement_with_flags_and_clock(name):
    with redirect_stdout(io.StringIO()):
        m = PITFALLS[name](lambda: time.sleep(0.001), **NEEDS_OPTIONS.get(name, {}))
    assert isinstance(m, timing.Measurement)
    assert m.device == "cpu"
    assert m.clock == "perf_counter"
    assert all(s >= 0.001 for s in m.samples)
    expected = machine.flags() | ({"threads": 1} if name == "one_thread_by_default" else {})
    assert m.flags == expected


# ---------------------------------------------------------------- each mistake, made


def test_without_synchronization_only_the_launch_is_timed(device):
    launch = lambda: device.submit(nap)
    wrong = pitfalls.no_synchronization(launch, device, samples=3)
    late = pitfalls.synchronization_after_the_clock(launch, device, samples=3)
    right = pitfalls.synchronized(launch, device, samples=3)
    assert min(right.samples) >= WORK
    assert wrong.median < right.median
    assert late.median < right.median
    assert "not a GPU" in wrong.device


def test_loading_counts_where_it_is_done_between_two_steps():
    order = []

    def slow(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    step, load = slow("step", WORK), slow("load", WORK / 2)
    between = pitfalls.loading_inside(step, load=load, samples=3)
    assert order == ["step", *["load", "step"] * 3]
    assert min(between.samples) >= 1.5 * WORK
    meanwhile = pitfalls.loading_meanwhile(step, load=load, samples=3)
    assert min(meanwhile.samples) >= WORK
    assert meanwhile.median < between.median
    waiting = pitfalls.loading_meanwhile(slow("", 0), load=slow("", WORK), samples=3)
    assert waiting.median >= WORK / 2, "a slow loader still shows"


def test_an_error_while_loading_is_raised():
    def fails():
        raise OSError("no such file")

    for timer in (pitfalls.loading_inside, pitfalls.loading_meanwhile):
        with pytest.raises(OSError, match="no such file"):
            timer(lambda: None, load=fails)


def test_wrong_timers_leave_the_queue_idle(device):
    for timer in (pitfalls.no_synchronization, pitfalls.synchronization_after_the_clock):
        device.log.clear()
        timer(lambda: device.submit(nap), device, samples=2)
        assert len(device.log) == 2


def test_synchronized_does_not_pay_for_earlier_work(device):
    device.submit(lambda: time.sleep(0.2))
    right = pitfalls.synchronized(lambda: device.submit(nothing), device, samples=1)
    assert right.median < 0.2


def test_first_call_is_the_only_call():
    fn = FirstCallSlow()
    m = pitfalls.first_call(fn)
    assert fn.calls == len(m.samples) == 1
    assert m.median >= WORK


def test_single_call_is_warmed_up():
    fn = FirstCallSlow()
    m = pitfalls.single_call(fn)
    assert fn.calls == 2
    assert len(m.samples) == 1


def test_first_call_waits_for_the_device(device):
    assert pitfalls.first_call(lambda: device.submit(nap), device).median >= WORK


def test_setup_is_inside():
    m = pitfalls.setup_inside(nothing, setup=nap, samples=2)
    assert min(m.samples) >= WORK


def test_prints_one_line_per_stage_and_call():
    with redirect_stdout(io.StringIO()) as out:
        pitfalls.printing_inside(nothing, lines=3, samples=2)
    assert len(out.getvalue().splitlines()) == 6


def test_the_mean_contains_the_first_call():
    fn = FirstCallSlow()
    m = pitfalls.mean_with_outlier(fn, samples=4)
    assert fn.calls == 4
    assert len(m.samples) == 1
    assert m.median >= WORK / 4


def test_gradients_are_recorded_even_under_no_grad():
    seen = set()
    with torch.no_grad():
        pitfalls.recording_gradients(lambda: seen.add(torch.is_grad_enabled()), min_seconds=1e-3)
    assert seen == {True}


@pytest.mark.skipif(not machine.can_keep_freed_memory(), reason="malloc cannot be set here")
def test_fresh_memory_runs_under_the_default_allocator():
    seen = set()
    with machine.setting(allocator="glibc, keeps freed memory"):
        pitfalls.fresh_memory(lambda: seen.add(machine.allocator()))
    assert seen == {"glibc, default"}


def test_cold_cache_writes_other_memory_before_each_call(monkeypatch):
    monkeypatch.setattr(pitfalls, "EVICTION_BYTES", 4096)
    m = pitfalls.cold_cache(nap, samples=2)
    assert len(m.samples) == 2


def test_what_comes_before_a_call_is_not_timed():
    m = pitfalls.single_calls(nothing, samples=3, before=nap)
    assert len(m.samples) == 3
    assert m.median < WORK


def test_one_after_the_other_calls_in_blocks():
    order = []
    twins = {name: lambda name=name: (order.append(name), time.sleep(1e-3)) for name in "ab"}
    table = pitfalls.one_after_the_other(twins, "a", seconds=0.02)
    assert "".join(order) == "a" * order.count("a") + "b" * order.count("b")
    assert list(table.index) == ["a", "b"]
    assert table.loc["a", "ratio"] == 1


def test_timer_sets_one_thread_and_the_guard_sees_it():
    seen = set()
    before = torch.get_num_threads()
    with machine.setting(threads=2):
        fn = lambda: seen.add(torch.get_num_threads())
        mine = pitfalls.one_thread_by_default(fn, min_seconds=1e-3)
        hers = timing.measure(fn, min_seconds=1e-3, peak=False)
    assert seen == {1, 2}
    assert torch.get_num_threads() == before
    with pytest.raises(timing.UnfairComparison, match="threads is 1 and 2"):
        timing.ratios({"mine": mine, "hers": hers}, "hers")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pitfalls.first_call(3), "fn must be a function without arguments, got 3"),
        (lambda: pitfalls.single_call(nothing, "gpu"), "device must be 'cpu' or 'cuda', got 'gpu'"),
        (
            lambda: pitfalls.hot_cache(nothing, samples=0),
            "samples must be an integer of at least 1",
        ),
        (lambda: pitfalls.hot_cache(nothing, samples=2.5), "samples must be .*, got 2.5"),
        (lambda: pitfalls.printing_inside(nothing, lines=0), "lines must be .*, got 0"),
        (lambda: pitfalls.setup_inside(nothing, setup=None), "setup must be a function"),
        (
            lambda: pitfalls.recording_gradients(nothing, min_seconds=0),
            "min_seconds must be a number above 0, got 0",
        ),
        (lambda: pitfalls.one_after_the_other({}, "a"), "candidates must map names to functions"),
        (
            lambda: pitfalls.one_after_the_other({"a": 1}, "a"),
            "every one of candidates must be a function without arguments, got 1",
        ),
        (
            lambda: pitfalls.one_after_the_other({"a": nothing}, "b"),
            "baseline must be one of a, got 'b'",
        ),
        (
            lambda: pitfalls.no_synchronization(nothing, "cpu"),
            "device must be 'cuda' for no_synchronization, got 'cpu'",
        ),
        (
            lambda: pitfalls.tf32_on_one_side({"a": nothing}, "a", "cpu"),
            "device must be 'cuda' for tf32_on_one_side, got 'cpu'",
        ),
        (lambda: contrast(nap, nap, repeats=0), "repeats must be an integer of at least 1, got 0"),
        (lambda: Contrast((1.0,), (1.0, 2.0)), "must be equally many, got 1 and 2"),
        (lambda: Contrast((1.0,), (0.0,)), r"right must be numbers above 0, got \(0.0,\)"),
        (lambda: Contrast((), ()), "wrong must be numbers above 0"),
        (lambda: pitfalls.background_load(after=-1).__enter__(), "after must be seconds in .*-1"),
        (lambda: pitfalls.background_load(processes=0).__enter__(), "processes must be .*, got 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="repeat"):
        pitfalls.first_call(nothing, repeat=3)


def test_a_model_queue_where_none_can_be_used(device):
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got model queue"):
        pitfalls.recording_gradients(nothing, device)


# ---------------------------------------------------------------- the model queue


def test_submit_returns_before_the_work_is_done(device):
    released = threading.Event()
    device.submit(released.wait)
    assert device.log == []
    released.set()
    device.synchronize()
    ((start, end),) = device.log
    assert start <= end


def test_work_is_done_in_order(device):
    done = []
    for i in range(20):
        device.submit(lambda i=i: done.append(i))
    device.synchronize()
    assert done == list(range(20))


def test_an_error_surfaces_once_at_synchronize_and_drops_later_work(device):
    done = []

    def fail():
        raise ZeroDivisionError("in the work")

    device.submit(fail)
    device.submit(lambda: done.append("after the error"))
    with pytest.raises(ZeroDivisionError, match="in the work"):
        device.synchronize()
    assert done == []
    device.submit(lambda: done.append("after the report"))
    device.synchronize()
    assert done == ["after the report"]


def test_the_block_ends_with_the_thread_and_reports_its_error():
    with pytest.raises(ZeroDivisionError), ModelQueue() as queue:
        queue.submit(lambda: 1 / 0)
    assert not queue._thread.is_alive()


def test_an_error_of_the_block_is_not_replaced():
    def fail(queue):
        queue.submit(lambda: 1 / 0)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), ModelQueue() as queue:
        fail(queue)
    assert not queue._thread.is_alive()


def test_the_block_finishes_its_work():
    done = []
    with ModelQueue() as queue:
        queue.submit(nap)
        queue.submit(lambda: done.append(True))
    assert done == [True]


def test_misuse_of_the_queue():
    message = "fn must be a function without arguments, got 1"
    with ModelQueue() as queue, pytest.raises(ValueError, match=message):
        queue.submit(1)
    with pytest.raises(RuntimeError, match="closed"):
        queue.submit(nothing)
    queue.synchronize()  # nothing to wait for


# ---------------------------------------------------------------- the size of a mistake


def test_contrast_takes_turns_and_pairs_the_repetitions():
    order, values = [], iter([2.0, 1.0, 6.0, 2.0, 4.0, 2.0])

    def take(name):
        order.append(name)
        return next(values)

    c = contrast(lambda: take("w"), lambda: take("r"), repeats=3)
    assert order == ["w", "r"] * 3
    assert c.factors == (2.0, 3.0, 2.0)
    assert (c.factor, c.low, c.high) == (2.0, 2.0, 3.0)
    assert (c.median_wrong, c.median_right) == (4.0, 2.0)
    assert c.noticeable
    assert str(c) == "2 times the right number (from 2 to 3 in 3 repetitions)"


def test_the_span_of_a_contrast_is_its_largest_factor_over_its_smallest():
    assert Contrast((0.5, 1.0, 2.0), (1.0, 1.0, 1.0)).span == 4
    assert Contrast((3.0,), (1.0,)).span == 1


def test_contrast_of_measurements_uses_medians():
    m = pitfalls._measurement([1.0, 2.0, 9.0], "cpu")
    assert contrast(lambda: m, lambda: 4.0, repeats=1).factors == (0.5,)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ((0.5, 2.0), "no error that stands out, wrong / right went from 0.5 to 2 in 2 repetitions"),
        ((1.0, 3.0), "no error that stands out, wrong / right went from 1 to 3 in 2 repetitions"),
        ((0.5, 0.5), "0.5 times the right number (from 0.5 to 0.5 in 2 repetitions)"),
        ((1e-5, 1e-5), "1/100,000 of the right number (from 1/100,000 to 1/100,000"),
    ],
)
def test_the_sentence_says_no_more_than_was_measured(wrong, sentence):
    c = Contrast(wrong, (1.0, 1.0))
    assert str(c).startswith(sentence)
    assert c.noticeable == ("no error" not in sentence)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1"), (3.14159, "3.14"), (0.123, "0.123"), (1 / 80, "1/80"), (126_000, "126,000")],
)
def test_factors_as_text(value, text):
    assert pitfalls.factor_text(value) == text


def on_gpu(name, part, median, session="2026-02", device="cuda", **values):
    return records.row(
        values.pop("experiment", "pitfalls"),
        name,
        thread_problem(values.pop("batch", 64)),
        "forward",
        **{"part": part, "median": median, "session": session, "device": "cpu"},
        **{"machine": "a card", "time": "2026-02-03T04:05:06Z", **values},
    ), device


def table_of(*found):
    frame = records.frame([row for row, _ in found])
    return pitfalls.recorded(frame.assign(device=[device for _, device in found]))


def test_recorded_mistakes_stand_beside_the_right_numbers():
    table = table_of(
        on_gpu("first_call", "wrong", 6.0),
        on_gpu("first_call", "right", 2.0),
        on_gpu("no_synchronization", "wrong", 1.0),
        on_gpu("no_synchronization", "right", 4.0),
        on_gpu("launch_bound", "thread, launched", 9.0, batch=2),
        on_gpu("launch_bound", "thread, graph", 3.0, batch=2),
        *(
            on_gpu("tf32_on_one_side", f"native, {part}", seconds, batch=256)
            for part, seconds in (("defaults", 1.0), ("on both sides", 2.0), ("on neither side", 4))
        ),
    )
    assert table.index.names == ["mistake", "layer", "batch"]
    assert table["wrong / right"].to_dict() == {
        ("first_call", "conv", 64): 3,
        ("no_synchronization", "custom", 64): 0.25,
        ("launch_bound", "custom", 2): 3,
        ("tf32_on_one_side", "conv", 256): 0.25,
    }
    assert table["on both sides"].dropna().to_dict() == {("tf32_on_one_side", "conv", 256): 2}
    assert set(table["where"]) == {"a card, 2026-02-03"}


def test_recorded_mistakes_are_those_of_the_newest_run_on_a_gpu():
    table = table_of(
        on_gpu("first_call", "wrong", 6.0, session="2026-01"),
        on_gpu("first_call", "right", 1.0, session="2026-01"),
        on_gpu("first_call", "wrong", 8.0),
        on_gpu("first_call", "right", 2.0),
        on_gpu("first_call", "wrong", 9.0, session="2026-03", device="cpu"),
        on_gpu("hot_cache", "wrong", 9.0, experiment="step"),
        (records.row("ceilings", "copy", None, ""), "cpu"),  # its batch makes the others floats
    )
    assert table["wrong / right"].to_dict() == {("first_call", "conv", 64): 4}
    assert table.index.get_level_values("batch").dtype == int


def test_without_a_recorded_gpu_the_table_of_mistakes_is_empty():
    for rows in ([], [on_gpu("first_call", "wrong", 6.0, device="cpu")]):
        table = table_of(*rows)
        assert table.empty
        assert {"wrong", "right", "wrong / right", "where"} <= set(table)


def test_the_background_load_ends_with_its_block(monkeypatch):
    started = []
    real = pitfalls.subprocess.Popen
    monkeypatch.setattr(
        pitfalls.subprocess,
        "Popen",
        lambda *a, **k: started.append(real(*a, **k)) or started[-1],
    )

    def fail():
        assert [p.poll() for p in started] == [None, None]
        raise KeyError

    with pytest.raises(KeyError), pitfalls.background_load(after=60, processes=2):
        fail()
    assert all(p.poll() is not None for p in started)


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_launch_is_not_the_work_on_a_gpu():
    a = torch.randn(4096, 4096, device="cuda")
    launch = lambda: a @ a
    launch()
    wrong = pitfalls.synchronization_after_the_clock(launch, "cuda")
    right = pitfalls.synchronized(launch, "cuda")
    assert wrong.median < right.median


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_tf32_is_on_for_convolutions_only():
    seen = set()

    def look():
        flags = machine.flags()
        seen.add((flags["cudnn_tf32"], flags["matmul_tf32"]))

    pitfalls.tf32_on_one_side({"a": look}, "a", seconds=0.01, peak=False)
    assert seen == {(True, False)}
