"""`diagnose`: the right cause first, the right branch, a report that says so; refusals."""

import gc
import html.parser
import io
import logging
import re
import sys

import naive_layers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convlab
from convlab import ThreadConv2d, diagnose, timing
from convlab.diagnosing import measure
from convlab.diagnosing.page import body
from convlab.guide import GUIDE

COLUMNS, BLOWN = "columns materialised (im2col)", "broadcasting blows the columns up"
WAITS, PER_IMAGE = "printing or synchronising in forward", "one iteration per image"
MUST_HOLD = {
    "ThreadConv2d": (COLUMNS, "plain"),
    "Adder": (BLOWN, "elementwise"),
    "Cosine": (COLUMNS, "expands"),
    "Involution": (COLUMNS, "places"),
    "Printing": (WAITS, "plain"),
    "Item": (WAITS, "plain"),
}


@pytest.fixture(scope="module", autouse=True)
def few_rounds():
    """What is measured is not looked at, only that it is there."""
    with pytest.MonkeyPatch.context() as patch:
        few = {"seconds": 0.005, "min_rounds": 2, "max_rounds": 2}
        patch.setattr(measure, "QUICK_OPTIONS", few)
        gc.freeze()  # each measurement of memory collects garbage: of what is there, half a second
        yield
        gc.unfreeze()


@pytest.fixture(scope="module")
def diagnosed():
    """name of a layer → its diagnosis, made once."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            known = {"ThreadConv2d": lambda: ThreadConv2d(8, 6, 3, padding=1), "Conv2d": conv}
            layer = known.get(name) or getattr(naive_layers, name)
            made[name] = diagnose(layer(), images(), quick=True)
        return made[name]

    return get


def conv():
    return nn.Conv2d(8, 6, 3, padding=1)


def images(n=5, c=8, h=12, w=12):
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(1))


class Function(nn.Module):
    """A layer with a convolution that runs any function."""

    def __init__(self, function):
        super().__init__()
        self.function, self.conv = function, conv()

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize("name", MUST_HOLD)
def test_the_right_cause_comes_first(diagnosed, name):
    cause, branch = MUST_HOLD[name]
    found = diagnosed(name)
    assert found.causes[0].name == cause
    assert found.kind.branch == branch
    assert found.branch is GUIDE[branch]
    assert found.kind.sure
    assert f"First cause: {cause}" in str(found)
    assert GUIDE[branch].title in str(found)


def test_the_problem_of_the_layer(diagnosed):
    for name in MUST_HOLD:
        p = diagnosed(name).problem
        assert (p.batch, p.in_channels, p.height, p.width) == (5, 8, 12, 12)
        assert (p.kernel_size, p.stride, p.padding, p.groups) == ((3, 3), (1, 1), (1, 1), 1)


def test_nothing_is_found_in_nn_conv2d(diagnosed):
    found = diagnosed("Conv2d")
    assert [cause for cause in found.causes if cause.rank[0] < 2] == []
    assert found.kind.branch == "plain"
    assert found.behaviour.same_weight


def test_it_is_measured_beside_conv2d_and_its_fast_form(diagnosed):
    plain, cosine = diagnosed("ThreadConv2d"), diagnosed("Cosine")
    three = ["this layer", "nn.Conv2d", "nn.Conv2d, library off"]
    assert list(plain.times.forward.index) == list(plain.times.train.index) == three
    assert list(cosine.times.forward.index) == [*three, "fast form"]
    assert cosine.times.fast_error < 1e-5
    assert (plain.times.forward["peak_bytes"] > 0).all()
    assert plain.times.launches is None
    assert [gain.how for gain in plain.gains] == ["measured"] * 2
    assert [gain.how for gain in cosine.gains] == ["measured"] * 2
    assert [gain.how for gain in diagnosed("Adder").gains] == ["at most"] * 2
    for gain in (*plain.gains, *cosine.gains):
        assert gain.low <= gain.factor <= gain.high


def test_the_operators_that_the_profiler_saw(diagnosed):
    for name, frame in diagnosed("ThreadConv2d").times.operators.items():
        assert {"aten::im2col", "aten::col2im", "aten::mm"} <= set(frame.index), name


def test_time_by_line(diagnosed):
    lines = diagnosed("Cosine").lines.set_index("line")
    assert lines["share"].sum() == pytest.approx(1)
    assert (lines["seconds"] > 0).all()
    assert all(re.fullmatch(r"naive_layers\.py:\d+", line) for line in lines.index)
    assert any("F.unfold" in source for source in lines["source"])


def test_what_is_not_known_is_said():
    layer = nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    found = diagnose(layer, images(), quick=True)
    assert (found.branch, found.problem, found.gains) == (None, None, ())
    assert list(found.times.forward.index) == ["this layer"]
    assert "the output has shape (2, 3)" in " ".join(found.notes)
    assert "No branch could be told" in str(found)
    body(found)


@pytest.mark.parametrize("name", [*MUST_HOLD, "Conv2d"])
def test_the_report_is_complete(diagnosed, name):
    text = str(diagnosed(name))
    for part in ("In short", "Try first:", "Beside nn.Conv2d", "By operator", "Decision guide"):
        assert part in text
    assert convlab.machine.name() in text
    assert ".." not in text.replace("…", "")
    assert not re.search(r"\b(nan|inf)\b", text)
    assert max(map(len, text.splitlines())) <= 100


class Reader(html.parser.HTMLParser):
    """Tags that are open, and where images and links lead."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.sources += [values[key] for key in ("src", "href") if key in values]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_on_its_own(diagnosed, tmp_path):
    path = tmp_path / "page.html"
    diagnosed("Cosine").save_html(path)
    text = path.read_text(encoding="utf-8")
    page = Reader(text)
    assert page.open == []
    assert page.tags.count("img") == 5
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert COLUMNS in text
    assert path.stat().st_size < 500_000
    assert Reader(diagnosed("Cosine")._repr_html_()).open == []


def test_code_in_the_page_stays_text(tmp_path):
    layer = Function(lambda s, x: s.conv(x) if len(x) < 1e6 else "<b>")
    text = diagnose(layer, images(), quick=True)._repr_html_()
    assert "&lt;b&gt;" in text
    assert "<b>&quot;" not in text


def test_where_the_page_cannot_be_written(diagnosed, tmp_path):
    with pytest.raises(ValueError, match="html must be a file that can be written, got"):
        diagnosed("Cosine").save_html(tmp_path)


# The layer is left as it was


def test_prints_are_not_shown_and_the_state_is_put_back(capsys):
    stream = io.StringIO()
    log = logging.getLogger("noisy")
    log.propagate = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        log.addHandler(logging.StreamHandler())
        layer = nn.Sequential(naive_layers.Printing(), nn.BatchNorm2d(6), nn.Dropout(0.5))
        layer[0].register_forward_hook(lambda *_: log.warning("called"))
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        layer[0].conv.weight.grad = torch.ones_like(layer[0].conv.weight)
        torch.manual_seed(5)
        state = torch.get_rng_state()
        found = diagnose(layer, images(), quick=True)
        log.handlers.clear()
    assert capsys.readouterr() == ("", "")
    assert stream.getvalue() == ""
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(layer[0].conv.weight.grad, torch.ones_like(layer[0].conv.weight))
    assert layer.training
    assert found.causes[0].name == WAITS
    assert "changes from call to call" in " ".join(found.notes)


def test_a_weight_of_nan_is_named_and_replaced_for_the_tests():
    layer = ThreadConv2d(8, 6, 3, padding=1)
    with torch.no_grad():
        layer.weight.fill_(float("nan"))
    found = diagnose(layer, images(), quick=True)
    assert found.kind.branch == "plain"
    assert "weight holds no usable numbers" in " ".join(found.notes)
    assert torch.isnan(layer.weight).all()
    assert [gain.how for gain in found.gains] == ["measured"] * 2


def test_a_layer_without_a_gradient():
    found = diagnose(Function(torch.no_grad()(lambda s, x: s.conv(x))), images(), quick=True)
    assert found.times.train is None
    assert "no gradient" in [cause.name for cause in found.causes]
    assert "none, the output requires no gradient" in " ".join(str(found).split())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    found = diagnose(naive_layers.Cosine().to(dtype), images().to(dtype), quick=True)
    assert found.causes[0].name == COLUMNS
    assert found.kind.branch == "expands"
    assert "fast form" in found.times.forward.index


def test_a_compiled_layer(no_code_is_generated):
    layer = torch.compile(naive_layers.Cosine(), backend="eager")
    found = diagnose(layer, images(), quick=True)
    assert found.layer == "Cosine"
    assert found.causes[0].name == COLUMNS
    assert "a slow first call" in [cause.name for cause in found.causes]
    assert "the layer is compiled" in " ".join(found.notes)


def test_a_layer_that_compiles_a_part_of_itself(no_code_is_generated):
    """While it is watched, too: the compiler must not give up on it."""
    inner = torch.compile(lambda x, w: F.unfold(x, 3).sin() * w, backend="eager", fullgraph=True)
    layer = Function(lambda s, x: inner(x, s.conv.weight.mean()))
    found = diagnose(layer, images(), quick=True)
    assert found.causes[0].name == COLUMNS
    assert "compiled" in " ".join(found.notes)
    assert not found.watched.error


# Refused


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s, x: (x, x), "layer must return one tensor, Function returned a tuple"),
        (lambda s, x: None, "layer must return one tensor, Function returned None"),
        (lambda s, x: s.conv(x.relu_()), "layer must not change its input, Function wrote to x"),
        (lambda s, x: s.conv(x).to("meta"), "moved it from cpu to meta"),
        (lambda s, x: sys.exit(3), "Function failed on x of shape .*SystemExit: 3"),
        (lambda s, x: x @ x[:, :, :5], r"failed on x of shape \(5, 8, 12, 12\): RuntimeError"),
        (lambda s, x: x.nope, r"AttributeError: .* \(test_diagnose.py, line \d+\)"),
    ],
)
def test_a_layer_that_cannot_be_diagnosed(function, message):
    with pytest.raises(ValueError, match=message) as caught:
        diagnose(Function(function), images())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (F.relu, images(), "layer must be an nn.Module, got a builtin_function|a function"),
        (nn.ReLU(), [1.0], "x must be a floating-point tensor .*got a list"),
        (nn.ReLU(), torch.zeros(3, 4), r"got \(3, 4\) of torch.float32"),
        (nn.ReLU(), torch.zeros(1, 1, 2, 2, dtype=torch.int64), "torch.int64"),
        (nn.ReLU(), torch.zeros(0, 1, 2, 2), "at least one value"),
        (nn.Conv2d(1, 1, 1, device="meta"), images(1, 1), "on one device, got 'weight' on meta"),
    ],
)
def test_bad_arguments(layer, x, message):
    with pytest.raises(ValueError, match=message):
        diagnose(layer, x)


def test_ctrl_c_in_the_layer_goes_through():
    def interrupted(layer, x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose(Function(interrupted), images())


def test_backward_is_the_difference_within_rounds():
    def taken(*samples):
        return {"this layer": timing.Measurement(samples, 1, None, "cpu", {}, "", 0.0)}

    made = measure.Times(None, None, samples={"forward": taken(1.0, 5.0, 2.0)})
    assert made.backward is None
    assert made.scattered
    made.samples = {"forward": taken(1.0, 5.0, 2.0), "train": taken(4.0, 9.0, 5.0)}
    assert made.backward == 3.0
    made.samples = {"forward": taken(1.0, 1.1, 1.2), "train": taken(2.0, 2.1, 2.2)}
    assert not made.scattered
