"""Run the notebooks, test them, or say which have outputs older than their sources.

`run` executes them and writes the outputs back; `test` executes a temporary copy in quick mode;
`check` compares the sources with the stamps. Names are beginnings of file names: `run 02 05`.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import nbformat
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
MAX_LINES, MAX_BYTES, MAX_WIDGET_BYTES = 15, 1_000_000, 100_000
KERNELSPEC = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
VIEW = "application/vnd.jupyter.widget-view+json"


class ThisInterpreter(AsyncKernelManager):
    """Starts the running interpreter, whatever kernelspecs the user has installed."""

    transport_encryption = "auto"  # without it the kernel warns on every start

    @property
    def kernel_spec(self):
        return KernelSpec(**get_kernel_dict())


def let_signals_through(**_):
    """Take back Ctrl-C and kill from nbclient, where they look like a kernel that died."""
    with contextlib.suppress(NotImplementedError):  # Windows
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(number)


def execute(nb, folder, timeout=None):
    """Execute `nb` in place with `folder` as its working directory."""
    NotebookClient(
        nb,
        timeout=timeout,
        kernel_manager_class=ThisInterpreter,
        resources={"metadata": {"path": str(folder)}},
        on_notebook_start=let_signals_through,
    ).execute()


def source_hash(nb):
    """SHA-256 over type and source of every cell, in order."""
    sources = [[cell.cell_type, cell.source] for cell in nb.cells]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def stale(path):
    """True when the notebook has no stamp or its sources changed since it was stamped."""
    nb = nbformat.read(path, as_version=4)
    return nb.metadata.get("convlab", {}).get("source_sha256") != source_hash(nb)


def stamp(nb):
    """Write into the notebook what its outputs were made from, where and when."""
    import torch

    import convlab.machine

    nb.metadata["convlab"] = {
        "source_sha256": source_hash(nb),
        "machine": convlab.machine.name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "convlab": convlab.__version__,
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def tidy(nb):
    """Name the usual kernel; remove times of cells, ANSI codes, large widget states, dead views."""
    nb.metadata["kernelspec"] = KERNELSPEC
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            for holder, key in [(output, "text"), (output.get("data", {}), "text/plain")]:
                if key in holder:
                    holder[key] = ANSI.sub("", holder[key])
    if len(json.dumps(nb.metadata.get("widgets", {}))) > MAX_WIDGET_BYTES:
        del nb.metadata["widgets"]
    drop_dead_views(nb)


def drop_dead_views(nb):
    """Remove outputs that only a running kernel could fill, and states that no output shows.

    A progress bar is a view of an Output widget; without a kernel it reads "Output()", and what it
    leaves when it is done is an empty text. A view whose state was not kept is no better.
    """
    states = {}
    for mime in nb.metadata.get("widgets", {}).values():
        states |= mime.get("state", {})
    bars = {name for name, s in states.items() if s.get("model_name") == "OutputModel"}
    shown = set()
    for cell in nb.cells:
        kept = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if VIEW in data and data[VIEW]["model_id"] not in states.keys() - bars:
                continue
            if output.output_type == "display_data" and data.get("text/plain") == "":
                continue
            shown |= {data[VIEW]["model_id"]} if VIEW in data else set()
            kept.append(output)
        if "outputs" in cell:
            cell.outputs = kept
    if not shown and not widget_errors(nb):
        nb.metadata.pop("widgets", None)


def widget_errors(nb):
    """Errors raised in ipywidgets callbacks: nbclient records them only in the widget state."""
    errors = []
    for mime in nb.metadata.get("widgets", {}).values():
        for widget in mime["state"].values():
            for output in widget["state"].get("outputs", []):
                if output["output_type"] == "error":
                    errors.append(f"widget callback: {output['ename']}: {output['evalue']}")
    return errors


def defects(nb):
    """What must not be committed, one sentence each."""
    found = widget_errors(nb)
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "code":
            continue
        if len(cell.source.splitlines()) > MAX_LINES:
            found.append(f"cell {i} has more than {MAX_LINES} lines")
        if not cell.outputs:
            found.append(f"cell {i} has no output")
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"cell {i}: {output.ename}: {output.evalue}")
            elif output.get("name") == "stderr":
                found.append(f"cell {i} wrote to stderr: {output.text.strip()[:200]}")
    if len(nbformat.writes(nb).encode()) > MAX_BYTES:
        found.append(f"the file has more than {MAX_BYTES:,} bytes")
    return found


def write(nb, path):
    """Replace `path` in one step, so that no reader and no Ctrl-C meets half a notebook."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(nbformat.writes(nb) + "\n", encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def run(path):
    """Execute one notebook and write it back; return what is wrong with it."""
    nb = nbformat.read(path, as_version=4)
    execute(nb, path.parent)
    tidy(nb)
    stamp(nb)
    write(nb, path)
    return defects(nb)


def test(path):
    """Execute one notebook in quick mode without touching its folder; return what failed."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {
            f"CONVLAB_{name}": str(Path(scratch, name.lower())) for name in ("DATA", "CACHE")
        }
        os.environ |= {"CONVLAB_QUICK": "1", **folders}
        folder = shutil.copytree(path.parent, Path(scratch, "notebooks"))
        nb = nbformat.read(folder / path.name, as_version=4)
        execute(nb, folder, timeout=900)
    return widget_errors(nb)


def check(path):
    """Return what is wrong with the stamp of one notebook."""
    if "convlab" not in nbformat.read(path, as_version=4).metadata:
        return ["not stamped: it was never run by `make notebooks`"]
    return ["stale: the sources changed after the outputs were made"] if stale(path) else []


def outcome(command, path):
    """Apply `command` to one notebook; an error of the notebook is one more defect."""
    try:
        return command(path)
    except (CellExecutionError, DeadKernelError, TimeoutError) as error:
        return [ANSI.sub("", str(error))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "test", "check"])
    parser.add_argument("names", nargs="*", help="beginnings of file names, such as 02")
    args = parser.parse_args()
    command = {"run": run, "test": test, "check": check}[args.command]
    wanted = tuple(args.names) or ("",)
    paths = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if path.name.startswith(wanted)]
    if args.names and not paths:
        parser.error(f"no notebook begins with {' or '.join(args.names)}")
    failed = 0
    for path in paths:
        start = time.perf_counter()
        problems = outcome(command, path)
        failed += bool(problems)
        seconds = time.perf_counter() - start
        print(f"{'FAILED' if problems else 'passed'} {path.name} {seconds:.1f} s", flush=True)
        for problem in problems:
            print(f"    {problem}")
    print(f"{len(paths) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted; the notebook that was running is unchanged.")
