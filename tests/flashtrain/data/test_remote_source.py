"""Runs whose config names remote shards: the same batches as from a folder, or one sentence."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from torch import Tensor

from flashtrain.compose import load
from flashtrain.config import Config, ConfigError
from flashtrain.data.mapped import DataError
from flashtrain.data.remote import Remote
from flashtrain.data.source import open_loader, open_tokenizer, prepare_source
from flashtrain.data.tokenizer import ByteTokenizer
from tests.flashtrain.data.made import make_shards

URL = "memory://streamed"
SMALL = [
    "experiment=null", "data=shards", "data.sequence_length=10", "data.batch_size=8",
    "data.micro_batch_size=1", "trainer.steps=10", "trainer.evaluate_sequences=8",
    "data.network_minutes=0.5",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """11 shards of 100 tokens, 9 sequences in each: 99 in an epoch; validation in 2 of 100."""
    folder = make_shards(tmp_path / "shards", 1100, limit=100, vocabulary=300)
    ByteTokenizer().save(folder / "tokenizer.json")
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/streamed/{path.name}", path.read_bytes())
    yield folder
    memory.rm("/streamed", recursive=True)


@pytest.fixture
def cache(tmp_path: Path) -> list[str]:
    """Room for two windows of two shards, and the one that is evaluated on."""
    return [f"data.cache_dir={tmp_path}/cache", f"data.cache_gb={5 * 200 / 1e9}"]


def config(*overrides: str) -> Config:
    return prepare_source(load([*SMALL, *overrides]), 1)


def batch(config: Config, steps: range, data_size: int) -> list[Tensor]:
    """Tokens [8, 10] of the global batches."""
    found: list[list[Tensor]] = [[] for _ in steps]
    for rank in range(data_size):
        with open_loader(config, rank, data_size, torch.device("cpu")) as loader:
            for place, step in enumerate(steps):
                found[place] += [b.tokens for b in loader.step(step)]
    return [torch.cat(parts) for parts in found]


def test_remote_shards_give_the_batches_of_local_ones(folder: Path, cache: list[str]) -> None:
    window = "data.shuffle_shards=2"
    local = config(f"data.path={folder}", window)
    remote = config(f"data.path={URL}", window, *cache)
    assert remote.model.vocabulary == local.model.vocabulary == 384
    whole = batch(local, range(30), 1)  # 99 and 198 sequences end an epoch inside 12 and 24
    # a run that changes its number of ranks twice, and goes on each time
    for data_size, steps in ((1, range(11)), (8, range(11, 14)), (2, range(14, 23)),
                             (4, range(23, 30))):  # fmt: skip
        parts = batch(remote, steps, data_size)
        for step, part in zip(steps, parts, strict=True):
            assert torch.equal(part, whole[step])
    tokens = torch.cat(whole)[:99, 0]
    assert sorted(tokens.tolist()) == sorted(
        (s * 100 + i * 10) % 300 for s in range(11) for i in range(9)
    )
    with open_loader(remote, 0, 1, torch.device("cpu")) as loader:
        held_out = torch.cat([b.tokens for b in loader.evaluation(8)])
    assert held_out.flatten().tolist() == list(range(7, 87))
    tokenizer = open_tokenizer(remote)
    assert tokenizer is not None and tokenizer.kind == "bytes"


def test_a_remote_source_mixes_with_a_local_one(
    folder: Path, cache: list[str], tmp_path: Path
) -> None:
    other = make_shards(tmp_path / "other", 500, vocabulary=300)
    sources = f"+data.sources={{far:{{path:'{URL}',weight:3}},near:{{path:{other},weight:1}}}}"
    far = config(sources, "data.shuffle_shards=2", *cache)
    near = config(sources.replace(URL, str(folder)), "data.shuffle_shards=2")
    for one, two in zip(batch(far, range(15), 2), batch(near, range(15), 1), strict=True):
        assert torch.equal(one, two)


def test_a_cache_for_all_shards_allows_the_whole_shuffle(folder: Path, tmp_path: Path) -> None:
    room = [f"data.cache_dir={tmp_path}/cache", f"data.cache_gb={12 * 200 / 1e9}"]
    far, near = config(f"data.path={URL}", *room), config(f"data.path={folder}")
    for one, two in zip(batch(far, range(8), 1), batch(near, range(8), 1), strict=True):
        assert torch.equal(one, two)


def test_closing_a_loader_wakes_a_read_that_waits(
    folder: Path, cache: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = config(f"data.path={URL}", "data.shuffle_shards=2", *cache, "data.network_minutes=60")
    tried = threading.Event()

    def fails(self: Remote, name: str) -> None:
        tried.set()
        raise ConnectionError(name)

    monkeypatch.setattr(Remote, "open", fails)
    loader = open_loader(found, 0, 1, torch.device("cpu"))
    errors: list[RuntimeError] = []

    def train() -> None:
        try:
            loader.step(0)
        except RuntimeError as error:
            errors.append(error)

    trainer = threading.Thread(target=train, daemon=True)
    trainer.start()
    assert tried.wait(30)
    began = time.monotonic()
    loader.close()
    trainer.join(30)
    assert time.monotonic() - began < 30 and "closed" in str(errors[0])


def test_where_shards_are_kept_does_not_make_it_another_run(cache: list[str]) -> None:
    plain = load([*SMALL, f"data.path={URL}"])
    assert load([*SMALL, f"data.path={URL}", *cache]).run_dir == plain.run_dir
    windows = load([*SMALL, f"data.path={URL}", "data.shuffle_shards=2"])
    assert windows.run_dir != plain.run_dir


@pytest.mark.parametrize(
    ("overrides", "error", "sentence"),
    [
        ([f"data.path={URL}"], ConfigError, "is remote: name a folder on a disk"),
        ([f"data.path={URL}", "CACHE"], ConfigError,
         r"data\.cache_gb=1e-06 is less than the 2\.4e-06 GB .* set data\.shuffle_shards"),
        ([f"data.path={URL}", "CACHE", "data.shuffle_shards=3"], ConfigError,
         r"less than the 1\.4e-06 GB .*data\.shuffle_shards=3.* lower data\.shuffle_shards or"),
        ([f"data.path={URL}", "CACHE", "data.shuffle_shards=65"], ConfigError,
         "data.shuffle_shards=65 is more than the 64 shards"),
        ([f"data.path={URL}", "CACHE", "data.shuffle_shards=1", "data.cache_gb=1e9"], ConfigError,
         r"data\.cache_gb=1e\+09 and the disk of .* GB for it"),
        ([f"data.path={URL}", "CACHE", "data.shuffle_shards=1", "data.packing=best_fit"],
         ConfigError, "set data.packing=concatenate or copy it"),
        ([f"data.path={URL}", "CACHE", "data.format=megatron"], ConfigError,
         "data.format=megatron: only folders of"),
        ([f"data.path={URL}", "CACHE", "data.validation_tokens=10"], ConfigError,
         "hold text out when preparing it"),
        (["data.path=nonsense://x", "CACHE"], DataError, "fsspec knows no nonsense://"),
        (["data.path=memory://absent", "CACHE"], DataError, "has no tokenizer.json that can be"),
        (["data.path=here", "data.shuffle_shards=0"], ConfigError, "must be a number above 0"),
        (["data=random", "model.vocabulary=9", "data.shuffle_shards=2"], ConfigError,
         "made-up tokens lie in no shards"),
    ],
)  # fmt: skip
def test_what_cannot_stream_is_refused(
    folder: Path, cache: list[str], overrides: list[str], error: type[Exception], sentence: str
) -> None:
    given = [o for override in overrides for o in (cache if override == "CACHE" else [override])]
    with pytest.raises(error, match=sentence) as refusal:
        config(*given)
    assert "\n" not in str(refusal.value)
