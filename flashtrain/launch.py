"""Start a run on this machine: `python -m flashtrain.launch [--nproc N] [key=value ...]`.

Checks the configuration and prepares the data once, before any worker exists, so that a mistake is
one line and not N tracebacks; then torchrun takes over, one process per GPU, or two on a machine
without one. On several nodes scripts/launch.sh has `--check` do the first on each of them, and then
starts torchrun there.
"""

import atexit
import contextlib
import json
import logging
import os
import shlex
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

USAGE = """usage: scripts/train.sh [--nproc N] [--max-restarts N] [--show | --check M]
                        [key=value ...]

Trains on this machine. Makes the virtual environment first where there is none. Relative paths,
runs/ and data/ among them, are relative to the current directory.

  --nproc N        processes on this machine (default: one per GPU, two without a GPU)
  --max-restarts N times to start again by itself when a process died or hung (default: 3)
  key=value        Hydra overrides of configs/train.yaml, for example
                     experiment=position_alibi   trainer.steps=1000   optimizer.lr=1e-3
                     data=shards data.path=FOLDER   parallel=tensor2   model=gpt2_124m
  --show           print the whole resolved configuration and stop
  --check M        prepare the data and stop: all that is looked at before workers start, for a run
                   of M such machines

Groups of keys: configs/README.md. Every key with its meaning: flashtrain/config.py. The same
command goes on where a run stopped. Several machines: scripts/launch.sh, scripts/slurm.sbatch.
"""
FAILED = 1
REFUSED = 2  # exit status of a run that was refused with one line
STOPPED = 130  # of one that a signal ended before it could save
HUNG = 75  # of one that could make no more steps (watch.py); EX_TEMPFAIL: try again
RESTARTS = 3
EARLIER_S = "FLASHTRAIN_EARLIER_S"  # tells workers what earlier starts took of trainer.time_limit
ENDED = "ended.json"  # in the run folder: the run's last start saved what it had trained
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # that torchrun hands on to the workers
PROFILED = {"CUDA_INJECTION64_PATH", "NVTX_INJECTION64_PATH"}  # Nsight and CUPTI tools set these
TIME_TO_SAVE_S = "600"  # before torchrun kills workers that were told to stop; its default is 30


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0
    from flashtrain.compose import load
    from flashtrain.config import ConfigError, to_dict

    try:
        restarts, overrides = _count("--max-restarts", arguments, 0)
        machines, overrides = _count("--check", overrides, 1)
        n_processes, overrides = _count("--nproc", overrides, 1)
        if n_processes is None:
            import torch

            n_processes = torch.cuda.device_count() or 2
        show = "--show" in overrides
        overrides = [item for item in overrides if item != "--show"]
        world_size = n_processes * (machines or 1)
        config = load(overrides, world_size)
        if show:
            print(json.dumps(to_dict(config), indent=2))
            return 0
        from flashtrain.door import admit

        config = admit(config, world_size, n_processes)
        assert config.run_dir is not None
        folder = Path(config.run_dir)
        path = _write(folder, json.dumps(to_dict(config), indent=2))
    except (ConfigError, ValueError, OSError) as error:
        print(f"flashtrain: {error}", file=sys.stderr)
        return REFUSED
    try:
        if machines is not None:
            return 0
        (folder / ENDED).unlink(missing_ok=True)
        status = _run(n_processes, path, folder, RESTARTS if restarts is None else restarts)
    finally:
        path.unlink(missing_ok=True)
    if status == 0:
        with contextlib.suppress(OSError):  # whoever read it went away, or a full disk
            print(_what_next(config.run_dir, config.trainer.sample_prompt, arguments))
    return status


def _write(folder: Path, config: str) -> Path:
    """A file in the run folder that workers read; OSError in one sentence where that fails."""
    # several machines may check the same run at once
    path = folder / f"launch-{socket.gethostname()}-{os.getpid()}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(config)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise OSError(
            f"run_dir={folder} cannot be written to ({error.strerror}): free some space, make it "
            "writable, or name another folder"
        ) from error
    return path


def _count(flag: str, arguments: list[str], least: int) -> tuple[int | None, list[str]]:
    """The whole number after `flag`, None without the flag, and the arguments that are left."""
    if flag not in arguments:
        return None, arguments
    at = arguments.index(flag)
    value = arguments[at + 1] if at + 1 < len(arguments) else ""
    if not value.isdigit() or int(value) < least:
        raise ValueError(f"{flag} {value!r} must be a whole number, {least} or more")
    return int(value), arguments[:at] + arguments[at + 2 :]


def _run(n_processes: int, config: Path, folder: Path, restarts: int) -> int:
    """Start after start until one ends well, is refused or stopped, or another makes no sense."""
    began = time.monotonic()
    for number in range(restarts + 1):
        before = _newest(folder)
        os.environ[EARLIER_S] = str(time.monotonic() - began)
        status, codes = _torchrun(n_processes, config, folder)
        again = _worth_another(codes, _newest(folder) != before)
        if status != FAILED or number == restarts or not again:
            return status
        print(f"flashtrain: restart {number + 1} of {restarts}", file=sys.stderr, flush=True)
    return FAILED


def _worth_another(codes: set[int], saved: bool) -> bool:
    """Whether what ended a start may not end the next one.

    codes: exit statuses of the processes that failed, negative for a signal. saved: the start left
    a checkpoint. An error before that will most likely come again.
    """
    # SIGTERM is torchrun's own, to those that waited for the one that failed
    return saved or HUNG in codes or any(code < 0 and code != -signal.SIGTERM for code in codes)


def _newest(folder: Path) -> str:
    names = (path.name for path in (folder / "checkpoints").glob("step-*") if not path.suffix)
    return max(names, default="")


def _torchrun(n_processes: int, config: Path, folder: Path) -> tuple[int, set[int]]:
    """`torchrun --standalone --nproc-per-node N -m flashtrain.train --config PATH`, in-process.

    In-process, so that a refusal by the workers (exit status 2, already explained in one line) is
    not followed by torchrun's own report. Without torchrun's own restarts, which would repeat it.
    Returns the exit status, and those of workers that failed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # fewer threads than cores / processes would idle cores, more would fight over them
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", TIME_TO_SAVE_S)
    worker = ["-m", "flashtrain.train", "--config", str(config)]
    torchrun = parse_args(["--standalone", f"--nproc-per-node={n_processes}", *worker])
    torchrun.signals_to_handle = SIGNALS
    try:
        run(torchrun)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if REFUSED in codes:
            return REFUSED, codes
        print(f"flashtrain: a worker failed.\n{error}", file=sys.stderr)
        return FAILED, codes
    except (KeyboardInterrupt, SignalException):
        if (folder / ENDED).exists():
            return 0, set()  # the workers saved, and said so
        print(
            "flashtrain: stopped by a signal before this step could be saved; the same command "
            "goes on from the newest checkpoint, if there is one",
            file=sys.stderr,
        )
        return STOPPED, set()
    return 0, set()


def _what_next(folder: str, prompt: str, overrides: list[str]) -> str:
    """The three commands a user wants after a run."""
    scripts = os.path.relpath(Path(__file__).resolve().parent.parent / "scripts")
    python = os.path.relpath(sys.executable) if sys.prefix != sys.base_prefix else "python"
    again = shlex.join([f"{scripts}/train.sh", *overrides])
    sample = shlex.join([python, f"{scripts}/generate.py", f"run={folder}"])
    curve = shlex.join([python, f"{scripts}/report.py", folder])
    return "\n".join(
        f"{label:<9}{command}"
        for label, command in (
            ("run", folder),
            ("resume", f"{again}   (goes on where it stopped)"),
            ("sample", f"{sample} prompt={shlex.quote(prompt)}"),
            ("curve", f"{curve}   (writes report.html there)"),
        )
    )


def leave(status: int) -> NoReturn:
    """End this process as `sys.exit` does, but for taking apart what is in its memory.

    With PyTorch that takes a second, in workers and then in the launcher (two cores, 2026-11-27),
    and a run that is told to stop may have few. Profilers that were loaded into the process write
    their last when it is taken apart, so under them it is.
    """
    if not PROFILED.isdisjoint(os.environ):
        sys.exit(status)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
