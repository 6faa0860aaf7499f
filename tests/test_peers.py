"""The peers compute what they are compared on, and say so where they are missing."""

import importlib.util
import sys

import pytest
import torch
from drawn import assert_same

from convlab import ALGORITHMS, ConvProblem
from convlab.peers import PEERS, find

PROBLEMS = [
    ConvProblem(2, 3, 4, 8, 7, kernel_size=3, padding=1),
    ConvProblem(2, 4, 6, 9, 8, (3, 2), (2, 1), (1, 0), (1, 2), 2),
]


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_peers_are_right(name, problem):
    if reason := PEERS[name].supports(problem):
        pytest.skip(reason)
    assert_same(PEERS[name], *problem.inputs(requires_grad=True), **problem.kwargs)


@pytest.mark.parametrize("name", ["unfoldnd", "einconv", "fft_conv"])
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    reason = PEERS[name].supports(PROBLEMS[0])
    assert "is not installed: pip install 'convlab[peers]'" in reason
    with pytest.raises(ValueError, match="is not installed"):
        PEERS[name](*PROBLEMS[0].inputs(), padding=1)


def test_names_are_found():
    assert find("unfold") is ALGORITHMS["unfold"]
    assert find("einconv") is PEERS["einconv"]
    assert not PEERS.keys() & ALGORITHMS.keys()
    with pytest.raises(ValueError, match=r"algorithm must be one of native, .* got 'magic'"):
        find("magic")


def test_the_threads_layer_compiled_is_the_threads_layer(monkeypatch):
    x, weight, bias = PROBLEMS[0].inputs()
    y = PEERS["compiled_thread"](x, weight, bias, padding=1)
    torch.testing.assert_close(y, ALGORITHMS["thread"](x, weight, bias, padding=1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ValueError, match="writes outside its memory"):
        PEERS["compiled_thread"](x, weight, bias, padding=1)


def test_native_matmul_is_asked_of_inductor_where_it_knows_it(monkeypatch):
    from torch._inductor import config

    from convlab import peers

    algorithm, option = PEERS["compiled_native_matmul"], "triton.native_matmul"
    assert "needs a CUDA GPU" in algorithm.supports(PROBLEMS[0])
    seen = []

    def compiled(function, tensors, arguments, options):
        seen.append((arguments[0].name, dict(options)))
        return lambda x, weight, bias: function(x, weight, bias, *arguments)

    module = sys.modules[ALGORITHMS["compiled"].function.__module__]
    monkeypatch.setattr(module, "compiled_function", compiled)
    x, weight, bias = PROBLEMS[0].inputs()
    y = algorithm.function(x, weight, bias, (1, 1), (1, 1), (1, 1), 1)
    torch.testing.assert_close(y, ALGORITHMS["thread"](x, weight, bias, padding=1))
    assert seen == [("thread", {option: True})]
    if hasattr(config.triton, "native_matmul"):
        assert algorithm.supports(PROBLEMS[0], "cuda") is None
    monkeypatch.setattr(peers, "NATIVE_MATMUL", "triton.no_such_option")
    assert "has no option triton.no_such_option" in algorithm.supports(PROBLEMS[0], "cuda")
