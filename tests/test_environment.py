"""pyproject.toml, environment.yml and constraints.txt name the same packages and agree."""

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings tomli there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA_NAMES = {"torch": "pytorch"}
CONDA_ONLY = {"python", "pip"}


def requirements(*extras):
    lines = PROJECT["dependencies"] + [line for extra in extras for line in EXTRAS[extra]]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def conda_requirements():
    lines = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    plain = [line for line in lines if isinstance(line, str)]
    by_pip = [line for line in lines[-1]["pip"] if not line.startswith("-e")]
    return {r.name: r for r in map(Requirement, plain + by_pip)}


def constraints():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def test_conda_environment_names_the_packages_of_the_project():
    wanted = {CONDA_NAMES.get(name, name) for name in requirements("notebooks", "test")}
    assert conda_requirements().keys() - CONDA_ONLY == wanted


def test_conda_environment_has_the_lower_bounds_of_the_project():
    conda = conda_requirements()
    assert str(conda["python"].specifier) == PROJECT["requires-python"]
    for name, requirement in requirements("notebooks", "test").items():
        assert conda[CONDA_NAMES.get(name, name)].specifier == requirement.specifier, name


def test_conda_environment_says_what_each_package_is_for():
    lines = (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()
    packages = [line for line in lines[lines.index("dependencies:") :] if line.startswith("  - ")]
    for line in packages:
        assert re.search(r" # \w", line) or line == "  - pip:", line


def test_conda_environment_ends_with_the_package_itself():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))[
        "dependencies"
    ]
    assert dependencies[-1]["pip"][-1] == "-e ."


def test_the_project_has_lower_bounds_only():
    for requirement in requirements(*EXTRAS).values():
        assert [s.operator for s in requirement.specifier] == [">="], str(requirement)


def test_constraints_pin_exactly():
    for constraint in constraints():
        assert [s.operator for s in constraint.specifier] == ["=="], str(constraint)
        assert "+" not in str(constraint.specifier), "a local version exists on one machine only"


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_constraints_satisfy_the_lower_bounds(extra):
    for name, requirement in requirements(extra).items():
        pins = [c for c in constraints() if canonicalize_name(c.name) == name]
        assert pins, f"{name} is not pinned"
        for pin in pins:
            (specifier,) = pin.specifier
            assert Version(specifier.version) in requirement.specifier, str(pin)
