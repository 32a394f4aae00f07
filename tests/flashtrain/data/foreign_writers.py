"""Small writers of other projects' token files, from the public descriptions of their formats."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_nanogpt(file: Path, ids: Sequence[int]) -> Path:
    """nanoGPT's data/*/prepare.py: uint16 ids and nothing else."""
    file.write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    return file


def write_llmc(file: Path, ids: Sequence[int], magic: int = 20240520, version: int = 1) -> Path:
    """llm.c's dev/data/data_common.py: 256 int32, of which three are set, then the ids."""
    header = [magic, version, len(ids), *[0] * 253]
    letter = "H" if magic == 20240520 else "I"
    file.write_bytes(struct.pack("<256i", *header) + struct.pack(f"<{len(ids)}{letter}", *ids))
    return file


def write_megatron(prefix: Path, documents: Sequence[Sequence[int]], code: int = 8) -> Path:
    """Megatron-LM's indexed_dataset.py: ids in PREFIX.bin, lengths and offsets in PREFIX.idx."""
    dtype = {4: "<i4", 5: "<i8", 8: "<u2"}[code]
    data = b"".join(np.array(document, dtype).tobytes() for document in documents)
    prefix.with_name(prefix.name + ".bin").write_bytes(data)
    size, at = np.dtype(dtype).itemsize, 0
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<QQ", len(documents), len(documents) + 1)
    for document in documents:
        index += struct.pack("<i", len(document))
    for document in documents:
        index += struct.pack("<q", at)
        at += size * len(document)
    for number in range(len(documents) + 1):
        index += struct.pack("<q", number)
    prefix.with_name(prefix.name + ".idx").write_bytes(index)
    return prefix
