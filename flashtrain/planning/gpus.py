"""GPUs and the links between them, as their makers state them.

Sources. Memory: what the driver reports (`nvidia-smi`, MiB; torch's total is 1 to 2 % less). bf16
TFLOP/s: dense, from `flashtrain.metrics.PEAKS`, where its sources stand. Memory bandwidth and
NVLink: NVIDIA's data sheets of A100 (80 GB: 2,039 GB/s; 40 GB: 1,555; NVLink 600 GB/s), H100 SXM
(3.35 TB/s; 900 GB/s), H200 SXM (4.8 TB/s; 900 GB/s), B200 (HGX: 8 TB/s; 1.8 TB/s), L40S (864 GB/s),
RTX 4090 (1,008 GB/s). Sheets count NVLink in both directions together; here it is one direction,
hence half. To the host: PCIe x16, 32 GB/s a direction of version 4.0 and 64 of 5.0; without NVLink
to other GPUs too. Networks: one adapter per GPU as in
DGX A100 (HDR, 200 Gb/s), DGX H100, H200 and B200 (ConnectX-7, NDR, 400 Gb/s), and XDR, 800 Gb/s;
`efa`: 3,200 Gb/s for the 8 GPUs of an Amazon p5 node; `ethernet100`: 100 Gb/s for 8 GPUs.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from functools import cached_property

from flashtrain.metrics import peak_tflops

MIB, GB = 2**20, 1e9
NETWORKS = {  # bytes/s per GPU and direction
    "hdr": 25 * GB,
    "ndr": 50 * GB,
    "xdr": 100 * GB,
    "efa": 50 * GB,
    "ethernet100": 12.5 / 8 * GB,
}


@dataclass(frozen=True)
class Gpu:
    name: str
    reported: str  # as CUDA names it, without "NVIDIA "
    memory: float  # bytes
    bandwidth: float  # of that memory, bytes/s
    link: float  # to the other GPUs of its node, bytes/s a direction
    host: float  # to the host's memory, likewise
    network: str  # of the usual node, a key of NETWORKS
    hopper: bool = False  # runs the attention kernels made for compute capability 9.0

    @cached_property
    def peak(self) -> float:
        """Dense bf16 FLOP/s."""
        peak = peak_tflops(self.reported)
        assert peak is not None, self.reported
        return peak * 1e12


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", "A100-SXM4-40GB", 40960 * MIB, 1555 * GB, 300 * GB, 32 * GB, "hdr"),
        Gpu("a100", "A100-SXM4-80GB", 81920 * MIB, 2039 * GB, 300 * GB, 32 * GB, "hdr"),
        Gpu(
            "h100", "H100 80GB HBM3", 81559 * MIB, 3350 * GB, 450 * GB, 64 * GB, "ndr", hopper=True
        ),
        Gpu("h200", "H200", 143771 * MIB, 4800 * GB, 450 * GB, 64 * GB, "ndr", hopper=True),
        Gpu("b200", "B200", 183359 * MIB, 8000 * GB, 900 * GB, 64 * GB, "ndr"),
        Gpu("l40s", "L40S", 46068 * MIB, 864 * GB, 32 * GB, 32 * GB, "hdr"),
        Gpu("rtx4090", "GeForce RTX 4090", 24564 * MIB, 1008 * GB, 32 * GB, 32 * GB, "ethernet100"),
    )
}


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, `node` of them on one host."""

    gpu: Gpu
    network: float  # between hosts, bytes/s per GPU and direction
    node: int = 8
    ram: float = math.inf  # bytes of a host's memory


def find_gpu(name: str) -> Gpu:
    """By its short name (h100) or as CUDA reports it (NVIDIA H100 80GB HBM3)."""
    reported = name.removeprefix("NVIDIA ").strip()
    for gpu in GPUS.values():
        if name.lower() == gpu.name or reported == gpu.reported:
            return gpu
    raise ValueError(f"gpu={name} is not known: take one of {', '.join(GPUS)}")


def build_cluster(
    gpu: str, links: str | None = None, node: int = 8, ram: float = math.inf
) -> Cluster:
    """links: the network between hosts, a name of NETWORKS or GB/s per GPU and direction."""
    if node < 1:
        raise ValueError(f"node={node}: a host has at least 1 GPU")
    found = find_gpu(gpu)
    links = links or found.network
    if links in NETWORKS:
        network = NETWORKS[links]
    elif re.fullmatch(r"\d+(\.\d+)?", links) and float(links) > 0:
        network = float(links) * GB
    else:
        raise ValueError(
            f"links={links} must be one of {', '.join(NETWORKS)}, or GB/s per GPU and direction"
        )
    return Cluster(found, network, node, ram)


def one_host(cluster: Cluster, gpus: int) -> Cluster:
    """The same GPUs with all `gpus` of them on one host, for measurements taken on one."""
    return dataclasses.replace(cluster, node=max(gpus, cluster.node))
