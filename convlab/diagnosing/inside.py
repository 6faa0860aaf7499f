"""Causes inside the layer: what its `forward` does to memory, how often it calls, how it waits."""

from __future__ import annotations

from collections import Counter

from convlab.diagnosing.causes import (
    MODEL_CALL_SECONDS,
    SPOILS,
    WORK,
    Cause,
    Facts,
    detector,
    explained,
    model_seconds,
    places,
)
from convlab.diagnosing.lineage import BLOWN, COLUMNS, COPY, FOLD, LAYOUT
from convlab.diagnosing.watch import Op
from convlab.timing import seconds, size

FEW = 4  # iterations that are not worth a word
NOTABLE_SHARE = 0.01
BELOW = 0.99  # ranks right behind


@detector
def printing_or_waiting(facts: Facts) -> Cause | None:
    waits = facts.watched.waits
    if not waits:
        return None
    taken = sum(wait.seconds for wait in waits)
    counts = Counter((wait.what, wait.where) for wait in waits)
    seen = "; ".join(
        f"{what} {count}×" + (f" at {where} `{where.text}`" if where else "")
        for (what, where), count in counts.most_common(4)
    )
    if facts.device == "cpu":
        where = "On the CPU they cost little but their own work; on a GPU the host waits at each"
    else:
        where = "The host waits for the GPU at each"
    return Cause(
        "printing or synchronising in forward",
        f"per call of forward: {seen}; {seconds(taken)} without the terminal. {where}",
        "take it out of forward first: every other time contains it. Log from outside, every "
        "hundredth step, and keep decisions on the device (torch.where, clamp)",
        taken,
        taken / (facts.watched.seconds() + taken) if taken else 0.0,
        None,
        (SPOILS, 0.0),
    )


@detector
def columns_materialised(facts: Facts) -> Cause | None:
    ops = _marked(facts, COLUMNS)
    if not ops or not facts.watched.columns:
        return None
    count = facts.watched.columns
    made = [op for op in ops if op.direction == "forward" and op.written and not op.copied]
    copied = sum(op.copied for op in ops)
    evidence = (
        f"columns of {size(count * facts.itemsize)}, {_times(count, facts.input_values)} the input,"
        f" are written{places((made or ops)[:1])}; {len(ops)} operators make, read or rewrite "
        "tensors of that size"
    )
    if copied:
        evidence += f", {copied} of them only to copy the columns"
    return Cause(
        "columns materialised (im2col)",
        evidence,
        "use a form that never stores them: F.conv2d where the guide allows it, else flex_conv2d, "
        "or a few images at a time (notebook 06)",
        **explained(facts, ops),
    )


@detector
def broadcast_blow_up(facts: Facts) -> Cause | None:
    ops = _marked(facts, BLOWN)
    if not ops:
        return None
    count = max(op.written for op in ops)
    over = _times(count, facts.input_values)
    return Cause(
        "broadcasting blows the columns up",
        f"{size(count * facts.itemsize)}, {over} the input, are written{places(ops, 2)}: one value"
        f" for every pair of output channel and tap; {len(ops)} operators work on tensors of that"
        " size",
        "reduce while combining: flex_conv2d adds up in registers; or loop over taps or output "
        "channels",
        **explained(facts, ops),
    )


@detector
def fold_with_kernel_1(facts: Facts) -> Cause | None:
    ops = _marked(facts, FOLD)
    if not any(op.name == "col2im" for op in ops):
        return None
    return Cause(
        "F.fold with kernel 1",
        f"{len(ops)} calls, forward and backward, copy what already is the output{places(ops)}",
        "y.view(N, K, OH, OW) of a weight-first product costs nothing",
        **explained(facts, ops),
    )


@detector
def hidden_copies(facts: Facts) -> Cause | None:
    # A copy of the columns counts in both causes: without columns there is nothing to copy, so it
    # does not put this one before them.
    ops = [op for op in facts.watched.ops if op.copied and op.mark in (COPY, COLUMNS)]
    taken = explained(facts, ops)
    if not ops or -taken["rank"][1] < NOTABLE_SHARE * model_seconds(facts):
        return None
    largest = max(ops, key=lambda op: op.written)
    columns = explained(facts, _marked(facts, COLUMNS))["rank"][1]
    others = explained(facts, _marked(facts, COPY))["rank"][1]
    if any(op.mark == COLUMNS for op in ops):
        taken["rank"] = (WORK, min(others, max(taken["rank"][1], BELOW * columns)))
    also = " (also counted as columns)" if any(op.mark == COLUMNS for op in ops) else ""
    return Cause(
        "hidden copies",
        f"{len(ops)} copies, the largest {size(largest.written * facts.itemsize)}"
        f"{places(op for op in ops if op.direction == 'forward')}{also}",
        "keep the order of axes that the next operator wants; W @ columns copies the columns, "
        "torch.bmm(W.expand(N, -1, -1), columns) does not",
        **taken,
    )


@detector
def layout_conversions(facts: Facts) -> Cause | None:
    ops = _marked(facts, LAYOUT)
    if not ops:
        return None
    return Cause(
        "layout conversions (NCHW ↔ NHWC)",
        f"{len(ops)} conversions{places(ops)}",
        "stay in one layout: x.to(memory_format=torch.channels_last) once, at the network's input",
        **explained(facts, ops),
    )


@detector
def one_at_a_time(facts: Facts) -> Cause | None:
    """A line that ran an operator once per image, channel or tap."""
    counts = Counter(
        (op.where, op.name)
        for op in facts.watched.ops
        if op.where and op.direction == "forward" and (op.written or op.mark)
    )
    batch, channels = facts.input_shape[:2]
    p = facts.problem
    taps = p.kernel_size[0] * p.kernel_size[1] if p else 0
    known = {p.out_channels if p else 0: "output channel", taps: "tap", batch: "image"}
    for (where, name), count in counts.most_common():
        unit = known.get(count) or next(
            (word for n, word in known.items() if n > FEW and count % n == 0 and count // n <= 4),
            "input channel" if count == channels else None,
        )
        if count > FEW and unit:
            lines = {w for (w, _), n in counts.items() if w and n >= count}
            ops = [op for op in facts.watched.ops if op.where in lines]
            calls = sum(op.direction == "forward" for op in facts.watched.ops)
            inside = sum(op.direction == "forward" for op in ops)
            costs = {**explained(facts, ops), "gain": None}
            costs["rank"] = (
                WORK,
                -len(ops) * MODEL_CALL_SECONDS,
            )  # the arithmetic is not its fault
            return Cause(
                f"one iteration per {unit}",
                f"{where} `{where.text}` ran {name} {count} times in one call; the loop makes "
                f"{inside} of the {calls} operator calls of forward, each with its "
                "start-up cost (a launch on a GPU)",
                f"work on all {unit}s in one operator"
                + (
                    ": put them on the batch axis of one call, or use groups"
                    if unit == "image"
                    else ""
                ),
                **costs,
            )
    return None


def _marked(facts: Facts, mark: str) -> list[Op]:
    return [op for op in facts.watched.ops if op.mark == mark]


def _times(count: int, of: int) -> str:
    return f"{count / of:.3g}×"
