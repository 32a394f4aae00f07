"""For every test: one thread per process, fixed seeds, and no GPU test where there is no GPU."""

import os
import random
import sys

import pytest

# read when torch is first imported, here and in every process a test starts: the ranks of a
# distributed test share the machine's cores
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:  # config tests never import it, and start in no time
        sys.modules["torch"].manual_seed(0)


@pytest.hookimpl(trylast=True)  # after -m has thrown out what was not asked for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, torch sees none"))
