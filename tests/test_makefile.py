"""The Makefile has the targets that README.md names, and its help needs no installation."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())


def test_every_target_in_the_readme_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"`[^`\n]+`|^(?: {4}|\$ ?)?make .*$", readme, re.MULTILINE)
    named = {target for text in code for target in re.findall(r"\bmake ([a-z]\w*)", text)}
    assert named <= TARGETS, named - TARGETS


def test_ci_calls_a_target():
    command = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()[-1]
    assert command in {f"make {target}" for target in TARGETS}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_help_is_the_default_and_lists_every_target(tmp_path):
    command = ["make", f"VENV={tmp_path / 'none'}"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert TARGETS - {"help"} == set(re.findall(r"^make (\w+)", listing, re.MULTILINE))
    assert not (tmp_path / "none").exists()
