"""Calls of linear_cross_entropy and what they must give, from plain PyTorch in any dtype."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kernels.linear_cross_entropy import VocabularyShard, linear_cross_entropy
from kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

SCALE = 0.3  # the gradient that arrives at the loss; no power of two, so it rounds


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; labels are random, every fifth ignored."""

    N: int = 37
    V: int = 75  # the interpreter's blocks have 32 columns
    D: int = 24
    chunk: int | None = 16
    ignored: float = 0.2
    spread: float = 1.0  # standard deviation of the logits
    options: dict[str, Any] = field(default_factory=dict)

    def on_gpu(self) -> "Case":
        """At a size with several of the GPU's blocks and chunks; odd sizes stay odd."""
        chunk = self.chunk and 16 * self.chunk
        return replace(self, N=16 * self.N + 1, V=300 * self.V + self.V % 2, D=8 * self.D,
                       chunk=chunk)  # fmt: skip


CASES = {
    "ragged": Case(),
    "whole blocks": Case(V=64, N=32),
    "less than a block": Case(V=9),
    "one word": Case(V=1),
    "one token": Case(N=1, ignored=0.0),
    "one chunk": Case(chunk=None),
    "a chunk of one": Case(N=5, chunk=1),
    "large logits": Case(spread=30.0),
    "none ignored": Case(ignored=0.0),
    "another ignore index": Case(options={"ignore_index": 3}),
    "softcap": Case(options={"softcap": 2.0}),
    "z-loss": Case(options={"z_loss": 0.01}),
    "everything": Case(spread=5.0, options={"softcap": 4.0, "z_loss": 0.02, "ignore_index": 0}),
}


@dataclass
class Inputs:
    case: Case
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [N]


def inputs_of(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    hidden = torch.randn(case.N, case.D, device=device)
    weight = torch.randn(case.V, case.D, device=device) * (case.spread * case.D**-0.5)
    labels = torch.randint(case.V, (case.N,), device=device)
    ignored = torch.rand(case.N, device=device) < case.ignored
    labels[ignored] = case.options.get("ignore_index", -100)
    return Inputs(case, hidden.to(dtype), weight.to(dtype), labels)


def run(inputs: Inputs, backend: str, **more: Any) -> dict[str, Tensor]:
    """loss, d_hidden and d_weight of the op."""
    leaves = [x.detach().requires_grad_() for x in (inputs.hidden, inputs.weight)]
    options = {"chunk": inputs.case.chunk, **inputs.case.options, **more}
    loss = linear_cross_entropy(*leaves, inputs.labels, backend=backend, **options)
    return _named(loss, leaves)


def run_reference(inputs: Inputs, compute: torch.dtype) -> dict[str, Tensor]:
    """The same with every step in `compute`."""
    leaves = [x.detach().to(compute).requires_grad_() for x in (inputs.hidden, inputs.weight)]
    options = inputs.case.options
    loss = linear_cross_entropy_reference(*leaves, inputs.labels, compute=compute, **options)
    return _named(loss, leaves)


def run_in_shards(inputs: Inputs, backend: str, size: int) -> dict[str, Tensor]:
    """The same over `size` shards of the vocabulary, without processes.

    A first run of each shard only records its statistics; the second has them to combine.
    """
    V = inputs.case.V
    words = V // size
    assert words * size == V
    recorded: list[list[Tensor]] = []

    def recorder(statistics: Tensor) -> Tensor:
        recorded[-1].append(statistics.clone())
        return statistics

    def shard(rank: int, combine: Any) -> VocabularyShard:
        return VocabularyShard(rank * words, V, combine)

    def local(rank: int) -> Inputs:
        part = inputs.weight[rank * words : (rank + 1) * words]
        return replace(inputs, weight=part)

    for rank in range(size):
        recorded.append([])
        with torch.no_grad():
            run_loss(local(rank), backend, shard(rank, recorder))
    results = []
    for rank in range(size):
        chunks = iter([torch.stack(parts) for parts in zip(*recorded, strict=True)])  # [size, 2, n]

        def combined(own: Tensor, chunks: Any = chunks) -> Tensor:
            lse, target = next(chunks).unbind(1)
            return torch.stack([lse.logsumexp(0), target.sum(0)])

        results.append(run(local(rank), backend, shard=shard(rank, combined)))
    for result in results[1:]:
        assert torch.equal(result["loss"], results[0]["loss"])
    return {
        "loss": results[0]["loss"],
        "d_hidden": torch.stack([r["d_hidden"] for r in results]).sum(0),
        "d_weight": torch.cat([r["d_weight"] for r in results]),
    }


def run_loss(inputs: Inputs, backend: str, shard: VocabularyShard | None = None) -> Tensor:
    """The loss alone."""
    options = {"chunk": inputs.case.chunk, **inputs.case.options}
    return linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.labels, backend=backend, shard=shard, **options
    )


def _named(loss: Tensor, leaves: list[Tensor]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, leaves, torch.full_like(loss, SCALE))
    return {"loss": loss.detach(), **dict(zip(("d_hidden", "d_weight"), grads, strict=True))}
