"""The row kernel compiles for GPUs that need not be there, without spills or split accesses."""

from pathlib import Path

import pytest

from tests.kernels.compiled import compiled

SCRIPT = Path(__file__).with_name("compile_rows.py")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_the_row_kernel_compiles_without_spills(capability: int, tmp_path: Path) -> None:
    found = compiled(SCRIPT, capability, tmp_path)
    assert len(found) == 15
    for kernel in found:
        assert kernel["spilled"] <= (8 if kernel["long"] else 0), kernel
        if not kernel["ones"]:
            assert kernel["narrow"] <= 2, kernel  # the label's column, read and written
