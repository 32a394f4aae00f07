"""Claims about one optimizer step on one process; layouts are compared in tests/distributed."""

import pytest
import torch
from torch import Tensor

from flashtrain.build import build_model
from flashtrain.compose import load
from flashtrain.config import Config
from flashtrain.data.loader import Batch
from flashtrain.engine.native import NativeEngine
from flashtrain.parallel.loss import IGNORED
from flashtrain.parallel.mesh import SINGLE, Mesh

CPU = torch.device("cpu")
ALONE = Mesh(world_size=1, rank=0, tensor=SINGLE, data=SINGLE)
TINY = [
    "data=random", "model.vocabulary=64", "model.d_model=32", "model.n_layers=2",
    "data.sequence_length=16", "data.batch_size=8", "trainer.compile=false",
]  # fmt: skip


def engine(*overrides: str) -> NativeEngine:
    config: Config = load([*TINY, *overrides])
    return NativeEngine(build_model(config, SINGLE, CPU), config, ALONE, CPU)


def batch(size: int, seed: int = 0) -> Batch:
    ids = torch.randint(64, (size, 17), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1].clone(), ids[:, 1:].clone())


def gradients(one: NativeEngine) -> list[Tensor]:
    return [p.grad.clone() for p in one.model.parameters() if p.grad is not None]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_micro_batches_add_up_to_the_batch() -> None:
    whole, parts = engine(), engine()
    big = batch(8)
    loss = whole.forward_backward([big])
    pieces = [Batch(big.tokens[i : i + 2], big.labels[i : i + 2]) for i in range(0, 8, 2)]
    torch.testing.assert_close(parts.forward_backward(pieces), loss)
    assert_same(gradients(parts), gradients(whole))


def test_the_mean_is_over_valid_tokens_of_the_whole_batch() -> None:
    one = engine()
    first, second = batch(2, seed=1), batch(2, seed=2)
    first.labels[:, 3:] = IGNORED  # 6 valid tokens here, 32 there
    losses = [one.forward_backward([part]) for part in (first, second)]
    both = engine().forward_backward([first, second])
    torch.testing.assert_close(both, (losses[0] * 6 + losses[1] * 32) / 38)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputation_changes_memory_and_nothing_else(kind: str) -> None:
    plain, again = engine(), engine(f"trainer.recompute={kind}")
    torch.testing.assert_close(
        again.forward_backward([batch(4)]), plain.forward_backward([batch(4)]), rtol=0, atol=0
    )
    assert_same(gradients(again), gradients(plain))


def test_the_loss_without_logits_is_the_loss_with_them() -> None:
    fused, plain = engine("precision=fp32"), engine("loss.fused=false", "precision=fp32")
    batches = [batch(4), batch(4, seed=1)]
    batches[0].labels[:, :5] = IGNORED
    torch.testing.assert_close(
        fused.forward_backward(batches), plain.forward_backward(batches), rtol=1e-6, atol=0
    )
    assert_same(gradients(fused), gradients(plain))


def test_z_loss_is_added_in_training_only() -> None:
    with_z, without = engine("loss.z_loss=0.01"), engine()
    assert with_z.forward_backward([batch(4)]) > without.forward_backward([batch(4)]) + 0.01
    torch.testing.assert_close(with_z.evaluate([batch(4)]), without.evaluate([batch(4)]))


def test_clipping_uses_the_norm_of_the_whole_gradient() -> None:
    one = engine("optimizer.clip_norm=1e-3")
    one.forward_backward([batch(4)])
    expected = torch.stack([g.norm() for g in gradients(one)]).norm()
    torch.testing.assert_close(one.step(1e-3), expected)


def test_step_forgets_gradients_and_moves_weights_by_the_rate_given() -> None:
    still, moved = engine(), engine()
    before = [p.detach().clone() for p in still.model.parameters()]
    for one, rate in ((still, 0.0), (moved, 1e-2)):
        one.forward_backward([batch(4)])
        one.step(rate)
        assert all(p.grad is None for p in one.model.parameters())
    for old, kept in zip(before, still.model.parameters(), strict=True):
        assert torch.equal(old, kept)
    assert not torch.equal(before[0], next(moved.model.parameters()))


def test_only_matrices_decay() -> None:
    one = engine("position=learned", "model.bias=true")
    names = {parameter: name for name, parameter in one.model.named_parameters()}
    decays = {
        names[p] for g in one.optimizer.param_groups if g["weight_decay"] for p in g["params"]
    }
    assert "embedding.weight" in decays
    assert "blocks.0.attention.qkv.weight" in decays
    assert not any("norm" in name or "bias" in name or "position" in name for name in decays)


def test_evaluate_gives_the_loss_and_no_gradients() -> None:
    one = engine()
    expected = one.forward_backward([batch(4)])
    fresh = engine()
    torch.testing.assert_close(fresh.evaluate([batch(4)]), expected)
    assert all(p.grad is None for p in fresh.model.parameters())


def test_next_token_logits_are_those_of_that_position() -> None:
    one = engine()
    tokens = batch(1).tokens
    with torch.no_grad():
        expected = one.model.logits(one.model(tokens))[0, 5]
    found = one.decoder().logits(tokens, torch.tensor([5]))
    torch.testing.assert_close(found[0], expected)
