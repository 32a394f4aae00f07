"""Many runs from one line: each combination of values is a job, started as any run is.

    python scripts/sweep.py position=learned,rope,alibi seed=1,2     # six jobs, one after another
    python scripts/sweep.py sweep=positions trainer.steps=200        # a study of configs/sweep/
    python scripts/sweep.py --dry-run sweep=widths                   # only list the jobs
    python scripts/sweep.py --nproc 1 optimizer.lr=1e-3,3e-4 name=rates
    python scripts/sweep.py sweep=optimizers launcher=slurm launcher.nodes=1 launcher.time=12:00:00

Values are written as for Hydra's multirun: a,b  choice(a,b)  range(1,4)  glob(*). Every job is
checked before the first one starts. Their folders are runs/NAME/JOB, NAME being name=, the study's
or the keys that vary, and it groups them in W&B. A job that fails is named at the end, and the
others go on. The same line again skips what is finished and resumes what is not.

launcher=slurm submits one `sbatch scripts/slurm.sbatch` a job (submitit would pickle a Python
function and start one task per GPU; a run is a torchrun line, which sbatch takes as it is). A job
that still waits or runs there is not submitted again.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flashtrain.config import ConfigError
from flashtrain.launch import REFUSED, STOPPED
from flashtrain.sweep import Job, Launcher, LauncherKind, Sweep, plan
from flashtrain.tracking.compare import as_text, best_first, comparison, overlaid, read_record

SUBMITTED = "slurm-job"  # in a job's folder: the number that sbatch gave it


class Local:
    """Jobs of this machine, one after another; a signal to us goes to the one that runs."""

    def __init__(self, launcher: Launcher, processes: int) -> None:
        self.processes = launcher.processes or processes
        self.child: subprocess.Popen[bytes] | None = None
        self.stopped = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._hand_on)

    def run(self, job: Job) -> str:
        """`finished`, or what became of it."""
        command = ["-m", "flashtrain.launch", "--nproc", str(self.processes), *job.overrides]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.child = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # a terminal's Ctrl-C reaches it once, through us
        )
        status = self.child.wait()
        if job.finished:
            return "finished"
        return "stopped" if self.stopped or status == 0 else f"failed with status {status}"

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)


class Slurm:
    """Jobs handed to Slurm, all at once."""

    stopped = False

    def __init__(self, launcher: Launcher) -> None:
        if Path.cwd() != ROOT:
            raise ConfigError(f"launcher=slurm submits from the repository: cd {ROOT}")
        self.options = [
            f"--nodes={launcher.nodes}",
            f"--gpus-per-node={launcher.gpus_per_node}",
            *([f"--partition={launcher.partition}"] if launcher.partition else []),
            *([f"--time={launcher.time}"] if launcher.time else []),
            *launcher.options,
        ]

    def run(self, job: Job) -> str:
        number = job.folder / SUBMITTED
        if number.is_file() and self._waits(number.read_text()):
            return f"is Slurm's job {number.read_text()} already"
        job.folder.mkdir(parents=True, exist_ok=True)
        submitted = self._ask(
            "sbatch",
            "--parsable",
            f"--job-name={job.label}",
            f"--output={job.folder}/slurm-%j.log",
            *self.options,
            str(ROOT / "scripts" / "slurm.sbatch"),
            *job.overrides,
        )
        if submitted.returncode != 0:
            return f"failed: sbatch says {submitted.stderr.strip()}"
        number.write_text(submitted.stdout.strip().partition(";")[0])  # ";CLUSTER" may follow
        return f"submitted as {number.read_text()}"

    def _waits(self, number: str) -> bool:
        listed = self._ask("squeue", "--noheader", "--jobs", number)
        return listed.returncode == 0 and bool(listed.stdout.strip())

    def _ask(self, *command: str) -> "subprocess.CompletedProcess[str]":
        try:
            return subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise ConfigError(
                f"launcher=slurm: {command[0]} is not on this machine: use a login node of the "
                "cluster, or launcher=local"
            ) from error


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="list the jobs and start none")
    parser.add_argument(
        "--nproc", type=int, help="processes of a job (default: one per GPU, two without a GPU)"
    )
    parser.add_argument("overrides", nargs="+", metavar="key=value[,value]", help="see above")
    arguments = parser.parse_args()
    try:
        processes = arguments.nproc or _processes()
        sweep = plan(arguments.overrides, processes)
        if arguments.dry_run:
            slurm = sweep.launcher.kind is LauncherKind.slurm
            count = sweep.launcher.processes or arguments.nproc
            start = ["sbatch", "scripts/slurm.sbatch"] if slurm else ["scripts/train.sh"]
            if count and not slurm:
                start += ["--nproc", str(count)]
            for job in sweep.jobs:
                print(f"{job.folder}{'  (finished)' if job.finished else ''}")
                print(f"    {shlex.join([*start, *job.overrides])}")
            return 0
        return run(sweep, processes)
    except (ConfigError, OSError) as error:
        print(f"sweep: {error}", file=sys.stderr)
        return REFUSED


def _processes() -> int:
    import torch

    return torch.cuda.device_count() or 2


def run(sweep: Sweep, processes: int) -> int:
    slurm = sweep.launcher.kind is LauncherKind.slurm
    launcher = Slurm(sweep.launcher) if slurm else Local(sweep.launcher, processes)
    ends: dict[str, str] = {}
    for number, job in enumerate(sweep.jobs, 1):
        print(f"== {sweep.name} {number}/{len(sweep.jobs)}  {job.label}", flush=True)
        ends[job.label] = "finished before" if job.finished else launcher.run(job)
        print(f"== {job.label} {ends[job.label]}", flush=True)
        if launcher.stopped:
            break
    print(f"\n{sweep.folder}")
    _compare(sweep)
    failed = {label: end for label, end in ends.items() if end.startswith("failed")}
    for label, end in failed.items():
        print(f"sweep: {label} {end}", file=sys.stderr)
    if launcher.stopped:
        print("sweep: stopped; the same command goes on from here", file=sys.stderr)
        return STOPPED
    return 1 if failed else 0


def _compare(sweep: Sweep) -> None:
    """The table of what has been logged so far, and its picture beside the runs."""
    started = [job.folder for job in sweep.jobs if (job.folder / "metrics.jsonl").is_file()]
    if not started:
        return
    records = best_first([read_record(folder) for folder in started])
    print(as_text(comparison(records)))
    try:
        picture = sweep.folder / "curves.svg"
        picture.write_text(overlaid(records))
        print(f"\ncurves   {picture}")
    except ConfigError:
        return  # nothing was logged twice yet


if __name__ == "__main__":
    sys.exit(main())
