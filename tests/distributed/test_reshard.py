"""The reshard matrix: what any layout of any engine saves, any other loads, to the last bit.

tensor 1, 2, 4 x shard 1, 2, 4 x {native, DeepSpeed ZeRO 1, 2, 3}, on 2 to 16 ranks, with replicas
where ranks are left, and native pipelines and context ranks beside them. Nothing is trained:
weights, moments and counters are made up, loaded by every layout, saved by it, and loaded again by
every layout of as many ranks, by those of more ranks that are tested after it, and by one process.
"""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from flashtrain import checkpoint
from flashtrain.checkpoint import State
from flashtrain.checkpoint.store import parameter_of
from flashtrain.engine.base import Engine
from tests.distributed.test_matrix import Layout, build, native, restore, save, train, zero
from tests.harness import run_ranks

STEP = 7
FILE = "rank-00000.safetensors"
# 16 data ranks divide the batch; DeepSpeed's tensor ranks share no head
OTHERS = ("data.batch_size=16", "trainer.evaluate_sequences=16", "model.n_kv_heads=4")
ONE = Layout("one", "llama", {}, 4, OTHERS)

BESIDE: dict[int, list[dict[str, int]]] = {
    2: [{"pipeline": 2}, {"context": 2}],
    4: [{"pipeline": 2, "tensor": 2}, {"pipeline": 2, "shard": 2, "zero": 3},
        {"context": 2, "tensor": 2}, {"context": 2, "pipeline": 2}],
}  # fmt: skip


def layouts(world: int, engine: str) -> list[Layout]:
    """With replicas on up to 4 ranks; for DeepSpeed every data rank is one of its shards."""
    found = []
    for tensor in (1, 2, 4):
        for shard in (1, 2, 4):
            replicate, rest = divmod(world, tensor * shard)
            if rest or (replicate > 1 and world > 4):
                continue
            if engine == "native":
                for stage in (1, 3) if shard > 1 else (1,):
                    degrees = {"tensor": tensor, "shard": shard, "replicate": replicate}
                    found.append(native("llama", 1, **degrees, zero=stage))
            elif replicate == 1:
                degrees = {"tensor": tensor, "shard": shard}
                found += [zero("llama", 1, **degrees, zero=stage) for stage in (1, 2, 3)]
    if engine == "native":
        found += [native("llama", 1, **degrees) for degrees in BESIDE.get(world, ())]
    for layout in found:
        layout.others += OTHERS
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints to load: made-up numbers from one process, then what tests have added."""
    engine, mesh = build(ONE.config(1), 1)
    train(engine, mesh, 4, 0, 1)  # makes the moments
    state = engine.state()
    for number, local in enumerate(state.tensors.values()):
        draw = torch.Generator().manual_seed(number)
        local.tensor.detach().copy_(torch.randn(local.tensor.shape, generator=draw))
    for scalar in state.scalars.values():
        scalar.fill_(STEP)
    return [save(tmp_path_factory.mktemp("made-up"), STEP, engine, mesh)]


@pytest.mark.parametrize("engine", ["native", "deepspeed"])
@pytest.mark.parametrize(
    "world",
    [
        2,
        pytest.param(4, marks=pytest.mark.slow),
        pytest.param(8, marks=pytest.mark.slow),
        pytest.param(16, marks=pytest.mark.slow),
    ],
    ids=lambda n: f"{n} ranks",
)
def test_what_one_layout_saves_any_other_loads_bit_for_bit(
    world: int, engine: str, saved: list[Path], tmp_path: Path
) -> None:
    if engine == "deepspeed":
        pytest.importorskip("deepspeed", reason="engine=deepspeed is an extra")
    tested = layouts(world, engine)
    run_ranks(check_ranks, world, tmp_path, tested, list(saved), tmp_path, limit=600)
    made = [tmp_path / layout.name / f"step-{STEP:08d}" for layout in tested]
    assert made
    whole, _ = build(ONE.config(1), 1)
    expected = load_file(saved[0] / FILE)
    for path in made:
        check_load(path, whole, expected)
    saved += made


def check_ranks(tested: list[Layout], sources: list[Path], folder: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"  # also where there is a GPU
    world = dist.get_world_size()
    expected = load_file(sources[0] / FILE)
    engines = [build(layout.config(world), world) for layout in tested]
    made = []
    for layout, (engine, mesh) in zip(tested, engines, strict=True):
        check_load(sources[0], engine, expected)
        made.append(save(folder / layout.name, STEP, engine, mesh))
    for layout, (engine, _) in zip(tested, engines, strict=True):
        for path in [*sources[1:], *made]:
            try:
                check_load(path, engine, expected)
            except BaseException as error:
                error.add_note(f"{path.parent.name} into {layout.name}")
                raise


def check_load(path: Path, engine: Engine, expected: dict[str, Tensor]) -> None:
    """Load into an engine full of NaN; every value that this rank holds is the right one."""
    state = engine.state(checkpoint.saved_names(path))
    spoil(state)
    restore(path, engine)
    missing = {parameter_of(name) for name in expected.keys() - state.tensors.keys()}
    assert missing == state.elsewhere  # of a pipeline, what other stages have
    for name, local in state.tensors.items():
        for box in local.boxes:
            part = tuple(slice(s, s + n) for s, n in zip(box.start, box.shape, strict=True))
            assert torch.equal(local.view(box), expected[name][part]), name
    assert {float(scalar) for scalar in state.scalars.values()} == {STEP}


@torch.no_grad()
def spoil(state: State) -> None:
    for local in state.tensors.values():
        local.tensor.fill_(float("nan"))
    for scalar in state.scalars.values():
        scalar.fill_(-1)
