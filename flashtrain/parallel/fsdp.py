"""Sharded data parallelism: PyTorch's FSDP2 over this rank's tensor-parallel part of the model.

Every matrix is cut along its rows over the shard axis, on top of what tensor parallelism cut; a
group of matrices (a block, the embedding, the rest) is gathered in the compute dtype before its
forward and its gradients are reduce-scattered in fp32 (Zhao et al. 2023, arXiv:2304.11277). With a
replicate axis too, gradients of each part are also summed over it (hybrid sharding).

Vectors (norms, biases) stay whole and fp32 on every rank, so that norms compute as they do on one
process; their gradients take one small all-reduce a step.

`zero` names what is sharded, after Rajbhandari et al. 2020, arXiv:1910.02054:
    1  weights and optimizer state: gathered and reduced once a step, however many micro-batches;
       between them whole fp32 gradients and whole weights stay
    2  gradients too: reduced after every micro-batch, weights gathered once a step
    3  the gathered weights do not outlive their use: gathered again for backward
"""

import dataclasses
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from flashtrain.model.gpt import GPT
from flashtrain.model.shard import Shard, Span, shard_of
from flashtrain.parallel.layers import PartialRows
from flashtrain.parallel.mesh import Mesh


def shard_model(
    model: GPT, mesh: Mesh, zero: int, compute: torch.dtype, device: torch.device
) -> None:
    """Cut the model over `mesh.shard`, in place, before it has memory (on the meta device).

    Parameters become DTensors that carry the notes of `layers.py`, now of this rank's part. A shard
    axis of one leaves the model as it is.
    """
    if mesh.shard.group is None:
        return
    # torch 2.13 warns on each rank that a block's output is a view and must not be written to; what
    # comes after a block makes tensors of its own
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
    before = dict(model.named_parameters())
    whole = {parameter for parameter in before.values() if parameter.dim() < 2}
    options: dict[str, Any] = {
        "mesh": _device_mesh(mesh, device.type),
        # not the inputs: positions come in fp32 and must stay so
        "mp_policy": MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False),
        "ignored_params": whole,
    }
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=zero == 3, **options)
    if not model.config.tied_head:
        fully_shard(model.embedding, reshard_after_forward=zero == 3, **options)
    # the rest, the head among it: needed first in backward, so not given back after forward
    fully_shard(model, reshard_after_forward=False, **options)
    for name, parameter in model.named_parameters():
        _note(parameter, before[name], mesh)


def _device_mesh(mesh: Mesh, device_type: str) -> DeviceMesh:
    """Our groups as FSDP2 wants them; it makes none of its own."""
    assert mesh.shard.group is not None
    if mesh.replicate.group is None:
        return DeviceMesh.from_group(mesh.shard.group, device_type, mesh_dim_names=("shard",))
    columns, rows = (
        torch.tensor(dist.get_process_group_ranks(axis.group), dtype=torch.int)
        for axis in (mesh.replicate, mesh.shard)
    )
    return DeviceMesh.from_group(
        [mesh.replicate.group, mesh.shard.group],
        device_type,
        mesh=columns.unsqueeze(1) + rows - mesh.rank,  # a rank is a sum of its places
        mesh_dim_names=("replicate", "shard"),
    )


def _note(parameter: nn.Parameter, before: nn.Parameter, mesh: Mesh) -> None:
    """Carry over what the tensor-parallel plan noted, cut down to this rank's rows."""
    notes = dict(before.__dict__)
    shard: Shard = shard_of(before)
    if isinstance(parameter, DTensor):
        first, last = _own_rows(before.size(0), mesh)
        if parameter.to_local().size(0) != last - first:
            raise RuntimeError(
                f"FSDP gave this rank {parameter.to_local().size(0)} of {before.size(0)} rows "
                f"where rows {first} to {last} were expected: its way to cut has changed"
            )
        row = before[:1].numel()
        span = Span(tuple(before.shape), first * row, (last - first) * row)
        notes["shard"] = dataclasses.replace(shard, span=span)
        if "partial_rows" in notes:
            notes["partial_rows"] = _cut_partial(notes["partial_rows"], first, last)
    else:
        pieces = tuple(
            dataclasses.replace(piece, owned=piece.owned and mesh.shard.rank == 0)
            for piece in shard.pieces
        )
        notes["shard"] = dataclasses.replace(shard, pieces=pieces)
    parameter.__dict__.update(notes)


def _own_rows(rows: int, mesh: Mesh) -> tuple[int, int]:
    """As `torch.chunk`: all parts equal but the last ones, which may be short or empty."""
    part = -(-rows // mesh.shard.size)
    return min(mesh.shard.rank * part, rows), min((mesh.shard.rank + 1) * part, rows)


def _cut_partial(
    partial: tuple[PartialRows, ...], first: int, last: int
) -> tuple[PartialRows, ...]:
    """Those rows of `partial` that lie in rows `[first, last)`, counted from there."""
    kept = []
    for rows in partial:
        low, high = max(rows.local, first), min(rows.local + rows.length, last)
        if low < high:
            at = rows.at + low - rows.local
            kept.append(PartialRows(low - first, high - low, at, rows.total))
    return tuple(kept)


def empty_part(parameter: Tensor, device: torch.device) -> Tensor:
    """Memory for a parameter on the meta device: of a DTensor, for this rank's part."""
    if not isinstance(parameter, DTensor):
        return torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    local = parameter.to_local()
    return DTensor.from_local(
        torch.empty(local.shape, dtype=local.dtype, device=device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def held_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> plain parameter over this rank's memory of it, with its notes; for the optimizer.

    An unsharded parameter is itself. Of a sharded model call it once, after its weights are filled:
    FSDP moves them one last time here, to pad them to equal parts.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()
    held = {}
    for name, parameter in model.named_parameters():
        held[name] = parameter
        if isinstance(parameter, DTensor):
            part = parameter.to_local().detach()
            held[name] = nn.Parameter(part, parameter.requires_grad)
            held[name].__dict__.update(parameter.__dict__)
    return held


def sharded_parameters(
    model: nn.Module, held: dict[str, nn.Parameter]
) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """What FSDP cut, each with this rank's memory of it in `held`; after `held_parameters`."""
    named = model.named_parameters()
    return [(whole, held[name]) for name, whole in named if isinstance(whole, DTensor)]


def take_gradients(parameters: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Point the gradients of the memory held at those of `sharded_parameters`. After the last
    backward."""
    for whole, part in parameters:
        grad = whole.grad
        part.grad = grad.to_local() if isinstance(grad, DTensor) else None


def set_pass(model: GPT, zero: int, last: bool) -> None:
    """Say before a micro-batch whether more of them follow before the optimizer's step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or zero >= 2)
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(last or zero == 3)


def give_back(model: nn.Module) -> None:
    """Free gathered weights that no backward will free: after a forward without one."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
