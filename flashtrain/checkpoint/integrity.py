"""The manifest of a checkpoint: what lies in it, and proof that every byte of it is still the same.

A checkpoint without a valid manifest is none. The manifest is written last and guards itself: its
bytes must be exactly what `encode` gives for its content, checksum included, so one flipped bit
anywhere in it is seen too.
"""

import json
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

FORMAT = 1
MANIFEST = "manifest.json"
CHUNK = 1 << 22  # bytes; xxh3_128 runs at about 13 GiB/s, so the disk decides the time
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # a name, never a path that leads elsewhere


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, said in one sentence."""


class NewerFormatError(CheckpointError):
    """Not damaged: written by a later flashtrain."""


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class PieceRecord:
    """Entry `key` of `file` is the box of `shape` at `offset` in the whole tensor."""

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorRecord:
    shape: tuple[int, ...]  # of the whole
    dtype: str  # as in "float32"
    pieces: tuple[PieceRecord, ...]


@dataclass(frozen=True)
class Manifest:
    step: int
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]


def checksum(path: Path) -> FileRecord:
    """Size and xxh3_128 of a file, read in chunks."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def write_bytes(path: Path, content: bytes) -> FileRecord:
    """Write, wait until the disk has it, and return the checksum of what was meant."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(content), xxhash.xxh3_128_hexdigest(content))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, as fsync of a file does for its bytes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def encode(manifest: Manifest) -> bytes:
    body = {"format": FORMAT, **asdict(manifest)}
    text = json.dumps(body, separators=(",", ":")).encode()
    return _seal(text)


def _seal(text: bytes) -> bytes:
    """The JSON object `text` with its own checksum as last member."""
    return text[:-1] + b',"xxh3_128":"' + xxhash.xxh3_128_hexdigest(text).encode() + b'"}\n'


def read_manifest(folder: Path) -> Manifest:
    """The manifest of one checkpoint.

    Raises CheckpointError with what is wrong with it; NewerFormatError when it is sound but of a
    format that this version does not know.
    """
    try:
        _refuse_link(folder / MANIFEST)
        raw = (folder / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{MANIFEST} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {error.strerror}") from error
    try:
        tree: Any = json.loads(raw)
        tree.pop("xxh3_128")
        sound = raw == _seal(json.dumps(tree, separators=(",", ":")).encode())
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise CheckpointError(f"{MANIFEST} is damaged: its own checksum does not fit")
    if tree.get("format") != FORMAT:
        raise NewerFormatError(
            f"{folder} has checkpoint format {tree.get('format')!r} and this version of flashtrain "
            f"reads format {FORMAT}: load it with the version that wrote it"
        )
    try:
        return _manifest(tree)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST} does not follow the schema: {error!r}") from error


def _manifest(tree: dict[str, Any]) -> Manifest:
    files = {name: FileRecord(**record) for name, record in tree["files"].items()}
    for name in files:
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a plain file name")
    tensors = {}
    for name, record in tree["tensors"].items():
        pieces = tuple(
            PieceRecord(p["file"], p["key"], tuple(p["offset"]), tuple(p["shape"]))
            for p in record["pieces"]
        )
        tensors[name] = TensorRecord(tuple(record["shape"]), str(record["dtype"]), pieces)
        check_cover(name, tensors[name])
        for piece in pieces:
            if piece.file not in files:
                raise ValueError(f"{name} lies in {piece.file}, which is not listed")
    return Manifest(int(tree["step"]), files, tensors)


def check_cover(name: str, record: TensorRecord) -> None:
    """Raise ValueError unless the pieces fill the whole tensor exactly once."""
    for piece in record.pieces:
        if len(piece.offset) != len(record.shape) or len(piece.shape) != len(record.shape):
            raise ValueError(f"{name}: a piece has other dimensions than {list(record.shape)}")
        for start, length, size in zip(piece.offset, piece.shape, record.shape, strict=True):
            if start < 0 or length < 0 or start + length > size:
                raise ValueError(f"{name}: a piece leaves the whole of {list(record.shape)}")
    filled = sum(math.prod(piece.shape) for piece in record.pieces)
    if filled != math.prod(record.shape):
        raise ValueError(
            f"{name}: its pieces hold {filled} of the {math.prod(record.shape)} values of "
            f"{list(record.shape)}, so a rank that owns a part did not write it or two ranks did"
        )
    # as much as the whole and nowhere twice is exactly once; of thousands of pieces, only those
    # are compared that share rows
    active: list[PieceRecord] = []
    for piece in sorted(record.pieces, key=lambda piece: piece.offset):
        active = [other for other in active if _end(other) > _start(piece)]
        for other in active:
            if overlap(piece.offset, piece.shape, other.offset, other.shape) is not None:
                raise ValueError(f"{name}: two pieces hold the same values")
        active.append(piece)


def _start(piece: PieceRecord) -> int:
    return piece.offset[0] if piece.offset else 0


def _end(piece: PieceRecord) -> int:
    """Of its rows; a scalar is one row."""
    return piece.offset[0] + piece.shape[0] if piece.offset else 1


def overlap(
    a_offset: tuple[int, ...],
    a_shape: tuple[int, ...],
    b_offset: tuple[int, ...],
    b_shape: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Offset and shape of what two boxes share; None when that is nothing."""
    start = tuple(map(max, a_offset, b_offset))
    a_end = map(sum, zip(a_offset, a_shape, strict=True))
    b_end = map(sum, zip(b_offset, b_shape, strict=True))
    shape = tuple(min(a, b) - s for a, b, s in zip(a_end, b_end, start, strict=True))
    return (start, shape) if all(length > 0 for length in shape) else None


def file_faults(folder: Path, files: dict[str, FileRecord]) -> list[str]:
    """What is wrong with these files, one phrase each; reads every byte."""
    faults = []
    for name, record in files.items():
        path = folder / name
        try:
            _refuse_link(path)
            size = path.stat().st_size
            if size != record.bytes:
                faults.append(f"{name} has {size} bytes instead of {record.bytes}")
            elif checksum(path) != record:
                faults.append(f"{name} is damaged: its checksum does not fit the manifest")
        except FileNotFoundError:
            faults.append(f"{name} is missing")
        except CheckpointError as error:
            faults.append(str(error))
        except OSError as error:
            faults.append(f"{name} cannot be read: {error.strerror}")
    return faults


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise CheckpointError(
            f"{path.name} is a link, which may lead anywhere: put the file itself in its place"
        )
