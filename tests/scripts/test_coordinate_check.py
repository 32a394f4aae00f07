"""muP keeps the change of activations per step flat over the width; the standard one does not."""

import pytest

from tests.runs.test_single_process import script

check = script("coordinate_check")
WIDTHS = (64, 128, 256)


def slopes(kind: str, *more: str) -> dict[str, float]:
    small = ["data.batch_size=4", "data.micro_batch_size=4", "data.sequence_length=16"]
    rows = [check.changes(kind, width, WIDTHS[0], 4, 4e-3, *small, *more) for width in WIDTHS]
    return {
        part: check.slope(WIDTHS, [row[index] for row in rows])
        for index, part in enumerate(check.PARTS)
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_activations_move_alike_at_every_width_with_mup_alone(optimizer: str) -> None:
    mup = slopes("mup", f"optimizer={optimizer}")
    # what the initial weights add to a change falls with the width, so slopes lie below 0
    assert all(-0.4 < value < 0.1 for value in mup.values()), mup
    standard = slopes("standard", f"optimizer={optimizer}")
    for part in ("attention", "mlp", "logits"):
        assert standard[part] > 0.45, standard
        assert standard[part] > mup[part] + 0.5, (mup, standard)


def test_the_slope_of_a_power_is_its_exponent() -> None:
    assert check.slope([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
