"""What is being measured on, and under which flags."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

FLAGS = {
    "threads": "CPU threads PyTorch uses inside one operation",
    "onednn": "oneDNN (torch.backends.mkldnn) may be used",
    "cudnn": "cuDNN may be used",
    "cudnn_benchmark": "cuDNN times its algorithms at the first call of a shape",
    "cudnn_deterministic": "cuDNN keeps to deterministic algorithms",
    "cudnn_tf32": "convolutions on CUDA may round float32 to TF32",
    "matmul_tf32": "matrix products on CUDA may round float32 to TF32",
    "matmul_precision": "torch.get_float32_matmul_precision()",
    "allocator": "how the C library's malloc is set",
}

GLIBC_MMAP_MAX, GLIBC_TRIM_THRESHOLD = -4, -1  # parameters of mallopt(3)
KEEP_FREED = "keeps freed memory"


def flags() -> dict[str, int | bool | str]:
    """Every setting that changes speed or accuracy, as it is now; `FLAGS` explains each."""
    backends = torch.backends
    return {
        "threads": torch.get_num_threads(),
        "onednn": backends.mkldnn.is_available() and backends.mkldnn.enabled,
        "cudnn": backends.cudnn.enabled,
        "cudnn_benchmark": backends.cudnn.benchmark,
        "cudnn_deterministic": backends.cudnn.deterministic,
        "cudnn_tf32": backends.cudnn.allow_tf32,
        "matmul_tf32": backends.cuda.matmul.allow_tf32,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "allocator": allocator(),
    }


_SETTERS = {
    "threads": torch.set_num_threads,
    "onednn": lambda on: setattr(torch.backends.mkldnn, "enabled", on),
    "cudnn": lambda on: setattr(torch.backends.cudnn, "enabled", on),
    "cudnn_benchmark": lambda on: setattr(torch.backends.cudnn, "benchmark", on),
    "cudnn_deterministic": lambda on: setattr(torch.backends.cudnn, "deterministic", on),
    "cudnn_tf32": lambda on: setattr(torch.backends.cudnn, "allow_tf32", on),
    "matmul_tf32": lambda on: setattr(torch.backends.cuda.matmul, "allow_tf32", on),
    "matmul_precision": torch.set_float32_matmul_precision,
}


@contextlib.contextmanager
def setting(**changes: int | bool | str) -> Iterator[None]:
    """Flags changed inside the block and put back after it.

    Raises:
        ValueError: a flag that `FLAGS` does not list, or that cannot be set.
    """
    for name in changes:
        if name not in FLAGS:
            raise ValueError(f"flag must be one of {', '.join(FLAGS)}, got {name!r}")
    before = flags()
    setters = {**_SETTERS, "allocator": _set_allocator}
    with contextlib.ExitStack() as undo:
        for name, value in changes.items():
            setters[name](value)
            undo.callback(setters[name], before[name])
        yield


def constant_in_graphs(function: Callable) -> Callable:
    """Decorator: `torch.compile` takes the result as it is when it compiles.

    `torch.compiler.assume_constant_result` does this too, and loads the compiler, for a second.
    """
    function._dynamo_marked_constant = True
    return function


@contextlib.contextmanager
def library_off() -> Iterator[None]:
    """cuDNN and oneDNN switched off inside the block."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    before = cudnn.enabled, mkldnn.enabled
    cudnn.enabled = mkldnn.enabled = False
    try:
        yield
    finally:
        cudnn.enabled, mkldnn.enabled = before


_allocator_kept = False


def allocator() -> str:
    """The C library's malloc and how it is set: decides whether large tensors page-fault.

    By default glibc asks the kernel for every large tensor and gives it back when it is freed, so
    that each use begins with page faults.
    """
    preload = os.environ.get("LD_PRELOAD", "") + os.environ.get("DYLD_INSERT_LIBRARIES", "")
    for name in ("jemalloc", "tcmalloc", "mimalloc"):
        if name in preload:
            return name
    library = _libc_name()
    if _allocator_kept:
        return f"{library}, {KEEP_FREED}"
    variables = sorted(k for k in os.environ if k.startswith("MALLOC_") or k == "GLIBC_TUNABLES")
    if library != "glibc" or not variables:
        return f"{library}, default"
    return f"{library}, " + " ".join(f"{k}={os.environ[k]}" for k in variables)


def can_keep_freed_memory() -> bool:
    """Whether `setting(allocator=...)` works: glibc, with malloc not replaced or preset."""
    return allocator() in ("glibc, default", f"glibc, {KEEP_FREED}")


def keeps_freed_memory() -> bool:
    """Whether `setting(allocator=...)` is in force that makes glibc keep freed memory."""
    return _allocator_kept


def _set_allocator(value: str) -> None:
    """`value`: "glibc, default" or "glibc, keeps freed memory".

    The way back is not complete: a free block that the heap kept may be used again. Measure the
    default first, or in a process of its own.
    """
    global _allocator_kept
    if not can_keep_freed_memory():
        raise ValueError(f"allocator can only be set with an unset glibc malloc, not {allocator()}")
    if value not in ("glibc, default", f"glibc, {KEEP_FREED}"):
        raise ValueError(
            f"allocator must be 'glibc, default' or 'glibc, {KEEP_FREED}', got {value!r}"
        )
    keep = value.endswith(KEEP_FREED)
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(GLIBC_MMAP_MAX, 0 if keep else 65536)
    libc.mallopt(GLIBC_TRIM_THRESHOLD, -1 if keep else 128 * 1024)  # -1: never
    if not keep:
        libc.malloc_trim(0)
    _allocator_kept = keep


@functools.cache
def _libc_name() -> str:
    if sys.platform == "darwin":
        return "macOS malloc"
    if sys.platform == "win32":
        return "Windows heap"
    return "glibc" if platform.libc_ver()[0] == "glibc" else "system malloc"


@functools.cache
def cpu_name() -> str:
    """The processor's own name, as the operating system gives it.

    A virtual machine may hide the model from the name ("AMD EPYC"); it is added then.
    """
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if sys.platform == "linux":
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
            if "model name" in facts:
                return _with_model(facts)
    return platform.processor() or platform.machine() or "unknown CPU"


def _with_model(facts: dict[str, str]) -> str:
    name = facts["model name"]
    if re.search(r"\d", name.partition("@")[0]) or "model" not in facts:
        return name
    return f"{name} (family {facts.get('cpu family')}, model {facts['model']})"


def name(device: str | torch.device = "cpu") -> str:
    """The machine in a few words: the GPU's name, or the CPU's with its cores."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = os.cpu_count()
    return f"{cpu_name()}, {cores} core{'s' if cores != 1 else ''}"


def slug(device: str | torch.device = "cpu") -> str:
    """`name` as a file name: lower case, digits and dashes."""
    plain = re.sub(r"\((r|tm)\)|@.*?ghz", " ", name(device).lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def describe(device: str | torch.device = "cpu") -> dict[str, str | int | float]:
    """Everything about the machine that a reader of a number wants to know."""
    import psutil

    device = torch.device(device)
    facts = {
        "machine": name(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "huge_pages": _huge_pages(),
        **versions(),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": gpu.name,
            "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
            "multiprocessors": gpu.multi_processor_count,
            "capability": f"{gpu.major}.{gpu.minor}",
            "l2_mib": round(gpu.L2_cache_size / 2**20, 1),
            **_driver(),
        }
    return facts


def free_bytes(device: str | torch.device = "cpu") -> int:
    """Memory that can be had without swapping."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def physical_cores() -> int:
    """Cores without hyper-threads, of those that this process may use."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(min(psutil.cpu_count(logical=False) or 1, usable or 1), 1)


@functools.cache
def cache_bytes(device: str | torch.device = "cpu") -> int:
    """The L2 cache: of one core on the CPU (1 MiB where the system does not say), of the GPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "hw.l2cachesize"]  # shared by a cluster of cores
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            return max(int(found) // 4, 2**18)
        for level in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/level"):
            if level.read_text().strip() == "2":
                return int(level.with_name("size").read_text().strip().rstrip("K")) * 2**10
    return 2**20


def stolen_seconds() -> float:
    """CPU seconds, of all cores since the start, that the host of a virtual machine gave to others.

    0 where the system does not count them.
    """
    try:
        with open("/proc/stat") as file:
            fields = file.readline().split()
        return int(fields[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0


@functools.cache
def versions() -> dict[str, str]:
    """Python, torch and the libraries behind it."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    with contextlib.suppress(Exception):
        from importlib.metadata import version

        found["triton"] = version("triton")
    return found


@functools.cache
def _huge_pages() -> str:
    """Linux: whether memory comes in 2 MiB pages, and so with fewer page faults."""
    with contextlib.suppress(OSError):
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return re.search(r"\[(\w+)\]", text).group(1)
    return "unknown"


def _driver() -> dict[str, str]:
    """The GPU's driver and its clocks as found, where nvidia-smi is there to say."""
    fields = ["driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit"]
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        out = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        values = [v.strip() for v in out.splitlines()[0].split(",")]
        return {k.replace(".", "_"): v for k, v in zip(fields, values, strict=True)}
    return {}
