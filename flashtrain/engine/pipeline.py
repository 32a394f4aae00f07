"""Training with layers spread over ranks: PyTorch's pipeline schedules over stages of our model.

One step: the schedule runs forward and backward of all micro-batches through this rank's stages and
sends hidden states and their gradients to its neighbours. Each micro-batch adds the gradient of
(its summed loss / valid tokens of the whole global batch), as in `native.py`; gradients are then
averaged over the data ranks (FSDP does it during backward), and those of what stages share summed.

    1f1b         Narayanan et al. 2020, arXiv:2006.09503 (PipeDream-Flush): of m micro-batches a
                 stage keeps no more than there are stages behind it and itself
    interleaved  Narayanan et al. 2021, arXiv:2104.04473: several short stages on a rank
    zero_bubble  Qi et al. 2024, arXiv:2401.10241, section 2: gradients of weights fill the waits
    zbv          the same, section 6: two stages on a rank, laid out in a V

PyTorch has memory for the hidden states and gradients that each micro-batch receives; of 1f1b only
for those that are kept at a time.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from flashtrain.checkpoint import State, collect_parameters, prepare, refuse_buffers
from flashtrain.config import Config, PipelineSchedule, Recompute
from flashtrain.data.loader import Batch
from flashtrain.engine.compile import compile_blocks
from flashtrain.engine.decoder import Decoder
from flashtrain.engine.deferred import DeferredGradients
from flashtrain.engine.evaluation import mean_loss, sum_over
from flashtrain.engine.native import SummedLoss
from flashtrain.engine.recompute import recompute_blocks
from flashtrain.engine.update import update
from flashtrain.model.cache import KVCache
from flashtrain.model.dtypes import DTYPES
from flashtrain.model.gpt import GPT
from flashtrain.optim import build_optimizer
from flashtrain.parallel.context import own_batch
from flashtrain.parallel.fsdp import (
    give_back,
    held_parameters,
    set_pass,
    sharded_parameters,
    take_gradients,
)
from flashtrain.parallel.gradients import average_gradients, sum_gradients
from flashtrain.parallel.loss import IGNORED
from flashtrain.parallel.mesh import Axis, Mesh
from flashtrain.parallel.pipeline import Chain, Stage, shared_axis
from flashtrain.parallel.transport import forget_transports
from flashtrain.pipelining import SPLIT_BACKWARD

log = logging.getLogger("flashtrain.engine")

SCHEDULES: dict[PipelineSchedule, Any] = {
    PipelineSchedule["1f1b"]: Schedule1F1B,
    PipelineSchedule.interleaved: ScheduleInterleaved1F1B,
    PipelineSchedule.zero_bubble: ScheduleInterleavedZeroBubble,
    PipelineSchedule.zbv: ScheduleZBVZeroBubble,
}


class PipelineEngine:
    """See `base.Engine`."""

    skips_bad_steps = True

    def __init__(
        self,
        stages: Sequence[Stage],
        names: frozenset[str],
        config: Config,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        """stages: of this rank, sharded and filled, on `device`. names: of the parameters of the
        whole model. Collective for Muon."""
        self.stages, self.mesh, self.device, self.config = stages, mesh, device, config
        self.dtype = DTYPES[config.precision.compute]
        self.parameters: dict[str, nn.Parameter] = {}
        for stage in stages:
            refuse_buffers(stage.model)
            self.parameters |= held_parameters(stage.model)
        sharded = (sharded_parameters(stage.model, self.parameters) for stage in stages)
        self.sharded = [pair for pairs in sharded for pair in pairs]
        self.elsewhere = names - self.parameters.keys()
        self.optimizer = build_optimizer(self.parameters, config, mesh)
        self.chain = Chain(stages, mesh, config.parallel, self.dtype)
        final = [stage.model for stage in stages if stage.is_last]
        self.head = SummedLoss(final[0], mesh.tensor, config.loss) if final else None
        self.deferred: dict[int, DeferredGradients] = {}
        if config.parallel.pipeline_schedule in SPLIT_BACKWARD:
            self.deferred = {stage.number: DeferredGradients(stage.model) for stage in stages}
        self._wrap_blocks()
        # FSDP averages what it cut, the rest is averaged here
        own = {id(parameter) for stage in stages for parameter in stage.parameters()}
        self.whole = [p for p in self.parameters.values() if id(p) in own]
        axes = {name: shared_axis(name, config, mesh) for name in self.parameters}
        shared = sorted(name for name, axis in axes.items() if axis.size > 1)  # alike on all ranks
        self.shared = [(self.parameters[name], axes[name]) for name in shared]
        self.scheduled: tuple[object, Any] | None = None
        self.share = self.total = torch.zeros((), device=device)

    def _wrap_blocks(self) -> None:
        trainer = self.config.trainer
        compiles = self.device.type == "cuda" if trainer.compile is None else trainer.compile
        if self.deferred and compiles:  # a compiled block has one backward
            compiles = False
            if self.mesh.rank == 0:
                kind = self.config.parallel.pipeline_schedule.name
                log.warning("parallel.pipeline_schedule=%s: blocks run uncompiled", kind)
        for stage in self.stages:
            if trainer.recompute is not Recompute.none:
                recompute_blocks(stage.model, trainer.recompute)
            if compiles:
                compile_blocks(stage.model)
        if compiles and self.head is not None:
            self.head.compile_head()

    def forward_backward(self, batches: list[Batch]) -> Tensor:
        batches = [own_batch(batch, self.mesh.context) for batch in batches]
        valid = torch.stack([(batch.labels != IGNORED).sum() for batch in batches]).sum()
        sum_over(self.mesh.tokens, valid)
        # averaging divides by the number of ranks; the loss is a sum over them
        self.share = self.mesh.tokens.size / valid.clamp(min=1)
        self.total = torch.zeros((), device=self.device)
        tokens, labels = (torch.cat(part) for part in list(zip(*batches, strict=True))[:2])
        inputs: dict[str, Tensor] = {"tokens": tokens}
        if batches[0].documents is not None:
            inputs["documents"] = torch.cat([b.documents for b in batches])  # type: ignore[misc]
        first = (tokens,) if self.stages[0].number == 0 else ()
        schedule = self._schedule(len(batches), tuple(batches[0].tokens.shape))
        schedule.step(*first, target=labels, return_outputs=False, **inputs)
        take_gradients(self.sharded)
        sum_over(self.mesh.tokens, self.total)
        sum_over(self.mesh.pipeline, self.total)
        return self.total / valid.clamp(min=1)

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """What backward starts from, of one micro-batch on the last stage."""
        assert self.head is not None
        loss = self.head.head(hidden, labels)
        self.total = self.total + loss.detach()
        return loss * self.share

    def _schedule(self, count: int, shape: tuple[int, ...]) -> Any:
        """Of `count` micro-batches of tokens of a shape. Only the latest is kept: it has memory for
        what each micro-batch receives."""
        if self.scheduled is not None and self.scheduled[0] == (count, shape):
            return self.scheduled[1]
        self.scheduled = None
        kind = self.config.parallel.pipeline_schedule
        tokens = torch.empty(shape, dtype=torch.int64, device="meta")
        length, width = shape[1] // self.mesh.tensor.size, self.config.model.d_model
        hidden = torch.empty(
            shape[0], length, width, dtype=self.dtype, device="meta", requires_grad=True
        )
        single = kind is PipelineSchedule["1f1b"]
        stages = [
            _ScheduledStage(
                stage, hidden if stage.number else tokens, hidden, self.mesh.pipeline,
                self.device, self.config.parallel.zero, self.deferred.get(stage.number), single,
            )
            for stage in self.stages
        ]  # fmt: skip
        schedule = SCHEDULES[kind](
            stages[0] if single else stages, count, loss_fn=self._loss, scale_grads=False
        )
        self.scheduled = (count, shape), schedule
        return schedule

    def step(self, learning_rate: float) -> Tensor:
        average_gradients(self.whole, self.mesh.tokens, self.config.engine.bucket_mb << 20)
        for parameter, axis in self.shared:
            sum_gradients([parameter], axis)
        norm = update(
            self.parameters.values(),
            self.optimizer,
            self.mesh,
            learning_rate,
            self.config.optimizer.clip_norm,
        )
        for parameter, _ in self.sharded:
            parameter.grad = None
        return norm

    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        own = (own_batch(batch, self.mesh.context) for batch in batches)
        loss = mean_loss(
            self._held_out_loss, own, self.mesh.tokens, self.device, self.mesh.pipeline
        )
        self._give_back()
        return loss

    def _held_out_loss(
        self, tokens: Tensor, labels: Tensor, documents: Tensor | None = None
    ) -> Tensor:
        """The summed loss where the last stage is, 0 on other ranks."""
        hidden = self.chain(tokens, documents)
        if hidden is None or self.head is None:
            return torch.zeros((), device=self.device)
        return self.head.head(hidden, labels)

    def _give_back(self) -> None:
        for stage in self.stages:
            give_back(stage.model)

    def decoder(self) -> Decoder:
        return PipelineDecoder(self.chain, self.mesh.tensor, self._give_back)

    def state(self, saved: Collection[str] = ()) -> State:
        prepare(self.parameters, self.optimizer, saved)
        own = collect_parameters(self.parameters, self.optimizer.state)
        return State(own.tensors, own.scalars, self.elsewhere)

    def loaded(self) -> None:
        """Nothing to do: the views are the weights themselves."""

    def close(self) -> None:
        forget_transports()


class _ScheduledStage(PipelineStage):
    """A stage as PyTorch's schedules take it; FSDP inside it is ours to steer, not theirs."""

    def __init__(
        self, stage: Stage, before: Tensor, after: Tensor, axis: Axis, device: torch.device,
        zero: int, deferred: DeferredGradients | None, is_1f1b: bool,
    ) -> None:  # fmt: skip
        """before, after: what comes in and goes out, on the meta device."""
        super().__init__(
            stage, stage.number, stage.count, device,
            input_args=(before,), output_args=(after,), group=axis.group,
            dw_builder=None if deferred is None else deferred.take,
        )  # fmt: skip
        self.stage, self.zero = stage, zero
        # micro-batches that a stage of 1f1b keeps; 0: another schedule
        self.window = stage.count - stage.number if is_1f1b else 0

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Of 1f1b: into the memory of a micro-batch whose backward is over, where PyTorch has
        memory for each."""
        if 0 < self.window <= fwd_chunk_id:
            self.args_recv_info[fwd_chunk_id] = self.args_recv_info[fwd_chunk_id - self.window]
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.window and bwd_chunk_id:
            self.grad_recv_info[bwd_chunk_id] = self.grad_recv_info[bwd_chunk_id - 1]
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # torch 2.11 greets neighbours of a V on the same rank too, which gloo cannot
        ops = super()._get_init_p2p_neighbors_ops()
        return [op for op in ops if op.peer != dist.get_rank()]

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        set_pass(self.stage.model, self.zero, last_backward)
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)


class PipelineDecoder(Decoder):
    """A model asked for its next token; every pass goes through all stages, and every rank gets the
    logits. Collective over the pipeline and the tensor ranks, and those that hold parts of weights.

    Every rank has room for the keys and values of all layers, and fills those of its own.
    """

    def __init__(self, chain: Chain, tensor: Axis, after: Any) -> None:
        first = next(iter(chain.stages.values()))
        super().__init__(first.model, tensor, after)
        self.chain = chain

    @property
    def dtype(self) -> torch.dtype:
        return self.chain.dtype

    def _logits(self, tokens: Tensor, last: Tensor | None, cache: KVCache | None) -> Tensor:
        rows = tokens.shape[1] if last is None else len(last)
        vocabulary = self.model.config.vocabulary
        assert vocabulary is not None
        return self._from_last(
            self.chain(tokens, cache=cache),
            (rows, vocabulary),
            lambda hidden, model: self._project(hidden, model, last),
        )

    def _scores(self, tokens: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        return self._from_last(
            self.chain(tokens, cache=None),
            (2, len(places)),
            lambda hidden, model: self._judge(hidden, model, places, targets),
        )

    def _from_last(
        self,
        hidden: Tensor | None,
        shape: tuple[int, int],
        finish: Callable[[Tensor, GPT], Tensor],
    ) -> Tensor:
        """What the rank of the last stage makes of its hidden states, on every rank."""
        if hidden is None:
            result = torch.empty(shape, device=self.device)
        else:
            *_, final = self.chain.stages.values()
            result = finish(hidden, final.model).contiguous()
        dist.broadcast(result, group=self.chain.axis.group, group_src=self.chain.last_rank)
        return result
