"""The rotation compiles for GPUs that need not be there: no spills, heads in words of 16 bytes."""

from pathlib import Path

import pytest

from tests.kernels.compiled import compiled

SCRIPT = Path(__file__).with_name("compile_rotation.py")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_rotation_compiles_without_spills(capability: int, tmp_path: Path) -> None:
    found = compiled(SCRIPT, capability, tmp_path)
    assert len(found) == 12
    for kernel in found:
        assert kernel["spilled"] == 0, kernel
        assert kernel["wide stores"] == kernel["stores"], kernel
        # but for cos and sin, of which a thread loads 2 numbers and gets the rest from others
        assert kernel["wide loads"] >= kernel["loads"] - 2, kernel
