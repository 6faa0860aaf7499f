"""Causes around the layer: flags, threads, gradients, the first call, the size of the problem."""

from __future__ import annotations

from convlab.diagnosing.causes import (
    CIRCUMSTANCE,
    MODEL_CALL_SECONDS,
    Cause,
    Facts,
    detector,
    explained,
    places,
)
from convlab.diagnosing.lineage import PRODUCTS
from convlab.timing import seconds, size

SLOW_START = 20.0  # times a later call, and at least …
SLOW_START_SECONDS = 0.2
TINY_SHARE = 0.5  # of the modelled time is the start of operators


@detector
def tf32_mismatch(facts: Facts) -> Cause | None:
    convolutions, products = facts.tf32
    used = [op for op in facts.watched.ops if op.name in PRODUCTS]
    own = [op for op in used if "conv" not in op.name]
    if facts.device == "cpu" or not convolutions or products or not own:
        return None
    return Cause(
        "TF32 for convolutions only",
        f"nn.Conv2d may round to TF32, the {len(own)} matrix products of this layer may not: they "
        "are slower and more exact than what they are compared with",
        "set torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32 alike",
        **explained(facts, own, CIRCUMSTANCE),
    )


@detector
def recomputed(facts: Facts) -> Cause | None:
    ops = [op for op in facts.watched.ops if op.recomputed]
    if not ops:
        return None
    return Cause(
        "forward computed again in the backward pass",
        f"{len(ops)} operators of forward run again{places(ops)}",
        "it trades time for memory: worth it only where the memory is needed",
        **explained(facts, ops),
    )


@detector
def no_gradient(facts: Facts) -> Cause | None:
    if not facts.differentiable:
        return Cause(
            "no gradient",
            "the output does not require a gradient, though x does: forward detaches, runs under "
            "no_grad or rounds",
            "if the layer is to be trained, keep the operations differentiable",
            rank=(CIRCUMSTANCE, 0.0),
        )
    if facts.frozen:
        which = ", ".join(facts.frozen[:4])
        return Cause(
            "parameters without a gradient",
            f"the backward pass computes none for {which}: it looks faster than training would be",
            "make them nn.Parameter with requires_grad and use them, or compare with a frozen "
            "nn.Conv2d",
            rank=(CIRCUMSTANCE, 0.0),
        )
    return None


@detector
def few_threads(facts: Facts) -> Cause | None:
    if facts.device != "cpu" or facts.threads >= facts.cores:
        return None
    return Cause(
        "fewer CPU threads than cores",
        f"PyTorch uses {facts.threads} of {facts.cores} cores",
        f"torch.set_num_threads({facts.cores}): at most {facts.cores / facts.threads:.3g} times "
        "faster",
        rank=(CIRCUMSTANCE, 0.0),
    )


@detector
def slow_first_call(facts: Facts) -> Cause | None:
    first, later = facts.first_seconds, facts.later_seconds
    if not facts.compiled and (first < SLOW_START_SECONDS or first < SLOW_START * later):
        return None
    return Cause(
        "a slow first call",
        f"the first call took {seconds(first)}, later ones {seconds(later)}: compilation, or a "
        "library that chooses its algorithm",
        "warm up before timing; keep the shapes constant, or it is paid again",
        rank=(CIRCUMSTANCE, -1e-9),
    )


@detector
def tiny_problem(facts: Facts) -> Cause | None:
    ops = [op for op in facts.watched.ops if op.written]
    model = -explained(facts, ops)["rank"][1]
    calls = len(ops) * MODEL_CALL_SECONDS
    if not ops or calls < TINY_SHARE * model:
        return None
    return Cause(
        "a tiny problem",
        f"{len(ops)} operators on tensors of {size(facts.input_values * facts.itemsize)} and the "
        "like: most of the time is the start of operators, not their work",
        "diagnose it with the batch and image you really use; if this is it, use fewer, larger "
        "operators (torch.compile, CUDA graphs)",
        rank=(CIRCUMSTANCE, -1.0),
    )
