"""Context parallelism against one process, in fp32: as test_matrix.py, whose checks these are, and
packed documents."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from flashtrain import layout as rules
from flashtrain.config import Config
from flashtrain.data.loader import Batch
from flashtrain.parallel.mesh import ALONE, Mesh
from tests.distributed.test_matrix import (
    ON_GPUS,
    RATE,
    SAVED,
    STEPS,
    B,
    Layout,
    Reference,
    T,
    batches,
    build,
    check_files,
    check_layout,
    check_two_gpus,
    halve_embedding,
    look,
    save,
    train,
)
from tests.harness import run_ranks

VARIANTS = {  # name -> one of test_matrix.MODELS, and what differs
    "learned": ("gpt2", ()),
    "rope": ("llama", ()),
    "alibi": ("llama", ("position=alibi",)),
    "sinusoidal": ("llama", ("position=sinusoidal",)),
}


def layout(variant: str, kind: str, micro_batch: int, *others: str, **degrees: int) -> Layout:
    model, differs = VARIANTS[variant]
    name = "_".join([variant, kind, *(f"{key}{value}" for key, value in degrees.items())])
    overrides = (*differs, "attention=torch", f"parallel.context_kind={kind}", *others)
    return Layout(name, model, degrees, micro_batch, overrides)


COPIED = "parallel.shard_context=false"
WORLDS = {
    2: [
        layout("learned", "gather", 12, context=2),
        layout("learned", "ring", 6, COPIED, context=2),
        layout("rope", "ring", 4, context=2, zero=2),
        layout("rope", "ulysses", 12, COPIED, "trainer.recompute=full", context=2),
        layout("alibi", "gather", 6, COPIED, context=2),
        layout("alibi", "ulysses", 6, context=2, zero=1),
        layout("sinusoidal", "ring", 12, "trainer.recompute=selective", COPIED, context=2),
    ],
    4: [
        layout("learned", "ring", 6, context=2, tensor=2),
        layout("rope", "gather", 12, COPIED, context=2, tensor=2),
        layout("alibi", "gather", 4, context=2, tensor=2),
        layout("rope", "ring", 3, context=2, shard=2),
        layout("rope", "ring", 3, COPIED, context=2, shard=2),
        layout("learned", "gather", 2, COPIED, context=2, replicate=2),
        layout("rope", "ring", 6, context=2, replicate=2, zero=1),
    ],
}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """By variant."""
    found = {}
    for variant, (model, differs) in VARIANTS.items():
        folder = tmp_path_factory.mktemp(f"context_{variant}")
        config = Layout("one", model, {}, B, differs).config(1)
        engine, mesh = build(config, 1)
        losses, norms = train(engine, mesh, B, 0, SAVED)
        save(folder, SAVED, engine, mesh)
        more = train(engine, mesh, B, SAVED, STEPS)
        save(folder, STEPS, engine, mesh)
        found[variant] = Reference(
            config, losses + more[0], norms + more[1], *look(engine, mesh),
            halve_embedding(engine, mesh), folder,
        )  # fmt: skip
    return found


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_context_equals_one_process(
    world: int, references: dict[str, Reference], tmp_path: Path
) -> None:
    layouts = WORLDS[world]
    configs = [one.config(world) for one in layouts]
    arguments = (layouts, configs, references, tmp_path)
    run_ranks(check_layouts, world, tmp_path, *arguments, limit=150)
    for one in layouts:
        check_files(one, references[variant_of(one)], tmp_path / one.name)


def variant_of(one: Layout) -> str:
    return one.name.partition("_")[0]


def check_layouts(
    layouts: list[Layout], configs: list[Config], references: dict[str, Reference], folder: Path
) -> None:
    for one, config in zip(layouts, configs, strict=True):
        try:
            check_layout(config, one.micro_batch, references[variant_of(one)], folder / one.name)
        except BaseException as error:
            error.add_note(f"in layout {one.name}")
            raise


def packed(step: int, mesh: Mesh, micro_batch: int) -> list[Batch]:
    """Batches in which documents end anywhere, also inside and at the ends of chunks."""
    ends = torch.rand(B, T, generator=torch.Generator().manual_seed(step)) < 0.3
    share = B // mesh.data.size
    own = ends.long().cumsum(1)[mesh.data.rank * share :][:share]
    return [
        batch._replace(documents=documents)
        for batch, documents in zip(
            batches(step, mesh, micro_batch), own.split(micro_batch), strict=True
        )
    ]


PACKED = [
    layout("rope", "gather", 6, context=2),
    layout("alibi", "gather", 12, COPIED, context=2),
    layout("learned", "gather", 4, context=2),
    layout("rope", "ulysses", 12, context=2),
]


def test_packed_documents_equal_one_process(tmp_path: Path) -> None:
    expected = []
    for one in PACKED:
        model, differs = VARIANTS[variant_of(one)]
        expected.append(run_packed(Layout("one", model, {}, B, differs).config(1), 1, B))
    configs = [one.config(2) for one in PACKED]
    run_ranks(check_packed, 2, tmp_path, PACKED, configs, expected)


def run_packed(config: Config, world: int, micro_batch: int) -> list[float]:
    """Losses and norms of three steps, and a held-out loss."""
    engine, mesh = build(config, world)
    found = []
    for step in range(3):
        found.append(float(engine.forward_backward(packed(step, mesh, micro_batch))))
        found.append(float(engine.step(RATE)))
    return [*found, float(engine.evaluate(packed(5, mesh, micro_batch)))]


def check_packed(layouts: list[Layout], configs: list[Config], expected: list[list[float]]) -> None:
    rules.ENOUGH_ROWS = 1  # several groups of heads
    for one, config, wanted in zip(layouts, configs, expected, strict=True):
        found = run_packed(config, dist.get_world_size(), one.micro_batch)
        assert_close(found, wanted, rtol=1e-5, atol=0, msg=lambda m, one=one: f"{one.name}: {m}")


def test_blocks_compile_whole(tmp_path: Path) -> None:
    kinds = ("gather", "ring", "ulysses")
    configs = [layout("rope", kind, 12, COPIED, context=2).config(2) for kind in kinds]
    run_ranks(check_blocks_compile_whole, 2, tmp_path, configs)


def check_blocks_compile_whole(configs: list[Config]) -> None:
    rules.ENOUGH_ROWS = 1  # several groups of heads
    expected = None
    for config, compiled in [(configs[0], False), *((config, True) for config in configs)]:
        torch._dynamo.reset()
        engine, mesh = build(config, 2)
        if compiled:  # the other block takes as long
            model = engine.model  # type: ignore[attr-defined]
            model.blocks[0].compile(fullgraph=True, backend="aot_eager")
        found = train(engine, mesh, B, 0, 1)
        expected = expected or found
        assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("kind", ["gather", "ring", "ulysses"])
def test_two_gpus_equal_one(kind: str, precision: str, tolerance: float, tmp_path: Path) -> None:
    others = (*ON_GPUS, f"precision={precision}")
    layouts = [
        layout("rope", kind, 3, *others, context=2),
        layout("rope", kind, 3, COPIED, *others, context=2),
    ]
    alone = Layout("one", "llama", {}, B, others).config(1)
    arguments = (alone, [one.config(2) for one in layouts], tolerance)
    run_ranks(check_two_gpus, 2, tmp_path, *arguments, backend="nccl", limit=600)


def test_documents_matter() -> None:
    """Else the test above would show nothing."""
    config = Layout("one", "llama", {}, B, ()).config(1)
    engine, _ = build(config, 1)
    whole = float(engine.evaluate(batches(5, ALONE, B)))
    assert abs(float(engine.evaluate(packed(5, ALONE, B))) - whole) > 1e-4
