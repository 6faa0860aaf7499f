"""What the rows of the ladder say: counted, measured, and with freed memory kept."""

import math

import pytest

from convlab import climb, cost, machine, notebook, records
from convlab.climb import Ladder, checked, of_page_faults, pace, short
from convlab.problem import ConvProblem
from convlab.problems import thread_problem
from convlab.thread import Interval

CEILINGS = cost.Ceilings(1e11, 1e10)
DEPTHWISE = ConvProblem(4, 72, 72, 56, 56, 3, padding=1, groups=72)
STRIDED = ConvProblem(4, 128, 128, 56, 56, 3, stride=2, padding=1)
POINTWISE = ConvProblem(4, 256, 64, 56, 56, 1)
WIDE = ConvProblem(64, 64, 64, 28, 28, 3, padding=1)


def row(algorithm, problem, pass_="forward", seconds=1.0, kept=False):
    """Five rounds that differ a little, all algorithms alike; no time if `seconds` is None."""
    flags = machine.flags() | {"allocator": "glibc, default"}
    if kept:
        flags["allocator"] = f"glibc, {machine.KEEP_FREED}"
    timed = {"status": "unsupported", "extra": {"reason": "It cannot."}}
    if seconds is not None:
        samples = [seconds * noise for noise in (1.0, 1.02, 0.98, 1.01, 0.99)]
        timed = {"samples": samples, "median": seconds, "q25": samples[4], "q75": samples[3]}
        timed["peak_bytes"] = int(1e6 * seconds)
    return records.row("ladder", algorithm, problem, pass_, flags=flags, session="s", **timed)


def climbed(times, problem, kept=False, pass_="forward"):
    return [row(name, problem, pass_, seconds, kept) for name, seconds in times.items()]


@pytest.fixture
def ladder():
    few, many = thread_problem(2), thread_problem(512)
    usual = {"native": 1.0, "thread": 8.0, "unfold": 6.0, "unfold_batched": 4.0}
    rows = climbed(usual, few) + climbed(usual, many)
    rows += climbed(usual | {"windows": 2.0, "fused": 0.5, "compiled": 5.0}, many, pass_="train")
    rows += climbed({"native": 1.0, "thread": 4.0, "unfold": 4.0}, many, kept=True)
    rows += [row("winograd", few, seconds=None), row("einconv", many, "train", 3.0)]
    rows += climbed({"native": 1.0, "row_windows": 0.5, "fused": 0.9}, DEPTHWISE)
    rows += climbed({"native": 1.0, "fft": 9.0, "windows": 2.0, "fused": 3.0}, STRIDED)
    rows += climbed({"native": 1.0, "unfold": 1.5}, POINTWISE)
    rows += climbed({"native": 1.0, "unfold": 3.0, "windows": 2.0}, WIDE)
    return Ladder(rows, CEILINGS)


def test_the_rows_are_found_by_what_was_measured(ladder):
    assert (ladder.few, ladder.many) == (thread_problem(2), thread_problem(512))
    assert ladder.problems == [ladder.few, ladder.many, DEPTHWISE, STRIDED, POINTWISE, WIDE]
    assert ladder.names[:4] == ["native", "thread", "unfold", "unfold_batched"]
    assert set(ladder.hand).isdisjoint({"native", "thread", "einconv"})
    assert ladder.factor("thread", "native", ladder.many, "forward").value == pytest.approx(8)
    assert ladder.factor("thread", "native", ladder.many, "forward", True).value == pytest.approx(4)
    assert math.isnan(ladder.factor("thread", "fft", ladder.many, "forward").value)
    case = ladder.case(ladder.many, "forward")
    assert case.loc["unfold", ["time", "memory", "ratio"]].tolist() == [6, 6e6, pytest.approx(6)]
    assert ladder.fastest(ladder.hand, ladder.many, "train") == "fused"
    assert ladder.fastest(ladder.hand, ladder.many, "train", kept=True) is None
    assert ladder.ratios("forward", ["unfold", "fft"]).loc[short(STRIDED), "fft"] == 9
    silence = ladder.silence()
    assert silence[["algorithm", "why", "problems"]].to_numpy().tolist() == [
        ["winograd", "It cannot.", "2 images"]
    ]


def test_other_experiments_are_no_rungs():
    rows = climbed({"native": 1.0}, thread_problem(2))
    other = records.row("step", "fft", thread_problem(1), "forward", samples=[1.0])
    assert Ladder([*rows, other], CEILINGS).names == ["native"]


def test_short_names_say_what_differs():
    assert short(thread_problem(2)) == "2 images"
    assert short(STRIDED) == "128→128, 56², k3/2, 4 images"
    assert short(DEPTHWISE) == "72→72, 56², k3 depthwise, 4 images"


def test_counted_is_what_bytes_and_flops_would_bring(ladder):
    p = ladder.many
    one, two = (cost.predicted_seconds(n, p, CEILINGS) for n in ("thread", "unfold"))
    assert ladder.counted("thread", "unfold", p, "forward") == pytest.approx(one / two)
    back = [
        cost.predicted_seconds(n, p, CEILINGS, direction="backward") for n in ("thread", "unfold")
    ]
    trained = (one + back[0]) / (two + back[1])
    assert ladder.counted("thread", "unfold", p, "train") == pytest.approx(trained)
    assert math.isnan(ladder.counted("thread", "einconv", p, "forward"))


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(1.1, 2, "faster"), (0.5, 0.9, "slower"), (0.9, 1.1, "within the noise")],
)
def test_pace_needs_the_whole_interval(low, high, word):
    assert pace(Interval("", 1, low, high)) == word


@pytest.mark.parametrize(
    ("kept", "sentence"),
    [
        ((1.0, 1.5), "page faults weigh more on a and are part of the gain"),
        ((5.0, 6.0), "page faults weigh more on b and hide part of the gain"),
        ((2.5, 3.5), "page faults do not change it beyond the noise"),
    ],
)
def test_page_faults_are_told_by_intervals_that_do_not_meet(kept, sentence):
    assert of_page_faults("a", "b", Interval("", 3, 2, 4), Interval("", 3, *kept)) == sentence


def test_of_a_loss_page_faults_are_a_part_or_hide_one():
    called = Interval("", 0.5, 0.4, 0.6)
    assert "on b and are part of the loss" in of_page_faults(
        "a", "b", called, Interval("", 1, 1, 1)
    )
    less = Interval("", 0.2, 0.1, 0.3)
    assert "on a and hide part of the loss" in of_page_faults("a", "b", called, less)


def test_a_rung_closes_with_all_three_figures(ladder):
    text = ladder.closing("thread", "unfold")
    assert text.startswith("Time of thread / unfold, 512 images. Forward: counted 1.")
    assert "measured 1.33× [1.33 … 1.33] (faster), with memory kept 1× [1 … 1]: page" in text
    assert "page faults weigh more on thread" in text
    assert "thread and are part of the gain. Training: counted 1." in text
    kept = ladder.closing("unfold", "unfold_batched")
    assert "memory kept" not in kept
    assert "Not measured" in ladder.closing("thread", "shifts")
    table = ladder.bought("thread", "unfold", problems=(ladder.few, ladder.many))
    assert list(table.index) == [
        ("unfold", "2 images", "forward"),
        ("unfold", "512 images", "forward"),
        ("unfold", "512 images", "training"),
    ]
    assert table["with memory kept"].tolist() == ["–", "1× [1 … 1]", "–"]
    assert "with memory kept" not in ladder.bought("unfold", "windows", problems=(ladder.many,))
    assert not len(ladder.bought("thread", "shifts", problems=(ladder.many,)))


def test_tally_and_contest_count_comparisons(ladder):
    text = ladder.tally("unfold_batched", "compiled")
    assert "faster in 0 of 1 comparisons, slower in 1." in text
    text = ladder.tally("unfold", "windows")
    assert "faster in 2 of 2" in text
    assert f"Faster: 512 images, training (3×); {short(WIDE)}, forward (1.5×)." in text
    assert ladder.tally("shifts", "windows").endswith("not measured.")
    contest = ladder.contest("einconv")
    assert contest.keys() == {"512 images, training"}
    assert contest["512 images, training"].value == pytest.approx(1 / 6)
    assert ladder.contest("fft_conv") == {}
    across = ladder.across("unfold", "windows")
    assert across.loc[short(WIDE)].tolist() == ["1.5× [1.5 … 1.5]", "–"]


def test_predictions_are_checked_against_the_rows(ladder):
    found = checked(ladder).set_index("layer")
    assert found.loc[f"{short(DEPTHWISE)}, forward", "found"].startswith("wrong: row_windows")
    strided = found.loc[f"{short(STRIDED)}, forward"]
    assert strided["found"].startswith("wrong, it copies by rows: the fastest by hand is windows")
    assert found.loc[f"{short(POINTWISE)}, forward", "found"].startswith("the library's: the fast")
    wide = found.loc[f"{short(WIDE)}, forward", "found"]
    assert wide.startswith("wrong: slowest / fastest of those with columns 1.5, for 512 images")
    assert len(found) == 4
    assert found["predicted"].is_monotonic_increasing, "what was predicted alike stands together"


def test_a_depthwise_product_that_only_wins_for_lack_of_rivals_is_not_good():
    rows = climbed({"native": 1.0}, thread_problem(2))
    rows += climbed({"native": 1.0, "row_windows": 2.0}, DEPTHWISE)
    (outcome,) = checked(Ladder(rows, CEILINGS))["found"]
    assert outcome == "right: row_windows takes 2×"
    rows = climbed({"native": 1.0}, thread_problem(2))
    assert checked(Ladder(rows, CEILINGS)).empty


@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr("IPython.display.display", found.append)
    for name in ("say", "answer"):
        monkeypatch.setattr(notebook, name, lambda text, *_, **v: found.append(text.format(**v)))
    monkeypatch.setattr(notebook, "table", lambda frame, note, **_: found.append(frame))
    return found


def test_climb_shows_figure_table_and_a_sentence_per_form(ladder, shown):
    ladder.climb("Rung", "thread", "unfold", "unfold_batched")
    figure, table, *sentences = shown
    assert [a.get_title(loc="left") or a.get_title() for a in figure.axes][:2] == [
        "2 images, forward",
        "2 images, training",
    ]
    assert set(table.index.get_level_values(0)) == {"unfold", "unfold_batched"}
    assert [s.split(",")[0] for s in sentences] == [
        "Time of thread / unfold",
        "Time of thread / unfold_batched",
    ]


def test_climb_says_why_a_rung_has_no_time(ladder, shown):
    ladder.climb("Rung", "thread", "winograd")
    ladder.climb("Rung", "thread", "shifts")
    assert shown == [
        "Not measured here: It cannot.",
        "Not measured here: left out in quick mode.",
    ]


def test_promised_and_source(ladder, shown):
    ladder.promised("thread", "unfold")
    (text,) = shown
    counted = ladder.counted("thread", "unfold", ladder.many, "forward")
    assert text.startswith("From thread to unfold, 512 images. Forward: ")
    assert f"{counted:.3g} times as fast. Training: " in text
    climb.source(short)
    assert shown[-1].data.startswith("```python\ndef short(p: ConvProblem) -> str:")


def test_count_says_what_a_form_moves(ladder, monkeypatch):
    said = {}
    monkeypatch.setattr(notebook, "table", lambda frame, note, **_: said.update(table=frame))
    monkeypatch.setattr(notebook, "say", lambda text, **values: said.update(values))
    ladder.count("unfold")
    assert said["f"] == cost.moved_bytes("unfold", ladder.many)
    assert said["g"] == cost.compulsory_bytes(ladder.many)
    assert len(said["table"]) == len(cost.steps("unfold", ladder.many))
