"""The ranks that write and read a checkpoint together: the only process-group use in this folder.

What goes over the wire is JSON in byte tensors. `torch.distributed`'s object collectives pickle.
"""

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Peers:
    """All ranks of `group`; without one, this process alone. Every call is made by every rank."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def gather(self, value: Any) -> list[Any] | None:
        """The JSON-able `value` of every rank, in rank order, on rank 0; None on the others."""
        if self.group is None:
            return [value]
        content = self._bytes(value)
        length = torch.tensor([content.numel()], device=content.device)
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length, group=self.group)
        longest = max(int(n) for n in lengths)
        padded = content.new_zeros(longest)
        padded[: content.numel()] = content
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(padded, parts, group=self.group, group_dst=0)
        if parts is None:
            return None
        return [_value(part[: int(n)]) for part, n in zip(parts, lengths, strict=True)]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON-able `value` on every rank; what the others pass is ignored."""
        if self.group is None:
            return value
        content = self._bytes(value if self.rank == 0 else None)
        length = torch.tensor([content.numel()], device=content.device)
        dist.broadcast(length, group=self.group, group_src=0)
        if self.rank != 0:
            content = content.new_empty(int(length))
        dist.broadcast(content, group=self.group, group_src=0)
        return _value(content)

    def _bytes(self, value: Any) -> Tensor:
        nccl = dist.get_backend(self.group) == dist.Backend.NCCL
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        content = bytearray(json.dumps(value).encode())
        return torch.frombuffer(content, dtype=torch.uint8).to(device)


ALONE = Peers()


def _value(content: Tensor) -> Any:
    return json.loads(content.cpu().numpy().tobytes())
