"""Documents packed into one sequence lose exactly what each loses alone, in fp32."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flashtrain.build import build_model
from flashtrain.compose import load
from flashtrain.config import Config
from flashtrain.data.loader import Batch
from flashtrain.data.prepare import Recipe, prepare
from flashtrain.data.samples import IGNORED
from flashtrain.data.source import open_loader, prepare_source
from flashtrain.engine.native import NativeEngine
from flashtrain.model.gpt import GPT
from flashtrain.model.position import places_in
from flashtrain.parallel import loss
from flashtrain.parallel.mesh import SINGLE, Mesh

CPU = torch.device("cpu")
T = 64
POSITIONS = [
    "position=none", "position=alibi", "position=rope", "position=rope position.applies_to=[q]",
    "position=rope position.applies_to=[q,k,v]", "position=learned",
    "position=learned position.applies_to=[embedding]", "position=sinusoidal",
    "position=sinusoidal position.applies_to=[embedding]",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    lines = [f'{{"text": "{"abc "[: i % 4]}{i * 7919} {"x" * (i * 5 % 97)}"}}\n' for i in range(90)]
    (folder / "a.jsonl").write_text("".join(lines))
    prepare([folder / "a.jsonl"], folder / "shards", Recipe("bytes", validation_share=0.2))
    return folder


def config(folder: Path, packing: str, *overrides: str) -> Config:
    return prepare_source(
        load([
            "experiment=null", "data=shards", f"data.path={folder / 'shards'}", f"run_dir={folder}",
            f"data.packing={packing}", f"data.sequence_length={T}", "data.batch_size=4",
            "data.micro_batch_size=2", "model.n_layers=2", "model.d_model=32", "model.n_heads=2",
            "precision=fp32", "trainer.compile=false", "trainer.evaluate_sequences=4",
            "trainer.steps=3", *overrides,
        ]),
        1,
    )  # fmt: skip


def batches(config: Config, step: int = 0) -> list[Batch]:
    with open_loader(config, 0, 1, CPU) as loader:
        return loader.step(step)


def token_losses(model: GPT, tokens: Tensor, labels: Tensor, documents: Tensor | None) -> Tensor:
    logits = model.logits(model(tokens, documents))
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)


def cut(batch: Batch) -> list[tuple[int, slice]]:
    """(row, columns) of every document."""
    assert batch.documents is not None
    found = []
    for row, numbers in enumerate(batch.documents.tolist()):
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), T]
        found += [(row, slice(a, b)) for a, b in pairwise(edges)]
    return found


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_packed_document_loses_what_it_loses_alone(
    folder: Path, packing: str, position: str
) -> None:
    found = config(folder, packing, *position.split())
    model = build_model(found, SINGLE, CPU)
    for parameter in model.parameters():  # a fresh model hardly attends to anything
        parameter.data.mul_(4)
    together = alone = torch.zeros(())
    for batch in batches(found):
        assert batch.documents is not None and int(batch.documents.max()) > 0
        losses = token_losses(model, *batch)
        together = together + losses.sum()
        for row, columns in cut(batch):
            tokens, labels = (
                batch.tokens[row : row + 1, columns],
                batch.labels[row : row + 1, columns],
            )
            own = token_losses(model, tokens, labels, None)
            torch.testing.assert_close(losses[row : row + 1, columns], own, rtol=2e-5, atol=2e-5)
            alone = alone + own.sum()
    parameters = list(model.parameters())
    for packed, single in zip(
        torch.autograd.grad(together, parameters), torch.autograd.grad(alone, parameters),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(packed, single, rtol=1e-4, atol=1e-4)


def test_without_documents_the_losses_differ(folder: Path) -> None:
    # what the tests above would pass by, if documents had no effect
    found = config(folder, "best_fit")
    model = build_model(found, SINGLE, CPU)
    for parameter in model.parameters():
        parameter.data.mul_(4)
    batch = batches(found)[0]
    apart, run_together = token_losses(model, *batch), token_losses(model, *batch[:2], None)
    assert batch.documents is not None
    first = batch.documents == 0
    torch.testing.assert_close(apart[first], run_together[first], rtol=2e-5, atol=2e-5)
    assert (apart[~first] - run_together[~first]).abs().max() > 0.01


def test_the_engine_counts_what_is_learned_from(folder: Path) -> None:
    found = config(folder, "best_fit")
    engine = NativeEngine(
        build_model(found, SINGLE, CPU), found,
        Mesh(world_size=1, rank=0, tensor=SINGLE, data=SINGLE), CPU,
    )  # fmt: skip
    with open_loader(found, 0, 1, CPU) as loader:
        # the last step of an epoch has the padded sequences; any step has to be right
        for step in range(4):
            own = loader.step(step)
            with torch.no_grad():
                losses = torch.cat([token_losses(engine.model, *batch).flatten() for batch in own])
            labels = torch.cat([batch.labels.flatten() for batch in own])
            expected = losses.sum() / (labels != IGNORED).sum()
            torch.testing.assert_close(engine.forward_backward(own), expected, rtol=1e-5, atol=0)
            engine.step(1e-3)
        held_out = list(loader.evaluation(4))
    assert all(batch.documents is not None for batch in held_out)
    assert float(engine.evaluate(held_out)) > 0


def test_padding_is_what_the_loss_leaves_out() -> None:
    assert IGNORED == loss.IGNORED


def test_places_count_from_the_first_token_of_a_document() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 2, 2], [5, 5, 4, 5, 5, 5]])
    assert places_in(documents).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 0, 1, 2]]
    assert places_in(documents[:, :1]).tolist() == [[0], [0]]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("position", "backend"),
    [  # PyTorch would add ALiBi's bias in bf16, so "torch" refuses it
        (f"position={kind}", backend)
        for kind in ("rope", "learned", "alibi")
        for backend in ("auto", "triton", "torch")
        if (kind, backend) != ("alibi", "torch")
    ],
)
def test_on_a_gpu_in_bf16_documents_stay_apart(folder: Path, position: str, backend: str) -> None:
    """Compiled blocks and the fused kernels, beside the CPU in fp32: what rounding changes is small
    beside what attention over the ends of documents would change."""
    size = ["model.d_model=128", "model.head_size=64", position]
    exact = config(folder, "best_fit", *size)
    fast = config(
        folder, "best_fit", *size, "precision=bf16", "trainer.compile=null",
        f"attention.backend={backend}",
    )  # fmt: skip
    gpu = torch.device("cuda")
    models = [build_model(exact, SINGLE, CPU), build_model(fast, SINGLE, gpu)]
    for model in models:
        for parameter in model.parameters():
            parameter.data.mul_(2)
    single = Mesh(world_size=1, rank=0, tensor=SINGLE, data=SINGLE)
    engine = NativeEngine(models[1], fast, single, gpu)
    batch = batches(exact)[0]
    moved = Batch(*(part.to(gpu) for part in batch if part is not None))
    with torch.no_grad():
        expected = token_losses(models[0], *batch)
        merged = token_losses(models[0], *batch[:2], None)
        found = token_losses(engine.model, *moved).float().cpu()
    effect = (merged - expected).abs().mean()
    assert (found - expected).abs().mean() < 0.3 * effect
    loss = engine.forward_backward([moved])  # backward of the same kernels, compiled
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(engine.step(1e-3)))
