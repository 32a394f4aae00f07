"""scripts/sweep.py with stand-ins for a run, for sbatch and for squeue."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from flashtrain.launch import ENDED
from flashtrain.sweep import Job, plan
from tests.runs.test_single_process import script

sweep = script("sweep")
LINE = ["seed=1,2,3", "trainer.steps=10"]


def leave_a_run(job: Job, step: int) -> None:
    """What a run that got that far has left."""
    job.folder.mkdir(parents=True, exist_ok=True)
    config = {"name": job.label, "seed": job.config.seed, "trainer": {"steps": 10}}
    (job.folder / "config.json").write_text(json.dumps(config))
    rows = [{"step": n, "train/loss": 5.0 - n * job.config.seed} for n in range(1, step + 1)]
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if step == 10:
        (job.folder / ENDED).write_text("{}")


class Child:
    """Stands in for subprocess.Popen: the run of seed 2 fails at step 4."""

    started: ClassVar[list[list[str]]] = []

    def __init__(self, command: list[str], **_: object) -> None:
        Child.started.append(command)
        (self.job,) = (job for job in plan(LINE, 1).jobs if f"name={job.label}" in command)

    def wait(self) -> int:
        failing = self.job.config.seed == 2
        leave_a_run(self.job, 4 if failing else 10)
        return 1 if failing else 0


def test_a_failed_job_is_named_the_others_go_on_and_finished_ones_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep.subprocess, "Popen", Child)
    Child.started.clear()
    assert sweep.run(plan(LINE, 1), 1) == 1
    out, err = capfd.readouterr()
    assert len(Child.started) == 3
    assert err == "sweep: seed-2 failed with status 1\n"
    assert [line.split()[:4] for line in out.splitlines() if line.startswith("seed-")] == [
        ["seed-3", "3", "10", "-25.0000"],
        ["seed-1", "1", "10", "-5.0000"],
        ["seed-2", "2", "4", "of"],
    ] or "4 of 10" in out
    assert (tmp_path / "runs/seed/curves.svg").read_text().startswith("<svg")

    assert sweep.run(plan(LINE, 1), 1) == 1
    assert len(Child.started) == 4  # seed 2 alone
    assert "name=seed-2" in Child.started[-1]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch that notes its arguments and numbers jobs; squeue that lists what `waiting` names."""
    for name, does in {
        "sbatch": f'printf "%s\\n" "$*" >>{tmp_path}/calls; wc -l <{tmp_path}/calls',
        "squeue": f'for last; do :; done; grep -x "$last" {tmp_path}/waiting || true',
    }.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{does}\n")
        path.chmod(0o755)
    (tmp_path / "waiting").write_text("1\n2\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    return tmp_path


def test_slurm_gets_one_sbatch_a_job_and_none_for_those_that_wait(slurm: Path) -> None:
    line = [*LINE, "launcher=slurm", "launcher.gpus_per_node=2", "launcher.time=1:00:00"]
    assert sweep.run(plan(line, 1), 1) == 0
    calls = (slurm / "calls").read_text().splitlines()
    assert len(calls) == 3
    assert "--nodes=1 --gpus-per-node=2 --time=1:00:00" in calls[0]
    assert "scripts/slurm.sbatch trainer.steps=10" in calls[0] or "slurm.sbatch seed=1" in calls[0]
    assert sweep.run(plan(line, 1), 1) == 0
    again = (slurm / "calls").read_text().splitlines()[3:]
    assert len(again) == 1  # the third is not in the queue any more and has not finished
    assert "seed=3" in again[0]


def test_the_jobs_can_be_listed_without_being_started(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    for more, start in (
        (["--nproc", "1"], "    scripts/train.sh --nproc 1 "),
        (["launcher=slurm", "launcher.nodes=1"], "    sbatch scripts/slurm.sbatch "),
    ):
        listed = subprocess.run(
            [sys.executable, root / "scripts/sweep.py", "--dry-run", *LINE, *more],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert listed.stdout.count(start) == 3
    assert not list(tmp_path.iterdir())
