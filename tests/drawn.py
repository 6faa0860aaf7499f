"""What several test files share: drawn problems, drawn calls, the comparison with float64."""

import re
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from convlab import ConvProblem
from convlab.algorithms.base import problem_of
from convlab.oracle import allowed_errors

LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided slice": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "inner slice": lambda x: F.pad(x, (1, 2, 2, 1), value=float("nan"))[..., 2:-1, 1:-2],
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "expanded channels": lambda x: x[:, :1].expand_as(x),
    "expanded rows": lambda x: x[:, :, :1].expand_as(x),
}


@st.composite
def problems(draw, min_batch=0, groups=(1, 1, 2, 3)):
    """A small `ConvProblem`; now and then the padded image is as large as the kernel."""

    def pairs(smallest, largest):
        return draw(st.tuples(*[st.integers(smallest, largest)] * 2))

    group = draw(st.sampled_from(groups))
    kernel, dilation = pairs(1, 4), pairs(1, 2)
    padding = draw(st.sampled_from(["same", "valid", "pair", "pair"]))
    stride = (1, 1) if padding == "same" else pairs(1, 3)
    if padding == "pair":
        padding = pairs(0, 2)
    if draw(st.integers(0, 2)) == 0:  # the usual kind, which specialised algorithms take too
        kernel, stride, dilation = (3, 3), (1, 1), (1, 1)
    pads = {"same": (9, 9), "valid": (0, 0)}.get(padding, padding)
    extra = pairs(0, 5)
    height, width = (
        max(1, d * (k - 1) + 1 - 2 * p) + e
        for k, d, p, e in zip(kernel, dilation, pads, extra, strict=True)
    )
    return ConvProblem(
        batch=draw(st.integers(min_batch, 3)),
        in_channels=group * draw(st.integers(1, 3)),
        out_channels=group * draw(st.integers(1, 3)),
        height=height,
        width=width,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=group,
    )


@dataclass
class Call:
    """Tensors and keyword arguments of one convolution."""

    problem: ConvProblem
    layout: str
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


@st.composite
def calls(draw):
    """A call in float64: any layout, batched or not, with or without bias and gradients."""
    problem = draw(problems())
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    x, weight, bias = problem.inputs(dtype=torch.float64, seed=draw(st.integers(0, 99)))
    x = LAYOUTS[layout](x)
    if problem.batch == 1 and draw(st.booleans()):
        x = x[0]
    if draw(st.booleans()):
        weight = weight.mT.contiguous().mT
    bias = bias if draw(st.booleans()) else None
    needs = draw(st.sampled_from([(1, 1, 1), (1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)]))
    for tensor, need in zip((x, weight, bias), needs, strict=True):
        if tensor is not None:
            tensor.requires_grad_(bool(need))
    return Call(problem, layout, x, weight, bias)


def assert_same(algorithm, x, weight, bias=None, *, dtype=None, **kwargs):
    """Value and gradients are those of `F.conv2d` in float64; the inputs stay as they were.

    The allowed difference is `oracle.tolerance` for `dtype` (that of x if not given) plus that of
    the float64 reference. Where the algorithm does not support the call, it must refuse it with
    the sentence of `supports`.
    """
    dtype = dtype or x.dtype
    problem = problem_of(x if x.dim() == 4 else x[None], weight, **sizes(kwargs))
    if reason := algorithm.supports(problem, x.device):
        with pytest.raises(ValueError, match=re.escape(reason)):
            algorithm(x, weight, bias, **kwargs)
        return

    tensors = [t for t in (x, weight, bias) if t is not None]
    before = [(t.detach().clone(), t._version) for t in tensors]
    y = algorithm(x, weight, bias, **kwargs)
    needs = [t.requires_grad for t in tensors]
    assert y.requires_grad == (any(needs) and torch.is_grad_enabled())
    assert y.dtype == dtype
    assert y.shape == (problem.output_shape if x.dim() == 4 else problem.output_shape[1:])
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = values_and_gradients(y, tensors, grad)

    exact = float64_reference([t.detach() for t in tensors], grad, needs, y.requires_grad, kwargs)
    grad = grad if y.requires_grad else None
    allowed = allowed_by(algorithm, problem, x, weight, bias, grad, dtype)
    allowed = [allowed[0], *(a for a, need in zip(allowed[1:], needs, strict=False) if need)]
    for value, true, limit in zip(found, exact, allowed, strict=False):
        assert value.shape == true.shape
        assert bool(((value.double() - true).abs() <= limit.reshape(true.shape)).all())

    for tensor, (copy, version) in zip(tensors, before, strict=True):
        assert tensor._version == version, "an input was written to"
        assert torch.equal(tensor, copy)


def allowed_by(algorithm, problem, x, weight, bias, grad, dtype):
    """Allowed errors of y and the gradients of x, weight and bias, in `dtype` and the reference."""
    zeros = torch.zeros(len(weight))
    tensors = x.reshape(problem.input_shape), weight, zeros if bias is None else bias
    tensors = [t.detach().double() for t in tensors]
    if grad is not None:
        grad = grad.double().reshape(problem.output_shape)
    found = [
        allowed_errors(rounding, problem, tensors, grad, torch.finfo(t).eps / 2, t)
        for rounding, t in ((algorithm.rounding, dtype), ("sums", torch.float64))
    ]
    names = [name for name in found[0] if bias is not None or name != "bias"]
    return [found[0][name] + found[1][name] for name in names]


def sizes(kwargs):
    """stride, padding, dilation and groups as `ConvProblem` takes them."""
    plain = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | kwargs
    return {
        name: (*value, *value)[-2:] if isinstance(value, list | tuple) else value
        for name, value in plain.items()
    }


def values_and_gradients(y, tensors, grad):
    """y, and the gradients of those tensors that want one."""
    if not y.requires_grad:
        return [y]
    return [y.detach(), *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], grad)]


def float64_reference(tensors, grad, needs, backward, kwargs):
    """`values_and_gradients` of `F.conv2d` in float64."""
    tensors = [
        t.detach().double().contiguous().requires_grad_(need and backward)
        for t, need in zip(tensors, needs, strict=True)
    ]
    return values_and_gradients(F.conv2d(*tensors, **kwargs), tensors, grad.double())
