"""Training with DeepSpeed's ZeRO 1, 2, 3 over our tensor-parallel model; its only importer.

DeepSpeed keeps the weights that are computed with (`precision.compute`), averages gradients over
the data ranks, clips and updates flat fp32 partitions. Ours stay: the tensor-parallel groups, which
it sees through `Groups`; sums of partial gradients over them; initial weights, written into the
fp32 partitions, so that they are those of any other engine to the last bit; and checkpoints, in
which a partition is boxes of logical tensors, as every other shard is.
"""

import dataclasses
import logging
import os
from collections.abc import Collection, Iterable
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

# read when it is imported; without it DeepSpeed guesses, and says so on every rank
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed
import deepspeed.ops
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError  # DeepSpeed's own dependency

from flashtrain.checkpoint import State, adam_state, collect_parameters, refuse_buffers
from flashtrain.config import Config, ConfigError, Recompute
from flashtrain.data.loader import Batch
from flashtrain.engine.compile import compile_blocks
from flashtrain.engine.decoder import Decoder
from flashtrain.engine.evaluation import mean_loss, sum_over
from flashtrain.engine.native import SummedLoss
from flashtrain.engine.recompute import recompute_blocks
from flashtrain.engine.zero_config import zero_config
from flashtrain.model.attention import Attention
from flashtrain.model.gpt import GPT
from flashtrain.model.init import init_parameters
from flashtrain.model.linear import Linear
from flashtrain.model.shard import Span, whole
from flashtrain.optim.adamw import build_adamw
from flashtrain.parallel.loss import IGNORED
from flashtrain.parallel.mesh import Mesh
from flashtrain.parallel.transport import forget_transports


def check_keys(config: Config) -> None:
    """Raise ConfigError for keys of `engine.deepspeed` that are ours or that DeepSpeed refuses."""
    try:
        DeepSpeedZeroConfig(**zero_config(config)["zero_optimization"])
    except ValueError as error:
        raise _refusal(error) from error


def _refusal(error: ValueError) -> ConfigError:
    """DeepSpeed's words in one line."""
    items = error.errors() if isinstance(error, ValidationError) else ()
    said = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in items]
    return ConfigError(f"engine.deepspeed: {'; '.join(said) or ' '.join(str(error).split())}")


class Groups:
    """Our mesh as DeepSpeed asks for it: its `mpu`."""

    def __init__(self, mesh: Mesh) -> None:
        self.tensor, self.data = mesh.tensor, mesh.data
        self.groups = [mesh.tensor.group, mesh.data.group]
        for rank in range(mesh.world_size) if None in self.groups else ():
            alone = dist.new_group([rank])  # DeepSpeed talks to itself, too
            if rank == mesh.rank:
                self.groups = [group or alone for group in self.groups]

    def get_model_parallel_rank(self) -> int:
        return self.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self.tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.groups[0]

    def get_data_parallel_rank(self) -> int:
        return self.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self.data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.groups[1]

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


class DeepSpeedEngine:
    """See `base.Engine`."""

    skips_bad_steps = False

    def __init__(self, model: GPT, config: Config, mesh: Mesh, device: torch.device) -> None:
        """`model`: a tensor-parallel shard with memory on `device`, in the compute dtype; its
        weights are filled here. Collective. Raises ConfigError for what DeepSpeed refuses."""
        self.model, self.mesh, self.device, self.zero = model, mesh, device, config.parallel.zero
        _prepare_process(device)
        refuse_buffers(model)
        self.loss = SummedLoss(model, mesh.tensor, config.loss)
        for layer in model.blocks.modules():
            if isinstance(layer, Linear):
                layer.fuses = False  # ZeRO 3 gathers a module's weights around its own forward
        if config.trainer.recompute is not Recompute.none:
            recompute_blocks(model, config.trainer.recompute)
        compiles = config.trainer.compile
        if (device.type == "cuda" and self.zero < 3) if compiles is None else compiles:
            compile_blocks(model)
            self.loss.compile_head()
        named = dict(model.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
        for parameter in named.values():
            if getattr(parameter, "partial_gradient", False) and mesh.tensor.group is not None:
                parameter.register_hook(self._sum_over_tensor)
        self._declare_uses()
        try:
            self.engine, *_ = deepspeed.initialize(
                model=self.loss,
                optimizer=build_adamw(named, config.optimizer, config.model, ours=False),
                config=zero_config(config),
                mpu=Groups(mesh),
                dist_init_required=False,
            )
        except ValueError as error:  # pydantic's included: a key or value it does not know
            raise _refusal(error) from error
        self.zero_optimizer = self.engine.optimizer
        # by name: where this rank's values lie in which fp32 partition, and a parameter over them
        self.places: dict[str, tuple[Tensor, int]] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in named.items():
            flat, at, span = self._place(parameter, shapes[name])
            self.places[name] = flat, at
            values = flat.detach().narrow(0, at, span.count)
            self.parameters[name] = nn.Parameter(values, requires_grad=False)
            noted = getattr(parameter, "shard", None) or whole(shapes[name])
            self.parameters[name].shard = dataclasses.replace(noted, span=span)  # type: ignore[attr-defined]
        init_parameters(self.parameters, config.model, config.seed)
        self.loaded()

    def forward_backward(self, batches: list[Batch]) -> Tensor:
        valid = torch.stack([(batch.labels != IGNORED).sum() for batch in batches]).sum()
        sum_over(self.mesh.data, valid)
        # DeepSpeed divides by the number of data ranks; the loss is a sum over them
        share = self.mesh.data.size / valid.clamp(min=1)
        total = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            loss = self.engine(*batch)
            self.engine.backward(loss * share, scale_wrt_gas=False)
            total += loss.detach()
        sum_over(self.mesh.data, total)
        return total / valid.clamp(min=1)

    def step(self, learning_rate: float) -> Tensor:
        for group in self.zero_optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)

    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        return mean_loss(self.loss, batches, self.mesh.data, self.device)

    def decoder(self) -> Decoder:
        return Decoder(self.model, self.mesh.tensor)

    def state(self, saved: Collection[str] = ()) -> State:
        base = self.zero_optimizer.optimizer
        if any(name.startswith("optimizer/") for name in saved):
            for flat in self._flat():
                if not base.state.get(flat):
                    base.state[flat] = adam_state(flat, base.param_groups[0])
        states: dict[Tensor, dict[str, Tensor]] = {
            held: {
                key: value if value.dim() == 0 else value.narrow(0, at, held.numel())
                for key, value in base.state.get(flat, {}).items()
            }
            for held, (flat, at) in zip(self.parameters.values(), self.places.values(), strict=True)
        }
        return collect_parameters(self.parameters, states)

    @torch.no_grad()
    def loaded(self) -> None:
        """Bring the weights that are computed with up to the fp32 ones."""
        if self.zero < 3:
            self.zero_optimizer.update_lp_params()
            return
        # small weights stay gathered from step to step: away with them, and gathered anew below
        self.zero_optimizer.checkpoint_event_prologue()
        for name, parameter in self.model.named_parameters():
            own = parameter.ds_tensor  # type: ignore[attr-defined]
            flat, at = self.places[name]
            own.data.copy_(flat.narrow(0, at, own.numel()))
        self.zero_optimizer.checkpoint_event_epilogue()

    def close(self) -> None:
        forget_transports()

    def _flat(self) -> list[Tensor]:
        """The fp32 partitions of this rank."""
        if self.zero < 3:
            partitions: list[Tensor] = self.zero_optimizer.single_partition_of_fp32_groups
            return partitions
        partitions = self.zero_optimizer.fp32_partitioned_groups_flat
        return partitions

    def _place(self, parameter: nn.Parameter, shape: tuple[int, ...]) -> tuple[Tensor, int, Span]:
        """The partition that holds a parameter, where in it this rank's part begins, and which
        values of the parameter that part is: perhaps none."""
        optimizer: Any = self.zero_optimizer
        if self.zero < 3:
            groups = enumerate(optimizer.bit16_groups)
            group = next(i for i, own in groups if any(p is parameter for p in own))
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return self._flat()[group], 0, Span(shape, 0, 0)
            part = mapping.lp_fragment_address
            at = mapping.hp_fragment_address.start
            return self._flat()[group], at, Span(shape, part.start, part.numel)
        group, at, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        total = prod(shape)
        first = min(self.mesh.data.rank * size, total)
        return self._flat()[group], at, Span(shape, first, min(size, total - first))

    def _sum_over_tensor(self, grad: Tensor) -> Tensor:
        """A whole parameter saw this rank's tokens only; DeepSpeed knows no such sum."""
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=self.mesh.tensor.group)
        return total.to(grad.dtype)

    def _declare_uses(self) -> None:
        """Tell ZeRO 3, which gathers a module's own weights, who reads those of another."""
        if self.zero < 3:
            return
        deepspeed.zero.register_external_parameter(self.loss, self.model.head.weight)
        for attention in self.model.modules():
            # added vectors go through the query, key and value weights on their own
            if isinstance(attention, Attention) and attention.adds:
                deepspeed.zero.register_external_parameter(attention, attention.qkv.weight)


def _prepare_process(device: torch.device) -> None:
    """What DeepSpeed expects of its launcher, which torchrun or one process alone is here."""
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # a page on every start
    compatible = getattr(deepspeed.ops, "__compatible_ops__", {})
    if device.type == "cpu" and "deepspeed_shm_comm" in compatible:
        compatible["deepspeed_shm_comm"] = False  # compiling it takes half a minute a start
