"""Settings for all tests."""

import pytest
import torch
from hypothesis import settings

# The same examples everywhere and no limit on time: a test that fails, fails for everyone.
settings.register_profile("convlab", deadline=None, derandomize=True)
settings.load_profile("convlab")

# The tensors are small: on a busy machine several threads would mostly wait for each other.
torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
