"""Reading ahead on local disks, and the memory that reading takes."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashtrain.data.ahead import ReadAhead
from flashtrain.data.shards import TokenShards
from tests.flashtrain.data.made import make_shards

ROOT = Path(__file__).resolve().parents[3]


def wait(condition: object, seconds: float = 20.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_files_are_read_whole_once_and_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(4)]
    for i, path in enumerate(paths):
        path.write_bytes(os.urandom(1000 * (i + 1)))
    ahead = ReadAhead(paths)
    released = []
    ahead.on_release = lambda: released.append(1)
    ahead.need([1], [3])
    wait(lambda: ahead.read_bytes == 6000)
    ahead.need([1], [3])  # the same again
    ahead.need([3], [0])
    wait(lambda: ahead.read_bytes == 7000)
    assert released == [1]  # shard 1 is not needed any more
    ahead.need([1], [])
    wait(lambda: ahead.read_bytes == 9000)  # maybe gone from the page cache: once more
    ahead.close()
    ahead.need([2], [])
    wait(lambda: ahead.read_bytes == 12000)
    assert ahead.path(2) == paths[2]


def test_a_file_that_cannot_be_read_is_left_to_its_reader(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    ahead = ReadAhead([tmp_path / "absent", tmp_path / "a"])
    ahead.need([0, 1], [])
    wait(lambda: ahead.read_bytes == 5)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="RWF_NOWAIT is Linux's")
def test_a_dropped_shard_is_in_the_page_cache_again(tmp_path: Path) -> None:
    size, paths = 6 << 20, [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(bytes(size))
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    ahead = ReadAhead(paths)
    ahead.need([0], [1])
    wait(lambda: ahead.read_bytes == 2 * size)
    for path in paths:
        with path.open("rb") as stream:
            for at in range(0, size, 1 << 16):
                try:  # only what lies in memory
                    got = os.preadv(stream.fileno(), [bytearray(1 << 16)], at, os.RWF_NOWAIT)
                except OSError as error:
                    if error.errno == errno.EOPNOTSUPP:
                        pytest.skip("this file system does not tell what lies in memory")
                    raise
                assert got == 1 << 16


def test_rows_are_announced_across_and_at_the_end_of_files(tmp_path: Path) -> None:
    shards = TokenShards(make_shards(tmp_path / "shards"))
    for start, length in ((0, 1), (299, 2), (290, 300), (990, 10), (999, 50)):
        shards.advise(start, length)


MEMORY = """
import sys
from pathlib import Path
from flashtrain.data.loader import DataLoader
from flashtrain.data.samples import Blocks
from flashtrain.data.shards import TokenShards
from flashtrain.data.windows import WindowShuffled

def resident():
    told = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(told["VmRSS"].split()[0]) / 1024

shards = TokenShards(sys.argv[1])
order = WindowShuffled(Blocks(shards, 2048, None, shards.sections), shards, 1, 2)
epoch = order.n_samples // 64
with DataLoader(order, batch_size=64, micro_batch_size=64) as loader:
    for step in range(epoch // 4):
        loader.step(step)
    before = most = resident()
    for step in range(epoch // 4, 5 * epoch // 4):
        loader.step(step)
        most = max(most, resident())
print(most - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is Linux's")
def test_memory_does_not_grow_with_the_shards_read(tmp_path: Path) -> None:
    # 20 shards of 4 MB, two at a time: 80 MB are mapped one after the other
    shards = make_shards(tmp_path / "shards", 20 << 21, limit=1 << 21, validation=1)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(shards)], cwd=ROOT, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 30  # MB: maps of one window give way to those of the next
