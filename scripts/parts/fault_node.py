"""A node is lost while a spare waits: three network namespaces on one switch. For bench_faults.py.

Killed: all of its processes at once, whose connections the kernel still closes. Cut: its cable,
which closes nothing, as when the power goes: the others find out by its silence (pulse.py). The
first node keeps the store at which they meet, so it is never the one. Needs the right to make
network namespaces.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.parts.fault_run import LIMIT, ROOT, Run, children, send

WAYS = ("killed", "cut")
TWO = "2 processes:"  # in the first lines of a start


@dataclass
class Lost:
    """Seconds since the loss."""

    way: str
    started_s: float | None = None  # until both nodes had started processes; None: never
    trained_s: float | None = None  # until a step was done: imports, meeting and loading came first
    skipped: str | None = None  # why it was not tried


class Nodes:
    """Namespaces a, b and c, each with a cable to a switch. Use it in a `with` block."""

    def __init__(self) -> None:
        self.switch = f"flashtrain-{os.getpid()}"
        self.names = [f"{self.switch}-{side}" for side in "abc"]
        self.addresses = [f"10.231.77.{number}" for number in (1, 2, 3)]

    def __enter__(self) -> "Nodes":
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "switch", "type", "bridge")
        ip("-n", self.switch, "link", "set", "switch", "up")
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("netns", "add", name)
            socket = f"port{address[-1]}"
            ip("-n", self.switch, "link", "add", socket, "type", "veth",
               "peer", "name", "cable", "netns", name)  # fmt: skip
            ip("-n", self.switch, "link", "set", socket, "master", "switch", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def start(self, side: int, overrides: list[str], log: Path) -> "subprocess.Popen[bytes]":
        """scripts/launch.sh's torchrun for one process."""
        command = [
            "ip", "netns", "exec", self.names[side], sys.executable, "-m", "torch.distributed.run",
            "--nnodes=2:2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=faults",
            f"--rdzv-endpoint={self.addresses[0]}:29400", f"--local-addr={self.addresses[side]}",
            "--rdzv-conf=keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=5,"
            f"is_host={int(side == 0)}",  # the host's name leads to no namespace
            "--max-restarts=9", "-m", "flashtrain.train", *overrides,
        ]  # fmt: skip
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }  # fmt: skip
        with log.open("ab") as output:
            return subprocess.Popen(
                command, stdout=output, stderr=output, cwd=ROOT, start_new_session=True,
                env=environment,
            )  # fmt: skip

    def cut(self, side: int) -> None:
        ip("-n", self.names[side], "link", "set", "cable", "down")


def ip(*arguments: str) -> None:
    """Raises OSError with what `ip` says."""
    ended = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if ended.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {ended.stderr.strip()}")


def lose_node(folder: Path, tokens: Path, way: str) -> Lost:
    """Train on two nodes, lose the second one, wait until the spare has taken its place."""
    try:
        with Nodes() as nodes:
            return _lose_node(nodes, folder, tokens, way)
    except OSError as error:
        return Lost(way, skipped=str(error))


def _lose_node(nodes: Nodes, folder: Path, tokens: Path, way: str) -> Lost:
    run = Run(folder / "nodes", tokens, 10**9, 20)
    run.folder.mkdir(parents=True)
    overrides = [*run.overrides, "tracking.wandb.mode=disabled"]
    logs = [folder / f"node-{side}.txt" for side in "abc"]
    agents: list[subprocess.Popen[bytes]] = []

    def said() -> str:
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())

    def workers(*sides: int) -> list[set[int]]:
        return [set(children(agents[side].pid)) for side in sides]

    try:
        for side in range(3):
            agents.append(nodes.start(side, overrides, logs[side]))
            if side == 0:
                time.sleep(1.0)  # so that it has the store
            elif side == 1 and not _until(lambda: TWO in said() and run.reached() >= 10):
                return Lost(way, skipped="two nodes did not come together here")
        time.sleep(5.0)  # the spare has come
        if workers(2) != [set()]:
            return Lost(way, skipped="the spare did not wait")
        before, (doomed,) = workers(0)[0], workers(1)
        run.began = time.time()
        began = time.monotonic()
        if way == "cut":
            nodes.cut(1)
        else:
            for pid in (agents[1].pid, *doomed):
                send(pid, signal.SIGKILL)
        lost = Lost(way)
        if _until(lambda: all(group - before for group in workers(0, 2))):
            lost.started_s = time.monotonic() - began
            # steps of the start before are logged until the loss only
            run.began = time.time()
            if _until(run.stepped):
                lost.trained_s = time.monotonic() - began
        return lost
    finally:
        for group in workers(*range(len(agents))):
            for pid in group:
                send(pid, signal.SIGKILL)
        for agent in agents:
            send(agent.pid, signal.SIGKILL)
            agent.wait()


def _until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False
