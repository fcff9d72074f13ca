"""Settings of the whole test suite: one thread, quiet libraries, property tests that repeat exactly."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("suite")


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _without_the_libraries() -> None:
    """Collecting garbage looks at no object of the libraries, of which there are half a million."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests pass explicit generators; what still draws from the global one starts the same in every order."""
    torch.manual_seed(0)
