"""The manifest of a folder of token shards: what the folder holds, and whether that is known.

manifest.json     format, dtype, vocabulary, tokenizer, source, splits; written last
tokenizer.json    the tokenizer that made them
train-00000.bin   little-endian uint16 or uint32 ids, nothing else; documents end with the
...               end-of-text token and run on over the ends of files
validation-00000.bin
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashtrain.data.mapped import DataError

FORMAT = 1
MANIFEST = "manifest.json"
# of a file in the folder and of its checksum; one that leads elsewhere could have files read there,
# and of a remote folder written
FILE_NAME, CHECKSUM = re.compile(r"\w[\w.-]*"), re.compile(r"[0-9a-f]{16}")
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
PREPARE = "make it again with `python scripts/prepare_data.py INPUT... --output FOLDER`"


@dataclass(frozen=True)
class ShardFile:
    name: str
    tokens: int
    bytes: int
    max_id: int
    xxh3: str  # 64 bits, hex


@dataclass(frozen=True)
class Split:
    tokens: int
    documents: int  # pieces that end with the end-of-text token
    text_bytes: int  # UTF-8 bytes the tokens stand for
    unigram_entropy: float  # nats per token: the loss of a model that knows frequencies only
    files: tuple[ShardFile, ...]


@dataclass(frozen=True)
class Manifest:
    dtype: str
    vocabulary: int  # size of the tokenizer
    end_of_text: int
    tokenizer: str  # its fingerprint
    source: str  # where the text comes from, and its licence
    recipe: dict[str, Any]  # options it was prepared with
    bad_documents: dict[str, int]  # reason -> how many were left out
    splits: dict[str, Split]
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @staticmethod
    def load(folder: Path) -> "Manifest":
        """The checked manifest of `folder`; DataError names what is missing or unknown."""
        if not folder.is_dir():
            raise DataError(f"there is no folder of token shards at {folder}; {PREPARE}")
        file = folder / MANIFEST
        if not file.is_file():
            raise DataError(
                f"{folder} holds no {MANIFEST}, so it is no finished folder of token shards; "
                f"{PREPARE}"
            )
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            version = tree.pop("format")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{file} is damaged ({error!r}); {PREPARE}") from error
        if version != FORMAT:
            raise DataError(
                f"{file} has format {version!r} and this version of flashtrain reads {FORMAT}; "
                f"{PREPARE}"
            )
        try:
            for name, split in tree["splits"].items():
                files = tuple(ShardFile(**item) for item in split.pop("files"))
                tree["splits"][name] = Split(files=files, **split)
                for item in files:
                    if not (FILE_NAME.fullmatch(item.name) and CHECKSUM.fullmatch(item.xxh3)):
                        raise DataError(
                            f"{file} names {item.name!r} with xxh3 {item.xxh3!r}, which is no "
                            f"plain file name and checksum; {PREPARE}"
                        )
            manifest = Manifest(**tree)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file} lacks or misnames a field ({error}); {PREPARE}") from error
        if manifest.dtype not in DTYPES:
            raise DataError(
                f"{file} has dtype {manifest.dtype!r}, which is not one of {', '.join(DTYPES)}; "
                f"{PREPARE}"
            )
        return manifest
