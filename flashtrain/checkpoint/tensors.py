"""Boxes of logical tensors in safetensors files.

A box (flashtrain/model/shard.py) is a start and a shape per dimension, so any way to cut a tensor
fits: rows, columns, rows of columns, parts of rows. Files are written here and not by the
safetensors package, because it wants the whole file in host memory first and cannot say what the
checksum should be; one tensor at a time is copied to the host, hashed and written. The package
reads them back, memory-mapped.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashtrain.checkpoint.integrity import (
    CheckpointError,
    FileRecord,
    TensorRecord,
    overlap,
)
from flashtrain.model.shard import Box, Shard

# names as in the safetensors format
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class LocalTensor:
    """What this rank holds of a logical tensor: contiguous memory, and the boxes in it."""

    tensor: Tensor
    shape: tuple[int, ...]  # of the whole
    boxes: tuple[Box, ...]  # the owned ones are written; every box is read

    @property
    def dtype(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    def view(self, box: Box) -> Tensor:
        return box.view(self.tensor)


def local_tensor(tensor: Tensor, shard: Shard) -> LocalTensor:
    """`tensor` as the part of the whole that `shard` describes (of a parameter or its moments).

    tensor: of the shard's shape, or where the shard is a span, its values in that order.
    """
    return LocalTensor(tensor, shard.shape, shard.boxes)


def owned_bytes(tensors: dict[str, LocalTensor]) -> int:
    return sum(
        math.prod(box.shape) * local.tensor.element_size()
        for local in tensors.values()
        for box in local.boxes
        if box.owned
    )


def entry_key(name: str, local: LocalTensor, box: Box) -> str:
    """The tensor's name alone when the box is the whole, so that other readers find it too."""
    if box.shape == local.shape:
        return name
    return f"{name}@{','.join(map(str, box.start))}"


def write_tensors(path: Path, entries: Sequence[tuple[str, Tensor]]) -> FileRecord:
    """One safetensors file, fsynced. The checksum is of the bytes meant, not of those read back."""
    # wide types first, so that every tensor starts at a multiple of its element size
    entries = sorted(entries, key=lambda entry: -entry[1].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in entries:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = xxhash.xxh3_128(), 0
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            size += file.write(part)
        for _, tensor in entries:
            flat = tensor.detach().contiguous().cpu().reshape(-1)
            content = flat.view(torch.uint8).numpy().data
            digest.update(content)
            size += file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


class Reader:
    """Copies boxes out of the files of one checkpoint; each file is mapped once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Any] = {}

    @torch.no_grad()
    def copy_into(self, local: LocalTensor, record: TensorRecord) -> None:
        """Fill every box of `local` in place, reading only what it covers."""
        for box in local.boxes:
            target = local.view(box)
            for piece in record.pieces:
                shared = overlap(box.start, box.shape, piece.offset, piece.shape)
                if shared is None:
                    continue
                start, shape = shared
                source = self._read(piece.file, piece.key, _range(start, piece.offset, shape))
                target[_range(start, box.start, shape)].copy_(source)

    def _read(self, file: str, key: str, part: tuple[slice, ...]) -> Tensor:
        try:
            if file not in self.files:
                self.files[file] = safe_open(self.folder / file, framework="pt")
            handle = self.files[file]
            result: Tensor = handle.get_slice(key)[part] if part else handle.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file}: cannot read {key}: {error}") from error
        return result


def _range(
    start: tuple[int, ...], origin: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[slice, ...]:
    """Index of the box at `start` in a tensor whose first value lies at `origin`."""
    return tuple(slice(s - o, s - o + n) for s, o, n in zip(start, origin, shape, strict=True))
