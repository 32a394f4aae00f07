"""Preparations that are interrupted, by exceptions and by kill -9, end with the same bytes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashtrain.data import encode
from flashtrain.data.mapped import DataError
from flashtrain.data.prepare import Progress, Recipe, prepare
from flashtrain.data.shards import TokenShards
from tests.flashtrain.data.made import BYTES, TEXTS, contents, write_jsonl

ROOT = Path(__file__).resolve().parents[3]


class Killed(BaseException):
    """Ends `prepare` from within, as a signal would."""


def stop_after(calls: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        nonlocal calls
        calls -= progress.stage == "tokens"
        if calls < 0:
            raise Killed

    return report


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_preparation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(encode, "BATCH", 2000)
    parts = []
    for n in range(4):
        texts = [*TEXTS[:9], "", *(f"{n}{text}" for text in TEXTS), f"{n}{TEXTS[0]}"]
        parts.append(write_jsonl(tmp_path / f"{n}.jsonl", texts))
    recipe = Recipe(vocabulary=280, validation_share=0.2, shard_tokens=3000, deduplicate=True)
    options = {"workers": workers, "save_seconds": 0.0}
    prepare(parts, tmp_path / "whole", recipe)
    out, tries = tmp_path / "out", 0
    while not out.exists():
        tries += 1
        seen: list[Progress] = []
        stop = stop_after(2)

        def report(progress: Progress) -> None:
            seen.append(progress)  # noqa: B023
            stop(progress)  # noqa: B023

        with contextlib.suppress(Killed):
            prepare(parts, out, recipe, report=report, **options)
        # the tokenizer is trained once, and nothing is encoded twice
        assert ("tokenizer" in {progress.stage for progress in seen}) == (tries == 1)
        assert tries < 40
    assert tries >= 3
    assert contents(out) == contents(tmp_path / "whole")


def test_an_interrupted_preparation_of_something_else_is_in_the_way(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(Killed):
        prepare([source], tmp_path / "out", BYTES, report=stop_after(0))
    other = Recipe("bytes", validation_share=0.3)
    with pytest.raises(DataError, match=r"out.partial is an interrupted preparation of .*--force"):
        prepare([source], tmp_path / "out", other)
    manifest = prepare([source], tmp_path / "out", other, force=True)
    assert manifest.recipe["validation_share"] == 0.3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


@pytest.mark.parametrize("damage", ["shard", "state"])
def test_a_damaged_interruption_is_said_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(encode, "BATCH", 500)
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(Killed):
        prepare([source], tmp_path / "out", BYTES, report=stop_after(3), save_seconds=0.0)
    work = tmp_path / ".out.partial"
    file = work / ("train-00000.bin" if damage == "shard" else "state.npz")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"state\.npz cannot be gone on from .*start again"):
        prepare([source], tmp_path / "out", BYTES)
    assert not work.exists()
    prepare([source], tmp_path / "out", BYTES)
    TokenShards(tmp_path / "out").verify()


class Hub:
    """Stands in for the package `datasets`; `fails` rows from here on the network is gone."""

    def __init__(self, fails: int | None) -> None:
        self.fails, self.column_names = fails, None

    def load_dataset(self, *_: object, **__: object) -> "Hub":
        if self.fails == 0:
            raise ConnectionError("no network")
        return self

    def skip(self, n: int) -> Iterator[dict[str, str]]:
        for number, text in enumerate(TEXTS[n:]):
            if number == self.fails:
                raise ConnectionError("no network")
            yield {"text": text}


def test_a_network_that_fails_costs_nothing_that_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH", 200)
    errors = SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "datasets.exceptions", errors)

    def run(output: str, fails: int | None, report: object = None) -> None:
        monkeypatch.setitem(sys.modules, "datasets", Hub(fails))
        prepare(["hf:some/set"], tmp_path / output, BYTES, save_seconds=0.0, report=report)

    run("whole", None)
    with pytest.raises(DataError, match=r"hf:some/set cannot be read: no network$"):
        run("out", 0)
    assert not (tmp_path / ".out.partial").exists()  # nothing was there to keep
    for fails in (30, 0, 20, 0):
        with pytest.raises(DataError, match="no network; when it can be again, the same command"):
            run("out", fails)
    seen: list[Progress] = []
    run("out", None, seen.append)
    assert seen[0].documents > 40
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_preparations_of_one_folder_at_once_are_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)

    def second(progress: Progress) -> None:
        with pytest.raises(DataError, match=r"another process is preparing .*out"):
            prepare([source], tmp_path / "out", BYTES)

    prepare([source], tmp_path / "out", BYTES, report=second)
    TokenShards(tmp_path / "out").verify()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_in_the_middle_the_script_ends_with_the_same_bytes(
    tmp_path: Path, workers: str
) -> None:
    # lines of many sizes; the tokenizer is given, so that the kill comes while tokens are written
    texts = [f"{n} " + " ".join(str(n * k) for k in range(n % 90)) for n in range(20_000)]
    source = write_jsonl(tmp_path / "a.jsonl.gz", texts)
    command = [sys.executable, "-c", KILLABLE, str(source), "bytes", workers]
    recipe = Recipe("bytes", deduplicate=True, shard_tokens=1 << 20)
    prepare([source], tmp_path / "whole", recipe)
    out, state = tmp_path / "out", tmp_path / ".out.partial" / "state.npz"
    first = subprocess.Popen([*command, str(out)], cwd=ROOT, start_new_session=True)
    limit = time.monotonic() + 60
    while not state.exists() and time.monotonic() < limit:
        time.sleep(0.005)
    first.kill()
    assert first.wait(60) == -signal.SIGKILL
    while alive(first.pid) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not alive(first.pid)  # its workers do not stay behind
    assert state.exists() and not out.exists()
    again = subprocess.run([*command, str(out)], cwd=ROOT, timeout=100, capture_output=True)
    assert again.returncode == 0, again.stderr
    assert int(again.stdout) > 0  # documents that were there already
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl.gz", "out", "whole"]


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


KILLABLE = """
import sys
from flashtrain.data import encode
from flashtrain.data.prepare import Recipe, prepare
encode.BATCH = 1 << 14  # many, so that the kill comes in their middle
source, tokenizer, workers, out = sys.argv[1:]
seen = []
prepare([source], out, Recipe(tokenizer, deduplicate=True, shard_tokens=1 << 20),
        workers=int(workers), save_seconds=0.0, report=seen.append)
print(seen[0].documents)
"""
