"""What a run writes holds no secret, what it reads runs no code, and both stay in their folder."""

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from flashtrain.checkpoint import CheckpointError, find_latest, verify
from flashtrain.checkpoint.integrity import MANIFEST, _seal, checksum
from flashtrain.config import ConfigError
from flashtrain.data.manifest import Manifest
from flashtrain.data.mapped import DataError
from flashtrain.data.shards import TokenShards
from flashtrain.secrets_check import refuse_secrets
from tests.faults.runs import make_tokens, settings
from tests.flashtrain.checkpoint.emulate import save_whole
from tests.test_layering import ROOT, UNPICKLERS, imports, sources

KEY = "0123456789abcdef0123456789abcdef01234567"  # looks like W&B's
PASSWORD = "correct-horse-battery-staple"


def test_nothing_under_flashtrain_names_pickle_or_an_object_collective() -> None:
    """`torch.load` and torch.distributed's object collectives unpickle; so does `_target_` code."""
    found = []
    for path, tree in sources("flashtrain"):
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {name.rpartition(".")[2] for name in imports(tree)}
        names |= {name.split(".")[0] for name in imports(tree)}
        # as a keyword or a dictionary's key; prose in docstrings may say it
        names |= {
            key.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Dict)
            for key in node.keys
            if isinstance(key, ast.Constant) and isinstance(key.value, str)
        }
        bad = UNPICKLERS | {"_target_", "instantiate", "load_inline", "broadcast_object_list"}
        bad |= {"all_gather_object", "gather_object", "scatter_object_list", "send_object_list"}
        found += [f"{path} names {name}" for name in sorted(names & bad)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                found.append(f"{path} calls torch.load")
    assert not found


def test_no_config_names_code() -> None:
    files = list((ROOT / "configs").rglob("*.yaml"))
    assert files
    assert not [path for path in files if "_target_" in path.read_text()]


MALICIOUS = textwrap.dedent(
    """
    import os, pickle, sys
    from pathlib import Path

    calls = []
    sys.addaudithook(lambda name, _: calls.append(name) if name.startswith("pickle.") else None)
    import torch  # unpickles nothing of ours, but may its own
    from flashtrain import checkpoint
    from tests.flashtrain.checkpoint.emulate import Tiny

    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    for folder in map(Path, sys.argv[1:]):
        calls.clear()
        try:
            path = checkpoint.find_latest(folder)
            checkpoint.restore(path, model, optimizer)
            checkpoint.read_meta(path)
            checkpoint.set_rng_state(checkpoint.read_rng(path, 0, 1))
            said = "loaded"
        except checkpoint.CheckpointError as error:
            said = f"refused: {error}"
        print("pickle" if calls else "no pickle", said, flush=True)
    os._exit(0)  # with such a hook, torch does not come to the end of an interpreter
    """
)


def loaded(*folders: Path) -> list[str]:
    """What one process says that loads the newest checkpoint of each folder."""
    ended = subprocess.run(
        [sys.executable, "-c", MALICIOUS, *map(str, folders)], cwd=ROOT, capture_output=True,
        text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return ended.stdout.splitlines()


def reseal(path: Path, change: "dict[str, object] | None" = None) -> None:
    """Make the manifest fit what the files are now, as an attacker would."""
    tree = json.loads((path / MANIFEST).read_bytes())
    del tree["xxh3_128"]
    for name in tree["files"]:
        record = checksum(path / name)
        tree["files"][name] = {"bytes": record.bytes, "xxh3_128": record.xxh3_128}
    tree |= change or {}  # what it may claim beside that
    (path / MANIFEST).write_bytes(_seal(json.dumps(tree, separators=(",", ":")).encode()))


def test_loading_unpickles_nothing_and_a_malicious_checkpoint_runs_no_code(tmp_path: Path) -> None:
    """A pickle that would touch a file, in the place of each file, all checksums fitting."""
    mark = tmp_path / "touched"
    payload = f"cposix\nsystem\n(S'touch {mark}'\ntR.".encode()
    save_whole(tmp_path / "honest", 1)
    names = ["rank-00000.safetensors", "state.json", "rng.json"]
    for name in names:
        path = save_whole(tmp_path / name, 1)
        (path / name).write_bytes(payload)
        reseal(path)
        verify(path)
    honest, *malicious = loaded(tmp_path / "honest", *(tmp_path / name for name in names))
    assert honest == "no pickle loaded"
    assert len(malicious) == 3
    assert all(line.startswith("no pickle refused: ") for line in malicious), malicious
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../secret", "..", ".", "", "sub/file", "a\x00b"]
)
def test_a_manifest_cannot_name_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("x")
    path = save_whole(tmp_path / "run", 1)
    tree = json.loads((path / MANIFEST).read_bytes())
    files = {**tree["files"], name: {"bytes": 1, "xxh3_128": "0" * 32}}
    reseal(path, {"files": files})
    with pytest.raises(CheckpointError, match="not a plain file name"):
        verify(path)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rng.json", MANIFEST])
def test_a_file_of_a_checkpoint_cannot_be_a_link_elsewhere(tmp_path: Path, name: str) -> None:
    """Though it holds the very bytes."""
    path = save_whole(tmp_path / "run", 1)
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name} is a link"):
        verify(path)


def test_a_checkpoint_that_is_a_link_is_deleted_as_a_link(tmp_path: Path) -> None:
    """Now, and when an earlier run died meanwhile."""
    elsewhere = save_whole(tmp_path / "other", 1)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("step-00000001", "step-00000002.tmp"):
        (run / name).symlink_to(elsewhere)
    for step in (3, 4):
        save_whole(run, step)  # keeps two
    assert sorted(path.name for path in run.iterdir()) == ["step-00000003", "step-00000004"]
    verify(elsewhere)


@pytest.mark.parametrize("key", ["name", "xxh3"])
@pytest.mark.parametrize("value", ["../secret", "/etc/passwd", "a/b", "..", "", "a\x00b", 7, None])
def test_a_manifest_of_tokens_cannot_either(tmp_path: Path, key: str, value: object) -> None:
    """Of a remote folder, its names become those of files in a cache."""
    folder = make_tokens(tmp_path)
    tree = json.loads((folder / "manifest.json").read_text())
    tree["splits"]["train"]["files"][0][key] = value
    (folder / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"no plain file name|lacks or misnames"):
        Manifest.load(folder)


def test_a_shard_cannot_be_a_link_elsewhere(tmp_path: Path) -> None:
    folder = make_tokens(tmp_path)
    shard = folder / "train-00000.bin"
    shard.rename(folder / "moved.bin")
    shard.symlink_to("moved.bin")
    TokenShards(folder)
    (folder / "moved.bin").rename(tmp_path / "moved.bin")
    shard.unlink()
    shard.symlink_to(tmp_path / "moved.bin")
    with pytest.raises(DataError, match="leads out of its folder"):
        TokenShards(folder)


def test_a_tensor_cannot_lie_in_a_file_that_is_not_listed(tmp_path: Path) -> None:
    path = save_whole(tmp_path, 1)
    tensors = json.loads((path / MANIFEST).read_bytes())["tensors"]
    next(iter(tensors.values()))["pieces"][0]["file"] = "other.safetensors"
    reseal(path, {"tensors": tensors})
    with pytest.raises(CheckpointError, match="not listed"):
        verify(path)


def test_a_folder_that_is_no_checkpoint_by_name_is_not_looked_into(tmp_path: Path) -> None:
    save_whole(tmp_path, 1)
    for name in ("step-00000009.tmp", "step-x", "step-00000009..", "..step-00000009"):
        (tmp_path / name).mkdir()
    assert find_latest(tmp_path) == tmp_path / "step-00000001"


def test_a_secret_in_the_configuration_is_refused_and_not_said() -> None:
    environment = {"WANDB_API_KEY": KEY, "HOME": "/home/someone-with-a-long-name"}
    refuse_secrets({"name": "run", "path": "/home/someone-with-a-long-name/x"}, environment)
    refuse_secrets({"data": {"tokenizer": "bpe", "sample_tokens": "9"}}, environment)
    for tree in (
        {"tracking": {"tags": ["a", f"x{KEY}"]}},
        {"engine": {"deepspeed": {"api_key": "anything"}}},
        {"data": {"path": f"https://user:{KEY}@host/x"}},
    ):
        with pytest.raises(ConfigError) as refusal:
            refuse_secrets(tree, environment)
        assert KEY not in str(refusal.value)
        assert "anything" not in str(refusal.value)


def test_keys_of_the_environment_appear_in_nothing_that_a_run_writes(tmp_path: Path) -> None:
    """A whole run with W&B offline, its console, and what it writes when it fails."""
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "flashtrain.train",
        *settings(make_tokens(tmp_path), run, trainer__steps=4, checkpoint__every=2),
        "tracking.wandb.mode=offline", "parallel.tensor=1",
    ]  # fmt: skip
    secrets = {"WANDB_API_KEY": KEY, "HF_TOKEN": f"hf_{KEY}", "DATABASE_PASSWORD": PASSWORD}
    environment = {**os.environ, **secrets, "OMP_NUM_THREADS": "1"}
    said = b""
    for extra in ([], ["checkpoint.resume=nowhere"], ["trainer.steps=x"]):
        ended = subprocess.run([*command, *extra], capture_output=True, cwd=ROOT, env=environment)
        assert (ended.returncode == 0) == (not extra), ended.stderr.decode()
        said += ended.stdout + ended.stderr
    files = [path for path in run.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.json", "metrics.jsonl", "state.json", "rank-00000.safetensors"} <= names
    assert any(path.suffix == ".wandb" for path in files)
    for secret in (KEY, PASSWORD):
        assert secret.encode() not in said
        assert not [path for path in files if secret.encode() in path.read_bytes()]
