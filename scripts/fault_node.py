"""A node that is lost without a word: two network namespaces, and the cable between them cut.

Part of bench_faults.py. A killed process closes its connections; a node without power does not, so
the other waits in a collective until its watch ends it (trainer.hang_timeout) and torchrun goes on
with the nodes that are left. Needs the right to make network namespaces.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fault_kinds import LIMIT, ROOT, Run, send

HANG_MINUTES = 0.2
JOINED, LEFT = "2 processes:", "1 processes:"  # in the first lines of a start


@dataclass
class Lost:
    """Seconds from the cut until a step was trained without the node; None: never."""

    recovery_s: float | None
    skipped: str | None = None  # why it was not tried


class Nodes:
    """Two namespaces with one cable. Use it in a `with` block."""

    def __init__(self) -> None:
        self.names = [f"flashtrain-{os.getpid()}-{side}" for side in "ab"]
        self.cable = [f"ft{os.getpid() % 10**7}{side}" for side in "ab"]
        self.address = ["10.231.77.1", "10.231.77.2"]

    def __enter__(self) -> "Nodes":
        for name in self.names:
            ip("netns", "add", name)
        a, b = self.cable
        ip("link", "add", a, "type", "veth", "peer", "name", b)
        for name, end, address in zip(self.names, self.cable, self.address, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            for device in (end, "lo"):
                ip("-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def start(self, side: int, overrides: list[str], log: Path) -> "subprocess.Popen[bytes]":
        """torchrun on one node, one process; the first keeps the store."""
        command = [
            "ip", "netns", "exec", self.names[side], sys.executable, "-m", "torch.distributed.run",
            "--nnodes=1:2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=faults",
            f"--rdzv-endpoint={self.address[0]}:29400", f"--local-addr={self.address[side]}",
            "--rdzv-conf=keep_alive_interval=2,keep_alive_max_attempt=3,last_call_timeout=2",
            "--max-restarts=9", "-m", "flashtrain.train", *overrides,
        ]  # fmt: skip
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.cable[side],
        }  # fmt: skip
        with log.open("ab") as output:
            return subprocess.Popen(
                command, stdout=output, stderr=output, cwd=ROOT, start_new_session=True,
                env=environment,
            )  # fmt: skip

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", self.cable[1], "down")


def ip(*arguments: str) -> None:
    """Raises OSError with what `ip` says."""
    ended = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if ended.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {ended.stderr.strip()}")


def lose_node(folder: Path, tokens: Path) -> Lost:
    """Train on both, cut, and wait until the first goes on alone."""
    run = Run(folder / "nodes", tokens, 10**9, 20)
    run.folder.mkdir(parents=True)
    overrides = [item for item in run.overrides if not item.startswith("parallel=")]
    overrides += ["parallel=auto", f"trainer.hang_timeout={HANG_MINUTES}"]
    overrides += ["tracking.wandb.mode=disabled"]
    logs = [folder / f"node-{side}.txt" for side in "ab"]
    started: list[subprocess.Popen[bytes]] = []

    def said() -> str:
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())

    def until(what: str, seen: int, steps: int) -> bool:
        """Whether a start said `what` beyond `seen`, and made `steps` steps after that."""
        deadline = time.monotonic() + LIMIT
        said_at = 0.0
        while time.monotonic() < deadline:
            if not said_at and what in said()[seen:]:
                said_at = time.time()
            if said_at and sum(row["time"] > said_at for row in run.rows()) >= steps:
                return True
            time.sleep(0.05)
        return False

    try:
        with Nodes() as nodes:
            try:
                started.append(nodes.start(0, overrides, logs[0]))
                time.sleep(1.0)  # so that the first has the store
                started.append(nodes.start(1, overrides, logs[1]))
                if not until(JOINED, 0, 10):
                    return Lost(None, "two nodes did not come together here")
                seen = len(said())
                began = time.monotonic()
                nodes.cut()
                return Lost(time.monotonic() - began if until(LEFT, seen, 1) else None)
            finally:
                for process in started:
                    _end(process)
    except OSError as error:
        return Lost(None, str(error))


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The launcher; its workers see that it is gone."""
    send(process.pid, signal.SIGKILL)
    process.wait()
