"""The cast kernels compile for GPUs that need not be there: no spills, wide loads and stores."""

from pathlib import Path

import pytest

from tests.kernels.compiled import compiled

SCRIPT = Path(__file__).with_name("compile_casts.py")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [89, 90])
def test_the_kernels_compile_without_spills(capability: int, tmp_path: Path) -> None:
    found = compiled(SCRIPT, capability, tmp_path)
    assert len(found) == 24
    for kernel in found:
        name = str(kernel["kernel"])
        assert kernel["spilled"] == 0, kernel
        # these kernels store both layouts, and are launched so where ptxas then makes no mistake
        both = kernel["x"] == "bf16" and name.endswith(("tensorwise", "_cast"))
        assert not (both and kernel["one pass"] and kernel["moves fp8"]), kernel
        # a loop's loads go to shared memory, ahead
        assert kernel["words a load"] == 4 or name.endswith("_maxima"), kernel
        few = name.endswith(("maximum", "maxima", "statistics"))  # which store a number or a few
        assert kernel["words a store"] == 4 or few, kernel
