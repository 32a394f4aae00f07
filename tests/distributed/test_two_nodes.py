"""Two machines, as far as one can show it: two network namespaces with a cable between them.

Each has its own interfaces, addresses and host name, and nothing else reaches the other. One
process of a run is started in each by scripts/launch.sh, and they train over gloo.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# in a user namespace of its own, where it may do all this: $1, $2: commands for the two nodes
CABLE = """
set -eu
node() {  # name, address, command: in its own network, under its own host name
  unshare --net --uts bash -c '
    hostname "$1"; ip link set lo up
    until ip link show "$1" >/dev/null 2>&1; do sleep 0.05; done
    ip address add "$2/24" dev "$1"; ip link set "$1" up; shift 2; exec "$@"' node "$@" &
}
mount --bind "$HOSTS" /etc/hosts
node node-a 10.77.0.1 bash -c "$1"; a=$!
node node-b 10.77.0.2 bash -c "$2"; b=$!
own=$(readlink /proc/self/ns/net)
for pid in $a $b; do
  until [ "$(readlink /proc/$pid/ns/net)" != "$own" ]; do sleep 0.05; done
done
ip link add node-a type veth peer name node-b
ip link set node-a netns $a
ip link set node-b netns $b
status=0
wait $a || status=$?
wait $b || status=$?
exit $status
"""


def between_nodes(folder: Path, a: str, b: str, limit: int) -> subprocess.CompletedProcess[str]:
    """Runs two bash commands, one on each node; the status of one that failed."""
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.77.0.1 node-a\n10.77.0.2 node-b\n")
    apart = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--uts", "--pid", "--fork"]
    return subprocess.run(
        [*apart, "--mount-proc", "--kill-child", "bash", "-c", CABLE, "cable", a, b],
        cwd=folder,
        env={**os.environ, "HOSTS": str(hosts)},
        capture_output=True,
        text=True,
        timeout=limit,
    )


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    """A folder that both nodes see; skips where namespaces cannot be made."""
    for tool in ("unshare", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: no network namespaces")
    # longer than it takes to lay the cable, which a node that ends takes with it
    try:
        probe = between_nodes(tmp_path, "sleep 2", "sleep 2", 30)
    except subprocess.TimeoutExpired:
        pytest.skip("two network namespaces were made, but no cable between them")
    if probe.returncode:
        said = probe.stderr.strip().splitlines() or ["no reason given"]
        pytest.skip(f"network namespaces cannot be made here: {said[-1]}")
    return tmp_path


def test_one_process_on_each_of_two_nodes_trains_one_run(nodes: Path) -> None:
    venv = nodes / "venv" / "bin"
    venv.mkdir(parents=True)
    torchrun = venv / "torchrun"
    torchrun.write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    python = venv / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    words = " ".join(
        [
            "model=gpt_tiny data=random model.vocabulary=128 data.sequence_length=32",
            "data.batch_size=4 data.micro_batch_size=2 parallel=tensor2 trainer.steps=3",
            "trainer.log_every=1 trainer.evaluate_every=100 trainer.evaluate_sequences=4",
            "tracking.wandb.mode=disabled run_dir=run",
        ]
    )
    start = (
        f"FLASHTRAIN_VENV={venv.parent} OMP_NUM_THREADS=1 GPUS=1 NODES=2 HEAD=node-a "
        f"CUDA_VISIBLE_DEVICES= {ROOT}/scripts/launch.sh {words}"
    )
    run = between_nodes(nodes, start, start, 240)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    rows = [json.loads(line) for line in (nodes / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert sorted(losses) == [1, 2, 3]
    assert "2 processes: tensor 2 x data 1" in run.stdout  # one run over both, shown once
    assert run.stdout.count("finished at step 3/3") == 1
