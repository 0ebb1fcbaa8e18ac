"""What tests on a GPU begin with; without a GPU they are skipped."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on-cpu", action="store_true", help="run the tests of tests/gpu without a GPU, to test them")


@pytest.fixture(scope="session")
def device(request) -> str:
    """cuda; cpu with ``--on-cpu``."""
    if request.config.getoption("--on-cpu", default=False):
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return "cuda"
