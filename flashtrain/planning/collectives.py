"""Seconds of one collective, from the bytes it moves and the links it crosses.

A ring over n ranks moves S (n - 1) / n bytes through every rank to gather S bytes, or to reduce and
scatter them, and twice that to sum them. On several hosts, k ranks of the group on each, S (h - 1)
/ h bytes enter every one of the h hosts through k adapters. Latency grows with ranks and hosts.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from flashtrain.planning.gpus import Cluster
from flashtrain.planning.rates import HOP, HOST_HOP, LINK, NETWORK, START


@dataclass(frozen=True)
class Group:
    """Ranks that talk: `size` of them, `stride` apart (flashtrain/parallel/mesh.py)."""

    size: int
    stride: int
    cluster: Cluster

    @cached_property
    def per_host(self) -> int:
        if self.size * self.stride <= self.cluster.node:
            return self.size
        return max(1, min(self.size, self.cluster.node // self.stride))

    @cached_property
    def hosts(self) -> int:
        return -(-self.size // self.per_host)

    def gather(self, whole: float) -> float:
        """All-gather to `whole` bytes on every rank, or reduce-scatter from them."""
        if self.size == 1:
            return 0.0
        hops = (self.hosts - 1) * HOST_HOP + (self.size - self.hosts) * HOP
        return START + hops + self._moved(whole)

    scatter = gather

    def sum(self, each: float) -> float:
        """All-reduce of `each` bytes on every rank; over several hosts as a tree."""
        if self.size == 1:
            return 0.0
        levels = 2 * math.ceil(math.log2(self.hosts)) if self.hosts > 1 else 0
        hops = levels * HOST_HOP + 2 * (self.per_host - 1) * HOP
        return START + hops + 2 * self._moved(each)

    def exchange(self, each: float) -> float:
        """All-to-all of `each` bytes on every rank."""
        if self.size == 1:
            return 0.0
        inside = each * (self.per_host - 1) / self.size / self._link
        outside = each * (self.size - self.per_host) / self.size / self._network
        return START + (self.hosts - 1) * HOST_HOP + max(inside, outside)

    def send(self, each: float) -> float:
        """Every rank's `each` bytes to the next one."""
        if self.size == 1:
            return 0.0
        if self.hosts == 1:
            return HOP + each / self._link
        return HOST_HOP + each / (self._network * self.per_host)

    def _moved(self, whole: float) -> float:
        inside = whole * (self.size - 1) / self.size / self._link
        if self.hosts == 1:
            return inside
        outside = whole * (self.hosts - 1) / self.hosts / (self.per_host * self._network)
        return max(inside, outside)

    @cached_property
    def _link(self) -> float:
        return LINK * self.cluster.gpu.link

    @cached_property
    def _network(self) -> float:
        return NETWORK * self.cluster.network
