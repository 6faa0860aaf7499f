"""`nn.Conv2d` as the library offers it: switches, layouts and number formats, side by side."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from convlab import machine, oracle, records, timing
from convlab.algorithms import Algorithm, algorithm
from convlab.experiments.cases import (
    Case,
    Settings,
    checked_part,
    judge,
    memory_error,
    needed_bytes,
    one_pass,
    outcome,
    prepared_pass,
    short_name,
)
from convlab.problem import DTYPES, ConvProblem
from convlab.records import Row
from convlab.timing import Candidate, Function

MULTIPLE = 8  # channels that tensor cores and vector registers take at once


@dataclass(frozen=True)
class Variant:
    """One way to have the library compute a convolution.

    Attributes:
        idea: one sentence.
        flags: set around every call (`machine.setting`).
        channels_last: x and weight lie in NHWC.
        dtype: the format of the arithmetic.
        autocast: the tensors stay in float32 and every call converts them; else they are converted
            once, before.
        padded: channels are filled up with zeros to multiples of `MULTIPLE`, the result is cut.
    """

    idea: str
    flags: dict = field(default_factory=dict)
    channels_last: bool = False
    dtype: str = "float32"
    autocast: bool = False
    padded: bool = False


NHWC = {"channels_last": True}
SHARED = {
    "as called": Variant("F.conv2d with the library's defaults."),
    "channels last": Variant("x and weight in NHWC.", **NHWC),
    "channels padded": Variant(f"Channels filled up to multiples of {MULTIPLE}.", padded=True),
    "bf16 autocast": Variant("torch.autocast to bfloat16.", dtype="bfloat16", autocast=True),
    "fp16 autocast": Variant("torch.autocast to float16.", dtype="float16", autocast=True),
    "bf16": Variant("x, weight and y in bfloat16.", dtype="bfloat16"),
    "bf16, channels last": Variant("bfloat16 in NHWC.", dtype="bfloat16", **NHWC),
}
VARIANTS: dict[str, dict[str, Variant]] = {
    "cpu": {**SHARED, "library off": Variant("oneDNN switched off.", {"onednn": False})},
    "cuda": {
        **SHARED,
        "library off": Variant("cuDNN switched off.", {"cudnn": False}),
        "benchmark": Variant("cuDNN times its algorithms first.", {"cudnn_benchmark": True}),
        "deterministic": Variant("Deterministic algorithms only.", {"cudnn_deterministic": True}),
        "TF32 off": Variant("float32 is not rounded to TF32.", {"cudnn_tf32": False}),
        "TF32 off, library off": Variant(
            "cuDNN off; products are not rounded either.", {"cudnn": False, "matmul_tf32": False}
        ),
        "bf16, channels last, padded, benchmark": Variant(
            "Everything at once.", {"cudnn_benchmark": True}, True, "bfloat16", padded=True
        ),
    },
}


def library_case(problem: ConvProblem, pass_: str, settings: Settings) -> Case:
    """All variants of this device and the thread's layer on one problem and one pass."""
    variants = VARIANTS["cuda" if settings.on_gpu else "cpu"]
    name = f"library/{short_name(problem)}/{pass_}"
    run = functools.partial(_library, problem, variants, pass_, settings)
    seconds = 5 * settings.options["seconds"]
    return Case("library", name, run, (*["native"] * len(variants), "thread"), seconds=seconds)


def _library(problem, variants, pass_, settings) -> list[Row]:
    rows, candidates, told = [], {}, {}
    for name, variant in variants.items():
        with machine.setting(**variant.flags):
            status, values = _judge(variant, problem, pass_, settings)
            if status == "ok":
                try:
                    fn = variant_pass(variant, problem, pass_, settings.device)
                    fn()
                    candidates[name] = Candidate(fn, variant.flags)
                    values["launches"] = timing.launches(fn) if settings.on_gpu else None
                except RuntimeError as error:
                    status, values = memory_error(error)
        told[name] = values | {
            "status": status,
            "part": name,
            "dtype": variant.dtype,
            "layout": "NHWC" if variant.channels_last else "NCHW",
        }
    status, values = judge("thread", problem, settings, pass_)
    told["thread"] = values | {"status": status}
    if status == "ok":
        fn = one_pass("thread", problem, pass_, settings.device)
        fn()
        candidates["thread"] = Candidate(fn)
        told["thread"]["launches"] = timing.launches(fn) if settings.on_gpu else None
    measured = timing.interleaved(candidates, settings.device, **settings.options)
    for name, values in told.items():
        base = "thread" if name == "thread" else "native"
        values["device"] = settings.device
        rows.append(records.row("library", base, problem, pass_, measured.get(name), **values))
    return rows


def _judge(variant, problem, pass_, settings) -> tuple[str, dict]:
    needed, free = needed_bytes("native", problem, pass_), settings.memory
    if needed > free:
        values = {"predicted_bytes": needed, "free_bytes": int(free)}
        return records.PREDICTED, {"extra": values}
    try:
        checked = oracle.check(
            variant_algorithm(variant),
            checked_part(problem),
            settings.device,
            arithmetic=variant.dtype,
        )
    except RuntimeError as error:
        return memory_error(error)
    return outcome(checked)


def convolve(variant: Variant) -> Callable[..., Tensor]:
    """`F.conv2d` under the variant's autocast and padding; the layout is the tensors' own."""

    def convolution(x, weight, bias, stride, padding, dilation, groups):
        context = contextlib.nullcontext()
        if variant.autocast:
            context = torch.autocast(x.device.type, DTYPES[variant.dtype])
        with context:
            if not variant.padded:
                return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
            return _padded(x, weight, bias, stride, padding, dilation, groups)

    return convolution


def _padded(x, weight, bias, stride, padding, dilation, groups):
    if groups > 1:  # zeros would have to go into every group
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    more_in, more_out = -x.shape[1] % MULTIPLE, -weight.shape[0] % MULTIPLE
    x = F.pad(x, (0, 0, 0, 0, 0, more_in))
    filled = F.pad(weight, (0, 0, 0, 0, 0, more_in, 0, more_out))
    bias = None if bias is None else F.pad(bias, (0, more_out))
    return F.conv2d(x, filled, bias, stride, padding, dilation)[:, : weight.shape[0]]


def variant_algorithm(variant: Variant) -> Algorithm:
    """The variant for `oracle.check`: takes float32 and converts layout and format itself."""
    inner = convolve(variant)

    def variant_of_native(x, weight, bias, *sizes):
        if variant.channels_last:
            nhwc = torch.channels_last
            x, weight = x.contiguous(memory_format=nhwc), weight.contiguous(memory_format=nhwc)
        if not variant.autocast:
            dtype = DTYPES[variant.dtype]
            x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
        return inner(x, weight, bias, *sizes)

    return algorithm(variant.idea, library=True)(variant_of_native)


def variant_pass(variant: Variant, problem: ConvProblem, pass_: str, device: str) -> Function:
    """A function of no arguments that makes one pass, its tensors made ready before."""
    dtype = "float32" if variant.autocast else variant.dtype
    call = convolve(variant)
    return prepared_pass(call, problem, pass_, device, dtype, variant.channels_last)
