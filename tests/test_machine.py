"""What `machine` says about itself, and that a flag it sets is really set and put back."""

import contextlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from convlab import machine


def test_flags_and_facts_are_json():
    for facts in (machine.flags(), machine.describe("cpu"), machine.versions()):
        assert json.loads(json.dumps(facts)) == facts


def test_every_flag_is_explained():
    assert machine.flags().keys() == machine.FLAGS.keys()


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Intel(R) Xeon(R) CPU @ 2.20GHz, 2 cores", "intel-xeon-cpu-2-cores"),
        ("AMD Ryzen 7 PRO/6850U™, 16 cores", "amd-ryzen-7-pro-6850u-16-cores"),
        ("NVIDIA H200", "nvidia-h200"),
        ("../../etc/passwd", "etc-passwd"),
    ],
)
def test_slug_is_a_safe_file_name(monkeypatch, name, slug):
    monkeypatch.setattr(machine, "name", lambda device: name)
    assert machine.slug() == slug


def test_slug_of_this_machine():
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", machine.slug())


def test_names_no_host_and_no_user(monkeypatch):
    uname = SimpleNamespace(
        system="Linux", node="secret", release="1", version="#1", machine="x86_64", processor=""
    )
    monkeypatch.setattr(platform, "uname", lambda: uname)
    monkeypatch.setattr(socket, "gethostname", lambda: "secret")
    for variable in ("USER", "LOGNAME", "USERNAME", "HOSTNAME", "HOME"):
        monkeypatch.setenv(variable, "secret")
    assert platform.node() == "secret"
    assert "secret" not in json.dumps([machine.describe(), machine.name(), machine.slug()])


@pytest.mark.parametrize(
    ("flag", "other"),
    [
        ("threads", lambda now: now + 1),
        ("onednn", lambda now: not now),
        ("cudnn", lambda now: not now),
        ("cudnn_benchmark", lambda now: not now),
        ("cudnn_deterministic", lambda now: not now),
        ("cudnn_tf32", lambda now: not now),
        ("matmul_tf32", lambda now: not now),
        ("matmul_precision", lambda now: "highest" if now == "high" else "high"),
    ],
)
def test_a_flag_is_set_and_put_back_after_an_error(flag, other):
    if flag == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    before = machine.flags()
    value = other(before[flag])
    assert seen_inside(machine.setting(**{flag: value}))[flag] == value
    assert machine.flags() == before


def seen_inside(context):
    """The flags inside a block that ends with an error."""
    with contextlib.suppress(ZeroDivisionError), context:
        seen = machine.flags()
        raise ZeroDivisionError
    return seen


def test_an_unknown_flag_is_named():
    with pytest.raises(ValueError, match=r"threads.*'thread'"), machine.setting(thread=1):
        pass


def test_a_value_that_is_refused_leaves_the_other_flags_alone():
    before = machine.flags()
    with (
        pytest.raises(ValueError, match="allocator"),
        machine.setting(threads=before["threads"] + 1, allocator="bump"),
    ):
        pass
    assert machine.flags() == before


def test_library_off_is_put_back_after_an_error():
    before = machine.flags()
    assert seen_inside(machine.library_off()) == before | {"cudnn": False, "onednn": False}
    assert machine.flags() == before


FAULTS = """
import resource, torch
from convlab import machine

def page_faults():  # of ten allocations of 64 MB, each written to
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = page_faults()
with machine.setting(allocator=f"glibc, {machine.KEEP_FREED}"):
    inside = machine.allocator()
    kept = min(page_faults() for _ in range(5))
print(default, kept, inside, machine.allocator(), sep="|")
"""


@pytest.mark.skipif(not machine.can_keep_freed_memory(), reason="needs glibc's malloc as it is")
def test_the_allocator_really_keeps_freed_memory():
    """In a process of its own: a heap that other tests have used may fault all the same."""
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    default, kept, inside, after = run.stdout.strip().split("|")
    assert int(default) > 100
    assert int(kept) < int(default) / 10
    assert (inside, after) == (f"glibc, {machine.KEEP_FREED}", "glibc, default")


def test_a_replaced_or_preset_allocator_is_named(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert machine.allocator() == "jemalloc"
    monkeypatch.delenv("LD_PRELOAD")
    monkeypatch.setattr(machine, "_libc_name", lambda: "glibc")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert machine.allocator() == "glibc, MALLOC_TRIM_THRESHOLD_=1"
    with (
        pytest.raises(ValueError, match="MALLOC_TRIM_THRESHOLD_=1"),
        machine.setting(allocator="glibc, default"),
    ):
        pass


def test_the_name_holds_the_processor_and_its_cores():
    assert machine.name("cpu").startswith(machine.cpu_name())
    assert str(os.cpu_count()) in machine.name("cpu").removeprefix(machine.cpu_name())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AMD EPYC", "AMD EPYC (family 26, model 2)"),
        ("Intel Xeon @ 2.5GHz", "Intel Xeon @ 2.5GHz (family 26, model 2)"),
        ("AMD EPYC 9654 96-Core Processor",) * 2,
    ],
)
def test_a_name_without_a_model_gets_one(name, expected):
    facts = {"model name": name, "cpu family": "26", "model": "2"}
    assert machine._with_model(facts) == expected


@pytest.mark.gpu
def test_facts_about_a_gpu():
    facts = machine.describe("cuda")
    assert facts["gpu"] == facts["machine"] == machine.name("cuda")
    assert re.fullmatch(r"\d+\.\d+", facts["capability"])
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", machine.slug("cuda"))
