"""Training with PyTorch itself: DDP or FSDP2 over the tensor-parallel model.

One step, as the gradient sees it: each micro-batch adds the gradient of (its summed loss / valid
tokens of the whole global batch); DDP or FSDP sums over the data ranks while backward still runs;
one small all-reduce an axis sums what ranks still hold in part; then norm, clip, step. So the loss
is a mean over the global batch however it was split.

Norm, clip, optimizer and checkpoints see `parameters`: this rank's memory of each parameter, plain
tensors whether they are whole, tensor-parallel shards or parts of those.
"""

import contextlib
from collections.abc import Collection, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flashtrain.checkpoint import State, collect_parameters, prepare, refuse_buffers
from flashtrain.config import Config, LossConfig, Recompute
from flashtrain.data.loader import Batch
from flashtrain.engine.compile import compile_blocks
from flashtrain.engine.decoder import Decoder
from flashtrain.engine.evaluation import mean_loss, sum_over
from flashtrain.engine.graph import DDP_WARMUP, WARMUP, Graphs, uses_graphs
from flashtrain.engine.offload import offload_inputs
from flashtrain.engine.recompute import chunk_mlps, recompute_blocks
from flashtrain.engine.update import set_rates, update
from flashtrain.model.gpt import GPT
from flashtrain.optim import build_optimizer, on_device
from flashtrain.parallel.context import own_batch
from flashtrain.parallel.fsdp import (
    give_back,
    held_parameters,
    set_pass,
    sharded_parameters,
    take_gradients,
)
from flashtrain.parallel.gradients import average_gradients
from flashtrain.parallel.loss import IGNORED, cross_entropy_sum, linear_cross_entropy_sum
from flashtrain.parallel.mesh import Axis, Mesh
from flashtrain.parallel.transport import forget_transports


class SummedLoss(nn.Module):
    """tokens, labels [B, T] int64 -> fp32 sum of token losses; the unit that DDP wraps.

    Without gradients it is the cross-entropy alone: the z-loss is for training only.
    """

    def __init__(self, model: GPT, tensor: Axis, loss: LossConfig) -> None:
        super().__init__()
        self.model, self.tensor, self.config = model, tensor, loss

    def compile_head(self) -> None:
        """What is fused needs no compiler."""
        if not self.config.fused:
            self.head = torch.compile(self.head, dynamic=False)  # type: ignore[method-assign]

    def head(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if self.config.fused:
            return linear_cross_entropy_sum(
                hidden,
                self.model.head.weight,
                labels,
                self.tensor,
                softcap=self.model.config.logit_softcap,
                z_loss=self.config.z_loss if torch.is_grad_enabled() else 0.0,
            )
        logits = self.model.logits(hidden)
        start = self.tensor.rank * logits.shape[-1]
        return cross_entropy_sum(logits, labels, self.tensor, start)

    def forward(self, tokens: Tensor, labels: Tensor, documents: Tensor | None = None) -> Tensor:
        return self.head(self.model(tokens, documents), labels)


class NativeEngine:
    """See `base.Engine`."""

    skips_bad_steps = True

    def __init__(self, model: GPT, config: Config, mesh: Mesh, device: torch.device) -> None:
        """`model`: sharded and filled, on `device`. Collective over the mesh when data > 1."""
        self.model, self.mesh, self.device = model, mesh, device
        self.clip_norm, self.zero = config.optimizer.clip_norm, config.parallel.zero
        refuse_buffers(model)
        self.parameters = held_parameters(model)
        self.sharded = sharded_parameters(model, self.parameters)
        self.optimizer = build_optimizer(self.parameters, config, mesh)
        self.loss = SummedLoss(model, mesh.tensor, config.loss)
        chunk_mlps(model, config.trainer.mlp_chunks)
        if config.trainer.recompute is not Recompute.none:
            recompute_blocks(model, config.trainer.recompute)
        compiles = config.trainer.compile
        if device.type == "cuda" if compiles is None else compiles:
            compile_blocks(model)
            self.loss.compile_head()
        if config.trainer.offload_activations:
            offload_inputs(model, device, config.trainer.offload_keep)
        records = uses_graphs(config, device)
        warmup = WARMUP
        self.forward: nn.Module = self.loss
        # what FSDP leaves whole on every rank of the shard axis; its gradients are averaged here
        self.unsharded: list[nn.Parameter] = []
        if mesh.shard.size > 1:
            own = {id(parameter) for parameter in model.parameters()}
            self.unsharded = [p for p in self.parameters.values() if id(p) in own]
        elif mesh.replicate.size > 1:
            # DDP keeps autograd's nodes that take gradients, and each runs on the stream of its
            # making: on the default one nothing can be recorded
            stream = torch.cuda.Stream(device) if records else None
            with torch.cuda.stream(stream):
                self.forward = DistributedDataParallel(
                    self.loss,
                    process_group=mesh.replicate.group,
                    bucket_cap_mb=config.engine.bucket_mb,
                    gradient_as_bucket_view=True,
                    init_sync=False,  # weights are a function of the seed alone: equal already
                )
            warmup = DDP_WARMUP
        self.graphs: Graphs | None = None
        if records:
            whole = self._update if on_device(self.optimizer) else None
            self.graphs = Graphs(self._passes, whole, self.parameters.values(), warmup=warmup)

    def forward_backward(self, batches: list[Batch]) -> Tensor:
        batches = [own_batch(batch, self.mesh.context) for batch in batches]
        run = self._passes if self.graphs is None else self.graphs.passes
        # of the global batch, a mean; of this rank's tokens, a sum
        loss, self.own_loss = run(batches)
        return loss

    def _passes(self, batches: list[Batch]) -> tuple[Tensor, Tensor]:
        valid = torch.stack([(batch.labels != IGNORED).sum() for batch in batches]).sum()
        sum_over(self.mesh.tokens, valid)
        # DDP and FSDP divide by the number of their ranks; the loss is a sum over them
        share = self.mesh.tokens.size / valid.clamp(min=1)
        total = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            set_pass(self.model, self.zero, last)
            with self._summing_gradients(last):
                loss = self.forward(*batch)
                (loss * share).backward()
            total += loss.detach()
        take_gradients(self.sharded)
        own = total.clone()
        sum_over(self.mesh.tokens, total)
        return total / valid.clamp(min=1), own

    def step(self, learning_rate: float) -> Tensor:
        set_rates(self.optimizer, learning_rate)
        if self.graphs is None or self.graphs.run_update is None:
            return self._update()
        return self.graphs.update()

    def _update(self) -> Tensor:
        average_gradients(self.unsharded, self.mesh.tokens)
        norm = update(self.parameters.values(), self.optimizer, self.mesh, None, self.clip_norm)
        for parameter, _ in self.sharded:
            parameter.grad = None
        return norm

    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        own = (own_batch(batch, self.mesh.context) for batch in batches)
        loss = mean_loss(self.loss, own, self.mesh.tokens, self.device)
        give_back(self.model)
        return loss

    def decoder(self) -> Decoder:
        return Decoder(self.model, self.mesh.tensor, after=partial(give_back, self.model))

    def state(self, saved: Collection[str] = ()) -> State:
        prepare(self.parameters, self.optimizer, saved)
        return collect_parameters(self.parameters, self.optimizer.state)

    def loaded(self) -> None:
        """Nothing to do: the views are the weights themselves."""

    def close(self) -> None:
        self.graphs = None  # NCCL ends no group while a graph holds operations of it
        forget_transports()

    def _summing_gradients(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if last or not isinstance(self.forward, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.forward.no_sync()
