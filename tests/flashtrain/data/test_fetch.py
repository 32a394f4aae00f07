"""Remote shards through fsspec: fetched ahead, checked, shared, bounded; networks that fail."""

import functools
import importlib.util
import json
import multiprocessing
import re
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from flashtrain.config import ConfigError, DataConfig
from flashtrain.data import fetch, remote
from flashtrain.data.cache import ShardCache
from flashtrain.data.fetch import Fetcher
from flashtrain.data.manifest import MANIFEST, Manifest
from flashtrain.data.mapped import DataError
from flashtrain.data.remote import Remote, is_remote, place_of
from flashtrain.data.remote_source import local_folder, open_remote
from flashtrain.data.samples import Blocks
from flashtrain.data.shards import TokenShards
from flashtrain.data.windows import WindowShuffled
from tests.flashtrain.data.made import make_shards

URL = "memory://shards-of-a-test"
SIZE = 600  # bytes of a shard: 300 tokens


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Ten shards here and at URL, and pauses that a test can wait for."""
    for module in (remote, fetch):
        monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(fetch, "POLL", 0.01)
    monkeypatch.setattr(fetch, "FULL_POLL", 0.05)
    folder = make_shards(tmp_path / "shards", 3000)
    (folder / "tokenizer.json").write_text("{}")
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/shards-of-a-test/{path.name}", path.read_bytes())
    yield folder
    memory.rm("/shards-of-a-test", recursive=True)


def settings(tmp_path: Path, shards: float = 6, seconds: float = 30.0) -> DataConfig:
    return DataConfig(
        cache_dir=str(tmp_path / "cache"), cache_gb=shards * SIZE / 1e9,
        network_minutes=seconds / 60,
    )  # fmt: skip


def fetcher_of(shards: TokenShards) -> Fetcher:
    found = shards.files
    assert isinstance(found, Fetcher)
    return found


def held(tmp_path: Path) -> set[int]:
    found = (tmp_path / "cache").glob("*/train-*.bin")
    return {int(path.name.split("-")[1]) for path in found}


def wait(condition: Any, seconds: float = 20.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_paths_and_urls() -> None:
    for url in ("s3://bucket/x", "https://host/x", "file:///x", "memory://x", "hf://datasets/x"):
        assert is_remote(url)
    for path in ("data/x", "/data/x", "C:/x", "./s3:/x"):
        assert not is_remote(path)
    assert place_of("s3://bucket/web/") == place_of("s3://bucket/web") != place_of("s3://b/web")


def test_remote_tokens_are_the_local_ones_in_a_bounded_cache(folder: Path, tmp_path: Path) -> None:
    shards = open_remote(URL, "train", 5000, settings(tmp_path, 3))
    local = TokenShards(folder)
    for start, length in ((0, 10), (295, 10), (2990, 10), (100, 2500), (0, 3000)):
        np.testing.assert_array_equal(shards.read(start, length), local.read(start, length))
        assert len(held(tmp_path)) <= 3
    shards.verify()
    shards.close()


def test_the_order_is_that_of_local_shards_and_the_next_window_is_fetched(
    folder: Path, tmp_path: Path
) -> None:
    def order(shards: TokenShards) -> WindowShuffled:
        return WindowShuffled(Blocks(shards, 7, None, shards.sections), shards, 1, 2)

    here, there = order(TokenShards(folder)), open_remote(URL, "train", 5000, settings(tmp_path, 4))
    far = order(there)
    blocks = [np.empty((2, 3, 7), np.int64) for _ in range(2)]
    for start in range(0, 3 * here.n_samples - 3, 3):
        for samples, block in zip((here, far), blocks, strict=True):
            samples.fill(np.arange(start, start + 3), block)
        assert np.array_equal(*blocks)
        assert len(held(tmp_path)) <= 4
    far.fill(np.arange(3), blocks[0])  # back to the start, as a resumed run would
    wait(lambda: held(tmp_path) == {*far.shards(0, 0), *far.shards(0, 1)})
    there.close()


def test_a_cached_shard_is_not_fetched_again(folder: Path, tmp_path: Path) -> None:
    first = open_remote(URL, "train", 5000, settings(tmp_path))
    first.read(0, 900)
    first.close()
    memory = fsspec.filesystem("memory")
    for path in memory.ls("/shards-of-a-test", detail=False):
        memory.pipe_file(path, b"gone")
    again = open_remote(URL, "train", 5000, settings(tmp_path))
    np.testing.assert_array_equal(again.read(0, 900), np.arange(900))
    again.close()
    again = open_remote(URL, "train", 5000, settings(tmp_path, seconds=0.2))
    with pytest.raises(DataError, match=r"no byte of memory://.*train-00003.* it arrived damaged"):
        again.read(1000, 5)


class Broken:
    """Stands before a Remote's `open`: `fails` times an error, or a stream cut off."""

    def __init__(self, shards: TokenShards, fails: float, how: str = "error") -> None:
        self.inner, self.fails, self.how = fetcher_of(shards).remote.open, fails, how
        self.tries = 0
        fetcher_of(shards).remote.open = self  # type: ignore[method-assign,assignment]

    def __call__(self, name: str) -> Any:
        self.tries += 1
        if self.tries > self.fails:
            return self.inner(name)
        if self.how == "hang":
            time.sleep(3600)
        if self.how == "cut":
            return _Cut()
        raise {"error": ConnectionError("reset"), "gone": FileNotFoundError("x")}[self.how]


class _Cut:
    def __enter__(self) -> "_Cut":
        self.parts = [b"ab", b"c", b""]
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, size: int) -> bytes:
        return self.parts.pop(0)


@pytest.mark.parametrize("how", ["error", "cut"])
def test_failures_are_tried_again(folder: Path, tmp_path: Path, how: str) -> None:
    shards = open_remote(URL, "train", 5000, settings(tmp_path))
    broken = Broken(shards, 4, how)
    np.testing.assert_array_equal(shards.read(250, 100), np.arange(250, 350))
    assert broken.tries == 6  # two shards
    shards.close()


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (
            "error",
            r"arrived for 0\.005 minutes \(ConnectionError: reset\): .* same command goes on",
        ),
        ("cut", r"it arrived damaged: 3 bytes with xxh3 \w+, and the manifest says 600 with"),
        ("hang", r"no byte of memory://\S+/train-00000\.bin .* \(it answers nothing\)"),
    ],
)
def test_a_network_that_stays_away_ends_the_run(
    folder: Path, tmp_path: Path, how: str, sentence: str
) -> None:
    shards = open_remote(URL, "train", 5000, settings(tmp_path, seconds=0.3))
    Broken(shards, float("inf"), how)
    with pytest.raises(DataError, match=sentence) as refusal:
        shards.read(0, 5)
    assert "\n" not in str(refusal.value)


def test_what_is_not_there_is_said_at_once(folder: Path, tmp_path: Path) -> None:
    shards = open_remote(URL, "train", 5000, settings(tmp_path, seconds=3600))
    Broken(shards, float("inf"), "gone")
    with pytest.raises(DataError, match=r"train-00000\.bin is in the manifest and cannot be read"):
        shards.read(0, 5)


def test_a_download_that_was_ahead_gives_way_to_one_that_is_waited_for(
    folder: Path, tmp_path: Path
) -> None:
    shards = open_remote(URL, "train", 5000, settings(tmp_path, 3))
    shards.need([0], [1, 2])
    wait(lambda: held(tmp_path) == {0, 1, 2})
    np.testing.assert_array_equal(shards.read(2700, 5), np.arange(2700, 2705))
    assert held(tmp_path) == {0, 1, 9}
    shards.close()


def test_a_cache_that_others_fill_is_said(folder: Path, tmp_path: Path) -> None:
    one = open_remote(URL, "train", 5000, settings(tmp_path, 2))
    one.need([0, 1], [])
    one.read(0, 600)
    other = open_remote(URL, "train", 5000, settings(tmp_path, 2, seconds=0.3))
    with pytest.raises(DataError, match=r"are in use: raise data\.cache_gb"):
        other.read(900, 5)
    one.need([2], [])
    other = open_remote(URL, "train", 5000, settings(tmp_path, 2))
    np.testing.assert_array_equal(other.read(900, 5), np.arange(900, 905))
    one.close()
    other.close()


def test_threads_end_with_their_work_and_with_their_shards(folder: Path, tmp_path: Path) -> None:
    def threads() -> int:
        return sum(thread.name == "shards" for thread in threading.enumerate())

    before = threads()
    shards = open_remote(URL, "train", 5000, settings(tmp_path))
    assert threads() == before
    shards.need([0], [1])
    shards.read(0, 5)
    wait(lambda: threads() == before)
    Broken(shards, float("inf"))
    shards.need([5], [])
    assert threads() == before + 1
    shards.close()
    wait(lambda: threads() == before)
    with pytest.raises(RuntimeError, match="closed"):
        shards.read(1500, 5)


def test_a_manifest_is_refreshed_only_at_the_door(folder: Path, tmp_path: Path) -> None:
    data = settings(tmp_path)
    place = local_folder(URL, data)
    tree = json.loads((folder / MANIFEST).read_text())
    tree["source"] = "another"
    fsspec.filesystem("memory").pipe_file(
        f"/shards-of-a-test/{MANIFEST}", json.dumps(tree).encode()
    )
    assert Manifest.load(local_folder(URL, data)).source == "made for a test"
    assert Manifest.load(local_folder(URL, data, refresh=True)).source == "another"
    assert sorted(path.name for path in place.iterdir()) == [MANIFEST, "tokenizer.json"]


def test_what_cannot_be_opened_is_one_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="knows no nonsense://"):
        Remote("nonsense://x")
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(DataError, match=r"gs:// needs a package .*pip install 'flashtrain\["):
            Remote("gs://bucket/x")
    with pytest.raises(DataError, match=r"memory://nothing has no tokenizer\.json that can be"):
        local_folder("memory://nothing", settings(tmp_path))
    with pytest.raises(ConfigError, match=r"is remote: name a folder .* data\.cache_dir=FOLDER"):
        open_remote(URL, "train", 5000, DataConfig())
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.* cannot be made"):
        open_remote(URL, "train", 5000, DataConfig(cache_dir=str(tmp_path / "file" / "cache")))
    with pytest.raises(DataError, match="tokenizer of 5000 ids and the model's"):
        open_remote(URL, "train", 300, settings(tmp_path))
    source = Remote(URL)
    monkeypatch.setattr(source, "open", lambda name: 1 / 0)
    with pytest.raises(DataError, match=r"could not be read for 0 seconds \(ZeroDivisionError"):
        source.read(MANIFEST, patience=0.05)


class _Plain(SimpleHTTPRequestHandler):
    """Sends whole files, whatever part of one is asked for."""

    def log_message(self, *_: object) -> None:
        pass


class _Ranges(_Plain):
    """Sends parts, as object stores and most servers do."""

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            return super().do_GET()
        data = Path(self.translate_path(self.path)).read_bytes()
        part = data[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.mark.parametrize("handler", [_Plain, _Ranges])
def test_shards_come_over_http(
    folder: Path, tmp_path: Path, handler: type[_Plain], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote, "BLOCK", 250)  # three parts make a shard
    served = functools.partial(handler, directory=str(folder.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), served) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/shards"
        shards = open_remote(url, "train", 5000, settings(tmp_path, 3))
        np.testing.assert_array_equal(shards.read(0, 3000), np.arange(3000))
        shutil.move(folder / "train-00009.bin", folder / "x")
        again = open_remote(url, "train", 5000, settings(tmp_path / "2"))
        with pytest.raises(DataError, match="is in the manifest and cannot be read"):
            again.read(2800, 5)
        server.shutdown()


def test_a_server_that_comes_back_is_waited_for(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    served = functools.partial(_Plain, directory=str(folder.parent))

    def serve(port: int) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", port), served)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def stop(server: ThreadingHTTPServer) -> None:
        server.shutdown()
        server.server_close()

    server = serve(0)
    port = server.server_port
    url = f"http://127.0.0.1:{port}/shards"
    shards = open_remote(url, "train", 5000, settings(tmp_path))
    assert int(shards.read(0, 1)[0]) == 0
    stop(server)
    again: list[ThreadingHTTPServer] = []
    timer = threading.Timer(1.0, lambda: again.append(serve(port)))
    timer.start()
    assert int(shards.read(1500, 1)[0]) == 1500  # fsspec says: file not found
    timer.join()
    stop(again[0])
    gone = open_remote(url, "train", 5000, settings(tmp_path, seconds=0.5))
    with pytest.raises(DataError, match=r"arrived for 0\.00833 minutes .*ClientConnectorError"):
        gone.read(2700, 1)


def test_shards_come_from_s3(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        told = {"endpoint_url": f"http://{host}:{port}", "key": "a", "secret": "b"}
        monkeypatch.setitem(fsspec.config.conf, "s3", told)
        store = fsspec.filesystem("s3")
        store.mkdir("tokens")
        store.put(str(folder), "tokens/web", recursive=True)
        shards = open_remote("s3://tokens/web", "train", 5000, settings(tmp_path, 3))
        np.testing.assert_array_equal(shards.read(0, 3000), np.arange(3000))
        store.rm("tokens/web/train-00009.bin")
        again = open_remote("s3://tokens/web", "train", 5000, settings(tmp_path / "2"))
        with pytest.raises(DataError, match="is in the manifest and cannot be read"):
            again.read(2800, 5)
    finally:
        server.stop()


def test_ranks_of_a_machine_share_a_cache(folder: Path, tmp_path: Path) -> None:
    """Three processes go through two epochs in windows; a fourth looks at the bytes meanwhile."""
    data = settings(tmp_path, 4)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    url = f"file://{folder}"
    ranks = [context.Process(target=_rank, args=(url, data, r, results)) for r in range(3)]
    cache = ShardCache(tmp_path / "cache", 4 * SIZE)
    for rank in ranks:
        rank.start()
    most = 0
    while any(rank.is_alive() for rank in ranks):
        # a file may go between being listed and being looked at
        paths = [*cache.folder.glob("*/*.bin"), *cache.folder.glob("*/*.partial")]
        most = max(most, SIZE * len(paths))
        time.sleep(0.002)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    found = dict(results.get() for _ in ranks)
    n_samples = 10 * (299 // 7)
    together = [start for step in zip(*found.values(), strict=True) for start in step]
    for epoch in range(2):
        part = together[epoch * n_samples : (epoch + 1) * n_samples]
        assert sorted(part) == [s * 300 + i * 7 for s in range(10) for i in range(42)]
    assert 2 * SIZE <= most <= 5 * SIZE  # one is listed under both names as it is renamed
    assert cache.size() <= 4 * SIZE


def _rank(url: str, data: DataConfig, rank: int, results: Any) -> None:
    shards = open_remote(url, "train", 5000, data)
    order = WindowShuffled(Blocks(shards, 7, None, shards.sections), shards, 1, 2)
    block, starts = np.empty((2, 1, 7), np.int64), []
    for number in range(rank, 2 * order.n_samples, 3):
        order.fill(np.array([number]), block)
        starts.append(int(block[0, 0, 0]))
        assert (np.diff(block[0, 0]) == 1).all()
    results.put((rank, starts))
