"""Every way to spread a run against one process, in fp32: loss, gradient norm and weights after
5 steps, and checkpoints that go from any of them to any other.

Ranks run all layouts of their number one after the other: starting them takes longer than training.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from flashtrain import checkpoint
from flashtrain.build import build_engine
from flashtrain.compose import load
from flashtrain.config import Config
from flashtrain.data.loader import Batch
from flashtrain.engine.base import Engine
from flashtrain.parallel.loss import IGNORED
from flashtrain.parallel.mesh import ALONE, Mesh, mesh_of
from tests.harness import run_ranks

CPU = torch.device("cpu")
STEPS, SAVED, RATE = 5, 3, 1e-2
B, T, V = 12, 8, 48
TINY = [
    "experiment=null", "data=random", f"model.vocabulary={V}", "model.d_model=32",
    "model.n_layers=2", "model.n_heads=4", f"data.sequence_length={T}", f"data.batch_size={B}",
    "precision=fp32", "trainer.compile=false", "tracking=quiet", "trainer.evaluate_sequences=12",
    "optimizer.clip_norm=0.5", "attention=reference",
    # a bias of keys moves no score: its gradient is rounding alone, which Adam would scale up
    "optimizer.eps=1e-3",
]  # fmt: skip
MODELS = {
    # vectors everywhere, one key/value head that tensor ranks share, a head tied to the embedding
    "gpt2": ["model.n_kv_heads=1", "model.bias=true", "position=learned",
             "position.applies_to=[embedding]"],
    "llama": ["model.n_kv_heads=2", "model.norm=rmsnorm", "model.mlp=swiglu", "model.qk_norm=true",
              "model.tied_head=false", "model.d_ff=44", "position=rope"],
}  # fmt: skip


@dataclass
class Layout:
    name: str
    model: str
    degrees: dict[str, int]  # of parallel.*
    micro_batch: int
    others: tuple[str, ...] = ()

    def config(self, world: int) -> Config:
        degrees = {"tensor": 1, "shard": 1} | self.degrees
        overrides = [
            *TINY,
            *MODELS[self.model],
            *(f"parallel.{key}={value}" for key, value in degrees.items()),
            f"data.micro_batch_size={self.micro_batch}",
            *self.others,
        ]
        return load(overrides, world)


def native(model: str, micro_batch: int, **degrees: int) -> Layout:
    name = "_".join(f"{key}{value}" for key, value in degrees.items())
    return Layout(f"{model}_{name}", model, degrees, micro_batch)


WORLDS = {
    2: [
        native("gpt2", 12, tensor=2),
        native("gpt2", 3, replicate=2),
        native("gpt2", 3, shard=2, zero=3),
        native("llama", 3, shard=2, zero=2),
        native("llama", 2, shard=2, zero=1),
    ],
    3: [native("llama", 2, shard=3)],  # 32, 44 and 48 rows over three: short and empty parts
    4: [
        native("gpt2", 3, tensor=2, shard=2, zero=3),
        native("llama", 2, tensor=2, shard=2, zero=1),
        native("llama", 3, tensor=2, replicate=2),
        native("llama", 1, replicate=2, shard=2, zero=3),
        native("gpt2", 1, replicate=2, shard=2, zero=1),
    ],
    8: [native("llama", 1, replicate=2, shard=2, tensor=2, zero=2)],
}


def zero(model: str, micro_batch: int, *others: str, **degrees: int) -> Layout:
    layout = native(model, micro_batch, **degrees)
    layout.name, layout.others = f"deepspeed_{layout.name}", ("engine=deepspeed", *others)
    return layout


DEEPSPEED = {
    2: [
        zero("gpt2", 3, shard=2, zero=1),
        zero("llama", 2, shard=2, zero=2),
        zero("llama", 3, shard=2, zero=3),
        zero("llama", 6, tensor=2, shard=1, zero=2),
    ],
    4: [
        zero("llama", 3, tensor=2, shard=2, zero=1),
        zero("llama", 2, tensor=2, shard=2, zero=2),
        zero("llama", 3, tensor=2, shard=2, zero=3),
    ],
}


def batches(step: int, mesh: Mesh, micro_batch: int, device: torch.device = CPU) -> list[Batch]:
    """This data rank's share of global batch `step`; valid tokens differ from rank to rank."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(V, (B, T + 1), generator=draw)
    labels = ids[:, 1:].clone()
    labels[:4, : 2 + step % 3] = IGNORED
    share = B // mesh.data.size
    first = mesh.data.rank * share
    return [
        Batch(
            ids[at : at + micro_batch, :-1].to(device, copy=True),
            labels[at : at + micro_batch].to(device, copy=True),
        )
        for at in range(first, first + share, micro_batch)
    ]


def build(config: Config, world: int, device: torch.device = CPU) -> tuple[Engine, Mesh]:
    mesh = mesh_of(config.parallel) if world > 1 else ALONE
    return build_engine(config, mesh, device), mesh


def train(
    engine: Engine, mesh: Mesh, micro_batch: int, first: int, end: int
) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in range(first, end):
        parts = batches(step, mesh, micro_batch, engine.device)  # type: ignore[attr-defined]
        losses.append(float(engine.forward_backward(parts)))
        norms.append(float(engine.step(RATE)))
    return losses, norms


def save(folder: Path, step: int, engine: Engine, mesh: Mesh) -> Path:
    peers = checkpoint.Peers(dist.group.WORLD if mesh.world_size > 1 else None)
    writes = mesh.replicate.rank == 0
    keep = checkpoint.Retention(9)
    return checkpoint.save(folder, step, engine.state(), {}, peers=peers, writes=writes, keep=keep)


def restore(path: Path, engine: Engine) -> None:
    checkpoint.load(path, engine.state(checkpoint.saved_names(path)))
    engine.loaded()


@dataclass
class Reference:
    """What one process does."""

    config: Config
    losses: list[float]
    norms: list[float]
    evaluated: float
    logits: torch.Tensor
    halved: float
    folder: Path  # with checkpoints of steps SAVED and STEPS


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """By model."""
    found = {}
    for model in MODELS:
        folder = tmp_path_factory.mktemp(model)
        config = Layout("one", model, {}, B).config(1)
        engine, mesh = build(config, 1)
        losses, norms = train(engine, mesh, B, 0, SAVED)
        save(folder, SAVED, engine, mesh)
        more = train(engine, mesh, B, SAVED, STEPS)
        save(folder, STEPS, engine, mesh)
        found[model] = Reference(
            config,
            losses + more[0],
            norms + more[1],
            *look(engine, mesh),
            halve_embedding(engine, mesh),
            folder,
        )
    return found


def look(engine: Engine, mesh: Mesh) -> tuple[float, torch.Tensor]:
    """A held-out loss; logits after one position and scores of a few tokens, in one row: forwards
    without a backward."""
    tokens = batches(7, ALONE, 1)[5].tokens
    logits = engine.decoder().logits(tokens, torch.tensor([4]))[0]
    both, places = tokens.repeat(2, 1), torch.tensor([0, 2, 7, 8, 15])
    # the last of them is the likeliest
    targets = torch.tensor(
        [5, 47, 0, 24, int(engine.decoder().logits(both, torch.tensor([7, 7]))[1].argmax())]
    )
    own, best = engine.decoder().scores(both, places, targets)
    assert bool(best[-1])
    return float(engine.evaluate(batches(6, mesh, 1))), torch.cat([logits, own, best.float()])


@torch.no_grad()
def halve_embedding(engine: Engine, mesh: Mesh) -> float:
    """The held-out loss after a write to the views of `state`, as word vectors are written."""
    table = engine.state().tensors.get("model/embedding.weight")
    for box in table.boxes if table is not None else ():  # not on every rank of a pipeline
        table.view(box).mul_(0.5)
    engine.loaded()
    return float(engine.evaluate(batches(6, mesh, 1)))


def run(world: int, layouts: list[Layout], references: dict[str, Reference], folder: Path) -> None:
    configs = [layout.config(world) for layout in layouts]
    run_ranks(check_layouts, world, folder, layouts, configs, references, folder, limit=300)
    for layout in layouts:
        check_files(layout, references[layout.model], folder / layout.name)


def check_layouts(
    layouts: list[Layout],
    configs: list[Config],
    references: dict[str, Reference],
    folder: Path,
) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"  # also where there is a GPU
    for layout, config in zip(layouts, configs, strict=True):
        try:
            check_layout(config, layout.micro_batch, references[layout.model], folder / layout.name)
        except BaseException as error:
            error.add_note(f"in layout {layout.name}")
            raise


def check_layout(config: Config, micro_batch: int, expected: Reference, folder: Path) -> None:
    world = dist.get_world_size()
    engine, mesh = build(config, world)
    losses, norms = train(engine, mesh, micro_batch, 0, SAVED)
    beside = checkpoint.Saver(
        folder, CPU, checkpoint.own_peers(world), writes=mesh.replicate.rank == 0
    )
    beside.start(SAVED, engine.state(), {})  # written while training goes on
    evaluated, logits = look(engine, mesh)  # must not disturb what follows
    more = train(engine, mesh, micro_batch, SAVED, STEPS)
    beside.finish()
    assert [saved.failure for saved in beside.results()] == [None]
    middle = beside.path(SAVED)
    save(folder, STEPS, engine, mesh)
    close = {"rtol": 1e-5, "atol": 0.0}
    assert_close(losses + more[0], expected.losses, **close)
    assert_close(norms + more[1], expected.norms, **close)
    evaluated, logits = look(engine, mesh)
    assert_close(evaluated, expected.evaluated, **close)
    assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)

    assert_close(halve_embedding(engine, mesh), expected.halved, **close)

    again, mesh = build(config, world)
    restore(middle, again)
    assert train(again, mesh, micro_batch, SAVED, STEPS) == more, (
        "resumed is not bit for bit the same"
    )
    restore(expected.folder / f"step-{SAVED:08d}", again)  # into an engine that was used
    from_one = train(again, mesh, micro_batch, SAVED, STEPS)
    assert_close(from_one[0], expected.losses[SAVED:], **close)
    assert_close(from_one[1], expected.norms[SAVED:], **close)


def check_files(layout: Layout, expected: Reference, folder: Path) -> None:
    """One process reads what the ranks wrote: weights and moments, and goes on from there."""
    found, wanted = build(expected.config, 1)[0], build(expected.config, 1)[0]
    restore(folder / f"step-{STEPS:08d}", found)
    restore(expected.folder / f"step-{STEPS:08d}", wanted)
    ours, theirs = found.state(), wanted.state()
    assert ours.scalars == theirs.scalars
    for name, local in theirs.tensors.items():
        scale = float(local.tensor.detach().abs().max())
        worst = float((ours.tensors[name].tensor - local.tensor).detach().abs().max())
        assert worst <= 1e-5 * scale, f"{layout.name}: {name} is off by {worst} of {scale}"
    restore(folder / f"step-{SAVED:08d}", found)
    losses, _ = train(found, ALONE, B, SAVED, STEPS)
    assert_close(losses, expected.losses[SAVED:], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "world", [2, 3, 4, pytest.param(8, marks=pytest.mark.slow)], ids=lambda n: f"{n} ranks"
)
def test_native_layouts_equal_one_process(
    world: int, references: dict[str, Reference], tmp_path: Path
) -> None:
    run(world, WORLDS[world], references, tmp_path)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_deepspeed_equals_one_process(
    world: int, references: dict[str, Reference], tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="engine=deepspeed is an extra")
    run(world, DEEPSPEED[world], references, tmp_path)


ON_GPUS = [
    "trainer.compile=null", "attention=auto", "model.head_size=64", "trainer.recompute=selective",
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("engine", ["native", "deepspeed"])
def test_two_gpus_equal_one(engine: str, precision: str, tolerance: float, tmp_path: Path) -> None:
    if engine == "deepspeed":
        pytest.importorskip("deepspeed", reason="engine=deepspeed is an extra")
    others = (*ON_GPUS, f"precision={precision}")
    layouts = [native("llama", 3, shard=2, zero=stage) for stage in (1, 2, 3)]
    for layout in layouts:
        layout.others = (*others, f"engine={engine}")
    alone = Layout("one", "llama", {}, B, others).config(1)
    configs = [layout.config(2) for layout in layouts]
    arguments = (alone, configs, tolerance)
    run_ranks(check_two_gpus, 2, tmp_path, *arguments, backend="nccl", limit=600)


def check_two_gpus(alone: Config, configs: list[Config], tolerance: float) -> None:
    device = torch.device("cuda", dist.get_rank())
    one, _ = build(alone, 1, device)
    losses, norms = train(one, ALONE, B, 0, STEPS)
    for config in configs:
        engine, mesh = build(config, 2, device)
        found = train(engine, mesh, 3, 0, STEPS)
        assert_close(found[0], losses, rtol=tolerance, atol=0)
        assert_close(found[1], norms, rtol=10 * tolerance, atol=0)
