"""The experiment on other kinds of convolution: checked, different forms, never timed if wrong."""

import pytest
import torch

from convlab import ConvProblem, experiments, machine, records
from convlab.experiments import Settings, custom
from convlab.experiments.custom import COMBINATIONS, combined, custom_case, custom_pass, deviation

SMALL = ConvProblem(3, 3, 4, 6, 5, kernel_size=3, padding=1)
GROUPED = ConvProblem(2, 4, 6, 7, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2)
FORMS = custom.BOTH
each = pytest.mark.parametrize("combination", COMBINATIONS)


@pytest.fixture(autouse=True)
def loops(monkeypatch):
    """The loops as they are: compiling is tested where flex_conv2d is."""
    monkeypatch.setitem(custom.BACKENDS, "flex_conv2d", "loops")


@pytest.fixture
def quick(monkeypatch):
    options = {"seconds": 0.01, "min_rounds": 2, "max_rounds": 2}
    monkeypatch.setattr(Settings, "options", options)
    return Settings(quick=True)


def by_hand(combination, x, weight, problem):
    """x (N, C, H, W) of `SMALL` → (N, K, OH, OW), by windows."""
    windows = torch.nn.functional.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    a, b = windows[:, None], weight[:, :, None, None]  # N, 1, C, OH, OW, 3, 3 and K, C, 1, 1, 3, 3
    dims = (2, 5, 6)
    if combination == "Σ |x − w|":
        return (a - b).abs().sum(dims)
    if combination == "Σ x · w":
        return (a * b).sum(dims)
    terms = a + b
    return terms.amax(dims) if combination.startswith("max") else terms.exp().sum(dims).log()


@each
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_what_its_name_says(combination, form):
    x, weight, _ = SMALL.inputs(dtype=torch.float64)
    y = combined(form, combination, x, weight, SMALL)
    torch.testing.assert_close(y, by_hand(combination, x, weight, SMALL))


@each
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("problem", [SMALL, GROUPED], ids=["usual", "grouped"])
def test_right_forms_pass_the_check(combination, form, problem):
    error, excess = deviation(form, combination, problem)
    assert error < 1e-5
    assert excess <= 1


@each
@pytest.mark.parametrize("what", ["value", "gradient of x", "gradient of weight"])
def test_a_small_fault_fails_the_check(monkeypatch, combination, what):
    real = custom.combined

    def faulty(form, name, x, weight, problem):
        if form == "flex_conv2d":
            if what == "gradient of x":
                x = x * 1.01 - 0.01 * x.detach()
            if what == "gradient of weight":
                weight = weight * 1.01 - 0.01 * weight.detach()
        y = real(form, name, x, weight, problem)
        return y * 1.001 + 0.001 if what == "value" and form == "flex_conv2d" else y

    monkeypatch.setattr(custom, "combined", faulty)
    assert deviation("flex_conv2d", combination, SMALL)[1] > 1


def test_what_fails_the_check_has_no_time(monkeypatch, quick):
    monkeypatch.setitem(
        COMBINATIONS, "wrong", (lambda x, w: x * w if x.dtype == torch.float64 else x + w, "sum")
    )
    rows = experiments.run_case(custom_case("custom", "wrong", SMALL, "forward", quick))
    found = {row.algorithm: row for row in rows}
    assert found["flex_conv2d"].status == found["by_definition"].status == "wrong"
    assert found["flex_conv2d"].median is None
    assert "times what rounding explains" in found["flex_conv2d"].extra["reason"]
    assert found["native"].status == "ok"


@pytest.mark.parametrize("pass_", ["forward", "train"])
def test_the_rows_of_a_case(quick, pass_):
    case = custom_case("custom", "Σ |x − w|", SMALL, pass_, quick)
    rows = experiments.run_case(case, "now")
    assert tuple(row.algorithm for row in rows) == case.algorithms == ("native", *FORMS)
    assert all(row.status == "ok" and row.median > 0 and row.peak_bytes > 0 for row in rows)
    assert all(row.error < 1e-5 and row.part == "Σ |x − w|" for row in rows)
    assert records.Row.from_json(rows[1].as_json()) == rows[1]


def test_what_needs_too_much_memory_is_not_started(monkeypatch):
    monkeypatch.setattr(custom, "combined", None)
    settings = Settings(quick=True, memory_limit=10_000)
    rows = experiments.run_case(custom_case("custom", "Σ |x − w|", SMALL, "train", settings))
    assert {row.status for row in rows[1:]} == {records.PREDICTED}
    assert rows[1].extra["predicted_bytes"] > rows[2].extra["predicted_bytes"] > 10_000


@pytest.mark.parametrize("combination", ["Σ |x − w|", "logsumexp (x + w)"])
@pytest.mark.parametrize("pass_", ["forward", "train"])
def test_the_guess_is_no_less_than_the_peak(combination, pass_):
    from convlab.timing import peak_bytes

    problem = SMALL.replace(batch=8, in_channels=8, out_channels=8, height=16, width=16)
    peak = peak_bytes(custom_pass("by_definition", combination, problem, pass_, "cpu"))
    assert peak <= custom.needed_bytes("by_definition", problem, pass_) <= 6 * peak


@each
def test_training_is_value_and_both_gradients(combination):
    x, weight, _ = SMALL.inputs(requires_grad=True)
    true = torch.autograd.grad(by_hand(combination, x, weight, SMALL).sum(), (x, weight))
    for form in FORMS:
        found = custom_pass(form, combination, SMALL, "train", "cpu")()
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quick", [True, False])
def test_the_plan(quick):
    plan = experiments.plan(["custom", "custom_memory"], Settings(quick=quick))
    assert len({case.name for case in plan}) == len(plan)
    assert any("train" in case.name for case in plan)


@pytest.mark.gpu
@each
@pytest.mark.parametrize("pass_", ["forward", "train"])
def test_on_a_gpu(combination, pass_, monkeypatch):
    monkeypatch.setitem(custom.BACKENDS, "flex_conv2d", "inductor")
    settings = Settings("cuda", quick=True)
    with machine.setting(matmul_tf32=False):
        rows = experiments.run_case(custom_case("custom", combination, SMALL, pass_, settings))
    assert all(row.status == "ok" and row.launches > 0 for row in rows)
