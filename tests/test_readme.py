"""README.md: its table comes from the records, and its map names every module."""

import re
import subprocess
import sys
from pathlib import Path

from convlab import records
from convlab.plots.verdicts import MEANINGS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_is_what_the_records_give():
    assert records.files(), "a machine is recorded"
    command = [sys.executable, "tools/readme.py", "--check"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0, "make readme"


def test_the_table_says_what_is_divided_by_what():
    lines = {line.split()[1]: line for line in README.splitlines() if line.startswith("| T")}
    assert lines.keys() == MEANINGS.keys()
    for claim, meaning in MEANINGS.items():
        assert (f"<br>*{meaning}* |" in lines[claim]) == ("/" in meaning)


def test_reproduce_takes_as_long_everywhere():
    told = {
        name: re.findall(
            r"make reproduce\b.*\babout (\w+) minutes", (ROOT / name).read_text("utf-8")
        )
        for name in ("README.md", "Makefile", "notebooks/10_judge_the_thread.ipynb")
    }
    assert all(told.values()), told
    assert len({words for each in told.values() for words in each}) == 1, told


def test_the_map_names_every_module():
    named = set(re.findall(r"^  (\w+\.py|\w+/) ", README, re.MULTILINE))
    modules = {path.name for path in (ROOT / "convlab").glob("*.py")}
    packages = {f"{path.parent.name}/" for path in (ROOT / "convlab").glob("*/__init__.py")}
    assert named == modules - {"__init__.py"} | packages


def test_every_linked_file_exists():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)\)", prose)
    assert not [name for name in links if "://" not in name and not (ROOT / name).exists()]


def test_every_notebook_is_listed():
    notebooks = {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks <= set(re.findall(r"\]\(([^)]+)\)", README))
