"""Claims about how a model comes to be."""

import torch

from flashtrain.build import build_model, materialize
from flashtrain.compose import load
from flashtrain.model.gpt import GPT
from flashtrain.parallel.mesh import SINGLE

TINY = ["data=random", "model.vocabulary=128", "model.d_model=32", "data.sequence_length=16"]
CPU = torch.device("cpu")


def test_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (
        build_model(load([*TINY, f"seed={seed}"]), SINGLE, CPU) for seed in (1, 1, 2)
    )
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_materialize_keeps_ties_and_notes() -> None:
    config = load(TINY)
    with torch.device("meta"):
        model = GPT(config.model, config.position, max_length=16)
    model.embedding.weight.note = "kept"  # type: ignore[attr-defined]
    materialize(model, CPU)
    assert model.head.weight is model.embedding.weight
    assert model.embedding.weight.note == "kept"
    assert all(parameter.device == CPU for parameter in model.parameters())
