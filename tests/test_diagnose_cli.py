"""`python -m convlab diagnose`: loads the reader's layer, reports, and refuses in one sentence."""

import gc
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

import convlab as convlab_package
from convlab import __main__
from convlab.diagnosing import measure
from convlab.diagnosing.loading import load, parse_arguments

ROOT = Path(__file__).resolve().parent.parent
LAYERS = """
import sys
import beside
import torch
from torch import nn
import torch.nn.functional as F

class Cosine(nn.Module):
    def __init__(self, channels, out_channels=4, kernel_size=3):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, channels * kernel_size**2))
        self.k = kernel_size

    def forward(self, x):
        columns = F.normalize(F.unfold(x, self.k, padding=self.k // 2), dim=1)
        print("seen")
        return (F.normalize(self.weight, dim=1) @ columns).unflatten(2, x.shape[2:])

def make(channels):
    return nn.Sequential(nn.Conv2d(channels, 2, 3), nn.Dropout())

class Slow(nn.Conv2d):
    def forward(self, x):
        import time
        print("called", file=sys.__stdout__, flush=True)
        time.sleep(60)

class Space:
    layer = nn.Conv2d(3, 4, 3)

class Broken(nn.Module):
    def __init__(self):
        raise RuntimeError("no such weight")

number = 3
if __name__ == "__main__":
    raise SystemExit("this is not for others")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder with the reader's files in it."""
    (tmp_path / "mine.py").write_text(LAYERS)
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "broken.py").write_text("import torch\nraise KeyError('x')\n")
    (tmp_path / "typo.py").write_text("def f(:\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(4)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "120")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name in ("mine", "beside", "broken", "typo", "leaves"):
            del sys.modules[name]


@pytest.fixture
def convlab(folder, monkeypatch, capsys):
    """The command line in this process, with few rounds."""
    few = {"seconds": 0.005, "min_rounds": 2, "max_rounds": 2}
    monkeypatch.setattr(measure, "QUICK_OPTIONS", few)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    gc.freeze()  # as in test_diagnose.py

    def run(*arguments):
        try:
            code = __main__.main(["diagnose", *map(str, arguments)])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    yield run
    gc.unfreeze()


def refused(done):
    """The one sentence after the lines of progress."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    *progress, sentence = done.stderr.splitlines()
    assert all(line.endswith(" …") for line in progress)
    assert sentence.startswith("convlab: ")
    return sentence


def test_a_layer_from_a_file(convlab, folder):
    arguments = "mine.py:Cosine", "--input", "3,5,9,10", "--args", "5, kernel_size=3"
    done = convlab(*arguments, "--quick", "--html", "page.html")
    assert done.returncode == 0, done.stderr
    assert "Cosine on 3×5×9×10, float32, cpu" in done.stdout
    assert "First cause: printing or synchronising in forward" in done.stdout
    assert "columns materialised (im2col)" in done.stdout
    assert "mine.py:" in done.stdout
    assert "seen" not in done.stdout.split()
    assert (folder / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "Page: page.html" in done.stderr
    assert done.stderr.count(" …\n") == 4


def test_a_layer_from_a_package_in_eval_mode(convlab):
    done = convlab("mine:make", "--input", "2,3,8,8", "--args", "3", "--eval", "--quick")
    assert done.returncode == 0, done.stderr
    assert "Kind of layer: a plain convolution" in done.stdout


def test_what_train_mode_hides_is_said(convlab):
    done = convlab("mine.py:make", "--input", "2,3,8,8", "--args", "3", "--quick")
    assert done.returncode == 0, done.stderr
    assert "(--eval)" in done.stdout


@pytest.mark.parametrize(
    ("target", "arguments", "parts"),
    [
        ("mine.py", "", ["target", "'mine.py'"]),
        (":Cosine", "", ["target", "':Cosine'"]),
        ("mine.py:", "", ["target"]),
        ("missing.py:Cosine", "", ["existing file", "'missing.py'"]),
        ("missing.module:Cosine", "", ["'missing.module'", "ModuleNotFoundError"]),
        ("mine.py:Nothing", "", ["mine.py", "'Nothing'"]),
        ("mine.py:number", "", ["number is a int"]),
        ("mine.py:Cosine", "", ["Cosine(channels, out_channels=4", "'channels'"]),
        ("mine.py:Cosine", "5, channels=3", ["multiple values"]),
        ("mine.py:Cosine", "print(1)", ["args", "'print(1)'"]),
        ("mine.py:Cosine", "5) + g(", ["args"]),
        ("mine.py:Cosine", "**{}", ["args"]),
        ("mine.py:Space.layer", "5", ["args must be empty"]),
        ("mine.py:Broken", "", ["RuntimeError: no such weight", "mine.py, line"]),
        ("mine.py:Cosine", "'a'", ["Cosine('a') failed: TypeError"]),
        ("mine.py:F.relu", "1", ["F.relu(1) failed"]),
        ("broken.py:Layer", "", ["'broken.py'", "KeyError", "broken.py, line 2"]),
        ("typo.py:Layer", "", ["'typo.py'", "SyntaxError"]),
        ("leaves.py:Layer", "", ["'leaves.py'", "SystemExit: 4"]),
        ("mine.py:make", "4", ["failed on x of shape (2, 3, 8, 8)", "4 channels"]),
        ("torch:zeros", "3", ["target must make an nn.Module"]),
    ],
)
def test_bad_targets_get_one_sentence(convlab, target, arguments, parts):
    sentence = refused(convlab(target, "--input", "2,3,8,8", "--args", arguments))
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--input", "2,3,8"], ["--input", "'2,3,8'"]),
        (["--input", "2,3,0,8"], ["--input"]),
        (["--input", "a,b,c,d"], ["--input"]),
        ([], ["--input"]),
        (["--input", "2,3,8,8", "--device", "tpu"], ["device", "'tpu'"]),
        (["--input", "2,3,8,8", "--threads", "0"], ["--threads", "0"]),
        (["--input", "2,3,8,8", "--html", "no/page.html"], ["--html", "no/page.html"]),
    ],
)
def test_bad_options_get_one_sentence(convlab, options, parts):
    sentence = refused(convlab("mine.py:Space.layer", *options))
    for part in parts:
        assert part in sentence


def test_the_readers_names_do_not_hide_modules(folder):
    load("mine.py:Space.layer")
    assert sys.modules["mine"].__file__ == str(folder / "mine.py")
    (folder / "json.py").write_text("layer = 1\n")
    import json

    with pytest.raises(ValueError, match="layer is a int"):
        load("json.py:layer")
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ([], {})),
        ("16, 32, padding=1", ([16, 32], {"padding": 1})),
        ("(3, 3), mode='same', bias=False,", ([(3, 3)], {"mode": "same", "bias": False})),
        ("-1, [2.5, None]", ([-1, [2.5, None]], {})),
    ],
)
def test_arguments(text, expected):
    assert parse_arguments(text) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_interrupted(folder):
    options = "mine.py:Slow", "--input", "2,3,8,8", "--args", "3, 4, 3"
    process = subprocess.Popen(
        [sys.executable, "-m", "convlab", "diagnose", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
    )
    try:
        assert process.stdout.readline() == "called\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert err.count("Stopped.") == 1


def test_importing_it_is_left_to_the_first_use():
    code = """
import sys, convlab
assert not any(name.startswith("convlab.diagnosing") for name in sys.modules)
convlab.diagnose
assert "convlab.diagnosing" in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'diagnos'"):
        _ = convlab_package.diagnos
