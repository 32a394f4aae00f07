import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrain.compose import load
from flashtrain.data.dataset import RandomTokens
from flashtrain.data.loader import DataLoader
from flashtrain.data.mapped import DataError
from flashtrain.data.ramp import Ramp, Stage
from flashtrain.data.samples import Blocks, Shuffled
from flashtrain.data.source import open_loader, prepare_source

EARLY = [(100, 2, 5), (300, 4, None), (800, None, 5)]


def opened(ramp: Ramp | None, data_rank: int = 0, data_size: int = 1) -> DataLoader:
    samples = Shuffled(Blocks(RandomTokens(1000, 1, 5000), 10), 7)
    return DataLoader(samples, batch_size=8, micro_batch_size=1, data_rank=data_rank,
                      data_size=data_size, ramp=ramp)  # fmt: skip


def test_stages_end_with_the_step_that_reaches_their_tokens() -> None:
    ramp = Ramp(8, 10, EARLY)
    # 20 tokens a step until 100, 40 until 300, then 80: 5 + 5 + 7 steps
    assert ramp.stages == [
        Stage(0, 0, 2, 5), Stage(5, 10, 4, 10), Stage(10, 30, 8, 5), Stage(17, 86, 8, 10),
    ]  # fmt: skip
    assert [ramp.tokens(step) for step in (0, 5, 10, 17, 18)] == [0, 100, 300, 860, 940]


@given(
    early=st.lists(st.tuples(st.integers(1, 400), st.sampled_from([1, 3, 8, None]),
                             st.sampled_from([1, 5, 10, None])), max_size=4))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_every_sample_is_taken_once_and_in_order(
    early: list[tuple[int, int | None, int | None]],
) -> None:
    until, rising = 0, []
    for more, batch, length in early:
        until += more
        rising.append((until, batch, length))
    ramp, sample = Ramp(8, 10, rising), 0
    for step in range(200):
        stage = ramp.stage(step)
        assert ramp.first_sample(step) == sample
        expected = next((s for s in rising if s[0] > sample * 10), (0, None, None))
        assert (stage.batch_size, stage.length) == (expected[1] or 8, expected[2] or 10)
        sample += stage.batch_size


def test_a_ramp_changes_shapes_and_neither_order_nor_tokens() -> None:
    with opened(None) as plain, opened(Ramp(8, 10, EARLY)) as ramped:
        whole = torch.cat([b.tokens for step in range(12) for b in plain.step(step)])
        labels = torch.cat([b.labels for step in range(12) for b in plain.step(step)])
        at = 0
        for step in range(18):
            batches, stage = ramped.step(step), ramped.ramp.stage(step)
            tokens = torch.cat([b.tokens for b in batches])
            assert len(batches) == stage.batch_size
            assert all(b.tokens.shape == (10 // stage.length, stage.length) for b in batches)
            rows = slice(at, at + stage.batch_size)
            assert torch.equal(tokens.reshape(-1, 10), whole[rows])
            assert torch.equal(torch.cat([b.labels for b in batches]).reshape(-1, 10), labels[rows])
            at += stage.batch_size


@pytest.mark.parametrize("data_size", [1, 2])
def test_a_ramp_is_the_same_on_every_layout(data_size: int) -> None:
    for step in (0, 4, 5, 11, 17):
        with opened(Ramp(8, 10, EARLY)) as loader:
            alone = torch.cat([b.tokens for b in loader.step(step)])
        parts = []
        for rank in range(data_size):
            with opened(Ramp(8, 10, EARLY), rank, data_size) as loader:
                parts += [b.tokens for b in loader.step(step)]
        assert torch.equal(torch.cat(parts), alone)


def test_stages_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="until 100 tokens after 100: each stage must end after"):
        Ramp(8, 10, [(100, 2, None), (100, 4, None)])
    with pytest.raises(DataError, match=r"sequences of 4 tokens .* data\.sequence_length=10"):
        Ramp(8, 10, [(100, 2, 4)])
    for early in ((100, 0, None), (100, -2, None), (100, None, 0), (100, None, -5)):
        with pytest.raises(DataError, match="both must be above 0"):
            Ramp(8, 10, [early])
    with pytest.raises(DataError, match="batch_size=2 is not divisible by micro_batch_size=1 x 4"):
        opened(Ramp(8, 10, EARLY), 0, 4)


def test_the_config_has_a_ramp() -> None:
    config = load([
        "experiment=null", "data=random", "model.vocabulary=64", "data.sequence_length=16",
        "data.batch_size=4", "data.micro_batch_size=1", "trainer.steps=5",
        "data.ramp=[{until_tokens:64,batch_size:2,sequence_length:8}]",
    ])  # fmt: skip
    with open_loader(prepare_source(config, 1), 0, 1, torch.device("cpu")) as loader:
        shapes = [[tuple(b.tokens.shape) for b in loader.step(step)] for step in (0, 1, 2)]
    assert shapes == [[(2, 8)] * 2, [(2, 8)] * 2, [(1, 16)] * 4]
    config.data.ramp[0].batch_size = 3
    config.data.micro_batch_size = 2
    with pytest.raises(DataError, match="batch_size=3 is not divisible by micro_batch_size=2"):
        prepare_source(config, 1)
