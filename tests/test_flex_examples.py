"""The worked examples against definitions made of windows, loops and other routines."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from convlab import flex_conv2d
from convlab.flex import examples

SIZES = [
    {"stride": 1, "padding": 1, "dilation": 1},
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
]
each_size = pytest.mark.parametrize("sizes", SIZES, ids=["usual", "uneven"])


def loops(*args, **options):
    """Starts at once."""
    return flex_conv2d(*args, **options | {"backend": "loops"})


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(examples, "flex_conv2d", loops)


def tensors(k=3, c=4, kernel=(3, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, c, 7, 6), (k, c, *kernel)
    return [
        torch.randn(s, dtype=torch.float64, generator=generator, requires_grad=True) for s in shapes
    ]


def patches(x, kernel, sizes, value=0.0):
    """(N, OH, OW, C, kh, kw), one pixel after the other."""
    stride, padding, dilation = (
        (v, v) if isinstance(v, int) else v
        for v in (sizes["stride"], sizes["padding"], sizes["dilation"])
    )
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), value=value)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel)]
    rows = [range(0, n - r, s) for n, r, s in zip(x.shape[2:], reach, stride)]
    found = [
        x[:, :, i : i + reach[0] + 1 : dilation[0], j : j + reach[1] + 1 : dilation[1]]
        for i, j in itertools.product(*rows)
    ]
    return torch.stack(found, 1).unflatten(1, [len(r) for r in rows])


def per_patch(function, x, weight, sizes, value=0.0):
    """function(patch, filter), both (C, kh, kw), for each pixel and filter → (N, K, OH, OW)."""
    p = patches(x, weight.shape[2:], sizes, value)
    each = [torch.stack([function(a, w) for w in weight]) for a in p.flatten(0, 2)]
    return torch.stack(each).unflatten(0, p.shape[:3]).movedim(3, 1)


def normalised(values):
    return values / values.norm()


def topk_product(patch, w):
    keep = patch.abs() >= patch.abs().flatten().topk(patch.numel() // 2).values[-1]
    return (patch * w)[keep].sum()


DEFINITIONS = {
    "standardised": (
        lambda x, w, **s: examples.standardised(x, w, eps=0.0, **s),
        lambda a, w: (a * (w - w.mean()) / w.std(correction=0)).sum(),
        0.0,
    ),
    "linear_light": (
        examples.linear_light,
        lambda a, w: (torch.where(a > 0, a, 0.0) ** 2.2 * w).sum(),
        0.0,
    ),
    "l2_distance": (examples.l2_distance, lambda a, w: torch.dist(a, w) ** 2, 0.0),
    "gaussian": (
        lambda x, w, **s: examples.gaussian(x, w, 0.1, **s),
        lambda a, w: torch.exp(-0.1 * torch.dist(a, w) ** 2),
        0.0,
    ),
    "cosine_similarity": (
        examples.cosine_similarity,
        lambda a, w: F.cosine_similarity(a.flatten(), w.flatten(), dim=0),
        0.0,
    ),
    "correlation": (
        examples.correlation,
        lambda a, w: normalised(a - a.mean()).flatten() @ normalised(w - w.mean()).flatten(),
        0.0,
    ),
    "kervolution": (
        lambda x, w, **s: examples.kervolution(x, w, 0.5, 2, **s),
        lambda a, w: (a.flatten() @ w.flatten() + 0.5) ** 2,
        0.0,
    ),
    "l1_distance": (examples.l1_distance, lambda a, w: torch.dist(a, w, p=1), 0.0),
    "dilate": (examples.dilate, lambda a, w: (a + w).max(), -torch.inf),
    "erode": (examples.erode, lambda a, w: (a - w).min(), torch.inf),
    "patch_topk": (lambda x, w, **s: examples.patch_topk(x, w, 0.5, **s), topk_product, 0.0),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@each_size
def test_value_and_gradients_are_those_of_the_definition(name, sizes, monkeypatch):
    if sizes is not SIZES[0]:
        monkeypatch.setattr(examples, "flex_conv2d", loops)
    fast, slow, outside = DEFINITIONS[name]
    x, weight = tensors()
    y, expected = fast(x, weight, **sizes), per_patch(slow, x, weight, sizes, outside)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    found, true = (torch.autograd.grad(t, (x, weight), grad) for t in (y, expected))
    torch.testing.assert_close(found, true, rtol=1e-8, atol=1e-8)


SMOOTH = ("standardised", "gaussian", "cosine_similarity", "correlation", "kervolution")


@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck(name):
    x, weight = tensors(k=2, c=2)
    fast = DEFINITIONS[name][0]
    assert torch.autograd.gradcheck(
        lambda *t: fast(*t, **SIZES[1]), (x[:1, :, :4, :4], weight), fast_mode=True
    )


@each_size
def test_squares_of_differences_one_by_one_are_the_expanded_form(sizes):
    x, weight = tensors()
    y = loops(x, weight, examples.squared_difference, **sizes)
    torch.testing.assert_close(y, examples.l2_distance(x, weight, **sizes))


def test_l2_distance_is_never_negative():
    x = torch.full((1, 3, 5, 5), 1e3) + torch.rand(1, 3, 5, 5)
    assert bool((examples.l2_distance(x, x[:, :, 1:4, 1:4]) >= 0).all())


def test_directions_of_nothing_are_finite():
    x, weight = torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3)
    for similarity in (examples.cosine_similarity, examples.correlation):
        assert torch.equal(similarity(x, weight), torch.zeros(1, 3, 3, 3))


def test_flat_elements_are_max_pooling(uncompiled):
    x = torch.randn(2, 1, 9, 8)
    flat = torch.zeros(1, 1, 3, 3)
    sizes = {"stride": 2, "padding": 1}
    assert torch.equal(examples.dilate(x, flat, **sizes), F.max_pool2d(x, 3, **sizes))
    assert torch.equal(examples.erode(x, flat, **sizes), -F.max_pool2d(-x, 3, **sizes))


def test_opening_lies_below_and_closing_above(uncompiled):
    """Erosion and dilation by one element are adjoint, as long as one of them mirrors it."""
    x, weight = torch.randn(1, 1, 12, 12), torch.randn(1, 1, 3, 3)
    mirrored = weight.flip(2, 3)
    opened = examples.dilate(examples.erode(x, weight, padding=1), mirrored, padding=1)
    closed = examples.erode(examples.dilate(x, mirrored, padding=1), weight, padding=1)
    assert bool((opened <= x + 1e-5).all())
    assert bool((closed >= x - 1e-5).all())


@pytest.mark.parametrize("sharpness", [0.3, 2.0])
def test_logsumexp_pool(sharpness, uncompiled):
    x, _ = tensors()
    s = torch.tensor(sharpness, dtype=torch.float64, requires_grad=True)
    sizes = {"stride": 2, "padding": 1, "dilation": 1}
    y = examples.logsumexp_pool(x, 3, s, **sizes)
    p = patches(x * s, (3, 3), sizes, value=-torch.inf)
    expected = (p.exp().sum((4, 5)).log() / s).movedim(3, 1)
    torch.testing.assert_close(y, expected)
    found, true = (torch.autograd.grad(t.square().sum(), (x, s)) for t in (y, expected))
    torch.testing.assert_close(found, true)


def test_logsumexp_pool_becomes_max_pooling(uncompiled):
    x, _ = tensors()
    y = examples.logsumexp_pool(x, 3, 1e4)
    torch.testing.assert_close(y, F.max_pool2d(x, 3, 1), rtol=0, atol=1e-3)


# Top-k


@settings(max_examples=30)
@given(
    values=st.lists(st.floats(0, 2.0**100, width=32), min_size=32, max_size=32),
    count=st.integers(1, 18),
    padding=st.integers(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_threshold_is_exact(values, count, padding, dtype):
    """Zeros, equal values, subnormal and very large ones included."""
    x = torch.tensor(values, dtype=dtype).view(1, 2, 4, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "flex_conv2d", loops)
        found = examples.kth_largest(x, (3, 3), count, padding=padding)
    columns = F.unfold(x, 3, padding=padding)
    assert torch.equal(found.flatten(), columns.topk(count, dim=1).values[0, -1])


def test_all_that_equal_the_smallest_kept_are_kept(uncompiled):
    x = torch.tensor([3.0, -1.0, 1.0, 0.5]).view(1, 1, 2, 2)
    weight = torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 1, 2, 2)
    assert examples.patch_topk(x, weight, 0.25).item() == 3
    assert examples.patch_topk(x, weight, 0.5).item() == 3 - 10 + 100
    assert examples.patch_topk(x, weight, 1.0).item() == 3 - 10 + 100 + 500


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5, float("nan")])
def test_a_bad_ratio_is_named(ratio):
    with pytest.raises(ValueError, match="ratio must be above 0 and at most 1, got"):
        examples.patch_topk(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2), ratio)


def test_nan_stays_in_its_patch(uncompiled):
    x = torch.tensor([[torch.nan, 3.0, 1.0, 4.0]]).view(1, 1, 1, 4)
    y = examples.patch_topk(x, torch.ones(1, 1, 1, 2), 0.5)
    assert y.isnan().flatten().tolist() == [True, False, False]
    assert y.flatten().tolist()[1:] == [3, 4]


# The weight's own


def test_a_mask_takes_weights_out():
    x, weight = tensors()
    mask = (torch.arange(6).view(3, 2) < 3).double()
    y = examples.masked(x, weight, mask, **SIZES[1])
    cut = weight.detach().clone()
    cut[:, :, 1, 1:] = cut[:, :, 2] = 0
    torch.testing.assert_close(y, F.conv2d(x, cut, **SIZES[1]))
    (grad,) = torch.autograd.grad(y.sum(), weight)
    assert not grad[:, :, 2].any()
    assert not grad[:, :, 1, 1].any()
    assert grad[:, :, 0].all()


# One weight per sample, per place


@each_size
def test_weights_of_each_sample(sizes):
    x, _ = tensors()
    weights = torch.randn(2, 3, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    y = examples.per_sample(x, weights, **sizes)
    expected = torch.cat([F.conv2d(a[None], w, **sizes) for a, w in zip(x, weights)])
    assert_same(y, expected, x, weights)


@each_size
def test_weights_of_each_place(sizes):
    x, weight = tensors()
    p = patches(x, (3, 2), sizes)  # N, OH, OW, C, kh, kw
    weights = torch.randn(*p.shape[1:3], 3, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    expected = torch.einsum("nyxcij,yxkcij->nkyx", p, weights)
    assert_same(examples.locally_connected(x, weights, **sizes), expected, x, weights)

    same = weight.expand_as(weights)
    y = examples.locally_connected(x, same, **sizes)
    torch.testing.assert_close(y, F.conv2d(x, weight, **sizes))


@each_size
def test_involution(sizes):
    x, _ = tensors()
    p = patches(x, (3, 2), sizes)
    kernels = torch.randn(2, 2, 3, 2, *p.shape[1:3], dtype=torch.float64, requires_grad=True)
    shared = kernels.repeat_interleave(2, dim=1)  # of each channel
    expected = torch.einsum("nyxcij,ncijyx->ncyx", p, shared)
    assert_same(examples.involution(x, kernels, **sizes), expected, x, kernels)


def assert_same(y, expected, *tensors):
    torch.testing.assert_close(y, expected)
    grad = torch.randn(y.shape, dtype=y.dtype)
    found, true = (torch.autograd.grad(t, tensors, grad) for t in (y, expected))
    torch.testing.assert_close(found, true)
