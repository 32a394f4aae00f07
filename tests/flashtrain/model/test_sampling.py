import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.model.sampling import Sampling, draw, uniform_numbers

SHARES = torch.tensor([0.5, 0.25, 0.15, 0.1])
DRAWS = 2000
SPREAD = 5 * math.sqrt(0.25 / DRAWS)


def drawn(shares: Tensor = SHARES, **settings: Any) -> Tensor:
    """How often each id comes up."""
    uniform = uniform_numbers(0, 1, DRAWS)[:, 0]
    ids = draw(shares.log().expand(DRAWS, -1), uniform, Sampling(**settings))
    return ids.bincount(minlength=len(shares)) / DRAWS


def test_draws_follow_the_softmax() -> None:
    assert (drawn() - SHARES).abs().max() < SPREAD
    cooled = (SHARES.log() / 0.5).softmax(0)
    assert (drawn(temperature=0.5) - cooled).abs().max() < SPREAD


def test_cuts_leave_the_likely_tokens() -> None:
    two = torch.tensor([2 / 3, 1 / 3, 0, 0])
    assert (drawn(top_k=2) - two).abs().max() < SPREAD
    assert (drawn(top_p=0.7) - two).abs().max() < SPREAD  # 0.5 + 0.25 is the fewest that hold 0.7
    assert (drawn(min_p=0.4) - two).abs().max() < SPREAD  # 0.15 is below 0.4 x 0.5
    assert (drawn(top_k=3, top_p=0.8) - two).abs().max() < SPREAD  # 0.75 / 0.9 is above 0.8
    assert drawn(top_p=0.4).tolist() == [1, 0, 0, 0]
    assert drawn(top_k=1).tolist() == [1, 0, 0, 0]
    assert drawn(temperature=0.0).tolist() == [1, 0, 0, 0]


def test_cuts_know_the_likely_tokens_wherever_they_stand() -> None:
    order = torch.tensor([3, 1, 0, 2])
    for settings in ({"top_k": 2}, {"top_p": 0.7}, {"min_p": 0.4}):
        found = drawn(SHARES[order], **settings)
        assert (found > 0).tolist() == [False, True, True, False], settings


@pytest.mark.parametrize("V", [1, 2, 50, 257, 1000])
def test_every_share_of_the_line_is_its_own_token(V: int) -> None:
    """A uniform number in the middle of a token's share of the line from 0 to 1 draws it."""
    shares = torch.rand(V, generator=torch.Generator().manual_seed(1)).add(0.1).double()
    shares /= shares.sum()
    middle = (shares.cumsum(0) - shares / 2).float()
    ids = draw(shares.log().float().expand(V, -1), middle, Sampling())
    assert ids.tolist() == list(range(V))


@pytest.mark.parametrize("V", [2, 300])
def test_the_ends_of_the_line_draw_tokens_that_are_possible(V: int) -> None:
    logits = torch.full((2, V), -math.inf)
    logits[:, V // 2] = 0.0
    ids = draw(logits, torch.tensor([0.0, 1.0]), Sampling())
    assert ids.tolist() == [V // 2, V // 2]


def test_row_r_of_a_batch_takes_the_numbers_of_seed_plus_r() -> None:
    batch = uniform_numbers(3, 4, 10)
    for row in range(4):
        assert torch.equal(batch[:, row], uniform_numbers(3 + row, 1, 10)[:, 0])
    assert (batch >= 0).all() and (batch < 1).all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": -1.0}, r"temperature=-1\.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"min_p": 0.0}, r"min_p=0\.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampling(**settings)
