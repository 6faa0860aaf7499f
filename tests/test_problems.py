"""`PROBLEMS`: every convolution of four networks, compared with what torchvision builds."""

import collections

import pytest
import torch
from torch import nn

from convlab.problem import ConvProblem
from convlab.problems import NETWORK_BATCH, NETWORKS, PROBLEMS, thread_problem
from convlab.vision import torchvision


def convolutions(network):
    """The problem of every `nn.Conv2d` that a forward pass goes through → how often it does."""
    found = collections.Counter()

    def count(layer, inputs, output):
        names = "kernel_size", "stride", "padding", "dilation", "groups"
        sizes = {name: getattr(layer, name) for name in names}
        batch, channels, height, width = inputs[0].shape
        problem = ConvProblem(batch, channels, layer.out_channels, height, width, **sizes)
        assert problem.output_shape == output.shape
        assert problem.weight_shape == layer.weight.shape
        found[problem] += 1

    with torch.device("meta"):  # shapes without numbers
        model = getattr(torchvision().models, network)().eval()
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(count)
        model(torch.empty(NETWORK_BATCH, 3, 224, 224))
    return found


@pytest.mark.parametrize("network", NETWORKS)
def test_the_layers_of_a_network_are_those_that_torchvision_builds(network):
    ours = [(PROBLEMS[name], times) for name, times in NETWORKS[network].items()]
    assert ours == list(convolutions(network).items()), "in the order of the forward pass"


def test_the_networks_and_how_many_convolutions_each_has():
    assert {network: sum(layers.values()) for network, layers in NETWORKS.items()} == {
        "resnet50": 53,
        "vgg16": 13,
        "mobilenet_v3_large": 62,
        "convnext_tiny": 22,
    }


def test_every_problem_is_the_threads_or_a_wide_one_or_a_networks():
    networks = [name for layers in NETWORKS.values() for name in layers]
    assert len(set(networks)) == len(networks)
    own = [name for name in PROBLEMS if name not in networks]
    assert own == ["thread_b2", "thread_b64", "thread_b256", "thread_b512", "wide_64", "wide_32"]
    assert len(PROBLEMS) == len(own) + len(networks)


def test_the_problem_of_the_thread():
    assert PROBLEMS["thread_b2"] == ConvProblem(2, 10, 15, 50, 50, 3, padding=1)
    assert [p.batch for n, p in PROBLEMS.items() if n.startswith("thread")] == [2, 64, 256, 512]
    assert all(PROBLEMS[f"thread_b{n}"] == thread_problem(n) for n in (2, 64, 256, 512))


@pytest.mark.parametrize("name", [name for layers in NETWORKS.values() for name in layers])
def test_a_name_says_which_problem_it_is(name):
    problem = PROBLEMS[name]
    sizes = f"_{problem.in_channels}to{problem.out_channels}_{problem.height}px"
    sizes += f"_k{problem.kernel_size[0]}"
    stride = "" if problem.stride == (1, 1) else f"_s{problem.stride[0]}"
    depthwise = "" if problem.groups == 1 else "_depthwise"
    assert name.partition("_" + str(problem.in_channels) + "to")[0] in NETWORKS
    assert name.endswith(sizes + stride + depthwise)
    assert problem.groups in (1, problem.in_channels)
    assert problem.batch == NETWORK_BATCH
