"""Remake the parts of README.md that come from the records: the verdicts and the picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from convlab import experiments, plots, records, thread, timing
from convlab.plots.verdicts import MEANINGS
from convlab.problem import ConvProblem
from convlab.problems import thread_problem
from convlab.records import Row

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PICTURE = ROOT / "data" / "answer.png"
BEGIN, END = "<!-- made by `make readme` from data/records/ -->", "<!-- end -->"
LABELS = {
    "native": "native: nn.Conv2d",
    "native_channels_last": "native_channels_last: in NHWC",
    "auto": "auto: chosen by measuring",
    "fused": "fused: the sum, compiled",
    "windows_chunked": "windows_chunked: a cache at a time",
    "row_windows": "row_windows: k copies, not k²",
    "windows": "windows: copied in long rows",
    "unfold": "unfold: weight first, no fold",
    "thread": "thread: the layer as posted",
}


def sessions() -> list[list[Row]]:
    """The newest session of a CPU and that of a GPU, of those that decide the claims."""
    newest: dict[str, list[Row]] = {}
    for path in records.files():
        for (_, device), group in experiments.by_machine(records.read(path)).items():
            rows = experiments.last_session(group, "step")
            if device not in newest or rows[0].session > newest[device][0].session:
                newest[device] = rows
    return [newest[device] for device in sorted(newest)]


def verdicts(machines: Sequence[Sequence[Row]]) -> str:
    """One table in Markdown: a line per claim, a column per machine."""
    tables = [thread.table(rows) for rows in machines]
    first = "Claim of the thread, *what is divided by what*"
    head = [first, "Its own figure", *map(thread.title, machines)]
    lines = [_line(head), _line(["---"] * len(head))]
    for i, claim in enumerate(tables[0].itertuples()):
        meaning = MEANINGS[claim.claim.split()[0]]
        ratio = f"<br>*{meaning}*" if "/" in meaning else ""
        cells = [claim.claim + ratio, tables[0]["the thread"][i]]
        for table in tables:
            measured = table["measured"][i].replace("\n", "<br>")
            cells.append(f"**{table['verdict'][i]}**<br>{measured}")
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def ladder() -> list[Row]:
    """The newest session of any machine that climbed the ladder; [] if none did."""
    rows = [row for path in records.files() for row in records.read(path)]
    having = [row for row in rows if row.experiment == "ladder"]
    return experiments.last_session(having)


def picture(rows: Sequence[Row]):
    """The thread's problem on many images, malloc as it comes: algorithms against `nn.Conv2d`."""
    p = thread_problem(max(r.problem["batch"] for r in rows))
    panels = {}
    for pass_, name in (("forward", "inference"), ("train", "forward and backward")):
        case = [r for r in rows if ConvProblem.from_dict(r.problem) == p and r.pass_ == pass_]
        case = [r for r in case if r.status == "ok" and not thread.kept(r)]
        table = timing.ratios(experiments.measured(case), "native")
        panels[name] = table.loc[[a for a in LABELS if a in table.index]]
    title = f"{p.batch} images of 50×50 pixels, 10→15 channels, kernel 3"
    return plots.ratio_bars(panels, title, thread.title(rows), "nn.Conv2d's", labels=LABELS)


def filled(text: str, body: str) -> str:
    """`text` with what stands between the two marks replaced by `body`."""
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n{body}\n{END}{after}"


def main() -> int:
    """Write README.md and the picture; with --check only say whether README.md is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit code 1 if README.md is old")
    options = parser.parse_args()
    machines = sessions()
    if not machines:
        print("data/records/ holds no records: run make record first", file=sys.stderr)
        return 2
    text = README.read_text(encoding="utf-8")
    new = filled(text, verdicts(machines))
    if options.check:
        return int(new != text)
    README.write_text(new, encoding="utf-8")
    if climbed := ladder():
        picture(climbed).savefig(PICTURE, dpi=110, bbox_inches="tight", metadata={"Software": None})
    print(f"README.md and {PICTURE.relative_to(ROOT)} made from {len(machines)} machine(s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
