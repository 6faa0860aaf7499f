"""`make lab` starts a server that only this machine reaches, with this environment's Python."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from jupyter_client import BlockingKernelClient

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60  # seconds until the server or the kernel must have answered


def lab_command():
    """The command of `make lab` with this interpreter and without the notebook it opens."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    lines = subprocess.run(
        ["make", "-n", "lab", "ARGS="], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    (line,) = [line for line in lines if "jupyterlab" in line]
    arguments = [a for a in shlex.split(line)[1:] if not a.endswith(".ipynb")]
    return [sys.executable, *arguments, "--no-browser", "--ServerApp.port=0"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """What a running server writes about itself: url, token, pid and its runtime folder."""
    home = tmp_path_factory.mktemp("jupyter")
    folders = {f"JUPYTER_{name}_DIR": str(home / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | folders | {"IPYTHONDIR": str(home), "JUPYTER_PREFER_ENV_PATH": "1"}
    environment.pop("JUPYTER_TOKEN", None)
    log = home / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(
            lab_command(), cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
    try:
        yield wait_for_server(process, home / "RUNTIME", log)
    finally:
        stop(process)


def wait_for_server(process, runtime, log):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        for path in runtime.glob("jpserver-*.json"):
            try:
                info = json.loads(path.read_text())
                urllib.request.urlopen(request(info, "api", token=None), timeout=5)
                return info | {"runtime": runtime}
            except (OSError, ValueError):  # half-written file, or not listening yet
                pass
        time.sleep(0.1)
    pytest.fail("the server did not start:\n" + log.read_text())


def stop(process):
    """End the server and its kernels, whatever state they are in."""
    family = []
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def request(info, path, token, data=None):
    headers = {"Authorization": f"token {token}"} if token else {}
    return urllib.request.Request(info["url"] + path, data=data, headers=headers)


def ask(server, path, data=None):
    with urllib.request.urlopen(request(server, path, server["token"], data), timeout=30) as reply:
        return json.load(reply)


def test_listens_on_this_machine_only(server):
    connections = psutil.Process(server["pid"]).net_connections(kind="inet")
    listening = {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_refuses_a_caller_without_the_token(server):
    assert len(server["token"]) >= 32
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request(server, "api/kernelspecs", token=None), timeout=30)
    assert refusal.value.code == 403
    refusal.value.close()


def test_default_kernel_is_this_environment(server):
    specs = ask(server, "api/kernelspecs")
    assert specs["default"] in specs["kernelspecs"]

    kernel = ask(server, "api/kernels", data=json.dumps({"name": specs["default"]}).encode())
    client = BlockingKernelClient()
    client.load_connection_file(str(server["runtime"] / f"kernel-{kernel['id']}.json"))
    client.start_channels()
    try:
        client.wait_for_ready(timeout=PATIENCE)
        printed = []
        reply = client.execute_interactive(
            "import convlab, sys; print(sys.prefix)",
            timeout=PATIENCE,
            output_hook=lambda message: printed.append(message["content"].get("text", "")),
        )
    finally:
        client.stop_channels()
    assert reply["content"]["status"] == "ok", reply["content"]
    assert "".join(printed).strip() == sys.prefix
