"""Pipeline parallelism: a model cut into stages, runs of blocks that stand on different ranks.

With s stages on each of p ranks, rank r holds stages r, r + p, .. (in a V: r and 2p - 1 - r). The
first stage has the embedding, the last one the norm and the head. What two stages need both:

    tied embedding   the first and the last stage each hold the weight. Its gradient is the sum of
                     both; it counts in the norm, and is saved, on the first one.
    position table   where all blocks use one, every rank holds it, and rank 0 counts and saves it.

Initial weights are a function of seed and name, so copies begin equal; equal gradients keep them
so. Names are those of the whole model, which is what a checkpoint goes by.

Dims: B batch, L tokens of this context rank, n tensor ranks, D width.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashtrain.config import Config, ModelConfig, ParallelConfig, PipelineSchedule, Target
from flashtrain.metrics import matrix_parameters
from flashtrain.model.cache import KVCache
from flashtrain.model.gpt import GPT
from flashtrain.model.position import NoPosition
from flashtrain.model.shard import shard_of
from flashtrain.parallel.mesh import SINGLE, Axis, Mesh


class BlockRange(nn.ModuleList):
    """Blocks under the numbers that they have in the whole model."""

    def __init__(self, blocks: Sequence[nn.Module], first: int) -> None:
        super().__init__()
        for number, block in enumerate(blocks, first):
            self.add_module(str(number), block)


class Stage(nn.Module):
    """`x [B, L/n, D], tokens [B, L] int64 -> [B, L/n, D]`, hidden states before and after.

    The first stage takes tokens as x too; the last one's output is ready for its head.
    """

    def __init__(self, model: GPT, number: int, count: int) -> None:
        super().__init__()
        self.model, self.number, self.count = model, number, count

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        hidden: Tensor = self.model(tokens, documents, cache, x if self.number else None)
        return hidden


def holders(parallel: ParallelConfig) -> list[int]:
    """The pipeline rank of every stage, in the order of the stages. `parallel` is resolved."""
    assert parallel.stages_per_rank is not None
    ranks = list(range(parallel.pipeline))
    if parallel.pipeline_schedule is PipelineSchedule.zbv:
        return ranks + ranks[::-1]
    return ranks * parallel.stages_per_rank


def split_layers(n_layers: int, stages: int, head: float) -> list[int]:
    """How many layers each stage gets, so that the slowest is as fast as can be.

    head: time of the head and the loss, in layers; the last stage has them. Among the others, the
    later ones get one more where they do not divide: earlier ones keep more micro-batches.
    Raises ValueError when a stage would have no layer.
    """
    if n_layers < stages:
        raise ValueError(f"{n_layers} layers leave some of {stages} stages without one")
    if stages == 1:
        return [n_layers]
    others = stages - 1

    def slowest(last: int) -> tuple[float, int]:
        return max(-(-(n_layers - last) // others), last + head), -last

    last = min(range(1, n_layers - others + 1), key=slowest)
    share, more = divmod(n_layers - last, others)
    return [share] * (others - more) + [share + 1] * more + [last]


def head_in_layers(model: ModelConfig) -> float:
    """Products of the head, in those of a layer. `model` is resolved and knows its vocabulary."""
    assert model.vocabulary is not None
    head = model.d_model * model.vocabulary
    return head * model.n_layers / (matrix_parameters(model) - head)


def cut_stages(model: GPT, axis: Axis, parallel: ParallelConfig) -> list[Stage]:
    """This rank's stages of a model on the meta device, whose modules they take over.

    Copies of a parameter that another rank counts and saves are noted as not owned.
    """
    ranks = holders(parallel)
    sizes = split_layers(len(model.blocks), len(ranks), head_in_layers(model.config))
    starts = accumulate(sizes, initial=0)
    stages = [
        Stage(_part(model, number, len(ranks), start, size), number, len(ranks))
        for number, (rank, start, size) in enumerate(zip(ranks, starts, sizes, strict=False))
        if rank == axis.rank
    ]
    if axis.rank > 0:
        for name, parameter in stages_parameters(stages):
            if name.startswith(("embedding.", "position.")):
                _disown(parameter)
    return stages


def _part(model: GPT, number: int, count: int, start: int, size: int) -> GPT:
    """The blocks from `start` on, with what else the stage needs of the model."""
    part = copy.copy(model)
    for name, entries in vars(model).items():  # hooks and modules of its own, not of the model
        if isinstance(entries, dict):
            vars(part)[name] = entries.copy()
    part.blocks = BlockRange(list(model.blocks)[start : start + size], start)
    first, last = number == 0, number == count - 1
    absent = []
    if not first and not (last and model.config.tied_head):
        absent.append("embedding")
    if not last:
        absent += ["norm", "head"]
        part.output_ratio = 1.0
    for name in absent:
        part.set_submodule(name, nn.Identity())
    if not first and model.position_on_embedding:
        part.position, part.position_on_embedding = NoPosition(), False
    return part


def _disown(parameter: nn.Parameter) -> None:
    shard = shard_of(parameter)
    pieces = tuple(dataclasses.replace(piece, owned=False) for piece in shard.pieces)
    noted = dataclasses.replace(shard, pieces=pieces)
    parameter.shard = noted  # type: ignore[attr-defined]


def stages_parameters(stages: Sequence[Stage]) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter of this rank once, under its name in the whole model."""
    seen: set[str] = set()
    for stage in stages:
        for name, parameter in stage.model.named_parameters():
            if name not in seen:
                seen.add(name)
                yield name, parameter


def shared_axis(name: str, config: Config, mesh: Mesh) -> Axis:
    """The ranks that hold a parameter of this rank too and have other terms of its gradient."""
    if name.startswith("position.") and Target.embedding not in config.position.applies_to:
        return mesh.pipeline
    if name.startswith("embedding.") and config.model.tied_head:
        in_a_v = config.parallel.pipeline_schedule is PipelineSchedule.zbv
        return SINGLE if in_a_v else mesh.ends  # in a V one rank has both ends
    return SINGLE


class Chain:
    """Forward passes through all stages, one batch after the other, without gradients.

    A rank goes on to its next batch while later ones have this one, so batches fill a pipeline of
    one stage per rank.
    """

    def __init__(
        self, stages: Sequence[Stage], mesh: Mesh, parallel: ParallelConfig, dtype: torch.dtype
    ) -> None:
        """dtype: of hidden states between stages."""
        self.stages = {stage.number: stage for stage in stages}
        self.ranks = holders(parallel)
        self.axis, self.tensor, self.dtype = mesh.pipeline, mesh.tensor, dtype
        self.last_rank = self.ranks[-1]

    def __call__(
        self, tokens: Tensor, documents: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor | None:
        """The last stage's output on the rank that holds it, None on the others. Collective."""
        batch, length = tokens.shape
        x = tokens
        for number, stage in self.stages.items():
            before = self.ranks[number - 1] if number else self.axis.rank
            if before != self.axis.rank:
                shape = (batch, length // self.tensor.size, stage.model.config.d_model)
                x = torch.empty(shape, dtype=self.dtype, device=tokens.device)
                dist.recv(x, group=self.axis.group, group_src=before)
            x = stage(x, tokens, documents, cache)
            after = self.axis.rank if stage.is_last else self.ranks[number + 1]
            if after != self.axis.rank:
                dist.send(x.contiguous(), group=self.axis.group, group_dst=after)
        return x if self.axis.rank == self.last_rank else None
