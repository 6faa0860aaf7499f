"""The ladder of rewrites, read from rows: what each rung promised, brought, and owed to malloc."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from convlab import cost, notebook, plots, thread
from convlab.experiments.named import LADDER
from convlab.peers import PEERS, find
from convlab.problem import ConvProblem
from convlab.problems import thread_problem
from convlab.records import Row
from convlab.thread import Interval
from convlab.timing import size

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PASSES = {"forward": "forward", "training": "train"}
"""How a pass is called in the text → in the rows."""
BY_ROWS = ("windows", "windows_chunked", "row_windows")  # copy whole rows of the image
COLUMNS = ("unfold", "unfold_batched", "unfold_chunked", "unfold_recompute", *BY_ROWS)
NO_PRODUCT = ("fused",)  # forward without a matrix product
NOWHERE = Interval("", np.nan, np.nan, np.nan)


def short(p: ConvProblem) -> str:
    """The sizes of a problem in a few letters; of the thread's problem only the batch."""
    if p == thread_problem(p.batch):
        return f"{p.batch} images"
    kernel = f"k{p.kernel_size[0]}" + (f"/{p.stride[0]}" if p.stride[0] > 1 else "")
    kernel += " depthwise" if p.groups > 1 else ""
    return f"{p.in_channels}→{p.out_channels}, {p.height}², {kernel}, {p.batch} images"


def words(i: Interval) -> str:
    """The interval in words; a dash where nothing was measured."""
    return "–" if np.isnan(i.value) else i.text("×")


def pace(i: Interval) -> str:
    """What the ratio of an old time and a new one says of the new way."""
    return "faster" if i.low > 1 else "slower" if i.high < 1 else "within the noise"


def of_page_faults(before: str, name: str, called: Interval, kept: Interval) -> str:
    """What the same ratio with freed memory kept says about the one as called."""
    if kept.high < called.low:
        part = "are part of the gain" if called.value >= 1 else "hide part of the loss"
        return f"page faults weigh more on {before} and {part}"
    if kept.low > called.high:
        part = "hide part of the gain" if called.value >= 1 else "are part of the loss"
        return f"page faults weigh more on {name} and {part}"
    return "page faults do not change it beyond the noise"


def checked(ladder: Ladder) -> pd.DataFrame:
    """What was predicted of other layers, and for each what the rows say of it."""
    import pandas as pd

    rows = []
    for p, (word, pass_) in ((p, item) for p in ladder.problems for item in PASSES.items()):
        case, best = ladder.case(p, pass_)["ratio"], ladder.fastest(ladder.hand, p, pass_)
        if p == thread_problem(p.batch) or best is None:
            continue
        for predicted, outcome in _outcomes(ladder, p, pass_, case, best):
            rows.append({"predicted": predicted, "layer": f"{short(p)}, {word}", "found": outcome})
    frame = pd.DataFrame(rows, columns=["predicted", "layer", "found"])
    return frame.sort_values("predicted", kind="stable", ignore_index=True)


def _outcomes(ladder: Ladder, p: ConvProblem, pass_: str, case: pd.Series, best: str):
    """(prediction, what came of it) for each that speaks of this problem."""
    leads = f"the fastest by hand is {best}, {case[best]:.3g}× nn.Conv2d's time"
    if p.kernel_size == (1, 1):
        i = ladder.factor(best, "native", p, pass_)
        whose = {"faster": "the library's", "slower": "ours", "within the noise": "neither's"}
        yield "1×1: whose product is faster?", f"{whose[pace(i)]}: {leads}"
    product = ladder.fastest([n for n in ladder.hand if n not in NO_PRODUCT], p, pass_)
    if p.groups > 1 and product:
        other = any(n in case.index for n in NO_PRODUCT)
        good = case[product] < 1 or (other and product == best)
        others = "" if product == best else f" ({leads})"
        yield (
            "depthwise: a rung that ends in a matrix product is not good",
            f"{'wrong' if good else 'right'}: {product} takes {case[product]:.3g}×{others}",
        )
    if p.stride != (1, 1):
        verdict = "wrong, it copies by rows" if best in BY_ROWS else "right"
        yield "stride: copying by rows loses its point", f"{verdict}: {leads}"
    dense = p.groups == 1 and p.stride == (1, 1) and p.kernel_size != (1, 1)
    if dense and min(p.in_channels, p.out_channels) >= 64:
        known, usual = (
            found[[n for n in COLUMNS if n in found.index]]
            for found in (case, ladder.case(ladder.many, pass_)["ratio"])
        )
        spread, other = known.max() / known.min(), usual.max() / usual.min()
        yield (
            "many channels: the rungs lie closer together",
            f"{'right' if spread < other else 'wrong'}: slowest / fastest of those with columns "
            f"{spread:.3g}, for {short(ladder.many)} of the thread's layer {other:.3g}",
        )


def source(*functions: Callable) -> None:
    """Show the source of functions."""
    from IPython.display import Markdown, display

    sources = [textwrap.dedent(inspect.getsource(f)) for f in functions]
    display(Markdown("```python\n" + "\n\n".join(sources) + "```"))


class Ladder:
    """Rows of the experiment "ladder" of one session, by what was measured.

    Attributes:
        timed: (problem, pass, freed memory kept, algorithm) → its rows, of those with a time.
        silent: the rows without a time.
        problems: those that have times.
        few, many: the thread's problem with its smallest and its largest batch.
        names: the algorithms, from the first rung up.
        hand: those of them written by hand, without a library's convolution.
    """

    def __init__(self, rows: Iterable[Row], ceilings: cost.Ceilings) -> None:
        self.rows, self.ceilings = [r for r in rows if r.experiment == "ladder"], ceilings
        self.silent = [r for r in self.rows if not r.samples]
        self.timed: dict[tuple, list[Row]] = {}
        for r in self.rows:
            key = ConvProblem.from_dict(r.problem), r.pass_, thread.kept(r), r.algorithm
            if r.samples:
                self.timed.setdefault(key, []).append(r)
        self.problems = list(dict.fromkeys(p for p, *_ in self.timed))
        batches = [p.batch for p in self.problems if p == thread_problem(p.batch)]
        self.few, self.many = thread_problem(min(batches)), thread_problem(max(batches))
        present = dict.fromkeys(r.algorithm for r in self.rows)
        self.names = [n for n in LADDER if n in present] + [n for n in present if n not in LADDER]
        ours = [n for n in self.names if n not in PEERS and n != "thread"]
        self.hand = [n for n in ours if not find(n).library]

    @property
    def title(self) -> str:
        return thread.title(self.rows)

    def factor(self, a: str, b: str, p: ConvProblem, pass_: str, kept: bool = False) -> Interval:
        """Time of `a` over time of `b`, round by round, with its 95 % interval."""
        pair = [self.timed.get((p, pass_, kept, name)) for name in (a, b)]
        return thread.statistic("", np.divide, *pair) if all(pair) else NOWHERE

    def case(self, p: ConvProblem, pass_: str, kept: bool = False) -> pd.DataFrame:
        """All algorithms on one problem: time with quartiles, peak memory, ratio to nn.Conv2d."""
        import pandas as pd

        found, native = {}, self.timed.get((p, pass_, kept, "native"))
        for name in self.names:
            if rows := self.timed.get((p, pass_, kept, name)):
                row, ratio = rows[0], np.nan
                if native:
                    pairs = zip(row.samples, native[0].samples)
                    ratio = np.median([a / b if b else np.nan for a, b in pairs])
                found[name] = [row.median, row.q25, row.q75, row.peak_bytes, ratio]
        columns = ["time", "time_low", "time_high", "memory", "ratio"]
        return pd.DataFrame.from_dict(found, orient="index", columns=columns)

    def floor(self, p: ConvProblem, pass_: str) -> float:
        """Seconds: arithmetic and compulsory bytes at this machine's ceilings."""
        return cost.floor_seconds(p, self.ceilings, direction=pass_)

    def counted(self, a: str, b: str, p: ConvProblem, pass_: str) -> float:
        """Time of `a` over time of `b` if bytes and FLOPs were all; nan where not counted."""
        directions = ("forward",) if pass_ == "forward" else ("forward", "backward")
        try:
            one, two = (
                sum(cost.predicted_seconds(n, p, self.ceilings, direction=d) for d in directions)
                for n in (a, b)
            )
        except ValueError:
            return np.nan
        return one / two

    def ratios(self, pass_: str, names: Sequence[str]) -> pd.DataFrame:
        """Problem × algorithm: time over that of nn.Conv2d."""
        import pandas as pd

        found = {short(p): self.case(p, pass_)["ratio"] for p in self.problems}
        return pd.DataFrame(found).T.reindex(columns=list(names))

    def fastest(
        self, names: Iterable[str], p: ConvProblem, pass_: str, kept: bool = False
    ) -> str | None:
        """Of `names`, the one with the smallest ratio to nn.Conv2d; None if none has a time."""
        found = self.case(p, pass_, kept)["ratio"]
        known = found[[name for name in names if name in found.index]].dropna()
        return known.idxmin() if len(known) else None

    def silence(self) -> pd.DataFrame:
        """The rows without a time: algorithm, status, reason, problems."""
        import pandas as pd

        reasons: dict[tuple, dict] = {}
        for r in self.silent:
            key = r.algorithm, r.status, r.extra.get("reason", "too large")
            reasons.setdefault(key, {})[short(ConvProblem.from_dict(r.problem))] = True
        return pd.DataFrame(
            {"algorithm": a, "status": status, "why": why}
            | {"problems": "all" if len(where) >= len(self.problems) else "; ".join(where)}
            for (a, status, why), where in reasons.items()
        )

    # What a rung brings

    def bought(self, before: str, *names: str, problems: Sequence[ConvProblem]) -> pd.DataFrame:
        """Time of the form before over that of each of `names`: counted, measured, memory kept."""
        import pandas as pd

        lines = {}
        for name in names:
            for p, word in ((p, word) for p in problems for word in PASSES):
                called, kept = (self.factor(before, name, p, PASSES[word], k) for k in (0, 1))
                if np.isnan(called.value):
                    continue
                lines[name, short(p), word] = {
                    f"{before} / it, counted": self.counted(before, name, p, PASSES[word]),
                    "measured": words(called),
                    "with memory kept": words(kept),
                }
        found, kept = pd.DataFrame(lines).T, "with memory kept"
        return found.drop(columns=kept) if len(found) and (found[kept] == "–").all() else found

    def closing(self, before: str, name: str, p: ConvProblem | None = None) -> str:
        """One sentence: counted x, measured y, with memory kept z; many images if `p` is None."""
        p = p or self.many
        found = []
        for word, pass_ in PASSES.items():
            called, kept = (self.factor(before, name, p, pass_, k) for k in (False, True))
            if np.isnan(called.value):
                continue
            counted = self.counted(before, name, p, pass_)
            text = f"{word.capitalize()}: " + (
                "" if np.isnan(counted) else f"counted {counted:.3g}×, "
            )
            text += f"measured {words(called)} ({pace(called)})"
            if not np.isnan(kept.value):
                text += f", with memory kept {words(kept)}: "
                text += of_page_faults(before, name, called, kept)
            found.append(text)
        return f"Time of {before} / {name}, {short(p)}. {'. '.join(found) or 'Not measured'}."

    def tally(self, before: str, name: str) -> str:
        """How often `name` is faster than the form before, over all problems and passes."""
        groups: dict[str, list[str]] = {"faster": [], "slower": [], "within the noise": []}
        for p, (word, pass_) in ((p, item) for p in self.problems for item in PASSES.items()):
            if not np.isnan((i := self.factor(before, name, p, pass_)).value):
                groups[pace(i)].append(f"{short(p)}, {word} ({i.value:.3g}×)")
        n = sum(map(len, groups.values()))
        if not n:
            return f"{name} beside {before}: not measured."
        text = f"{name} beside {before}, as called: faster in {len(groups['faster'])} of {n} "
        text += f"comparisons, slower in {len(groups['slower'])}."
        return text + (f" Faster: {'; '.join(groups['faster'])}." if groups["faster"] else "")

    def across(self, before: str, name: str) -> pd.DataFrame:
        """Time of the form before over that of `name` on every problem, with intervals."""
        import pandas as pd

        found = {
            short(p): {word: words(self.factor(before, name, p, q)) for word, q in PASSES.items()}
            for p in self.problems
        }
        return pd.DataFrame(found).T

    def contest(self, name: str) -> dict[str, Interval]:
        """The best by hand over `name`: problem and pass → ratio of times, where both have one."""
        found = {}
        for p, (word, pass_) in ((p, item) for p in self.problems for item in PASSES.items()):
            best = self.fastest(self.hand, p, pass_)
            i = NOWHERE if best is None else self.factor(best, name, p, pass_)
            if not np.isnan(i.value):
                found[f"{short(p)}, {word}"] = i
        return found

    # For a notebook

    def rung(self, title: str, *names: str, problems: Sequence[ConvProblem]) -> Figure:
        """Time, ratio and memory of some algorithms on some problems, in both passes."""
        panels, floors = {}, {}
        for p, word in ((p, word) for p in problems for word in PASSES):
            found, key = self.case(p, PASSES[word]), f"{short(p)}, {word}"
            panels[key] = found.loc[[n for n in dict.fromkeys(names) if n in found.index]]
            floors[key] = self.floor(p, PASSES[word])
        note = f"Time, × nn.Conv2d's, peak memory; bars with quartiles. {self.title}"
        return plots.rungs(panels, floors, title, note)

    def climb(
        self,
        title: str,
        before: str,
        *names: str,
        problems: Sequence[ConvProblem] = (),
    ) -> None:
        """Figure, table and closing sentences of one rung; by default with few and many images."""
        from IPython.display import display

        problems = problems or (self.few, self.many)
        if not any(key[3] in names for key in self.timed):
            why = {r.extra.get("reason", r.status) for r in self.silent if r.algorithm in names}
            return notebook.say(
                "Not measured here: {why}", why=" ".join(why) or "left out in quick mode."
            )
        display(self.rung(title, "native", "thread", before, *names, problems=problems))
        note = f"Ratios of times; counted: at this machine's ceilings. {self.title}"
        table = self.bought(before, *names, problems=problems)
        if len(table):
            notebook.table(table, note, **{f"{before} / it, counted": ".3g"})
        for name in names:
            for p in dict.fromkeys(p for p in problems if p != self.few):
                notebook.say(self.closing(before, name, p))

    def promised(self, before: str, name: str, p: ConvProblem | None = None) -> None:
        """Show, folded: counted bytes before and after, and the time they take at the ceilings."""
        p = p or self.many
        text = f"From {before} to {name}, {short(p)}. "
        for word, pass_ in PASSES.items():
            directions = ("forward",) if pass_ == "forward" else ("forward", "backward")
            old, new = (
                sum(cost.moved_bytes(n, p, direction=d) for d in directions) for n in (before, name)
            )
            text += f"{word.capitalize()}: {size(old)} → {size(new)} through main memory; at this "
            text += f"machine's ceilings {self.counted(before, name, p, pass_):.3g} times as fast. "
        notebook.answer(text, "Show what the count promises")

    def count(self, name: str, p: ConvProblem | None = None) -> None:
        """Show the passes over memory of a forward pass, and what they and backward come to."""
        import pandas as pd

        p = p or self.many
        steps = pd.DataFrame([vars(s) for s in cost.steps(name, p)]).set_index("what")
        note = f"{name}, forward, {p}; counted. launches: on CUDA, of one chunk where chunked."
        shown = steps[["read", "written", "flops", "launches"]]
        notebook.table(shown, note, read="bytes", written="bytes", flops=".3g")
        text = "Through main memory: {f:bytes} forward and {b:bytes} backward; at least {g:bytes} "
        text += "and {c:bytes} are needed."
        f, b = (cost.moved_bytes(name, p, direction=d) for d in ("forward", "backward"))
        g, c = (cost.compulsory_bytes(p, direction=d) for d in ("forward", "backward"))
        notebook.say(text, f=f, b=b, g=g, c=c)
