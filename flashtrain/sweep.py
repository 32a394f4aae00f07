"""Many runs from one line: overrides with several values become jobs, each a launch of its own.

Values are written as for Hydra's multirun and read by Hydra's own parser: `seed=1,2`,
`optimizer.lr=1e-3,3e-4`, `position=glob(*)`, `model.n_layers=range(2,9,2)`, `choice(..)`. Hydra's
multirun itself would run all jobs in one process tree, under one set of ranks; here a job is what
`scripts/train.sh` or `sbatch scripts/slurm.sbatch` starts, so it is checked, resumed and stopped as
any run is.

A study, configs/sweep/NAME.yaml, is a list of grids: each the product of its lines, all of them
together the study. The command line beats it, key by key.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flashtrain.compose import CONFIGS, fingerprint, load
from flashtrain.config import Config, ConfigError
from flashtrain.launch import ENDED
from flashtrain.tracking.compare import read_rows

Choice = dict[str, str | None]  # override's key -> its one value; None: ~key, which has none
LauncherKind = Enum("LauncherKind", ["local", "slurm"])


@dataclass
class Launcher:
    """configs/launcher/*.yaml: where jobs run."""

    kind: LauncherKind = LauncherKind.local
    processes: int | None = None  # local: of one job; null: one per GPU, two without a GPU
    nodes: int = 1  # slurm: of one job
    gpus_per_node: int = 8  # slurm: and processes
    partition: str | None = None
    time: str | None = None  # as Slurm writes it, 12:00:00
    options: list[str] = field(default_factory=list)  # any others of sbatch


@dataclass
class Study:
    """configs/sweep/*.yaml."""

    fixed: list[str] = field(default_factory=list)  # overrides of every job
    grids: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    label: str  # the values that tell it from the other jobs
    overrides: list[str]  # one value each, with its name, folder and W&B group
    config: Config  # resolved
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether it has trained to its last step and saved that."""
        rows = read_rows(self.folder)
        last = max((int(row["step"]) for row in rows), default=0)
        return (self.folder / ENDED).is_file() and last >= self.config.trainer.steps


@dataclass(frozen=True)
class Sweep:
    name: str
    launcher: Launcher
    jobs: list[Job]

    @property
    def folder(self) -> Path:
        return Path("runs") / self.name


def plan(arguments: Sequence[str], processes: int, configs: Path = CONFIGS) -> Sweep:
    """The jobs of a command line, every one composed and checked.

    arguments: overrides, `sweep=STUDY`, `launcher=local|slurm`, `launcher.key=value`, `name=NAME`.
    processes: of a local job where `launcher.processes` is null. Raises ConfigError for a line that
    Hydra cannot read and for jobs that cannot run, each named.
    """
    own = dict.fromkeys(("sweep", "name", "launcher"), "")
    options, overrides = [], []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in own:
            own[key] = value
        elif key.startswith("launcher."):
            options.append(argument.removeprefix("launcher."))
        elif key == "run_dir":
            raise ConfigError(f"{argument}: every job gets a folder of its own, runs/SWEEP/JOB")
        else:
            overrides.append(argument)
    launcher = _read(Launcher, "launcher", own["launcher"] or "local", configs, options)
    study = Study(grids=[[]])
    if own["sweep"]:
        study = _read(Study, "sweep", own["sweep"], configs, [])
    choices = _distinct(
        choice
        for grid in study.grids or [[]]
        for choice in _product([*study.fixed, *grid], overrides, configs)
    )
    labels = _labels(choices)
    varied = [key for key in choices[0] if len({choice.get(key) for choice in choices}) > 1]
    name = own["name"] or own["sweep"] or _clean("+".join(varied)) or "sweep"
    if launcher.kind is LauncherKind.slurm:
        processes = launcher.nodes * launcher.gpus_per_node
    world = launcher.processes or processes
    return Sweep(name, launcher, _jobs(name, labels, choices, world, configs))


def _jobs(
    sweep: str, labels: list[str], choices: list[Choice], world: int, configs: Path
) -> list[Job]:
    jobs, refused = [], []
    for label, choice in zip(labels, choices, strict=True):
        overrides = [key if value is None else f"{key}={value}" for key, value in choice.items()]
        if "tracking.wandb.group" not in choice:
            overrides.append(f"tracking.wandb.group={sweep}")
        overrides.append(f"name={label}")
        try:
            config = load(overrides, world, configs)
        except ConfigError as error:
            refused.append(f"{label}: {error}")
            continue
        folder = Path("runs") / sweep / f"{label}-{fingerprint(config)}"
        config = dataclasses.replace(config, run_dir=str(folder))
        jobs.append(Job(label, [*overrides, f"run_dir={folder}"], config, folder))
    if refused:
        raise ConfigError(
            f"{len(refused)} of {len(choices)} jobs cannot run, so none is started:\n  "
            + "\n  ".join(refused)
        )
    return jobs


def _product(lines: Sequence[str], beats: Sequence[str], configs: Path) -> list[Choice]:
    """Every combination; keys of `beats` take the place of those in `lines`."""
    try:
        with initialize_config_dir(str(configs), version_base="1.3"):
            parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
            values: dict[str, list[str | None]] = {}
            for override in parser.parse_overrides([*lines, *beats]):
                line, key = override.input_line, override.get_key_element()
                if not override.is_sweep_override():
                    _, equals, value = str(line).partition("=")
                    values[key] = [value if equals else None]
                elif override.is_discrete_sweep():
                    values[key] = list(override.sweep_string_iterator())
                    if not values[key]:
                        raise ConfigError(f"{line}: no value there is one of these")
                else:
                    raise ConfigError(
                        f"{line}: an interval has no end of values; name them, {key}=1e-3,3e-4"
                    )
    except HydraException as error:
        bad = getattr(error, "override", None) or " ".join(beats)
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"{bad!r} is not an override or a list of them: {first}") from error
    return [
        dict(zip(values, combination, strict=True))
        for combination in itertools.product(*values.values())
    ]


def _distinct(choices: Any) -> list[Choice]:
    return list({json.dumps(choice): choice for choice in choices}.values())


def _labels(choices: list[Choice]) -> list[str]:
    """A name for each job that is a folder's and a reader's: position-rope+seed-1."""
    keys = list(dict.fromkeys(key for choice in choices for key in choice))
    varied = [key for key in keys if len({choice.get(key) for choice in choices}) > 1]
    labels = [
        "+".join(
            _clean(f"{key.rpartition('.')[2]}-{choice[key]}") for key in varied if key in choice
        )
        for choice in choices
    ]
    labels = [label[:120] or "job" for label in labels]
    return [
        label if labels.count(label) == 1 else f"{label}+{number}"
        for number, label in enumerate(labels, 1)
    ]


def _clean(text: str) -> str:
    """What a folder may be called: [q,k] -> q.k"""
    return re.sub(r"[^\w.+-]+", ".", text).strip(".").replace(".-", "-").replace("-.", "-")


def _read(schema: type, group: str, choice: str, configs: Path, options: list[str]) -> Any:
    path = configs / group / f"{choice}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(item.stem for item in (configs / group).glob("*.yaml")))
        raise ConfigError(f"{group}={choice}: no such choice; choose from {known}")
    try:
        tree = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path))
        # not OmegaConf's dotlist: YAML takes 1:00:00 for the number 3600
        for override in OverridesParser.create().parse_overrides(options):
            OmegaConf.update(tree, override.get_key_element(), override.value())
        return OmegaConf.to_object(tree)
    except (OmegaConfBaseException, HydraException) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
