"""Small token shards with known ids, written as `prepare` writes them."""

from pathlib import Path

import numpy as np

from flashtrain.data.shards import FORMAT, Manifest
from flashtrain.data.writer import SplitWriter, dtype_for, write_manifest


def make_shards(
    folder: Path,
    n_tokens: int = 1000,
    *,
    validation: int = 200,
    limit: int = 300,
    vocabulary: int = 5000,
) -> Path:
    """Train ids 0, 1, 2, ... and validation ids 7, 8, ..., in files of `limit` tokens."""
    folder.mkdir(parents=True)
    splits = {}
    for name, first, count in (("train", 0, n_tokens), ("validation", 7, validation)):
        writer = SplitWriter(folder, name, vocabulary, limit)
        writer.append(np.arange(first, first + count) % vocabulary, 1, count)
        splits[name] = writer.close()
    manifest = Manifest(
        dtype=dtype_for(vocabulary),
        vocabulary=vocabulary,
        end_of_text=0,
        tokenizer="none",
        source="made for a test",
        recipe={},
        bad_documents={},
        splits=splits,
        format=FORMAT,
    )
    write_manifest(folder, manifest)
    return folder
