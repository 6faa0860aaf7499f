"""The experiments by name, and the problems that each of them uses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from convlab import machine
from convlab.experiments.cases import KEPT, Case, Settings, compare_case, one_pass, training_step
from convlab.experiments.custom import BOTH, COMBINATIONS, FLEX, custom_case
from convlab.experiments.facts import ceilings_case, stages_case, storage_case
from convlab.experiments.kernel import error_cases, kernel_cases
from convlab.experiments.library import library_case
from convlab.experiments.mistakes import MISTAKES, mistakes_case
from convlab.experiments.networks import network_cases
from convlab.problem import ConvProblem
from convlab.problems import NETWORKS, PROBLEMS, thread_problem

LAYER = ("native", "native_channels_last", "native_no_library", "thread", "unfold", "windows")
STEP = ("native", "native_no_library", "thread", "unfold", "windows")
PAIR = ("native", "thread")
LADDER = (
    "native",
    "native_channels_last",
    "thread",
    "unfold",
    "unfold_batched",
    "unfold_chunked",
    "unfold_recompute",
    "windows",
    "windows_chunked",
    "row_windows",
    "shifts",
    "winograd",
    "fft",
    "compiled",
    "fused",
    "auto",
    *("unfoldnd", "einconv", "fft_conv", "compiled_thread"),
)
SLOW_TO_START = (
    "compiled",
    "fused",
    "compiled_thread",
)  # seconds of compiling per problem and pass
SCALED = ("native", "thread", "unfold")
ON_NETWORKS = ("native", "native_no_library", "thread")
PASSES = ("forward", "train")
BUDGET = 10**9  # bytes
LAYER_BATCH = 4  # images on which the ladder climbs real layers
GPU_BATCH = 64  # images on which a GPU is asked for the layers of real networks


@dataclass(frozen=True)
class Experiment:
    """A question and the cases that answer it."""

    question: str
    cases: Callable[[Settings], list[Case]]


def _allocators(s: Settings) -> list[dict | None]:
    """Flags under which a claim is judged: malloc as it comes and, where that is glibc, kept."""
    usual = machine.allocator() == "glibc, default" and not s.on_gpu
    return [None, KEPT] if usual else [None]


# What `reproduce` measures


def _layer(s: Settings) -> list[Case]:
    problems = [thread_problem(s.batch(n)) for n in (2, 512)]
    return [compare_case("layer", p, LAYER, q, s) for p in problems for q in PASSES]


def _steps(s: Settings) -> list[Case]:
    p = thread_problem(s.batch(256))
    return [
        compare_case("step", p, STEP, q, s, candidate, flags=flags)
        for flags in _allocators(s)
        for q, candidate in (("train", training_step), ("forward", one_pass))
    ]


def _batches(s: Settings) -> list[Case]:
    sizes = (1, 8, 32) if s.quick else (1, 4, 16, 64, 256)
    problems = map(thread_problem, sizes)
    return [compare_case("batch", p, PAIR, q, s) for p in problems for q in PASSES]


def _stage_cases(s: Settings) -> list[Case]:
    sizes = (2, 32) if s.quick else (2, 64, 256, 512)
    return [
        stages_case(thread_problem(n), "thread", s, flags)
        for flags in _allocators(s)
        for n in sizes
    ]


def _photographs(s: Settings) -> list[Case]:
    p = ConvProblem(64, 3, 16, 64, 64, kernel_size=3, padding=1)
    candidate = functools.partial(one_pass, images=_photo_batch)
    names = (*PAIR, "unfold")
    return [compare_case("photographs", p, names, q, s, candidate) for q in PASSES]


def _photo_batch(p: ConvProblem) -> Tensor:
    from convlab.images import photo_batch

    return photo_batch(p.batch, p.height)


# How it scales: one size grows, all others stay

_SMALL, _MIDDLE = thread_problem(4), thread_problem(8)
_SQUARE = ConvProblem(16, 32, 32, 28, 28, kernel_size=3, padding=1)

SCALES: dict[str, dict[int, ConvProblem]] = {
    "batch": {n: thread_problem(n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)},
    "channels": {
        n: _SQUARE.replace(in_channels=n, out_channels=n)
        for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    },
    "kernel": {n: _MIDDLE.replace(kernel_size=n, padding=n // 2) for n in (1, 3, 5, 7, 9, 11)},
    "image": {n: _SMALL.replace(height=n, width=n) for n in (8, 16, 32, 64, 128, 256)},
    "stride": {n: _MIDDLE.replace(stride=n) for n in (1, 2, 3, 4)},
    "dilation": {n: _MIDDLE.replace(dilation=n, padding=n) for n in (1, 2, 4, 8)},
    "groups": {n: _SQUARE.replace(groups=n) for n in (1, 2, 4, 8, 16, 32)},
}
"""What grows → its size → the problem."""

QUICK_LIMIT = {"batch": 64, "channels": 64, "kernel": 7, "image": 64}


def _scale(axis: str, s: Settings) -> list[Case]:
    problems = SCALES[axis]
    if s.quick:
        limit = QUICK_LIMIT.get(axis, 8)
        problems = {n: p for i, (n, p) in enumerate(problems.items()) if n <= limit and i % 2 == 0}
    name, faults = f"scale_{axis}", axis == "batch" and not s.on_gpu
    return [
        compare_case(name, p, SCALED, q, s, options=s.brief, faults=faults)
        for p in problems.values()
        for q in PASSES
    ]


def _batch_under(flags: dict, s: Settings) -> list[Case]:
    """The batch grows on one thread, or with freed memory kept."""
    sizes = (4, 16, 64) if s.quick else (2, 8, 32, 128, 512)
    if s.on_gpu or (flags == KEPT and KEPT not in _allocators(s)):
        return []
    return [
        compare_case(
            "batch_settings",
            thread_problem(n),
            PAIR,
            "forward",
            s,
            options=s.brief,
            faults=True,
            flags=flags,
        )
        for n in sizes
    ]


def _batch_settings(s: Settings) -> list[Case]:
    return [*_batch_under({"threads": 1}, s), *_batch_under(KEPT, s)]


def _grid(s: Settings) -> list[Case]:
    """Two planes of sizes: channels by image, batch by kernel."""
    channels, sizes = ((4, 64), (8, 32)) if s.quick else ((1, 4, 16, 64, 256), (8, 16, 32, 64))
    batches, kernels = ((1, 16), (1, 3)) if s.quick else ((1, 4, 16, 64), (1, 3, 5, 7, 9))
    planes = [ConvProblem(2, c, c, n, n, 3, padding=1) for c in channels for n in sizes]
    planes += [
        thread_problem(n).replace(kernel_size=k, padding=k // 2) for n in batches for k in kernels
    ]
    return [
        compare_case("grid", p, PAIR, "forward", s, options=s.brief) for p in dict.fromkeys(planes)
    ]


def _memory(s: Settings) -> list[Case]:
    """The kernel grows under a budget; what would exceed it is not started."""
    images, budget = (4, BUDGET // 8) if s.quick else (32, BUDGET)
    limited = Settings(s.device, s.quick, s.visits, min(budget, s.memory_limit or budget))
    kernels = (3, 7, 11) if s.quick else (1, 3, 5, 7, 9, 11)
    problems = [thread_problem(images).replace(kernel_size=k, padding=k // 2) for k in kernels]
    return [compare_case("memory", p, SCALED, "train", limited, options=s.brief) for p in problems]


# What the library brings


def _library(s: Settings) -> list[Case]:
    problems = [thread_problem(s.batch(256)), PROBLEMS["wide_64"]]
    if s.quick:
        problems[1] = problems[1].replace(batch=8)
    return [library_case(p, q, s) for p in problems for q in PASSES]


def _networks(s: Settings) -> list[Case]:
    names = [list(layers) for layers in NETWORKS.values()]
    chosen = [name for layers in names for name in (layers[1::24] if s.quick else layers)]
    problems = dict.fromkeys(PROBLEMS[name] for name in chosen)
    batch = {"batch": GPU_BATCH} if s.on_gpu else {"batch": 1} if s.quick else {}
    return [
        compare_case("networks", p.replace(**batch), ON_NETWORKS, q, s, options=s.brief)
        for p in problems
        for q in PASSES
    ]


# The ladder of rewrites

LAYERS = (
    "resnet50_3to64_224px_k7_s2",
    "resnet50_64to64_56px_k3",
    "resnet50_128to128_56px_k3_s2",
    "resnet50_256to64_56px_k1",
    "mobilenet_v3_large_72to72_56px_k3_depthwise",
    "convnext_tiny_96to96_56px_k7_depthwise",
)


def _ladder(s: Settings) -> list[Case]:
    """Every algorithm and every peer: the thread's problem, two wider ones, six real layers."""
    usual = [thread_problem(2), thread_problem(16 if s.quick else 512)]
    real = [PROBLEMS[name].replace(batch=LAYER_BATCH) for name in LAYERS]
    others = [PROBLEMS["wide_64"], PROBLEMS["wide_32"], *real]
    if s.quick:
        others = [PROBLEMS[LAYERS[4]].replace(batch=1)]
    thread_cases = [
        compare_case("ladder", p, _climbed(s), q, s, options=s.brief if s.quick else None, flags=f)
        for f in (_allocators(s)[:1] if s.quick else _allocators(s))
        for p in usual
        for q in PASSES
    ]
    return thread_cases + [
        compare_case("ladder", p, _climbed(s), q, s, options=s.brief)
        for p in others
        for q in PASSES
    ]


def _climbed(s: Settings) -> tuple[str, ...]:
    """On a GPU with the kernel made for it, and without `fused`, whose loops are for a CPU: in a
    first run there, beside other work, one compiled for a minute and none beat `compiled`."""
    left_out = SLOW_TO_START if s.quick else ("fused",) if s.on_gpu else ()
    more = ("implicit_gemm",) if s.on_gpu else ()
    return tuple(name for name in (*LADDER, *more) if name not in left_out)


# Other kinds of convolution


def _custom(s: Settings) -> list[Case]:
    """Four combinations on a wider layer, the first of them on the thread's problem too.

    By its definition, training with all four would take minutes: two of them stand for it.
    """
    first, second, *others = COMBINATIONS
    layer = PROBLEMS["wide_32"]
    if s.on_gpu and not s.quick:  # each combination compiles for half a minute
        large = PROBLEMS["resnet50_64to64_56px_k3"].replace(batch=256)
        plan = [(first, p, q, BOTH) for p in (layer, thread_problem(256)) for q in PASSES]
        plan += [(first, large, q, ()) for q in PASSES]  # by definition it fits into no memory
        plan += [(second, layer, q, BOTH) for q in PASSES]
        return [custom_case("custom", *each[:3], s, each[3]) for each in plan]
    layer = layer.replace(batch=8) if s.quick else layer
    plan = [(first, layer, q, forms) for q in PASSES for forms in (BOTH, FLEX)]
    if not s.quick:
        plan += [(second, layer, q, forms) for q in PASSES for forms in (BOTH, FLEX)]
        plan += [(name, layer, "forward", BOTH) for name in others]
        plan += [(name, layer, q, FLEX) for name in others for q in PASSES]
        plan += [(first, thread_problem(512), q, forms) for q in PASSES for forms in (BOTH, FLEX)]
    return [custom_case("custom", *each[:3], s, each[3]) for each in plan]


def _custom_memory(s: Settings) -> list[Case]:
    """The kernel grows: do the k² values of a patch need memory?"""
    small = ConvProblem(8, 4, 4, 32, 32, kernel_size=1)
    kernels, passes = ((3, 7), ("forward",)) if s.quick else ((1, 3, 5, 7), PASSES)
    name = next(iter(COMBINATIONS))
    return [
        custom_case("custom_memory", name, small.replace(kernel_size=k, padding=k // 2), q, s)
        for k in kernels
        for q in passes
    ]


def _mistakes(s: Settings) -> list[Case]:
    return [mistakes_case(name, s) for name in MISTAKES] if s.on_gpu else []


def _kernel(s: Settings) -> list[Case]:
    return kernel_cases(s) if s.on_gpu else []


def _kernel_errors(s: Settings) -> list[Case]:
    return error_cases(s) if s.on_gpu else []


EXPERIMENTS: dict[str, Experiment] = {
    "storage": Experiment("Which operations copy?", lambda s: [storage_case(s)]),
    "ceilings": Experiment("How fast can this machine be?", lambda s: [ceilings_case(s)]),
    "layer": Experiment("The thread's layer on 2 and on 512 images", _layer),
    "step": Experiment("A training step and inference at batch 256", _steps),
    "stages": Experiment("What does each stage cost, forward and backward?", _stage_cases),
    "batch": Experiment("How does the ratio change with the batch?", _batches),
    "photographs": Experiment("Is it the same on real photographs?", _photographs),
    **{
        f"scale_{axis}": Experiment(f"What if this grows: {axis}?", functools.partial(_scale, axis))
        for axis in SCALES
    },
    "batch_settings": Experiment("The batch grows: threads and page faults", _batch_settings),
    "grid": Experiment("Where is the ratio large?", _grid),
    "memory": Experiment(f"Which kernel overflows {BUDGET / 1e9:g} GB?", _memory),
    "library": Experiment("What do the library's switches bring?", _library),
    "networks": Experiment("What does the library bring on real layers?", _networks),
    "ladder": Experiment("What does each rewrite bring?", _ladder),
    "network_step": Experiment("Does it matter in a whole network?", network_cases),
    "custom": Experiment("What does a convolution of another kind cost?", _custom),
    "custom_memory": Experiment("Does its memory grow with the kernel?", _custom_memory),
    "pitfalls": Experiment("Mistakes that only a GPU shows", _mistakes),
    "kernel": Experiment("How fast is a kernel whose columns are never stored?", _kernel),
    "kernel_errors": Experiment("How exact is it, beside the library?", _kernel_errors),
}
REPRODUCE = ("storage", "ceilings", "layer", "step", "stages", "batch", "photographs")
REPEATED = ("step", "stages", "batch")
