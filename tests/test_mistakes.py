"""The mistakes that only a GPU shows: rows from made-up timers, and the real ones on a GPU."""

import itertools

import pytest
import torch

from convlab import experiments, machine, pitfalls, records
from convlab.experiments import Settings, mistakes, mistakes_case
from convlab.problems import thread_problem
from convlab.timing import Measurement

CPU = Settings()


def made_up(*samples):
    return Measurement(samples, 1, None, "cpu", machine.flags(), "clock", 1e-9)


def timer(name, order, scale=1.0):
    """A timer that notes its turn; its medians are 1, 2, 3, … times `scale`."""
    turns = itertools.count(1)

    def measure():
        order.append(name)
        seconds = scale * next(turns)
        return made_up(0.5 * seconds, seconds, 9 * seconds)

    return measure


def test_wrong_and_right_take_turns_and_their_medians_are_the_samples():
    order = []
    found = mistakes._in_turn(timer("wrong", order), timer("right", order, scale=10), CPU)
    assert order == ["wrong", "right"] * mistakes.REPEATS
    assert list(found) == ["wrong", "right"]
    assert found["wrong"].samples == tuple(range(1, mistakes.REPEATS + 1))
    assert found["right"].samples == tuple(10 * n for n in range(1, mistakes.REPEATS + 1))
    assert found["wrong"].flags == machine.flags()


def test_rows_of_a_mistake_say_which_part_they_are(tmp_path):
    problem = thread_problem(64)
    measured = {"wrong": made_up(1.0, 2.0, 3.0), "right": made_up(4.0, 5.0, 6.0)}
    rows = mistakes.rows_of("first_call", measured, problem, CPU)
    assert [(r.experiment, r.algorithm, r.part) for r in rows] == [
        ("pitfalls", "first_call", "wrong"),
        ("pitfalls", "first_call", "right"),
    ]
    assert [r.median for r in rows] == [2, 5]
    assert {r.problem["batch"] for r in rows} == {64}
    assert {(r.pass_, r.device, r.status) for r in rows} == {("forward", "cpu", "ok")}
    records.append(tmp_path / "rows.jsonl", rows)
    assert records.read(tmp_path / "rows.jsonl") == rows


def test_the_first_call_is_that_of_a_shape_that_was_not_seen_before(monkeypatch):
    """Run on the CPU, where the rows are made alike."""
    seen = []
    real = mistakes.one_pass

    def watched(name, problem, pass_, device):
        seen.append(problem)
        return real(name, problem, pass_, device)

    monkeypatch.setattr(mistakes, "one_pass", watched)
    rows = experiments.run_case(mistakes_case("first_call", CPU), "now")
    assert len(set(seen)) == len(seen) == mistakes.REPEATS
    assert [(r.part, len(r.samples)) for r in rows] == [
        ("wrong", mistakes.REPEATS),
        ("right", mistakes.REPEATS),
    ]
    assert {(r.session, r.case, r.rows_in_case) for r in rows} == {
        ("now", "pitfalls/first_call", 2)
    }


def test_waiting_or_not_is_asked_of_the_gpu_only():
    with pytest.raises(ValueError, match="device must be 'cuda' for no_synchronization, got 'cpu'"):
        experiments.run_case(mistakes_case("no_waiting", CPU))


def test_on_the_cpu_there_are_none():
    assert experiments.EXPERIMENTS["pitfalls"].cases(CPU) == []


def test_an_unknown_mistake_is_an_error():
    with pytest.raises(KeyError, match="haste"):
        mistakes_case("haste", CPU)


# On a GPU: what each of MISTAKES measures

HOW = ("launched", "graph")
PARTS = {
    "no_waiting": {
        "no_synchronization": ["wrong", "right"],
        "synchronization_after_the_clock": ["wrong", "right"],
    },
    "first_call": {"first_call": ["wrong", "right"]},
    "cold_cache": {"hot_cache": ["wrong", "right"]},
    "fresh_memory": {"fresh_memory": ["wrong", "right"]},
    "tf32": {
        "tf32_on_one_side": [
            f"{name}, {where}"
            for where in ("defaults", "on both sides", "on neither side")
            for name in ("native", "thread")
        ]
    },
    "launches": {
        "launch_bound": [f"{name}, {how}" for name in ("native", "thread") for how in HOW]
    },
}


def test_every_mistake_is_expected_here_and_named_as_its_timer():
    assert mistakes.MISTAKES.keys() == PARTS.keys()
    named = {name for parts in PARTS.values() for name in parts}
    assert named - pitfalls.PITFALLS.keys() == {"launch_bound"}, "no timer makes this mistake"


@pytest.mark.gpu
@pytest.mark.parametrize("name", PARTS)
def test_a_mistake_on_the_gpu(name):
    before = machine.flags()
    rows = experiments.run_case(mistakes_case(name, Settings("cuda", quick=True)), "now")
    found = {}
    for row in rows:
        found.setdefault(row.algorithm, []).append(row.part)
        assert row.status == "ok"
        assert row.median > 0
        assert row.device == "cuda"
    assert {k: sorted(v) for k, v in found.items()} == {
        k: sorted(v) for k, v in PARTS[name].items()
    }
    assert machine.flags() == before


@pytest.mark.gpu
def test_a_graph_replays_the_same_kernels():
    x = torch.arange(6.0, device="cuda")
    y = torch.zeros(6, device="cuda")
    replay = mistakes.graphed(lambda: torch.add(x, 1, out=y))
    for value in (3.0, 5.0):
        x.fill_(value)
        replay()
        torch.cuda.synchronize()
        assert y.tolist() == [value + 1] * 6
