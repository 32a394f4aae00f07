import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.config import PositionConfig
from flashtrain.model.gpt import GPT
from flashtrain.model.sample import sample
from tests.flashtrain.model.test_gpt import build, tiny

SHARES = torch.tensor([0.5, 0.25, 0.15, 0.1])


def fixed(tokens: Tensor, position: int) -> Tensor:
    return SHARES.log()


def of_model(gpt: GPT) -> Any:
    return lambda tokens, position: gpt.logits(gpt(tokens))[0, position]


def drawn(n: int = 2000, **settings: Any) -> Tensor:
    ids = sample(fixed, [0], n, max_length=8, **settings)[1:]
    return torch.tensor(ids).bincount(minlength=4) / n


def test_temperature_zero_takes_the_likeliest_token_of_the_unpadded_model() -> None:
    gpt = build(tiny(), PositionConfig())
    ids = sample(of_model(gpt), [5, 6, 7], 8, max_length=16, temperature=0.0)
    expected = [5, 6, 7]
    for _ in range(8):
        expected.append(int(gpt.logits(gpt(torch.tensor([expected])))[0, -1].argmax()))
    assert ids == expected


def test_the_model_always_sees_one_shape_and_the_newest_ids() -> None:
    seen = []

    def count_up(tokens: Tensor, position: int) -> Tensor:
        seen.append((tokens.tolist()[0], position))
        return torch.eye(10)[int(tokens[0, position]) + 1]

    ids = sample(count_up, [1, 2], 4, max_length=4, temperature=0.0)
    assert ids == [1, 2, 3, 4, 5, 6]
    assert seen == [([1, 2, 0, 0], 1), ([1, 2, 3, 0], 2), ([1, 2, 3, 4], 3), ([2, 3, 4, 5], 3)]


def test_draws_follow_the_softmax() -> None:
    spread = 5 * math.sqrt(0.25 / 2000)
    assert (drawn() - SHARES).abs().max() < spread
    cooled = (SHARES.log() / 0.5).softmax(0)
    assert (drawn(temperature=0.5) - cooled).abs().max() < spread


def test_top_k_and_top_p_cut_the_unlikely_tokens() -> None:
    spread = 5 * math.sqrt(0.25 / 2000)
    two = torch.tensor([2 / 3, 1 / 3, 0, 0])
    assert (drawn(top_k=2) - two).abs().max() < spread
    assert (drawn(top_p=0.7) - two).abs().max() < spread  # 0.5 + 0.25 is the fewest that hold 0.7
    assert drawn(top_p=0.4).tolist() == [1, 0, 0, 0]
    assert drawn(top_k=1).tolist() == [1, 0, 0, 0]
    assert drawn(n_ids=1).tolist() == [1, 0, 0, 0]


def test_the_seed_decides() -> None:
    first = sample(fixed, [0], 50, max_length=8, seed=1)
    assert first == sample(fixed, [0], 50, max_length=8, seed=1)
    assert first != sample(fixed, [0], 50, max_length=8, seed=2)


@pytest.mark.parametrize(
    ("prompt", "settings", "sentence"),
    [
        ([], {}, "prompt has no tokens"),
        ([0], {"temperature": -1.0}, r"temperature=-1\.0"),
        ([0], {"top_k": 0}, "top_k=0"),
        ([0], {"top_p": 1.5}, r"top_p=1\.5"),
        ([0], {"max_length": 0}, "max_length=0"),
    ],
)
def test_settings_out_of_range_are_refused(
    prompt: list[int], settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        sample(fixed, prompt, 1, **({"max_length": 8} | settings))
