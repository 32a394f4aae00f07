"""The passes compile for GPUs that need not be there: no spills, 16 bytes an access."""

from pathlib import Path

import pytest

from tests.kernels.compiled import compiled

SCRIPT = Path(__file__).with_name("compile_passes.py")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_passes_compile_without_spills(capability: int, tmp_path: Path) -> None:
    found = compiled(SCRIPT, capability, tmp_path)
    assert len(found) == 8
    for kernel in found:
        assert kernel["spilled"] == 0, kernel
        assert kernel["widest"] == 16, kernel
        assert 6 * 128 * kernel["registers"] <= 65536, kernel  # as tiles.py says
