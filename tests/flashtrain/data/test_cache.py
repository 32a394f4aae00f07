"""The folder of downloaded shards: its bound, its locks, what killed processes leave."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from flashtrain.data.cache import Claim, NoRoomError, ShardCache


def put(cache: ShardCache, name: str, data: bytes) -> None:
    claim = cache.claim(name, len(data))
    assert claim is not None
    claim.stream.write(data)
    cache.publish(claim).close()


def names(cache: ShardCache) -> list[str]:
    return sorted(path.name for path in cache.folder.glob("*/*"))


def test_files_come_whole_and_the_longest_unneeded_go_first(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 300)
    for name in "abc":
        put(cache, f"s/{name}.bin", name.encode() * 100)
        time.sleep(0.01)
    assert cache.size() == 300
    pin = cache.pin("s/a.bin", 100)  # needed now, so no longer the oldest
    assert pin is not None and pin.read() == b"a" * 100
    cache.release(pin)
    put(cache, "s/d.bin", b"d" * 150)
    assert names(cache) == ["a.bin", "d.bin"]
    assert cache.pin("s/b.bin", 100) is None


def test_what_is_in_use_stays_and_what_is_promised_counts(tmp_path: Path) -> None:
    cache, other = ShardCache(tmp_path, 300), ShardCache(tmp_path, 300)
    put(cache, "s/a.bin", b"a" * 100)
    pin = cache.pin("s/a.bin", 100)
    assert pin is not None
    claim = cache.claim("s/b.bin", 150)
    assert claim is not None
    assert other.claim("s/b.bin", 150) is None  # another one writes it
    with pytest.raises(NoRoomError, match=r"0\.00 of 0\.00 GB .* are in use"):
        other.claim("s/c.bin", 100)
    assert names(cache) == ["a.bin", "b.bin.150.partial"]
    claim.stream.write(b"b" * 70)
    assert other.arrived("s/b.bin", 150) == 70
    cache.drop(claim)
    assert other.arrived("s/b.bin", 150) == 0
    cache.release(pin)
    put(other, "s/c.bin", b"c" * 300)
    assert names(cache) == ["c.bin"]


def test_a_file_that_a_crash_cut_off_is_not_taken(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 300)
    put(cache, "s/a.bin", b"a" * 100)
    os.truncate(tmp_path / "s" / "a.bin", 40)
    assert cache.pin("s/a.bin", 100) is None
    assert names(cache) == []


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 300)
    process = multiprocessing.get_context("spawn").Process(target=_die, args=(tmp_path,))
    process.start()
    process.join(60)
    assert names(cache) == ["a.bin.200.partial"]
    put(cache, "s/b.bin", b"b" * 250)
    assert names(cache) == ["b.bin"]


def _die(folder: Path) -> None:
    claim = ShardCache(folder, 300).claim("s/a.bin", 200)
    assert isinstance(claim, Claim)
    claim.stream.write(b"a" * 100)
    os._exit(9)
