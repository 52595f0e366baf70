"""What every test stands on: no network, one thread, the same random numbers in every run."""

import os

# Before any test module imports a host: huggingface_hub and matplotlib read these once, when imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - else Ray's processes wait for the other tests

import hypothesis
import pytest
import torch

# The asserts in these explain themselves, too.
pytest.register_assert_rewrite("contract", "reference")

# No deadline: the first call of an operator pays for its set-up. Derandomized: a failure here is one everywhere.
hypothesis.settings.register_profile("crossget", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("crossget")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are tiny, and the order of a threaded sum may differ between machines."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
