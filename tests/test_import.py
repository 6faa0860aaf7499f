"""What `import convlab` loads, and which module may know of which."""

import ast
import graphlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "convlab"

# Lowest first: a module imports only from those before it. `algorithms` is one layer with an
# order of its own: base, then the algorithms, then the registry. "" is the package itself.
LAYERS = [
    "problem",
    "problems",
    "counts",
    "cost",
    "guide",
    "machine",
    "guide",
    "timing",
    "pitfalls",
    "kernels",
    "algorithms",
    "flex",
    "layers",
    "swap",
    "oracle",
    "auto",
    "peers",
    "stages",
    "images",
    "vision",
    "records",
    "datasets",
    "networks",
    "training",
    "steps",
    "sameness",
    "experiments",
    "thread",
    "",
    "plots",
    "pictures",
    "notebook",
    "climb",
    "diagnosing",
    "__main__",
]
SLOW_TO_IMPORT = [
    *("IPython", "PIL", "ipywidgets", "matplotlib", "pandas", "rich", "scipy", "seaborn"),
    *("sklearn", "torchvision", "triton"),
]


def module_name(path):
    """convlab/algorithms/base.py → algorithms.base; convlab/algorithms/__init__.py → algorithms."""
    parts = path.relative_to(FOLDER).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_name(path): path for path in sorted(FOLDER.rglob("*.py"))}


def imported_from_convlab(path):
    """Modules of convlab that a file imports anywhere, in a function or for types only too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = {name for name in inner if name.removeprefix("convlab.") in PATHS}
            names_of_module = len(modules) < len(inner)
            found |= modules | ({node.module} if names_of_module else set())
    found = {name for name in found if name.partition(".")[0] == "convlab"}
    return {name.removeprefix("convlab").lstrip(".") for name in found}


GRAPH = {name: imported_from_convlab(path) for name, path in PATHS.items()}


def test_the_imports_are_found():
    assert GRAPH["cost"] == {"counts", "problem"}
    assert GRAPH["algorithms.native"] == {"algorithms.base", "machine"}
    assert {"algorithms", "timing"} <= GRAPH[""]
    assert set().union(*GRAPH.values()) <= PATHS.keys()


def layer(name):
    return name.partition(".")[0]


def test_every_module_has_its_layer():
    assert {layer(name) for name in PATHS} <= set(LAYERS)


@pytest.mark.parametrize("name", PATHS)
def test_a_module_imports_only_from_lower_layers(name):
    place = LAYERS.index(layer(name))
    for other in GRAPH[name]:
        same_layer = layer(other) == layer(name)
        assert same_layer or LAYERS.index(layer(other)) < place, f"{name} imports {other}"


def test_there_is_no_cycle():
    graphlib.TopologicalSorter(GRAPH).prepare()  # CycleError names the cycle


def python(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_importing_convlab_loads_nothing_slow_besides_torch():
    code = """
import json, sys, torch
before = set(sys.modules)
import convlab
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    loaded = python(code)
    assert "convlab" in loaded
    assert not {name.partition(".")[0] for name in loaded} & set(SLOW_TO_IMPORT)
    assert "torch._dynamo" not in loaded


def test_every_module_can_be_the_first_to_be_imported():
    triton = importlib.util.find_spec("triton") is not None
    needing = (
        set() if triton else {name for name in PATHS if "import triton" in PATHS[name].read_text()}
    )
    names = [f"convlab.{name}".rstrip(".") for name in PATHS if name not in {"__main__"} | needing]
    code = f"""
import importlib, json, sys
for name in {names}:
    for loaded in [m for m in sys.modules if m.partition(".")[0] == "convlab"]:
        del sys.modules[loaded]
    importlib.import_module(name)
print(json.dumps("ok"))
"""
    assert python(code) == "ok"
