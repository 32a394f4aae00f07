"""What `data.path` may name, opened: our own shards, here or elsewhere, or others' files."""

from pathlib import Path

from flashtrain.config import DataConfig, DataFormat, MixSource
from flashtrain.data.dataset import ShardedDataset
from flashtrain.data.foreign import is_foreign, open_foreign
from flashtrain.data.manifest import MANIFEST
from flashtrain.data.mapped import DataError
from flashtrain.data.remote import is_remote
from flashtrain.data.remote_source import local_folder, open_remote
from flashtrain.data.shards import TokenShards

FIRST_LOOK = 1 << 20  # tokens of a foreign file that are held against the vocabulary at the door


def open_split(source: MixSource, split: str, vocabulary: int, data: DataConfig) -> ShardedDataset:
    """The tokens of one split of `source`, ids below `vocabulary`; DataError where it has none.

    data: says where remote shards are kept, and how many of them.
    """
    if is_remote(source.path):
        return open_remote(source.path, split, vocabulary, data)
    if is_own(source):
        return TokenShards(Path(source.path), split, vocabulary=vocabulary)
    kind = None if source.format is DataFormat.auto else source.format.name
    tokens = open_foreign(source.path, split, vocabulary, kind)
    if tokens is None and split == "train":
        raise DataError(f"{source.path} is no file, folder or pattern of {source.format.name} data")
    if tokens is None:
        raise DataError(
            f"{source.path} has no validation split: name data to evaluate on with "
            "data.validation_path, or hold the last tokens out with data.validation_tokens"
        )
    tokens.read(0, min(FIRST_LOOK, tokens.tokens))
    return tokens


def open_held_out(data: DataConfig, vocabulary: int) -> ShardedDataset:
    """The validation split of data.validation_path, or all of it where it is not split."""
    assert data.validation_path is not None
    source = MixSource(data.validation_path)
    if is_own(source):
        return open_split(source, "validation", vocabulary, data)
    found = open_foreign(source.path, "validation", vocabulary)
    return found or open_split(source, "train", vocabulary, data)


def is_own(source: MixSource) -> bool:
    """Also where there is nothing or an unfinished folder, which our own shards say best."""
    if is_remote(source.path):
        return True
    if source.format is not DataFormat.auto:
        return source.format is DataFormat.flashtrain
    folder = Path(source.path)
    ours = (folder / MANIFEST).is_file() or any(folder.glob("*-[0-9][0-9][0-9][0-9][0-9].bin"))
    return ours or not is_foreign(source.path)


def folder_of(path: str, data: DataConfig) -> Path:
    """Where manifest and tokenizer of our own shards are read."""
    return local_folder(path, data) if is_remote(path) else Path(path)
