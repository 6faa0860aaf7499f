"""`swap_convolutions` changes what computes a model's convolutions and nothing else."""

import copy
import functools
import io
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from convlab import ALGORITHMS, Conv2d, ThreadConv2d, swap, swap_convolutions
from convlab.networks import settled
from convlab.swap import LeftAlone, convolutions
from convlab.vision import torchvision

models = torchvision().models
segmentation = models.segmentation

INCEPTION = {"init_weights": False, "aux_logits": False}
BARE = {"weights_backbone": None}
FAMILIES = {
    "alexnet": (models.alexnet, 64),
    "resnet": (models.resnet18, 32),
    "resnext": (models.resnext50_32x4d, 32),
    "regnet": (models.regnet_y_400mf, 32),
    "mobilenet_v2": (models.mobilenet_v2, 32),
    "mobilenet_v3": (models.mobilenet_v3_small, 32),
    "efficientnet": (models.efficientnet_b0, 32),
    "convnext": (models.convnext_tiny, 32),
    "inception": (functools.partial(models.inception_v3, **INCEPTION), 75),
    "googlenet": (functools.partial(models.googlenet, **INCEPTION), 32),
    "densenet": (models.densenet121, 32),
    "squeezenet": (models.squeezenet1_1, 32),
    "shufflenet": (models.shufflenet_v2_x0_5, 32),
    "mnasnet": (models.mnasnet0_5, 32),
    "swin": (models.swin_t, 32),
    "deeplab": (functools.partial(segmentation.deeplabv3_mobilenet_v3_large, **BARE), 32),
    "fcn": (functools.partial(segmentation.fcn_resnet50, **BARE), 32),
    "lraspp": (functools.partial(segmentation.lraspp_mobilenet_v3_large, **BARE), 32),
}
TRACED = ("compiled", "fused", "auto")  # seconds per network: a few networks are enough
TRACED_FAMILIES = ("resnet", "squeezenet", "convnext")
TOO_LARGE = {
    ("deeplab", "fft"),  # the spectra of kernels 73 pixels wide take 13 GB
    ("fcn", "fft"),  # seven seconds
}


@functools.lru_cache(maxsize=1)
def network(family):
    """The model in float64, its batch norms settled on random images, an input, its output."""
    make, size = FAMILIES[family]
    torch.manual_seed(0)
    model = make().double()
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected = output(settled(model, images), images[:1])
    return model, images[:1], expected


def output(model, x):
    y = model(x)
    return y["out"] if isinstance(y, dict) else y


def swapped(model, algorithm):
    """The model swapped as far as the algorithm goes; None where it supports no layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftAlone)
        try:
            return swap_convolutions(model, algorithm)
        except ValueError:
            layers = [c.module for c in convolutions(model)]
            assert all(swap.unsupported(layer, algorithm) for layer in layers)
            return None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_of_a_network_stays(family):
    model, x, expected = network(family)
    assert expected.std() > 1e-3, "an output that is nearly constant would hide an error"
    of_native = {c.names[0] for c in convolutions(model)}
    for algorithm in ALGORITHMS:
        traced = algorithm in TRACED and family not in TRACED_FAMILIES
        if traced or (family, algorithm) in TOO_LARGE or swapped(model, algorithm) is None:
            continue
        with torch.no_grad():
            y = output(model, x)
        used = {c.algorithm for c in convolutions(model)} - {"native"}
        assert used == {algorithm} - {"native"}
        swap_convolutions(model, "native")
        error = (y - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, algorithm
    assert {type(c.module) for c in convolutions(model)} == {nn.Conv2d}
    assert {c.names[0] for c in convolutions(model)} == of_native
    assert torch.equal(output(model, x), expected)


def test_the_check_of_a_network_sees_a_small_error(monkeypatch):
    model, x, expected = network("resnet")
    monkeypatch.setitem(ALGORITHMS, "native_no_library", wrong := copy.copy(ALGORITHMS["native"]))
    wrong.function = lambda *arguments: ALGORITHMS["native"].function(*arguments) * 1.0001
    with torch.no_grad():
        y = swap_convolutions(model, "native_no_library")(x)
    swap_convolutions(model, "native")
    assert (y - expected).abs().max() / expected.abs().max() > 1e-5


# What stays


def small_model(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, **options),
        nn.ReLU(),
        nn.Sequential(
            nn.Conv2d(4, 4, 3, padding="same", groups=2, padding_mode="reflect", **options),
            nn.Conv2d(4, 2, (1, 3), stride=(1, 2), bias=False, **options),
        ),
    )


def image(dtype=torch.float32):
    return torch.randn(2, 3, 8, 9, generator=torch.Generator().manual_seed(1)).to(dtype)


def kinds(model):
    return [type(c.module) for c in convolutions(model)]


def test_everything_in_a_module_stays():
    model = small_model(dtype=torch.float64).eval()
    model[0].weight.requires_grad_(False)
    model[2][0].train()
    before = dict(model.named_modules())
    state = {name: id(m) for name, m in before.items()}
    parameters = [id(p) for p in model.parameters()]
    keys = list(model.state_dict())
    inside = {name: vars(m).copy() for name, m in before.items()}
    expected = model(image(torch.float64))

    assert swap_convolutions(model, "unfold") is model
    assert {name: id(m) for name, m in model.named_modules()} == state
    assert [id(p) for p in model.parameters()] == parameters
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 4
    assert kinds(model) == [Conv2d] * 3
    assert (model[2][0].training, model[2][1].training) == (True, False)
    torch.testing.assert_close(model(image(torch.float64)), expected)

    assert swap_convolutions(model, "native") is model
    assert kinds(model) == [nn.Conv2d] * 3
    assert {name: vars(m) for name, m in model.named_modules()} == inside
    assert torch.equal(model(image(torch.float64)), expected)


def test_one_algorithm_follows_another():
    model = small_model()
    for algorithm in ("thread", "windows", "windows", "unfold"):
        swap_convolutions(model, algorithm)
        assert [c.algorithm for c in convolutions(model)] == [algorithm] * 3
    assert "algorithm='unfold'" in repr(model)


def test_hooks_are_called():
    model, calls = small_model(), []
    layer = model[0]
    layer.register_forward_pre_hook(lambda m, args: calls.append("before"))
    layer.register_forward_hook(lambda m, args, y: calls.append("after"))
    layer.register_full_backward_pre_hook(lambda m, grad: calls.append("backward before"))
    layer.register_full_backward_hook(lambda m, grad, out: calls.append("backward"))
    layer.register_state_dict_pre_hook(lambda m, prefix, keep: calls.append("state"))
    layer.weight.register_hook(lambda grad: calls.append("gradient"))
    swap_convolutions(model, "thread")(image().requires_grad_()).sum().backward()
    model.state_dict()
    assert sorted(calls) == sorted(
        ["before", "after", "backward before", "backward", "gradient", "state"]
    )


def test_an_optimiser_goes_on_with_the_same_parameters():
    model = small_model()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    twin = copy.deepcopy(model)
    twin_optimiser = torch.optim.SGD(twin.parameters(), lr=0.1)
    swap_convolutions(model, "unfold")
    for each, steps in ((model, optimiser), (twin, twin_optimiser)):
        each(image()).square().sum().backward()
        steps.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_shared_module_stays_shared_and_is_listed_once():
    layer = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, layer)})
    assert [c.names for c in convolutions(model)] == [("a", "b.0", "b.1")]
    swap_convolutions(model, "unfold", only="b.1")
    assert model["a"] is model["b"][0] is model["b"][1] is layer
    assert type(layer) is Conv2d


def test_a_model_may_be_a_convolution():
    layer = nn.Conv2d(3, 4, 3)
    expected = layer(image())
    assert swap_convolutions(layer, "windows") is layer
    torch.testing.assert_close(layer(image()), expected)
    assert type(swap_convolutions(layer, "native", only="")) is nn.Conv2d


# Which convolutions


NAMES = ["0", "2.0", "2.1"]


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (None, [True, True, True]),
        ("2.0", [False, True, False]),
        ("2.*", [False, True, True]),
        (["0", "2.1"], [True, False, True]),
        (("*.1",), [False, False, True]),
        (lambda name, module: name != "0", [False, True, True]),
        (lambda name, module: module.kernel_size == (3, 3), [True, True, False]),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_only(only, expected):
    model = swap_convolutions(small_model(), "unfold", only)
    assert [c.names for c in convolutions(model)] == [(name,) for name in NAMES]
    assert [type(c.module) is Conv2d for c in convolutions(model)] == expected


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("3", "only must fit a convolution, got '3', none of 0, 2.0, 2.1"),
        (["0", "2.2*"], "only must fit a convolution, got '2.2*', none of 0, 2.0, 2.1"),
        ([], "only must be names, patterns, a function or None, got []"),
        (3, "only must be names, patterns, a function or None, got 3"),
        ([nn.Conv2d], "only must be names, patterns, a function or None, got [<class"),
        (lambda name, module: False, "only must choose a convolution, none of: 0, 2.0, 2.1"),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_a_bad_only_is_named(only, message):
    model = small_model()
    with pytest.raises(ValueError, match=re.escape(message)):
        swap_convolutions(model, "unfold", only)
    assert kinds(model) == [nn.Conv2d] * 3


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"algorithm must be one of native, .*'unfolded'"):
        swap_convolutions(small_model(), "unfolded")
    with pytest.raises(ValueError, match=r"model must be an nn.Module, got 'resnet18'"):
        swap_convolutions("resnet18", "unfold")


# What is left alone


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


class OwnProduct(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


def replaced_forward():
    layer = nn.Conv2d(3, 3, 3)
    layer.forward = lambda x: x
    return layer


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.nn.quantized import Conv2d

        return Conv2d(3, 3, 3)


LEFT = {
    "ConvTranspose2d is no nn.Conv2d": lambda: nn.ConvTranspose2d(3, 3, 3),
    "Conv1d is no nn.Conv2d": lambda: nn.Conv1d(3, 3, 3),
    "Conv3d is no nn.Conv2d": lambda: nn.Conv3d(3, 3, 3),
    "LazyConv2d has no sizes before its first call": lambda: nn.LazyConv2d(3, 3),
    "LazyConvTranspose2d is no nn.Conv2d": lambda: nn.LazyConvTranspose2d(3, 3),
    "OwnForward has a forward of its own": lambda: OwnForward(3, 3, 3),
    "OwnProduct has a forward of its own": lambda: OwnProduct(3, 3, 3),
    "Conv2d has a forward of its own": replaced_forward,
    "Conv2d is no nn.Conv2d": quantised,
    "ThreadConv2d is no nn.Conv2d": lambda: ThreadConv2d(3, 3, 3),
    "unfold needs a floating-point weight, not complex64": lambda: nn.Conv2d(
        3, 3, 3, dtype=torch.complex64
    ),
}


@pytest.mark.parametrize("reason", LEFT)
def test_other_convolutions_are_left_alone_and_reported(reason):
    layer = LEFT[reason]()
    kind, inside = type(layer), vars(layer).copy()
    model = nn.Sequential(nn.Conv2d(3, 3, 3), layer)
    with pytest.warns(LeftAlone) as found:
        swap_convolutions(model, "unfold")
    assert [str(w.message) for w in found] == [f"1 of 2 convolutions left alone: {reason} (1)"]
    assert found[0].filename == __file__
    assert type(layer) is kind
    assert vars(layer) == inside
    assert type(model[0]) is Conv2d
    with pytest.raises(ValueError, match=re.escape(f"can be swapped, but {reason} (1)")):
        swap_convolutions(model, "unfold", only="1")


def test_a_model_without_convolutions_is_no_silent_success():
    with pytest.raises(ValueError, match=r"nn.Conv2d that can be swapped, but it has no conv"):
        swap_convolutions(nn.Linear(3, 3), "unfold")


def test_nothing_is_reported_where_everything_was_swapped():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap_convolutions(small_model(), "unfold")


def test_what_an_algorithm_does_not_support_is_left_alone_and_reported():
    model = models.resnet18()
    with pytest.warns(LeftAlone, match=r"^7 of 20 convolutions left alone: winograd comp.* and 3"):
        swap_convolutions(model, "winograd")
    for c in convolutions(model):
        fits = c.module.kernel_size == (3, 3) and c.module.stride == (1, 1)
        assert c.algorithm == ("winograd" if fits else "native")
    with pytest.raises(ValueError, match=r"can be swapped, but winograd computes 3×3 kernels"):
        swap_convolutions(models.swin_t(), "winograd")


def test_what_was_not_selected_is_not_reported():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ConvTranspose2d(3, 3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap_convolutions(model, "unfold", only="0")


def test_a_lazy_convolution_can_be_swapped_once_it_has_sizes():
    model = nn.Sequential(nn.LazyConv2d(3, 3))
    expected = model(image())
    swap_convolutions(model, "unfold")
    torch.testing.assert_close(model(image()), expected)


def test_a_problem_that_is_refused_at_the_call_says_why(monkeypatch):
    monkeypatch.setattr(
        ALGORITHMS["unfold"], "_limits", lambda p, d: "Too wide." if p.width > 50 else None
    )
    model = swap_convolutions(nn.Conv2d(3, 3, 3), "unfold")
    with pytest.raises(ValueError, match="Too wide"):
        model(torch.ones(1, 3, 8, 60))


# Subclasses and other ways to make a weight


class Named(nn.Conv2d):
    """A subclass that computes nothing of its own."""

    def __init__(self, *sizes, note="", **options):
        super().__init__(*sizes, **options)
        self.note = note


DUPLICATES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: saved_and_loaded(m),
}


def saved_and_loaded(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False, **options)


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_a_swapped_model_can_be_copied_and_saved(duplicate):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Named(4, 4, 3, note="mine"))
    expected = model(image())
    twin = DUPLICATES[duplicate](swap_convolutions(model, "unfold"))
    assert [c.algorithm for c in convolutions(twin)] == ["unfold"] * 2
    assert isinstance(twin[1], Named)
    assert twin[1].note == "mine"
    assert twin[0].weight.data_ptr() != model[0].weight.data_ptr()
    torch.testing.assert_close(twin(image()), expected)
    assert kinds(swap_convolutions(twin, "native")) == [nn.Conv2d, Named]
    assert kinds(model) == [Conv2d, type(model[1])]
    assert torch.equal(DUPLICATES[duplicate](twin)(image()), expected)


def test_state_dicts_go_both_ways():
    model, other = (small_model(dtype=torch.float64) for _ in range(2))
    swap_convolutions(model, "unfold")
    for p in model.parameters():
        nn.init.normal_(p)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = image(torch.float64)
    torch.testing.assert_close(other(x), model(x))


@torch.no_grad()
def test_parametrized_and_normalised_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.weight_norm(nn.Conv2d(3, 3, 3))
    layers = [
        parametrizations.weight_norm(nn.Conv2d(3, 3, 3)),
        parametrizations.spectral_norm(Named(3, 3, 3)).eval(),
        old,
        nn.utils.spectral_norm(nn.Conv2d(3, 3, 3)).eval(),
        prune.l1_unstructured(nn.Conv2d(3, 3, 3), "weight", amount=0.5),
    ]
    for layer in layers:
        expected, keys = layer(image()), list(layer.state_dict())
        twin = copy.deepcopy(layer)
        native_kind = type(layer)
        swap_convolutions(layer, "unfold")
        assert isinstance(layer, Conv2d)
        assert list(layer.state_dict()) == keys
        torch.testing.assert_close(layer(image()), expected)
        torch.testing.assert_close(copy.deepcopy(layer)(image()), expected)
        assert type(twin) is native_kind, "a copy keeps its class"
        swap_convolutions(layer, "native")
        assert not isinstance(layer, Conv2d)
        torch.testing.assert_close(layer(image()), expected)
        assert torch.equal(twin(image()), expected)


def test_a_parametrization_can_be_removed_after_the_swap():
    layer = parametrizations.weight_norm(nn.Conv2d(3, 3, 3))
    expected = layer(image())
    swap_convolutions(layer, "unfold")
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is Conv2d
    torch.testing.assert_close(layer(image()), expected)
    assert type(swap_convolutions(layer, "native")) is nn.Conv2d


# With the rest of PyTorch


@pytest.mark.parametrize("algorithm", ["thread", "unfold", "windows_chunked", "native"])
def test_under_torch_compile(algorithm):
    model = small_model()
    expected = model(image())
    swap_convolutions(model, algorithm)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = run(image())
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_compiled_code_notices_a_swap(monkeypatch):
    model = nn.Conv2d(3, 3, 3)
    run = torch.compile(model, backend="eager")
    expected = run(image())
    twice = copy.copy(ALGORITHMS["unfold"])
    twice.function = lambda *arguments: 2 * F.conv2d(*arguments)
    monkeypatch.setitem(ALGORITHMS, "unfold", twice)
    swap_convolutions(model, "unfold")
    torch.testing.assert_close(run(image()), 2 * expected)
    swap_convolutions(model, "native")
    torch.testing.assert_close(run(image()), expected)


def test_under_torch_export():
    model = swap_convolutions(small_model().eval(), "unfold")
    exported = torch.export.export(model, (image(),))
    torch.testing.assert_close(exported.module()(image()), model(image()))


def test_a_traced_graph_can_be_swapped():
    """Symbolic tracing comes first: it cannot look into the algorithms."""
    graph = torch.fx.symbolic_trace(small_model())
    expected = graph(image())
    torch.testing.assert_close(swap_convolutions(graph, "unfold")(image()), expected)
    assert kinds(graph) == [Conv2d] * 3


def test_under_autocast():
    model = small_model()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(image())
        y = swap_convolutions(model, "unfold")(image())
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_moves_between_devices_and_dtypes():
    model = swap_convolutions(small_model(), "unfold").to(torch.float64)
    assert model(image(torch.float64)).dtype == torch.float64
    assert model.to("meta")(image().double().to("meta")).shape == (2, 2, 8, 4)


def test_data_parallel_replicas():
    model = nn.DataParallel(small_model())
    expected = model(image())
    torch.testing.assert_close(swap_convolutions(model, "unfold")(image()), expected)
    replica = model.module[0]._replicate_for_data_parallel()
    assert (type(replica), replica.algorithm) == (Conv2d, "unfold")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has none")
def test_distributed_data_parallel(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, twin = small_model(), small_model()
        before = nn.parallel.DistributedDataParallel(swap_convolutions(model, "unfold"))
        after = nn.parallel.DistributedDataParallel(twin)
        swap_convolutions(after, "unfold")
        for each in (before, after):
            each(image()).square().sum().backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
def test_on_a_gpu():
    model = small_model().cuda()
    expected = model(image().cuda())
    for algorithm in ("unfold", "windows", "shifts"):
        y = swap_convolutions(model, algorithm)(image().cuda())
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    moved = model.cpu()(image())
    torch.testing.assert_close(moved, expected.cpu(), rtol=1e-3, atol=1e-3)
