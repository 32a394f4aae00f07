"""A real run on two ranks that is told to stop: it saves the step it is at, says so, exits 0."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashtrain.data.prepare import Recipe, prepare

LIMIT = 120  # seconds until a run that does not stop is a failure


# what takes nearly all of the time of a run, so that the signal comes meanwhile
EVALUATION = ["trainer.evaluate_every=1", "trainer.evaluate_sequences=160"]
SAVING = ["checkpoint.every=1"]


@pytest.mark.parametrize(
    ("number", "meanwhile"),
    [
        (None, ["trainer.time_limit=0.05"]),
        (signal.SIGTERM, []),
        (signal.SIGINT, []),
        (signal.SIGUSR1, EVALUATION),
        (signal.SIGTERM, SAVING),
    ],
)
def test_a_signal_or_the_clock_saves_and_ends_with_success(
    number: signal.Signals | None, meanwhile: list[str], tmp_path: Path
) -> None:
    text = "\n\n".join(f"the quick brown fox jumps over {n} lazy dogs" for n in range(1500))
    (tmp_path / "text.txt").write_text(text)
    prepare([tmp_path / "text.txt"], tmp_path / "tokens", Recipe("bytes", validation_share=0.2))
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "flashtrain.launch", "--nproc", "2", "data=shards",
        f"data.path={tmp_path}/tokens", "data.sequence_length=16", "data.batch_size=4",
        "data.micro_batch_size=2",
        "model.d_model=16", "model.n_heads=2", "model.n_layers=1", "trainer.steps=1000000",
        "trainer.log_every=1", "trainer.evaluate_sequences=2", "trainer.sample_tokens=1",
        "tracking.wandb.mode=disabled", f"run_dir={run}", *meanwhile,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        if number is not None:
            _wait_for_a_step(run, process)
            os.kill(process.pid, number)  # the launcher alone: it hands the signal on
        said, _ = process.communicate(timeout=LIMIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, said
    assert "Traceback" not in said
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = max(row["step"] for row in rows if "train/loss" in row)
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved[-1] == f"step-{last:08d}"
    assert len(saved) == (2 if meanwhile == SAVING else 1)  # and nothing half-written
    assert not [row for row in rows if row["step"] == last and "validation/loss" in row]
    why = "the time limit" if number is None else number.name
    assert f"{why}: saved step {last}; the same command goes on from there" in said
    assert json.loads((run / "ended.json").read_text()) == {"why": why}


def _wait_for_a_step(run: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + LIMIT
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no step within the limit"
        time.sleep(0.1)
