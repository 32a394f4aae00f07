"""A model over two ranks, asked by the first alone."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flashtrain.build import build_model
from flashtrain.checkpoint import Peers
from flashtrain.compose import load
from flashtrain.config import Config
from flashtrain.data.tokenizer import Tokenizer, train_bpe
from flashtrain.engine.decoder import Decoder
from flashtrain.examinee import Examinee
from flashtrain.parallel.mesh import build_mesh
from flashtrain.scoring import perplexity
from tests.harness import run_ranks

LENGTH = 16
TEXT = "the quick brown fox jumps over the lazy dog. "
Answers = tuple[float, list[str]]


def config() -> Config:
    return load(
        ["experiment=null", "data=random", "precision=fp32", "model.vocabulary=384",
         "model.d_model=32", "model.n_heads=4", "model.n_layers=2", "model.init_std=0.3",
         f"data.sequence_length={LENGTH}"]
    )  # fmt: skip


def tokenizer() -> Tokenizer:
    return train_bpe([TEXT] * 20, 290)


def examinee(moved: list[int] | None = None) -> Examinee:
    alone = not dist.is_initialized()
    axis = build_mesh(1 if alone else dist.get_world_size()).tensor
    decoder = Decoder(build_model(config(), axis, torch.device("cpu")), axis)
    peers = Peers(None if alone else dist.group.WORLD)
    count = moved if moved is not None else []
    return Examinee(decoder, tokenizer(), LENGTH, 2, peers, lambda: count.append(1))


def ask(asked: Examinee) -> Answers:
    own = asked.tokenizer
    prompts = [own.encode(text) for text in ("the quick", "a lazy dog jumps", "fox")]
    texts = asked.answer(prompts, 6, 0.0, ["\n\n"])
    return perplexity(asked, own, TEXT * 3, stride=5).loss, texts


def test_two_ranks_answer_as_one(tmp_path: Path) -> None:
    alone = examinee()
    expected = alone.examine(lambda: ask(alone))
    assert expected is not None
    assert len(set(expected[1])) == 3
    run_ranks(check_ranks, 2, tmp_path, expected)


def check_ranks(expected: Answers) -> None:
    moved: list[int] = []
    asked = examinee(moved)
    found = asked.examine(lambda: ask(asked))
    assert len(moved) >= 4  # every batch of two, on every rank
    if dist.get_rank() == 0:
        assert found is not None
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert found[1] == expected[1]
    else:
        assert found is None
    # what fails on the rank that asks leaves the others as they were
    try:
        asked.examine(lambda: asked.score([([1], [2]), ([], [3])]))
        assert dist.get_rank() == 1
    except ValueError:
        assert dist.get_rank() == 0
    again = asked.examine(lambda: ask(asked))
    assert again == found


@pytest.mark.parametrize("until", [[], ["fo"]])
def test_answers_end_before_a_stop_string(until: list[str]) -> None:
    alone = examinee()
    prompt = alone.tokenizer.encode("the quick")
    (whole,) = alone.answer([prompt], 12, 0.0, [])
    assert whole
    middle = whole[len(whole) // 2]
    (cut,) = alone.answer([prompt], 12, 0.0, [*until, middle])
    assert cut == whole[: whole.index(middle)]
