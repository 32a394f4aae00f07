"""Training with PyTorch itself: data parallelism by DDP over the tensor-parallel model.

One step, as the gradient sees it: each micro-batch adds the gradient of (its summed loss / valid
tokens of the whole global batch); DDP sums over the data ranks while backward still runs; one small
all-reduce sums what tensor ranks hold in part; then norm, clip, AdamW. So the loss is a mean over
the global batch however it was split.
"""

import contextlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flashtrain.config import Config, Recompute
from flashtrain.data.loader import Batch
from flashtrain.engine.recompute import recompute_blocks
from flashtrain.model.gpt import GPT
from flashtrain.optim.adamw import build_adamw
from flashtrain.parallel.collectives import all_gather
from flashtrain.parallel.gradients import clip_by_norm_, gradient_norm, sum_partial_gradients
from flashtrain.parallel.loss import IGNORED, cross_entropy_sum
from flashtrain.parallel.mesh import Axis, Mesh


class SummedLoss(nn.Module):
    """tokens, labels [B, T] int64 -> fp32 sum of token losses; the unit that DDP wraps."""

    def __init__(self, model: GPT, tensor: Axis) -> None:
        super().__init__()
        self.model, self.tensor = model, tensor

    def head(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.model.logits(hidden)
        start = self.tensor.rank * logits.shape[-1]
        return cross_entropy_sum(logits, labels, self.tensor, start)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.model(tokens), labels)


class NativeEngine:
    """See `base.Engine`."""

    def __init__(self, model: GPT, config: Config, mesh: Mesh, device: torch.device) -> None:
        """`model`: sharded and filled, on `device`. Collective over the mesh when data > 1."""
        self.model, self.mesh, self.device = model, mesh, device
        self.clip_norm = config.optimizer.clip_norm
        self.optimizer = build_adamw(model, config.optimizer)
        self.loss = SummedLoss(model, mesh.tensor)
        if config.trainer.recompute is not Recompute.none:
            recompute_blocks(model, config.trainer.recompute)
        compiles = config.trainer.compile
        if device.type == "cuda" if compiles is None else compiles:
            # block by block: one graph serves all layers, so start-up does not grow with depth
            for block in model.blocks:
                block.compile(dynamic=False)
            self.loss.head = torch.compile(self.loss.head, dynamic=False)  # type: ignore[method-assign]
        self.forward: nn.Module = self.loss
        if mesh.data.size > 1:
            self.forward = DistributedDataParallel(
                self.loss,
                process_group=mesh.data.group,
                bucket_cap_mb=config.engine.bucket_mb,
                gradient_as_bucket_view=True,
                init_sync=False,  # weights are a function of the seed alone: equal already
            )

    def forward_backward(self, batches: list[Batch]) -> Tensor:
        valid = torch.stack([(batch.labels != IGNORED).sum() for batch in batches]).sum()
        self._sum_over_data(valid)
        # DDP divides by the number of data ranks; the loss is a sum over them
        share = self.mesh.data.size / valid.clamp(min=1)
        total = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            with self._summing_gradients(last=index == len(batches) - 1):
                loss = self.forward(batch.tokens, batch.labels)
                (loss * share).backward()
            total += loss.detach()
        self._sum_over_data(total)
        return total / valid.clamp(min=1)

    def step(self, learning_rate: float) -> Tensor:
        sum_partial_gradients(self.model, self.mesh.tensor)
        parameters = list(self.model.parameters())
        norm = gradient_norm(parameters, self.mesh.tensor)
        if self.clip_norm is not None:
            clip_by_norm_(parameters, norm, self.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        sums = torch.zeros(2, device=self.device, dtype=torch.float64)
        for batch in batches:
            sums[0] += self.loss(batch.tokens, batch.labels)
            sums[1] += (batch.labels != IGNORED).sum()
        self._sum_over_data(sums)
        return (sums[0] / sums[1].clamp(min=1)).float()

    @torch.no_grad()
    def next_token_logits(self, tokens: Tensor, position: int) -> Tensor:
        logits = self.model.logits(self.model(tokens))[0, position].float()
        axis = self.mesh.tensor
        if axis.group is None:
            return logits
        return all_gather(logits, axis.size, axis.name).flatten()

    def state(self) -> tuple[GPT, torch.optim.Optimizer]:
        return self.model, self.optimizer

    def _sum_over_data(self, tensor: Tensor) -> None:
        if self.mesh.data.group is not None:
            dist.all_reduce(tensor, group=self.mesh.data.group)

    def _summing_gradients(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if last or not isinstance(self.forward, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.forward.no_sync()
