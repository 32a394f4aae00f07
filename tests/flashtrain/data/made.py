"""What several tests read: small texts, and shards with known ids as `prepare` writes them."""

import gzip
import json
from pathlib import Path

import numpy as np

from flashtrain.data.manifest import FORMAT, Manifest
from flashtrain.data.prepare import Recipe
from flashtrain.data.writer import SplitWriter, dtype_for, write_manifest

TEXTS = [
    f"document {i}: naïve 漢字 👩‍👩‍👧 <|endoftext|> and {i * i} more words\n" for i in range(60)
]
BYTES = Recipe(tokenizer="bytes", validation_share=0.2)


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    lines = "".join(json.dumps({key: text, "other": 1}) + "\n" for text in texts)
    data = lines.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_shards(
    folder: Path,
    n_tokens: int = 1000,
    *,
    validation: int = 200,
    limit: int = 300,
    vocabulary: int = 5000,
    first: int = 0,
) -> Path:
    """Train ids `first`, `first` + 1, ... and validation ids 7 up, in files of `limit` tokens."""
    folder.mkdir(parents=True)
    splits = {}
    for name, start, count in (("train", first, n_tokens), ("validation", first + 7, validation)):
        writer = SplitWriter(folder, name, vocabulary, limit)
        writer.append(np.arange(start, start + count) % vocabulary, 1, count)
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
