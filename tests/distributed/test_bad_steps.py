"""Numbers that go bad on one rank: no rank moves, all say so, and training goes on from there."""

from pathlib import Path

import torch
import torch.distributed as dist

from flashtrain.checkpoint import State
from flashtrain.engine.native import NativeEngine
from tests.distributed.test_matrix import Layout, build, native, train
from tests.harness import run_ranks

LAYOUTS = [
    native("gpt2", 12, tensor=2),
    native("gpt2", 3, replicate=2),
    native("llama", 3, shard=2, zero=1),
    native("llama", 3, shard=2, zero=3),
]


def test_no_rank_moves_when_one_goes_bad(tmp_path: Path) -> None:
    run_ranks(check_ranks, 2, tmp_path, LAYOUTS)


def check_ranks(layouts: list[Layout]) -> None:
    for layout in layouts:
        try:
            check_layout(layout)
        except BaseException as error:
            error.add_note(f"in layout {layout.name}")
            raise


def check_layout(layout: Layout) -> None:
    engine, mesh = build(layout.config(2), 2)
    assert isinstance(engine, NativeEngine)
    train(engine, mesh, layout.micro_batch, 0, 2)
    before = values(engine.state())
    head = engine.loss.head
    if dist.get_rank() == 1:
        engine.loss.head = lambda *inputs: head(*inputs) * torch.nan  # type: ignore[method-assign]
    _, norms = train(engine, mesh, layout.micro_batch, 2, 3)
    engine.loss.head = head  # type: ignore[method-assign]
    assert not torch.tensor(norms).isfinite().any()
    after = values(engine.state())
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]), name
    more = train(engine, mesh, layout.micro_batch, 3, 5)

    never, mesh = build(layout.config(2), 2)
    train(never, mesh, layout.micro_batch, 0, 2)
    assert train(never, mesh, layout.micro_batch, 3, 5) == more


def values(state: State) -> dict[str, torch.Tensor]:
    tensors = {name: local.tensor.detach().clone() for name, local in state.tensors.items()}
    return tensors | {name: scalar.clone() for name, scalar in state.scalars.items()}
