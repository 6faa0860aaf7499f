"""torchvision imports next to any PyTorch, and is left alone where it imports by itself."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convlab.vision import torchvision

ROOT = Path(__file__).resolve().parent.parent

# A package of the same name whose C++ library is missing, or not, or whose import fails otherwise.
PACKAGE = """
from torchvision import extension, registrations
models = "models"
assert extension is torchvision.extension
"""
REGISTRATIONS = """
import torch
import torchvision.extension
{declare}
for name in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{{name}}")(lambda *arguments: None)
{fail}
"""
DECLARE = """
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
"""
SCRIPT = """
from convlab import vision
try:
    found = vision.torchvision()
    assert found is vision.torchvision()
    print(found.models, len(vision._declared))
except Exception as error:
    print(type(error).__name__, error)
"""


def imported(folder, declare="", fail=""):
    """What a new Python says about a made-up torchvision."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("import torchvision\n" + PACKAGE)
    (package / "extension.py").touch()
    (package / "registrations.py").write_text(REGISTRATIONS.format(declare=declare, fail=fail))
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(folder)!r}]\n{SCRIPT}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_what_a_missing_library_would_declare_is_declared(tmp_path):
    assert imported(tmp_path) == "models 1\n"


def test_nothing_is_declared_where_the_library_does_it(tmp_path):
    assert imported(tmp_path, DECLARE) == "models 0\n"


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ('raise RuntimeError("made for another PyTorch")', "RuntimeError made for another PyTorch"),
        ('raise ImportError("no module nothing")', "ImportError no module nothing"),
        (
            'raise RuntimeError("operator torchvision::roi does not exist")',
            "RuntimeError operator torchvision::roi does not exist",
        ),
    ],
    ids=["another error", "not there", "another operator"],
)
def test_any_other_error_passes_through(tmp_path, fail, message):
    assert imported(tmp_path, DECLARE, fail).strip().startswith(message)


def test_models_datasets_and_transforms_work():
    vision = torchvision()
    assert vision is torchvision() is sys.modules["torchvision"]
    image = torch.rand(3, 8, 8)
    assert torch.equal(vision.transforms.functional.hflip(image), image.flip(2))
    assert vision.models.mobilenet_v3_small().eval()(torch.rand(1, 3, 32, 32)).shape == (1, 1000)
    assert len(vision.datasets.FakeData(size=3)) == 3
