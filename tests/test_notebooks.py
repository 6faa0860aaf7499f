"""The committed notebooks have outputs, and none is older than its source."""

import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import notebooks  # noqa: E402

PATHS = sorted(notebooks.NOTEBOOKS.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@each_notebook
def test_outputs_are_as_new_as_the_sources(path):
    assert notebooks.check(path) == []


@each_notebook
def test_nothing_in_it_that_must_not_be_committed(path):
    assert notebooks.defects(nbformat.read(path, as_version=4)) == []


@each_notebook
def test_was_run_once_from_top_to_bottom(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "made_up.ipynb"
    output = new_output("stream", name="stdout", text="2\n")
    cell = new_code_cell("print(1 + 1)", execution_count=1, outputs=[output])
    nbformat.write(new_notebook(cells=[cell]), path)
    return path


def edit(path, change):
    nb = nbformat.read(path, as_version=4)
    change(nb)
    notebooks.write(nb, path)


def set_source(source):
    return lambda nb: nb.cells[0].update(source=source)


def test_a_notebook_without_stamp_is_stale(path):
    assert notebooks.stale(path)
    assert "not stamped" in notebooks.check(path)[0]


def test_an_edited_source_makes_it_stale_until_it_is_stamped_again(path):
    edit(path, notebooks.stamp)
    assert not notebooks.stale(path)

    edit(path, set_source("print(1 + 2)"))
    assert notebooks.stale(path)
    assert "stale" in notebooks.check(path)[0]

    edit(path, notebooks.stamp)
    assert not notebooks.stale(path)


def test_order_and_type_of_cells_count_as_source(path):
    edit(path, lambda nb: nb.cells.append(new_code_cell("2")))
    edit(path, notebooks.stamp)
    edit(path, lambda nb: nb.cells.reverse())
    assert notebooks.stale(path)

    edit(path, notebooks.stamp)
    edit(path, lambda nb: nb.cells[0].update(cell_type="raw"))
    assert notebooks.stale(path)


def test_outputs_do_not_count_as_source(path):
    edit(path, notebooks.stamp)
    edit(path, lambda nb: nb.cells[0].outputs.clear())
    assert not notebooks.stale(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (set_source("1\n" * 16), "cell 0 has more than 15 lines"),
        (lambda nb: nb.cells[0].outputs.clear(), "cell 0 has no output"),
        (lambda nb: nb.cells[0].outputs[0].update(name="stderr"), "cell 0 wrote to stderr: 2"),
        (
            lambda nb: nb.cells[0].outputs.append(new_output("error", ename="E", evalue="why")),
            "cell 0: E: why",
        ),
        (
            lambda nb: nb.cells[0].outputs[0].update(text="x" * 1_000_000),
            "the file has more than 1,000,000 bytes",
        ),
    ],
)
def test_defects_are_named(path, change, sentence):
    nb = nbformat.read(path, as_version=4)
    assert notebooks.defects(nb) == []
    change(nb)
    assert notebooks.defects(nb) == [sentence]


def test_noise_is_stripped(path):
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    nb.cells[0].outputs[0].text = "\x1b[31mred\x1b[0m"
    nb.metadata["widgets"] = {"state": "x" * notebooks.MAX_WIDGET_BYTES}
    notebooks.tidy(nb)
    assert nb.cells[0].metadata == {}
    assert nb.cells[0].outputs[0].text == "red"
    assert "widgets" not in nb.metadata
    assert nb.metadata.kernelspec.name == "python3"


def test_views_that_need_a_kernel_are_stripped(path):
    """A bar's view and the blank it leaves go, with its state; a slider stays while it has one."""
    view = lambda name: {notebooks.VIEW: {"model_id": name}, "text/plain": "Output()"}
    data = [view("bar"), {"text/html": "<pre></pre>", "text/plain": ""}, view("slider")]
    data += [view("lost"), {"text/html": "<b>2</b>", "text/plain": "2"}]
    states = {
        "bar": {"model_name": "OutputModel", "state": {"outputs": []}},
        "slider": {"model_name": "VBoxModel", "state": {}},
    }
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].outputs += [new_output("display_data", data=each) for each in data]
    nb.metadata["widgets"] = {"mime": {"state": states}}
    notebooks.tidy(nb)
    printed, *others = nb.cells[0].outputs
    assert printed.text == "2\n"
    assert [output.data for output in others] == [data[2], data[4]]
    assert "widgets" in nb.metadata

    del nb.metadata["widgets"]["mime"]["state"]["slider"]
    notebooks.tidy(nb)
    assert [output.get("data") for output in nb.cells[0].outputs] == [None, data[4]]
    assert "widgets" not in nb.metadata


def test_an_error_in_a_stripped_view_is_still_found(path):
    error = {"output_type": "error", "ename": "E", "evalue": "why"}
    states = {"bar": {"model_name": "OutputModel", "state": {"outputs": [error]}}}
    nb = nbformat.read(path, as_version=4)
    nb.metadata["widgets"] = {"mime": {"state": states}}
    notebooks.tidy(nb)
    assert notebooks.defects(nb) == ["widget callback: E: why"]


def test_executes_with_this_interpreter_and_finds_errors_in_widget_callbacks(tmp_path):
    nb = new_notebook(
        cells=[
            new_code_cell("import os, sys; print(sys.executable); print(os.getcwd())"),
            new_code_cell("import ipywidgets\nipywidgets.interact(lambda n: 1 // n, n=(0, 4, 1));"),
            new_code_cell("ipywidgets.interact(lambda n: 1 // n, n=ipywidgets.IntSlider(0));"),
        ]
    )
    notebooks.execute(nb, tmp_path, timeout=60)
    executable, folder = nb.cells[0].outputs[0].text.splitlines()
    assert Path(executable) == Path(sys.executable)
    assert Path(folder).resolve() == tmp_path.resolve()
    assert nb.cells[2].outputs[0].output_type != "error", "nbclient itself sees no error"
    (error,) = notebooks.widget_errors(nb)
    assert error.startswith("widget callback: ZeroDivisionError")
