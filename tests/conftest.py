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
from commits import sample_cases

# The asserts in these explain themselves, too.
pytest.register_assert_rewrite("contract", "reference")

# No deadline: the first call of an operator pays for its set-up. Derandomized: a failure here is one everywhere.
hypothesis.settings.register_profile("crossget", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("crossget")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sample", type=int, metavar="N", help="run at most N slow cases of a parametrised test, chosen by the commit"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    size = config.getoption("sample")
    if size is None:
        return
    slow = [item for item in items if item.get_closest_marker("slow") is not None]
    left_out = {item.nodeid for item in slow} - sample_cases((item.nodeid for item in slow), size)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are tiny, and the order of a threaded sum may differ between machines."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
