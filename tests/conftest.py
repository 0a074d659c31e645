"""Settings of every test run: one thread, no network, a seeded generator."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it at import

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the library remembers between runs goes to a folder of the tests."""
    os.environ["SEGVIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def same_every_time() -> None:
    """What a test draws without a generator of its own does not differ between runs."""
    torch.manual_seed(0)


@pytest.fixture
def seeded() -> torch.Generator:
    """A generator with a fixed seed; the global one is seeded too."""
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)
