"""The passes compile for GPUs that need not be there: no spills, 16 bytes an access."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_passes.py")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_passes_compile_without_spills(capability: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 5
    for kernel in found:
        assert kernel["spilled"] == 0, kernel
        assert kernel["widest"] == 16, kernel
        assert 6 * 128 * kernel["registers"] <= 65536, kernel  # as tiles.py says
