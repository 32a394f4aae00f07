"""Generation over a cache against the model run again from the start for each token."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashtrain.config import Mlp, Norm, PositionConfig, PositionKind
from flashtrain.engine.decoder import Decoder, cast_weights
from flashtrain.model.cache import cache_bytes_per_token
from flashtrain.model.generate import complete, generate
from flashtrain.model.gpt import GPT
from flashtrain.model.sampling import Sampling
from flashtrain.parallel.mesh import SINGLE, build_mesh
from tests.distributed.test_tensor_parallel import VARIANTS
from tests.distributed.test_tensor_parallel import build as build_split
from tests.flashtrain.model.test_gpt import POSITIONS, build, describe, tiny
from tests.harness import run_ranks

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6]]
ROOM = 16  # max_length of the models that `build` makes


def again_from_the_start(gpt: GPT, prompt: list[int], n: int) -> list[int]:
    """The likeliest token each time, without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(gpt.logits(gpt(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("position", POSITIONS, ids=describe)
def test_likeliest_tokens_are_those_without_a_cache(position: PositionConfig) -> None:
    gpt = build(tiny(), position)
    expected = [again_from_the_start(gpt, prompt, 9) for prompt in PROMPTS]
    assert complete(Decoder(gpt), PROMPTS, 9, max_length=ROOM, sampling=GREEDY) == expected


@pytest.mark.parametrize(
    "settings",
    [
        dict(n_kv_heads=2, norm=Norm.rmsnorm, mlp=Mlp.swiglu, qk_norm=True, tied_head=False),
        dict(n_kv_heads=1, bias=True, logit_softcap=5.0, head_size=16),
    ],
)
def test_likeliest_tokens_of_other_models(settings: dict[str, Any]) -> None:
    gpt = build(tiny(**settings), PositionConfig(PositionKind.rope))
    expected = [again_from_the_start(gpt, prompt, 9) for prompt in PROMPTS]
    assert complete(Decoder(gpt), PROMPTS, 9, max_length=ROOM, sampling=GREEDY) == expected


def test_logits_over_a_cache_are_those_without_one() -> None:
    gpt = build(tiny(n_kv_heads=2), PositionConfig(PositionKind.rope))
    tokens = torch.randint(0, 48, (2, 12))
    with torch.no_grad():
        expected = gpt.logits(gpt(tokens))
    decoder = Decoder(gpt)
    cache, last = decoder.empty_cache(2, 12), torch.tensor([4, 6])
    found = decoder.logits(tokens[:, :8], last, cache)
    torch.testing.assert_close(found, expected[[0, 1], last])
    cache.filling = False
    cache.lengths.copy_(last + 1)
    for _ in range(5):
        at = cache.lengths.long()
        found = decoder.logits(tokens[[0, 1], at].unsqueeze(0), cache=cache)
        torch.testing.assert_close(found, expected[[0, 1], at])
        cache.lengths += 1


def test_a_batch_draws_what_its_prompts_draw_alone() -> None:
    gpt = build(tiny(), PositionConfig(PositionKind.rope))
    sampling = dict(temperature=0.9, top_p=0.9)
    # 30 tokens: every sequence outgrows the model at another time
    together = complete(
        Decoder(gpt), PROMPTS, 30, max_length=ROOM, sampling=Sampling(**sampling, seed=7)
    )
    for row, prompt in enumerate(PROMPTS):
        (alone,) = complete(
            Decoder(gpt), [prompt], 30, max_length=ROOM, sampling=Sampling(**sampling, seed=7 + row)
        )
        assert together[row] == alone


def test_the_seed_decides() -> None:
    decoder = Decoder(build(tiny(), PositionConfig(PositionKind.rope)))
    first, same, other = (
        complete(decoder, PROMPTS, 12, max_length=ROOM, sampling=Sampling(seed=seed))
        for seed in (1, 1, 9)
    )
    assert first == same
    assert first != other


@pytest.mark.parametrize("kind", [PositionKind.learned, PositionKind.rope])
def test_a_sequence_that_outgrows_the_model_forgets_its_older_half(kind: PositionKind) -> None:
    gpt = build(tiny(), PositionConfig(kind))
    ids = [3, 1, 4]
    seen = list(ids)
    for _ in range(40):
        if len(seen) > ROOM:
            seen = seen[-ROOM // 2 :]
        (token,) = again_from_the_start(gpt, seen, 1)
        seen.append(token)
        ids.append(token)
    assert complete(Decoder(gpt), [ids[:3]], 40, max_length=ROOM, sampling=GREEDY) == [ids[3:]]
    long = [1, 2, 3, 4] * 6
    (found,) = complete(Decoder(gpt), [long], 3, max_length=ROOM, sampling=GREEDY)
    assert found == again_from_the_start(gpt, long[-ROOM // 2 :], 3)


def test_sequences_end_one_by_one_and_all_ended_ends_it() -> None:
    gpt = build(tiny(), PositionConfig(PositionKind.rope))
    free = complete(Decoder(gpt), PROMPTS, 9, max_length=ROOM)
    end = free[0][2]
    ended = complete(Decoder(gpt), PROMPTS, 9, max_length=ROOM, end=end)
    for ids, whole in zip(ended, free, strict=True):
        assert ids == (whole[: whole.index(end) + 1] if end in whole else whole)
    rounds = list(
        generate(Decoder(gpt), PROMPTS, 9, max_length=ROOM, stop=lambda ids: len(ids) > 1)
    )
    assert [[t is not None for t in ids] for ids in rounds] == [[True] * 3] * 2


def test_only_ids_of_the_tokenizer_are_drawn() -> None:
    gpt = build(tiny(), PositionConfig(PositionKind.none))
    drawn = complete(Decoder(gpt), PROMPTS, 60, max_length=ROOM, n_ids=5)
    assert {token for ids in drawn for token in ids} == set(range(5))


@pytest.mark.parametrize(
    ("prompts", "max_length", "sentence"),
    [([[1], []], 8, "no tokens"), ([], 8, "no tokens"), ([[1]], 0, "max_length=0")],
)
def test_nothing_to_go_on_from_is_refused(
    prompts: list[list[int]], max_length: int, sentence: str
) -> None:
    gpt = build(tiny(), PositionConfig(PositionKind.none))
    with pytest.raises(ValueError, match=sentence):
        next(generate(Decoder(gpt), prompts, 1, max_length=max_length))


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_memory_of_a_token_is_what_the_cache_takes(kv_heads: int) -> None:
    model = tiny(n_kv_heads=kv_heads)
    gpt = build(model, PositionConfig(PositionKind.rope), dtype=torch.bfloat16)
    cache = Decoder(gpt).empty_cache(3, 10)
    taken = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.k, layer.v))
    assert cache_bytes_per_token(model, torch.bfloat16) == taken / 30
    assert taken / 30 == 2 * 2 * kv_heads * 8 * 2  # k and v, layers, heads, their size, bf16


def test_tensor_ranks_draw_what_one_process_draws(tmp_path: Path) -> None:
    run_ranks(check_tensor_ranks, 2, tmp_path)


def check_tensor_ranks() -> None:
    axis = build_mesh(dist.get_world_size()).tensor
    prompts = [[5, 6, 7], [9], [1, 2, 3, 4, 5]]
    for variant in VARIANTS:
        dense, split = (
            build_split(variant, part, torch.float64).double() for part in (SINGLE, axis)
        )
        for model in (dense, split):
            model.embedding.dtype = torch.float64
        for sampling in (GREEDY, Sampling(seed=2)):
            settings = dict(max_length=12, sampling=sampling)  # outgrown: 5 + 10 tokens
            expected = complete(Decoder(dense), prompts, 10, **settings)
            assert complete(Decoder(split, axis), prompts, 10, **settings) == expected, variant
        heads = dense.config.n_kv_heads
        assert heads is not None
        held = Decoder(split, axis).empty_cache(2, 4).k.shape[-2]
        assert held == max(1, heads // 2)


@pytest.mark.parametrize("position", [POSITIONS[0], POSITIONS[9], POSITIONS[-1]], ids=describe)
def test_cast_weights_give_the_same_logits(position: PositionConfig) -> None:
    model = tiny(qk_norm=True, bias=True)
    decoder = Decoder(build(model, position, dtype=torch.bfloat16))
    tokens, last = torch.tensor(PROMPTS[2:]), torch.tensor([5])
    expected = decoder.logits(tokens, last)
    cast_weights(decoder.model)
    assert torch.equal(decoder.logits(tokens, last), expected)
    kept = {n for n, p in decoder.model.named_parameters() if p.dtype == torch.float32}
    assert kept == {n for n, _ in decoder.model.named_parameters() if "norm" in n}


def test_blocks_that_training_compiled_are_not_compiled_again_for_a_text() -> None:
    calls: list[int] = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        calls.append(len(inputs))
        return module.forward

    gpt = build(tiny(), PositionConfig(PositionKind.rope))
    expected = complete(Decoder(gpt), PROMPTS, 5, max_length=ROOM)
    for block in gpt.blocks:
        block.compile(backend=backend)
    assert complete(Decoder(gpt), PROMPTS, 5, max_length=ROOM) == expected
    assert not calls
    gpt(torch.zeros(1, 4, dtype=torch.int64))
    assert calls


@pytest.mark.gpu
@pytest.mark.parametrize("position", POSITIONS, ids=describe)
def test_a_captured_step_draws_what_an_eager_one_draws(position: PositionConfig) -> None:
    gpt = build(tiny(head_size=32), position).cuda()
    expected = complete(Decoder(gpt), PROMPTS, 40, max_length=ROOM, sampling=GREEDY)
    found = complete(Decoder(gpt), PROMPTS, 40, max_length=ROOM, sampling=GREEDY, graph=True)
    assert found == expected
    for seed in (3, 4):
        settings: dict[str, Any] = dict(max_length=ROOM, sampling=Sampling(top_p=0.9, seed=seed))
        first = complete(Decoder(gpt), PROMPTS, 40, **settings, graph=True)
        assert first == complete(Decoder(gpt), PROMPTS, 40, **settings, graph=True)
        assert first == complete(Decoder(gpt), PROMPTS, 40, **settings)
