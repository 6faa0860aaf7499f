"""A remembered launch is the launch that Triton makes: seen by a driver that only takes notes."""

import contextlib
import importlib.util
import sys
import types

import pytest
import torch

from convlab import ConvProblem
from convlab.problems import thread_problem

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or sys.platform != "linux",
        reason="the package triton and its assembler exist for Linux",
    ),
]


class Driver:
    """Compiles for sm_90, loads nothing, and notes every launch."""

    def __init__(self):
        self.launches = []
        self.utils = types.SimpleNamespace(
            load_binary=lambda name, *_: (name, name, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, _, enter, leave, *arguments):
            values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
            self.launches.append(((x, y, z), function, packed, values))

        return launch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def driver(monkeypatch):
    import triton
    from triton.runtime import driver

    from convlab.kernels import starting, tiles

    noted = Driver()
    seconds = iter(range(1, 10**6))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(triton.testing, "do_bench", lambda fn, **_: fn() or [next(seconds)] * 3)
    monkeypatch.setattr(tiles, "OUTPUT", tiles.OUTPUT[:2])
    monkeypatch.setattr(tiles, "WEIGHT", tiles.WEIGHT[:1])
    monkeypatch.setattr(starting, "_ready", {})
    monkeypatch.setattr(driver, "_active", noted)
    forget()
    yield noted
    forget()


def forget():
    """Kernels that were compiled or tuned."""
    from convlab.flex import tiles as flex_tiles
    from convlab.flex.kernels import outputs
    from convlab.kernels import tiles
    from convlab.kernels.implicit_gemm import product

    for kernel in (product, outputs):
        kernel.device_caches.clear()
    tiles.tuned.cache_clear()
    flex_tiles.tuned.cache_clear()


def forward(problem, offset=0):
    """One launch of the kernel; offset: of x, in numbers, from an aligned address."""
    from convlab.kernels import launching

    x, weight, bias = problem.inputs()
    x = torch.zeros(x.numel() + 4)[offset : offset + x.numel()].view(x.shape)
    sizes = types.SimpleNamespace(**problem.kwargs)
    tensors = x, weight, bias, torch.empty(problem.output_shape)
    return lambda: launching.output(*tensors, sizes), tensors


def test_the_second_launch_is_the_first_again(driver):
    start, (x, _, bias, y) = forward(thread_problem(4))
    start()
    tried = len(driver.launches)
    assert tried == 3, "two tiles are timed, and the faster one is launched"
    start()
    *_, first, second = driver.launches
    assert len(driver.launches) == tried + 1
    assert first[:3] == second[:3]
    weight = 1  # laid out anew for each launch
    assert first[3][:weight] == second[3][:weight] == [x.data_ptr()]
    assert first[3][weight + 1 :] == second[3][weight + 1 :]
    assert second[3][2:4] == [bias.data_ptr(), y.data_ptr()]


def test_another_size_or_alignment_is_another_launch(driver):
    from convlab.kernels import starting

    forward(thread_problem(4))[0]()
    forward(thread_problem(5))[0]()
    forward(thread_problem(4), offset=1)[0]()
    assert len(starting._ready) == 3
    forward(ConvProblem(4, 10, 15, 50, 50, kernel_size=3, padding=1))[0]()
    assert len(starting._ready) == 3
    assert len(driver.launches) == 3 + 3 + 1 + 1, "tuned for each size, started twice more"


def test_remembered_launches_are_forgotten_in_the_end(driver, monkeypatch):
    from convlab.kernels import starting

    monkeypatch.setattr(starting, "REMEMBERED", 2)
    for images in (1, 2, 3):
        forward(thread_problem(images))[0]()
    assert len(starting._ready) == 1


def test_custom_convolutions_are_started_so_too(driver, monkeypatch):
    from test_flex_triton_compile import launches

    from convlab.flex import launching, tiles

    monkeypatch.setattr(tiles, "PIXELS", tiles.PIXELS[2:3])
    problem = ConvProblem(2, 4, 6, 9, 8, kernel_size=3, padding=1)
    launch = launches(problem, lambda x, w: (x - w).abs(), "sum")[0]
    real = [torch.zeros(a.shape) if isinstance(a, torch.Tensor) else a for a in launch.arguments]
    launch = launch._replace(arguments=tuple(real))
    launching._start(launch)
    launching._start(launch)
    first, second = driver.launches[-2:]
    assert first == second
