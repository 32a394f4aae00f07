"""The remote shards a config names: refused at the door where they cannot work, and opened.

The manifest and the tokenizer are copied to the cache when a run is admitted; shards come as they
are needed (fetch.py).
"""

import os
import shutil
import uuid
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from flashtrain.config import Config, ConfigError, DataConfig, DataFormat, MixSource, Packing
from flashtrain.data.cache import ShardCache
from flashtrain.data.fetch import Fetcher
from flashtrain.data.manifest import MANIFEST, Manifest, ShardFile
from flashtrain.data.remote import Remote, in_a_line, is_remote, place_of
from flashtrain.data.shards import TokenShards
from flashtrain.data.tokenizer import TOKENIZER_FILE
from flashtrain.data.windows import LARGEST_WINDOW

GB = 1e9


def admit_remote(config: Config, sources: Iterable[MixSource]) -> None:
    """Copy manifests and tokenizers of all remote sources; ConfigError for what does not go."""
    data = config.data
    paths = {source.path for source in sources if is_remote(source.path)}
    if paths and (data.shuffle_shards or 0) > LARGEST_WINDOW:
        raise ConfigError(
            f"data.shuffle_shards={data.shuffle_shards} is more than the {LARGEST_WINDOW} shards "
            f"of {min(paths)} that may be open at a time: lower it"
        )
    for source in sources:
        if source.path in paths and source.format not in (DataFormat.auto, DataFormat.flashtrain):
            raise ConfigError(
                f"{source.path} with data.format={source.format.name}: only folders of "
                "scripts/prepare_data.py are read from elsewhere, whose manifest has the "
                "checksums; copy these files to a disk of this machine"
            )
    if paths and data.packing is Packing.best_fit:
        raise ConfigError(
            f"data.packing=best_fit looks at all documents before the run, and {min(paths)} is "
            "remote: set data.packing=concatenate or copy it to a disk of this machine"
        )
    if paths and data.validation_tokens is not None:
        raise ConfigError(
            f"data.validation_tokens={data.validation_tokens} with the remote {min(paths)}: hold "
            "text out when preparing it (--validation-share), or name data.validation_path"
        )
    if data.validation_path is not None and is_remote(data.validation_path):
        paths.add(data.validation_path)
    for path in sorted(paths):
        local_folder(path, data, refresh=True)


def cache_folder(url: str, data: DataConfig) -> Path:
    """data.cache_dir; ConfigError where it is not named or cannot be written."""
    if data.cache_dir is None:
        raise ConfigError(
            f"{url} is remote: name a folder on a disk of this machine that shards are kept in, "
            "data.cache_dir=FOLDER, and the room they may take there, data.cache_gb"
        )
    folder = Path(data.cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data.cache_dir={folder} cannot be made: {in_a_line(error)}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"data.cache_dir={folder} cannot be written to")
    return folder


def local_folder(url: str, data: DataConfig, *, refresh: bool = False) -> Path:
    """A folder with the manifest and tokenizer of `url`: what is in the cache, or copied there.

    refresh: copied anew, in case they changed.
    """
    folder = cache_folder(url, data) / place_of(url)
    names = (TOKENIZER_FILE, MANIFEST)  # the manifest last, as it is written last
    if refresh or not all((folder / name).is_file() for name in names):
        remote = Remote(url)
        folder.mkdir(exist_ok=True)
        for name in names:
            partial = folder / f".{name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            partial.write_bytes(remote.read(name))
            partial.rename(folder / name)
    return folder


def open_remote(url: str, split: str, vocabulary: int, data: DataConfig) -> TokenShards:
    """One split; nothing is downloaded but manifest and tokenizer, and those only once."""
    cache = ShardCache(cache_folder(url, data), round(data.cache_gb * GB))
    bring = partial(Fetcher, Remote(url), cache, patience=data.network_minutes * 60)
    return TokenShards(local_folder(url, data), split, vocabulary=vocabulary, bring=bring)


def check_room(config: Config, sources: Iterable[MixSource]) -> None:
    """ConfigError where data.cache_gb is less than what has to be in reach at the same time."""
    data = config.data
    needed = 0
    for source in sources:
        if not is_remote(source.path):
            continue
        splits = Manifest.load(local_folder(source.path, data)).splits
        needed += _in_reach(source.path, splits["train"].files, data)
        if data.validation_path is None:
            needed += _evaluated(config, splits["validation"].files)
    if data.validation_path is not None and is_remote(data.validation_path):
        splits = Manifest.load(local_folder(data.validation_path, data)).splits
        needed += _evaluated(config, splits["validation"].files)
    if not needed:
        return
    if needed > data.cache_gb * GB:
        way = (
            "set data.shuffle_shards, which needs a few shards at a time,"
            if data.shuffle_shards is None
            else "lower data.shuffle_shards"
        )
        raise ConfigError(
            f"data.cache_gb={data.cache_gb:g} is less than the {needed / GB:.3g} GB of shards that "
            f"data.shuffle_shards={_null(data.shuffle_shards)} and the evaluation need in reach: "
            f"{way} or raise data.cache_gb"
        )
    assert data.cache_dir is not None
    held = ShardCache(Path(data.cache_dir), 0).size()
    free = shutil.disk_usage(data.cache_dir).free
    if held + free < data.cache_gb * GB:
        raise ConfigError(
            f"data.cache_gb={data.cache_gb:g} and the disk of data.cache_dir={data.cache_dir} has "
            f"{(held + free) / GB:.3g} GB for it: lower it or name another folder"
        )


def _in_reach(path: str, files: Sequence[ShardFile], data: DataConfig) -> int:
    """Bytes of the windows that are read and brought at the same time, at most."""
    sizes = sorted((file.bytes for file in files), reverse=True)
    if data.shuffle_shards is not None:
        return sum(sizes[: 2 * data.shuffle_shards])
    if len(sizes) > 2 * LARGEST_WINDOW:
        raise ConfigError(
            f"{path} has {len(sizes)} shards, and {2 * LARGEST_WINDOW} at most can be shuffled "
            "over as a whole from elsewhere: set data.shuffle_shards"
        )
    return sum(sizes)


def _evaluated(config: Config, files: Sequence[ShardFile]) -> int:
    """Bytes of the shards that hold the first trainer.evaluate_sequences sequences."""
    left = config.trainer.evaluate_sequences * config.data.sequence_length + 1
    size = 0
    for file in files:
        if left <= 0:
            break
        left, size = left - file.tokens, size + file.bytes
    return size


def _null(value: int | None) -> str:
    return "null" if value is None else str(value)
