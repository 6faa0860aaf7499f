"""Settings for all tests."""

import os
import random
import sys

import pytest
import torch
from hypothesis import settings

# The same examples everywhere and no limit on time: a test that fails, fails for everyone.
settings.register_profile("convlab", deadline=None, derandomize=True)
settings.load_profile("convlab")

# The tensors are small: on a busy machine several threads would mostly wait for each other.
torch.set_num_threads(1)

# The user's own choices of `auto` are neither read nor written, by processes of tests neither.
os.environ["CONVLAB_CACHE"] = ""


@pytest.fixture(scope="session", autouse=True)
def rounds_of_auto_are_made_up():
    """`auto` checks its candidates and takes any correct one: nothing is timed."""
    from convlab.auto import measuring

    draw = random.Random(0)

    def made_up(functions, device):
        fastest = draw.choice([*functions])
        return {name: [0.5 if name == fastest else 1.0] * 9 for name in functions}, {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "rounds", made_up)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_code_is_generated():
    """Compiled forms are traced and their graphs run as they are: C++ takes seconds each."""
    from convlab.algorithms import ALGORITHMS  # its module `compiled` is hidden by the algorithm

    module = sys.modules[ALGORITHMS["compiled"].function.__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BACKEND", "eager")
        yield module


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
