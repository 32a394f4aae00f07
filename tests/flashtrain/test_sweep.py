"""Which jobs a line means, where they go, and when they are done."""

import json
import shutil
from pathlib import Path

import pytest

from flashtrain.compose import CONFIGS
from flashtrain.config import ConfigError
from flashtrain.launch import ENDED
from flashtrain.sweep import LauncherKind, plan

STUDIES = sorted(path.stem for path in (CONFIGS / "sweep").glob("*.yaml"))


def values(arguments: list[str], *keys: str) -> list[tuple[str, ...]]:
    """Of the named overrides in each job."""
    jobs = [
        dict(item.split("=", 1) for item in job.overrides if "=" in item)
        for job in plan(arguments, 1).jobs
    ]
    return [tuple(job[key] for key in keys) for job in jobs]


def test_a_line_means_the_product_of_its_values() -> None:
    assert values(["position=rope,alibi", "seed=1,2"], "position", "seed") == [
        ("rope", "1"),
        ("rope", "2"),
        ("alibi", "1"),
        ("alibi", "2"),
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("seed=range(1,4)", ["1", "2", "3"]),
        ("seed=choice(5,7)", ["5", "7"]),
        ("position.applies_to=[q,k],[q]", ["[q,k]", "[q]"]),
        ("schedule=glob(w*)", ["wsd"]),
        ("trainer.sample_prompt=", [""]),
    ],
)
def test_values_are_written_as_hydra_takes_them(line: str, expected: list[str]) -> None:
    assert values([line], line.partition("=")[0]) == [(value,) for value in expected]


def test_an_override_without_a_value_goes_to_every_job() -> None:
    jobs = plan(["~experiment", "seed=1,2"], 1).jobs
    assert all("~experiment" in job.overrides for job in jobs)
    assert {job.config.precision.compute.name for job in jobs} == {"bf16"}


def test_every_job_has_a_name_a_folder_and_the_group_of_the_sweep() -> None:
    sweep = plan(["position=rope,alibi", "seed=1,2", "name=kinds"], 1)
    assert [job.label for job in sweep.jobs][:2] == ["position-rope+seed-1", "position-rope+seed-2"]
    assert len({job.folder for job in sweep.jobs}) == 4
    for job in sweep.jobs:
        assert job.folder.parent == Path("runs/kinds")
        assert job.config.run_dir == str(job.folder)
        assert job.config.name == job.label
        assert job.config.tracking.wandb.group == "kinds"


def test_folders_follow_the_numbers_and_labels_the_layout() -> None:
    """Other steps are another run; jobs that differ in what numbers do not depend on are too."""
    (short,), (long,) = (plan([f"trainer.steps={n}", "seed=1"], 1).jobs for n in (10, 20))
    assert short.folder != long.folder
    jobs = plan(["attention=torch,reference"], 1).jobs
    assert len({job.folder for job in jobs}) == 2


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_can_run(study: str) -> None:
    sweep = plan([f"sweep={study}"], 1)
    assert sweep.name == study
    assert len({job.folder for job in sweep.jobs}) == len(sweep.jobs) >= 5
    # "1.0" and "1" would be two jobs and one run
    assert len({json.dumps(sorted(job.overrides)) for job in sweep.jobs}) == len(sweep.jobs)


def test_a_study_may_be_one_job(tmp_path: Path) -> None:
    shutil.copytree(CONFIGS, tmp_path / "configs")
    (tmp_path / "configs" / "sweep" / "mine.yaml").write_text("fixed: [trainer.steps=3]\n")
    (job,) = plan(["sweep=mine"], 1, tmp_path / "configs").jobs
    assert job.config.trainer.steps == 3


def test_the_command_line_beats_the_study() -> None:
    assert values(["sweep=position_kinds", "position=rope", "seed=3"], "position", "seed") == [
        ("rope", "3")
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["position=rope,alibi", "position.applies_to=[q]"],
            "1 of 2 jobs.*position-alibi: .*ALiBi",
        ),
        (["optimizer.lr=interval(0,1)"], "interval"),
        (["sweep=nothing"], "sweep=nothing: no such choice; choose from attention"),
        (["launcher=cloud"], "choose from local, slurm"),
        (["launcher.nods=2", "seed=1"], "nods"),
        (["run_dir=here", "seed=1"], "folder of its own"),
        (["seed=[1"], "seed"),
        (["position=glob(zz*)"], r"position=glob\(zz\*\): no value"),
        (["optimizer.lr=1e-3,3e-4", "seed=range(5,1)"], r"seed=range\(5,1\): no value"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    arguments: list[str], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){sentence}"):
        plan(arguments, 1)


def test_slurm_jobs_are_checked_for_the_processes_they_will_have() -> None:
    line = ["seed=1,2", "launcher=slurm", "launcher.nodes=2", "launcher.gpus_per_node=4"]
    sweep = plan(line, 1)
    assert sweep.launcher.kind is LauncherKind.slurm
    assert sweep.jobs[0].config.parallel.replicate == 4  # of 8 processes, tensor 2


def test_a_job_is_finished_once_its_last_step_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (job,) = plan(["trainer.steps=20", "seed=1"], 1).jobs
    assert not job.finished
    job.folder.mkdir(parents=True)
    rows = job.folder / "metrics.jsonl"
    rows.write_text('{"step": 10}\n')
    (job.folder / ENDED).write_text("{}")
    assert not job.finished  # stopped on purpose, half-way
    rows.write_text('{"step": 10}\n{"step": 20}\n')
    assert job.finished
    (job.folder / ENDED).unlink()  # started again, or died before it could save
    assert not job.finished
