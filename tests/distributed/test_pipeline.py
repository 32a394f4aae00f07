"""Pipeline parallelism against one process, in fp32: as test_matrix.py, whose checks these are, and
packed documents, other optimizers, changing shapes, gradients that are not finite."""

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from flashtrain.config import Config
from flashtrain.data.loader import Batch
from flashtrain.model.generate import complete
from flashtrain.parallel.mesh import ALONE
from tests.distributed.test_context import packed
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

FOUR = "model.n_layers=4"
VARIANTS = {  # name -> one of test_matrix.MODELS, and what differs
    "tied": ("gpt2", (FOUR,)),
    "untied": ("llama", (FOUR,)),
    "table": ("llama", (FOUR, "position=learned", "model.tied_head=true")),  # in all blocks
    "odd": ("gpt2", ("model.n_layers=5", "model.vocabulary=192")),  # a head as dear as layers
}


def layout(variant: str, kind: str, micro_batch: int, *others: str, **degrees: int) -> Layout:
    model, differs = VARIANTS[variant]
    name = "_".join([variant, kind, *(f"{key}{value}" for key, value in degrees.items())])
    overrides = (*differs, f"parallel.pipeline_schedule={kind}", *others)
    return Layout(name, model, degrees, micro_batch, overrides)


FULL, SELECTIVE = "trainer.recompute=full", "trainer.recompute=selective"
FAST = [
    layout("tied", "1f1b", 3, SELECTIVE, pipeline=2),
    layout("table", "interleaved", 6, pipeline=2),
    layout("tied", "zbv", 3, pipeline=2),
]
WORLDS = {
    2: [
        layout("odd", "1f1b", 4, FULL, pipeline=2),
        layout("untied", "interleaved", 3, "loss.fused=false", pipeline=2),
        layout("tied", "zero_bubble", 3, pipeline=2),
        layout("untied", "zero_bubble", 3, pipeline=2, stages_per_rank=2),
    ],
    3: [
        layout("odd", "1f1b", 2, pipeline=3),  # the rank in the middle has no embedding
        layout("table", "1f1b", 4, "loss.fused=false", pipeline=3),
    ],
    4: [
        layout("tied", "1f1b", 3, SELECTIVE, pipeline=2, tensor=2),
        layout("untied", "1f1b", 3, pipeline=2, replicate=2),
        layout("tied", "1f1b", 3, pipeline=2, shard=2, zero=3),
        layout("untied", "1f1b", 2, pipeline=2, shard=2, zero=2),
        layout("table", "1f1b", 1, pipeline=2, shard=2, zero=1),
        layout("untied", "interleaved", 1, pipeline=2, shard=2, zero=3),
        layout("tied", "interleaved", 3, pipeline=2, tensor=2),
        layout("tied", "zbv", 3, FULL, pipeline=2, replicate=2),
        layout("table", "zero_bubble", 3, SELECTIVE, pipeline=2, replicate=2),
        layout("untied", "1f1b", 6, "attention=torch", pipeline=2, context=2),
        layout("tied", "1f1b", 3, pipeline=4),
        layout("tied", "zero_bubble", 3, pipeline=4),
    ],
    8: [
        layout("tied", "1f1b", 1, pipeline=2, shard=2, tensor=2, zero=2),
        layout("untied", "1f1b", 1, pipeline=2, replicate=2, shard=2, zero=3),
    ],
}


def reference(variant: str, folder: Path) -> Reference:
    model, differs = VARIANTS[variant]
    config = Layout("one", model, {}, B, differs).config(1)
    engine, mesh = build(config, 1)
    losses, norms = train(engine, mesh, B, 0, SAVED)
    save(folder, SAVED, engine, mesh)
    more = train(engine, mesh, B, SAVED, STEPS)
    save(folder, STEPS, engine, mesh)
    return Reference(
        config, losses + more[0], norms + more[1], *look(engine, mesh),
        halve_embedding(engine, mesh), folder,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs on one process save, each once."""
    return tmp_path_factory.mktemp("pipeline")


@functools.cache
def of_one_process(variant: str, folder: Path) -> Reference:
    (folder / variant).mkdir()
    return reference(variant, folder / variant)


SLOW = pytest.mark.slow


def test_schedules_equal_one_process(folder: Path, tmp_path: Path) -> None:
    compare(2, FAST, folder, tmp_path)


@SLOW
@pytest.mark.parametrize("world", WORLDS)
def test_pipelines_equal_one_process(world: int, folder: Path, tmp_path: Path) -> None:
    compare(world, WORLDS[world], folder, tmp_path)


def compare(world: int, layouts: list[Layout], folder: Path, tmp_path: Path) -> None:
    configs = [one.config(world) for one in layouts]
    references = {name: of_one_process(name, folder) for name in map(variant_of, layouts)}
    arguments = (layouts, configs, references, tmp_path)
    run_ranks(check_layouts, world, tmp_path, *arguments, limit=300)
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


# an optimizer of whole matrices; hidden states that are scaled once, at the head
DIFFERS = ("optimizer=muon", "model.parametrization=mup", "model.base_width=16")
OTHERS = [
    layout("table", "1f1b", 3, *DIFFERS, pipeline=2),
    layout("untied", "interleaved", 3, *DIFFERS, pipeline=2),
]


def test_packed_documents_muon_and_other_shapes_equal_one_process(tmp_path: Path) -> None:
    expected = []
    for one in OTHERS:
        model, differs = VARIANTS[variant_of(one)]
        alone = Layout("one", model, {}, B, (*differs, *DIFFERS)).config(1)
        expected.append(run_others(alone, 1, one.micro_batch))
    configs = [one.config(2) for one in OTHERS]
    run_ranks(check_others, 2, tmp_path, OTHERS, configs, expected)


def run_others(config: Config, world: int, micro_batch: int) -> list[float]:
    """Losses and norms of steps of all shapes, a held-out loss, and ids that are drawn."""
    engine, mesh = build(config, world)
    steps = [packed(step, mesh, micro_batch) for step in range(2)]
    short = [Batch(*(x[:, : T // 2] for x in (b.tokens, b.labels)))
             for b in batches(2, mesh, micro_batch)]  # fmt: skip
    found = []
    for parts in [*steps, short, short[: len(short) // 2], packed(3, mesh, micro_batch)]:
        found.append(float(engine.forward_backward(parts)))
        found.append(float(engine.step(RATE)))
    found.append(float(engine.evaluate(packed(5, mesh, micro_batch))))
    for drawn in complete(engine.decoder(), [[1, 2, 3], [4]], 5, max_length=T):
        found += map(float, drawn)
    return found


def check_others(layouts: list[Layout], configs: list[Config], expected: list[list[float]]) -> None:
    for one, config, wanted in zip(layouts, configs, expected, strict=True):
        found = run_others(config, 2, one.micro_batch)
        assert_close(found, wanted, rtol=2e-5, atol=0, msg=lambda m, one=one: f"{one.name}: {m}")


def test_a_gradient_that_is_not_finite_moves_no_rank(tmp_path: Path) -> None:
    run_ranks(check_a_bad_step, 2, tmp_path, layout("tied", "1f1b", 6, pipeline=2).config(2))


def check_a_bad_step(config: Config) -> None:
    engine, mesh = build(config, 2)
    train(engine, mesh, 6, 0, 1)
    held = engine.state().tensors
    before = {name: local.tensor.detach().clone() for name, local in held.items()}
    engine.forward_backward(batches(1, mesh, 6))
    if mesh.pipeline.rank == 1:
        engine.parameters["norm.weight"].grad[0] = torch.nan  # type: ignore[attr-defined]
    assert engine.step(RATE).isnan()
    for name, local in held.items():
        assert torch.equal(local.tensor, before[name]), name


@SLOW
def test_blocks_compile_whole(tmp_path: Path) -> None:
    run_ranks(
        check_blocks_compile_whole, 2, tmp_path, layout("tied", "1f1b", 6, pipeline=2).config(2)
    )


def check_blocks_compile_whole(config: Config) -> None:
    expected = train(*build(config, 2), 6, 0, 1)
    engine, mesh = build(config, 2)
    (stage,) = engine.stages  # type: ignore[attr-defined]
    first, *_ = stage.model.blocks  # the others take as long
    first.compile(fullgraph=True, backend="aot_eager")
    assert_close(train(engine, mesh, 6, 0, 1), expected, rtol=1e-5, atol=0)


ON_TWO = [
    layout("tied", "1f1b", 3, pipeline=2),
    layout("tied", "interleaved", 3, pipeline=2),
    layout("tied", "zero_bubble", 3, pipeline=2),
    layout("tied", "zbv", 3, pipeline=2),
]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_two_gpus_equal_one(precision: str, tolerance: float, tmp_path: Path) -> None:
    others = (*ON_GPUS, f"precision={precision}")
    model, differs = VARIANTS["tied"]
    alone = Layout("one", model, {}, B, (*differs, *others)).config(1)
    configs = []
    for one in ON_TWO:
        one.others = (*one.others, *others)
        configs.append(one.config(2))
    run_ranks(check_gpus, 2, tmp_path, alone, configs, tolerance, backend="nccl", limit=600)


def check_gpus(alone: Config, configs: list[Config], tolerance: float) -> None:
    check_two_gpus(alone, configs, tolerance)
    device = torch.device("cuda", dist.get_rank())
    one, _ = build(alone, 1, device)
    expected = float(one.evaluate(batches(6, ALONE, 1, device)))
    wanted = one.decoder().logits(batches(7, ALONE, 1, device)[5].tokens)
    for config in configs:
        engine, mesh = build(config, 2, device)
        found = float(engine.evaluate(batches(6, mesh, 1, device)))
        assert_close(found, expected, rtol=tolerance, atol=0)
        logits = engine.decoder().logits(
            batches(7, ALONE, 1, device)[5].tokens, torch.tensor([T - 1], device=device)
        )
        assert_close(logits[0], wanted[-1], rtol=tolerance, atol=tolerance)
