"""The thread's claims, the figures it reported, and the verdict that records give on each.

A rule compares a figure's 95 % interval with the range in which the claim would be right: wholly
inside it holds, wholly outside it does not, and across the edge nothing is decided. A claim with
several figures (problems, settings of malloc) is decided when more than half of them are, and all
of those alike; where two decide differently, or half are undecided, it depends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from convlab import machine
from convlab.problems import thread_problem
from convlab.records import RecordError, Row, data_folder
from convlab.steps import PARTS
from convlab.timing import CONFIDENCE, RESAMPLES

if TYPE_CHECKING:
    import pandas as pd

HOLDS, FAILS, DEPENDS, UNKNOWN = "holds", "does not hold", "depends", "not measured here"
INF, NAN = float("inf"), float("nan")
LIBRARY = ("native", "native_channels_last", "native_no_library", "auto", "unfoldnd")  # call it
NETWORK = "network_step"
REWRITTEN = ("layer", "step", "ladder")  # experiments that measure rewritten forms too


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval, and where it was measured."""

    where: str
    value: float
    low: float
    high: float

    def text(self, style: str) -> str:
        if style == "%":
            return f"{self.value:.0%} [{self.low:.0%} … {self.high:.0%}]"
        return f"{self.value:.3g}× [{self.low:.3g} … {self.high:.3g}]"

    def against(self, low: float, high: float) -> str:
        """HOLDS, FAILS or DEPENDS (undecided) for the range `low` … `high`."""
        if low <= self.low and self.high <= high:
            return HOLDS
        return FAILS if self.high < low or self.low > high else DEPENDS


@dataclass(frozen=True)
class Verdict:
    """What records say about a claim: the figure, whether it holds, and why, in one sentence.

    Attributes:
        intervals: the measured figures that decided, where the rule has any.
        claimed: (low, high), the range in which the claim would be right.
        style: how the figures are written, "×" or "%".
    """

    verdict: str
    figure: str
    reason: str
    intervals: tuple[Interval, ...] = ()
    claimed: tuple[float, float] = (-INF, INF)
    style: str = "×"


@dataclass(frozen=True)
class Claim:
    """One claim of the thread.

    Attributes:
        id: T1 … T12.
        text: the claim in our words.
        figure: the thread's own figures, as text.
        judge: the rule, rows → `Verdict`.
    """

    id: str
    text: str
    figure: Callable[[dict[str, float]], str]
    judge: Callable[[Sequence[Row]], Verdict]


def figures() -> dict[str, float]:
    """The thread's own measurements, in seconds; `data/thread.json` says what each is.

    Raises:
        RecordError: the file is missing or damaged.
    """
    path = data_folder() / "thread.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {f["name"]: f["seconds"] for f in content["figures"]}
        for claim in CLAIMS:
            claim.figure(found)
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise RecordError(f"{path}: cannot read the thread's figures: {error}") from error
    return found


# Figures from rows

Case = dict[str, list[Row]]
"""Algorithm → its rows, one per visit of the session.

Of "stages" the keys are pass:part; of whole networks the parts are there too, as algorithm:part.
"""


def statistic(where: str, formula: Callable, *rows: Sequence[Row]) -> Interval:
    """`formula` of the samples of rows measured in the same rounds: its median, its interval."""
    return interval(where, *bootstrap(formula, *rows))


def interval(where: str, value: float, drawn: np.ndarray) -> Interval:
    """`value` between the quantiles of `drawn`; unbounded if they are not all finite."""
    if not np.isfinite(drawn).all():  # a clock too coarse for what it timed shows zero
        return Interval(where, value, -INF, INF)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(where, value, float(low), float(high))


def bootstrap(formula: Callable, *rows: Sequence[Row], seed: int = 0) -> tuple[float, np.ndarray]:
    """The median of `formula` over all rounds, and the medians of `RESAMPLES` resamples.

    The formula is taken round by round, so what slows a whole round down falls out. A session's
    visits lie minutes apart; the bootstrap draws visits, then rounds within each, so that the
    interval knows of the machine's changes from minute to minute.
    """
    visits = []
    for group in zip(*rows):
        rounds = min(len(row.samples) for row in group)
        data = [np.array(row.samples[:rounds]) for row in group]
        with np.errstate(divide="ignore", invalid="ignore"):
            visits.append(np.asarray(formula(*data), float))
    value = float(np.median(np.concatenate(visits)))
    if not all(np.isfinite(v).all() for v in visits):
        return value, np.full(RESAMPLES, NAN)
    sizes = np.array([len(v) for v in visits])
    table = np.array([np.resize(v, sizes.max()) for v in visits])
    generator = np.random.default_rng(seed)
    chosen = generator.integers(len(visits), size=(RESAMPLES, len(visits)))[:, :, None]
    rounds = generator.random((RESAMPLES, len(visits), sizes.max())) * sizes[chosen]
    taken = np.where(np.arange(sizes.max()) < sizes[chosen], table[chosen, rounds.astype(int)], NAN)
    return value, np.nanmedian(taken.reshape(RESAMPLES, -1), axis=1)


def change(
    where: str,
    formula: Callable,
    before: Sequence[Sequence[Row]],
    after: Sequence[Sequence[Row]],
    scale: float = 1.0,
) -> Interval:
    """`formula` of the medians of the case `after`, over that of the case `before`, times `scale`.

    Two cases share no rounds: each is resampled on its own, the rows of a case together.
    """
    values, draws = [], []
    for seed, case in enumerate((before, after)):
        medians, drawn = zip(*(bootstrap(np.positive, rows, seed=seed) for rows in case))
        values.append(np.float64(formula(*medians)))
        draws.append(formula(*drawn))
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = scale * values[1] / values[0]
        return interval(where, float(quotient), scale * draws[1] / draws[0])


def cases(rows: Iterable[Row], experiment: str, pass_: str = "") -> list[Case]:
    """The experiment's cases, smallest batch first, one per allocator."""
    found: dict[tuple, Case] = {}
    for r in rows:
        staged = experiment == "stages"
        if r.experiment == experiment and r.samples and (staged or r.pass_ == pass_):
            key = f"{r.pass_}:{r.part}" if staged else r.algorithm
            if r.part and experiment == NETWORK:
                key = f"{r.algorithm}:{r.part}"
            case = r.case.partition(" #")[0]
            place = (r.problem.get("batch", 0), kept(r), case, r.session)
            found.setdefault(place, {}).setdefault(key, []).append(r)
    return [found[key] for key in sorted(found)]


def kept(row: Row) -> bool:
    """Whether the C library kept freed memory, so that no tensor page-faults anew."""
    return str(row.flags.get("allocator", "")).endswith(machine.KEEP_FREED)


def where(rows: Sequence[Row]) -> str:
    batch = rows[0].problem["batch"]
    text = f"{batch} image{'s' if batch != 1 else ''}"
    text = f"{network}, {text}" if (network := rows[0].extra.get("network")) else text
    return f"{text}, memory kept" if kept(rows[0]) else text


def listed(places: Sequence[str]) -> str:
    """What `where` gave, in a sentence: "64 images, 256 images (memory kept) and 512 images"."""
    parts = [place.partition(", ") for place in places]
    texts = [f"{head} ({rest})" if rest else head for head, _, rest in parts]
    return " and ".join([", ".join(texts[:-1])] * (len(texts) > 1) + texts[-1:])


def ratio_cases(rows, experiment, pass_, a, b) -> list[Interval]:
    """time(a) / time(b) for each case that has both."""
    return [
        statistic(where(case[a]), np.divide, case[a], case[b])
        for case in cases(rows, experiment, pass_)
        if a in case and b in case
    ]


def layer_ratios(rows, pass_) -> list[Interval]:
    """time(thread) / time(native), of the thread's layer alone and of whole networks."""
    return [
        ratio
        for experiment in ("step", NETWORK)
        for ratio in ratio_cases(rows, experiment, pass_, "thread", "native")
    ]


def stage_cases(rows, formula: Callable, *keys: str) -> list[Interval]:
    """`formula` of the named stage times (pass:part) for each case of "stages"."""
    return [
        statistic(where(case[keys[0]]), formula, *(case[k] for k in keys))
        for case in cases(rows, "stages")
        if all(k in case for k in keys)
    ]


# Rules


def decide(
    found: Sequence[Interval], low: float, high: float, reasons: dict[str, str], style: str = "×"
) -> Verdict:
    """One verdict from the figures of several problems; `reasons` maps HOLDS and FAILS to why."""
    if not found:
        return missing()
    figure = "; ".join(f"{f.where}: {f.text(style)}" for f in found)
    votes = [f.against(low, high) for f in found]
    most = max((HOLDS, FAILS), key=votes.count)
    undecided = votes.count(DEPENDS)
    if HOLDS in votes and FAILS in votes:
        there = [f.where for f, v in zip(found, votes, strict=True) if v == HOLDS]
        verdict, reason = DEPENDS, f"It holds for {listed(there)} only."
    elif 2 * votes.count(most) > len(votes):
        verdict, reason = most, reasons[most]
        if undecided:
            reason += f" {undecided} of {len(votes)} figures: inside the noise."
    elif len(votes) == 1:
        verdict, reason = DEPENDS, "The interval crosses the edge: inside the noise."
    else:
        verdict = DEPENDS
        reason = f"{undecided} of {len(votes)} intervals cross the edge: inside the noise."
    return Verdict(verdict, figure, reason, tuple(found), (low, high), style)


def missing() -> Verdict:
    return Verdict(UNKNOWN, "–", "No record of it.")


def storage(rows: Iterable[Row]) -> dict[str, dict]:
    return {r.part: r.extra for r in rows if r.experiment == "storage" and r.status == "ok"}


def copies_text(facts: dict[str, dict], *names: str) -> str:
    parts = []
    for name in names:
        times = facts[name]["bytes_written"] / facts[name]["bytes_in"]
        parts.append(
            f"{name} " + ("is a view" if facts[name]["view"] else f"writes {times:.3g}× its input")
        )
    return ", ".join(parts)


def t1_views(rows: Sequence[Row]) -> Verdict:
    facts = storage(rows)
    names = "F.unfold", "F.fold"
    if not facts.keys() >= set(names):
        return missing()
    views = [facts[name]["view"] for name in names]
    figure = copies_text(facts, *names)
    if all(views):
        return Verdict(HOLDS, figure, "Both results share their input's memory.")
    if any(views):
        return Verdict(DEPENDS, figure, "One of the two shares its input's memory.")
    return Verdict(
        FAILS, figure, "Both results lie in memory of their own; Tensor.unfold is a view."
    )


SHARE_KEYS = [f"{d}:{p}" for p in ("unfold", "fold", "total") for d in ("forward", "backward")]


def _share(*times: np.ndarray) -> np.ndarray:
    """Unfold and fold, of forward and backward together."""
    return sum(times[:4]) / sum(times[4:])


NETWORK_KEYS = [f"thread:{part}" for part in ("unfold", "fold", *PARTS["train"])]


def _network_share(unfold: np.ndarray, fold: np.ndarray, *parts: np.ndarray) -> np.ndarray:
    """Unfold and fold of all layers, forward and backward, of the whole training step."""
    return (unfold + fold) / sum(parts)


def t2_most_time(rows: Sequence[Row]) -> Verdict:
    return decide(
        stage_cases(rows, _share, *SHARE_KEYS),
        0.5,
        INF,
        {
            HOLDS: "Unfold and fold take more than half of forward and backward.",
            FAILS: "Unfold and fold take less than half of forward and backward.",
        },
        "%",
    )


def t3_training(rows: Sequence[Row]) -> Verdict:
    return decide(
        layer_ratios(rows, "train"),
        4.5,
        10,
        {
            HOLDS: "The ratio of the training steps lies between 4.5 and 10.",
            FAILS: "The ratio of the training steps lies outside 4.5 to 10.",
        },
    )


def t4_fold_free(rows: Sequence[Row]) -> Verdict:
    facts = storage(rows)
    found = stage_cases(rows, np.divide, "forward:fold", "forward:total")
    if "F.fold" not in facts or not found:
        return missing()
    reasons = dict.fromkeys((HOLDS, FAILS), "Almost free is taken as under 5 % of forward.")
    timed = decide(found, 0, 0.05, reasons, "%")
    view = facts["F.fold"]["view"]
    figure = f"{copies_text(facts, 'F.fold')}; share of forward: {timed.figure}"
    if view:
        verdict, reason = timed.verdict, f"It copies nothing. {timed.reason}"
    elif timed.verdict == HOLDS:
        verdict, reason = DEPENDS, "It copies, yet takes under 5 % of forward."
    elif timed.verdict == FAILS:
        verdict, reason = FAILS, "It copies, and takes more than 5 % of forward."
    else:
        verdict, reason = FAILS, "It copies; whether that costs 5 % of forward is not decided."
    return replace(timed, verdict=verdict, figure=figure, reason=reason)


def t5_same_cost(rows: Sequence[Row]) -> Verdict:
    return decide(
        stage_cases(rows, np.divide, "forward:product", "forward:unfold"),
        0.5,
        2,
        {
            HOLDS: "Product and unfold are within a factor of two of each other.",
            FAILS: "Product and unfold differ by more than a factor of two.",
        },
    )


def t6_backward(rows: Sequence[Row]) -> Verdict:
    return decide(
        stage_cases(rows, np.divide, "backward:total", "forward:total"),
        0.5,
        2,
        {
            HOLDS: "Backward and forward are within a factor of two of each other.",
            FAILS: "Backward and forward differ by more than a factor of two.",
        },
    )


def t7_extra_time(rows: Sequence[Row]) -> Verdict:
    """Unfold's and fold's time over the extra time; the stages and the ratio share a batch.

    Both are measured in rounds of their own, so the interval of the quotient comes from
    independent draws of the two; taking the ends of both intervals would make it too wide.
    """
    steps = {where(c["thread"]): c for c in cases(rows, "step", "train") if "thread" in c}
    pairs = [
        (step, case, _share, SHARE_KEYS)
        for case in cases(rows, "stages")
        if (step := steps.get(where(next(iter(case.values()))))) is not None
    ]
    networks = cases(rows, NETWORK, "train")
    pairs += [(c, c, _network_share, NETWORK_KEYS) for c in networks if "thread" in c]
    found, equal = [], []
    for step, case, share, keys in pairs:
        if "native" not in step:
            continue
        label = where(step["native"])
        part, parts = bootstrap(np.divide, step["native"], step["thread"])
        if part >= 1:
            equal.append(label)
        elif all(k in case for k in keys):
            whole, wholes = bootstrap(share, *(case[k] for k in keys), seed=1)
            extra = np.where(parts < 1, 1 - parts, NAN)
            found.append(interval(label, whole / (1 - part), wholes / extra))
    if equal and not found:
        return Verdict(DEPENDS, "–", f"The layer takes no extra time for {listed(equal)}.")
    return decide(
        found,
        0.8,
        INF,
        {
            HOLDS: "Unfold and fold take at least 80 % of the extra time.",
            FAILS: "Unfold and fold take less than 80 % of the extra time.",
        },
        "%",
    )


def t8_batch(rows: Sequence[Row]) -> Verdict:
    per_pass = {q: ratio_cases(rows, "batch", q, "thread", "native") for q in ("forward", "train")}
    found = [r for ratios in per_pass.values() for r in ratios]
    if not found or min(map(len, per_pass.values())) < 2:
        return missing()
    figure = "; ".join(
        f"{q}: {min(r.value for r in ratios):.3g}× ({min(ratios, key=_value).where}) to "
        f"{max(r.value for r in ratios):.3g}× ({max(ratios, key=_value).where})"
        for q, ratios in per_pass.items()
    )
    outside = sum(r.against(2, 4) == FAILS for r in found)
    inside = sum(r.against(2, 4) == HOLDS for r in found)
    if inside == len(found):
        verdict, reason = HOLDS, "Every ratio lies between 2 and 4."
    elif outside:
        verdict, reason = FAILS, f"Of {len(found)} ratios {outside} lie outside 2 to 4."
    else:
        verdict, reason = DEPENDS, f"Of {len(found)} ratios {inside} lie inside, none outside."
    labelled = [
        replace(r, where=f"{r.where}, {q}") for q, ratios in per_pass.items() for r in ratios
    ]
    return Verdict(verdict, figure, reason, tuple(labelled), (2, 4))


def _value(found: Interval) -> float:
    return found.value


def t9_inference(rows: Sequence[Row]) -> Verdict:
    return decide(
        layer_ratios(rows, "forward"),
        6,
        7,
        {
            HOLDS: "The ratio of inference lies between 6 and 7.",
            FAILS: "The ratio of inference lies outside 6 to 7.",
        },
    )


def t10_library_off(rows: Sequence[Row]) -> Verdict:
    """Figures outside the range say on which side: faster refutes the claim as slower does."""
    low, high = 0.8, 1.25
    found = ratio_cases(rows, "step", "train", "native_no_library", "thread")
    sides = ["faster" if f.high < low else "slower" if f.low > high else "" for f in found]
    ways = [
        f"over 25 % {way} than the layer for {listed(places)}"
        for way in ("faster", "slower")
        if (places := [f.where for f, side in zip(found, sides) if side == way])
    ]
    told = f"Without its library nn.Conv2d is {' and '.join(ways)}."
    holding = "Without its library nn.Conv2d takes as long as the layer, within 25 %."
    decided = decide(found, low, high, {HOLDS: holding, FAILS: told})
    if not ways:
        return decided
    figure = "; ".join(
        f"{f.where}: {f.text('×')}{side and f', {side}'}" for f, side in zip(found, sides)
    )
    reason = f"{decided.reason} {told}" if decided.verdict == DEPENDS else decided.reason
    return replace(decided, figure=figure, reason=reason)


def t11_library(rows: Sequence[Row]) -> Verdict:
    return decide(
        ratio_cases(rows, "step", "train", "native_no_library", "native"),
        2,
        INF,
        {
            HOLDS: "Switching the library off costs at least a factor of two.",
            FAILS: "Switching the library off costs less than a factor of two.",
        },
    )


def _of_the_thread(problem: dict) -> bool:
    """Whether it is the thread's problem, on any number of images."""
    return bool(problem) and problem == thread_problem(problem["batch"]).as_dict()


def t12_nothing(rows: Sequence[Row]) -> Verdict:
    """The layer against the best form, on the thread's problem, that calls no library's
    convolution; a session may have measured two such forms or all."""
    of_thread = [r for r in rows if r.experiment in REWRITTEN and _of_the_thread(r.problem)]
    found, forms = [], []
    for pass_ in ("forward", "train"):
        measured = [case for name in REWRITTEN for case in cases(of_thread, name, pass_)]
        for case in measured:
            others = [a for a in case if a not in LIBRARY and a != "thread"]
            if "thread" in case and others:
                gains = [
                    statistic(f"{a}, {where(case[a])}, {pass_}", np.divide, case["thread"], case[a])
                    for a in others
                ]
                found.append(max(gains, key=_value))
                forms += others
    if not found:
        return missing()
    best = max(found, key=lambda f: f.low)
    forms = list(dict.fromkeys(forms))
    among = f"{len(forms)} forms" if len(forms) > 3 else ", ".join(forms)
    figure = f"{best.where}: {best.text('×')} faster (of {among})"
    if best.low > 1.25:
        form = best.where.split(",")[0]
        verdict, reason = FAILS, f"{form} is faster, without the library's convolution."
    elif all(f.high <= 1.25 for f in found):
        verdict, reason = HOLDS, "No rewritten form measured so far gains over 25 %."
    else:
        verdict, reason = DEPENDS, "The gain of the best rewritten form is inside the noise."
    return Verdict(verdict, figure, reason, tuple(found), (0, 1.25))


def _ms(value: float) -> str:
    return f"{value * 1e3:.3g} ms"


CLAIMS: tuple[Claim, ...] = (
    Claim("T1", "unfold and fold only play with strides", lambda f: "no figure", t1_views),
    Claim(
        "T2",
        "im2col and col2im take most of the time",
        lambda f: "a profile on a GPU, its numbers not preserved",
        t2_most_time,
    ),
    Claim(
        "T3",
        "training is 4.5 to 10 times slower than nn.Conv2d",
        lambda f: (
            f"{f['train_custom'] / f['train_conv']:.3g}× and "
            f"{f['train_custom_first'] / f['train_conv_first']:.3g}× (GPU, batch 256)"
        ),
        t3_training,
    ),
    Claim(
        "T4",
        "fold is almost free, it copies nothing",
        lambda f: f"{f['b512_fold'] / f['b512_forward_custom']:.0%} of forward (CPU, 512 images)",
        t4_fold_free,
    ),
    Claim(
        "T5",
        "unfold and the product cost about the same",
        lambda f: f"{f['b512_product'] / f['b512_unfold']:.3g}× (CPU, 512 images)",
        t5_same_cost,
    ),
    Claim(
        "T6",
        "backward costs about as much as forward",
        lambda f: f"{f['b512_backward_custom'] / f['b512_forward_custom']:.3g}× (CPU, 512 images)",
        t6_backward,
    ),
    Claim(
        "T7",
        "the extra time per batch comes from unfold and fold",
        lambda f: f"{_ms(f['train_custom'] - f['train_conv'])} extra (GPU, batch 256)",
        t7_extra_time,
    ),
    Claim(
        "T8",
        "with a larger batch both get slower and the ratio stays between 2 and 4",
        lambda f: (
            f"forward {f['b512_forward_custom'] / f['b512_forward_conv']:.3g}×, backward "
            f"{f['b512_backward_custom'] / f['b512_backward_conv']:.3g}× (CPU, 512 images)"
        ),
        t8_batch,
    ),
    Claim(
        "T9",
        "inference is 6 to 7 times slower",
        lambda f: f"{f['inference_custom'] / f['inference_conv']:.3g}× (GPU)",
        t9_inference,
    ),
    Claim(
        "T10",
        "with the library (cuDNN, oneDNN) off, nn.Conv2d is as slow as the custom layer",
        lambda f: f"{_ms(f['train_cudnn_off'])}, similar to the custom layer (GPU)",
        t10_library_off,
    ),
    Claim(
        "T11",
        "the library is much better for these sizes",
        lambda f: f"{f['train_cudnn_off'] / f['train_cudnn_on']:.3g}× (GPU)",
        t11_library,
    ),
    Claim("T12", "nothing can be done", lambda f: "no figure", t12_nothing),
)


def judge(rows: Iterable[Row]) -> list[tuple[Claim, Verdict]]:
    """Every claim with its verdict from the rows of one machine and device."""
    rows = list(rows)
    return [(claim, claim.judge(rows)) for claim in CLAIMS]


def table(rows: Iterable[Row]) -> pd.DataFrame:
    """`judge` with the thread's figures: claim, the thread, measured (`span`), verdict, reason."""
    import pandas as pd

    thread_figures = figures()
    return pd.DataFrame(
        {
            "claim": f"{claim.id} {claim.text}",
            "the thread": claim.figure(thread_figures),
            "measured": span(found),
            "verdict": found.verdict,
            "reason": found.reason,
        }
        for claim, found in judge(rows)
    )


def span(found: Verdict) -> str:
    """The smallest and the largest of several figures, a line each, with interval and place."""
    if len(found.intervals) < 3 or "; " not in found.figure:
        return found.figure.replace("; ", "\n")
    ordered = sorted(found.intervals, key=_value)
    ends = "\n".join(f"{i.text(found.style)} ({i.where})" for i in (ordered[0], ordered[-1]))
    return f"{ends}\nof {len(ordered)} figures"


def malloc(row: Row) -> str:
    """How the row's malloc was set, in words for a heading."""
    allocator = str(row.flags["allocator"])
    library, _, setting = allocator.partition(", ")
    return f"malloc: {library}'s default" if setting == "default" else f"malloc: {allocator}"


def title(rows: Sequence[Row]) -> str:
    """Machine, device, versions, threads, allocator and first date of rows measured together."""
    first = rows[0]
    text = f"{first.machine}, {first.device}, torch {first.versions['torch']}"
    if first.device == "cpu":
        threads = first.flags["threads"]
        text += f", {threads} thread{'s' if threads != 1 else ''}, {malloc(first)}"
    quick = ", quick: smaller batches, wider intervals" if " quick-" in first.session else ""
    return f"{text}, {min(row.time for row in rows)[:10]}{quick}"
