"""The norm kernels compile for GPUs that need not be there: no spills, wide loads."""

from pathlib import Path

import pytest

from tests.kernels.compiled import compiled

SCRIPT = Path(__file__).with_name("compile_norms.py")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_without_spills(capability: int, tmp_path: Path) -> None:
    found = compiled(SCRIPT, capability, tmp_path)
    assert len(found) == 12
    for kernel in found:
        assert kernel["spilled"] == 0, kernel
        # backward's come through cp.async where it looks ahead
        assert kernel["words a load"] == 4 or kernel["kernel"] != "forward", kernel
