"""Token files that other projects wrote, as they are: nanoGPT, llm.c, Megatron-LM.

    nanogpt    FOLDER with train.bin and val.bin, or a file: little-endian uint16, nothing else
    llmc       FOLDER with *train*.bin and *val*.bin, a file or a "pattern*.bin": 256 int32 (magic,
               version, tokens, zeros), then ids: uint16 (20240520, 1) or uint32 (20240801, 7)
    megatron   PREFIX of PREFIX.bin and PREFIX.idx, as `--data-path` takes it

None of them says how many ids there are, so `read` holds each one against the vocabulary.
"""

import glob
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashtrain.data.mapped import DataError, MappedTokens, Piece

NANOGPT, LLMC, MEGATRON = FORMATS = ("nanogpt", "llmc", "megatron")

LLMC_HEADER = 256 * 4  # bytes
LLMC_KINDS: dict[tuple[int, int], np.dtype[Any]] = {
    (20240520, 1): np.dtype("<u2"),
    (20240801, 7): np.dtype("<u4"),
}

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_HEADER = 9 + 8 + 1 + 8 + 8  # bytes: magic, version, type, sequences, documents
# codes of the types that ids come in; signed ones are read as unsigned: a negative id is too large
MEGATRON_TYPES = {1: "<u1", 2: "<u1", 3: "<u2", 4: "<u4", 5: "<u8", 8: "<u2"}


class ForeignTokens(MappedTokens):
    """A `Dataset` over files of one of FORMATS."""

    def __init__(self, name: str, kind: str, pieces: list[Piece], vocabulary: int) -> None:
        super().__init__(name, pieces)
        self.kind, self.vocabulary = kind, vocabulary

    def read(self, start: int, length: int) -> NDArray[Any]:
        ids = super().read(start, length)
        if length and int(ids.max()) >= self.vocabulary:
            raise DataError(
                f"{self.name} holds id {ids.max()} near token {start:,}, and the vocabulary is "
                f"{self.vocabulary}: set model.vocabulary above all ids, or name the tokenizer "
                "they were made with (data.tokenizer_path) and the right data.format"
            )
        return ids


def open_foreign(
    path: str, split: str, vocabulary: int, kind: str | None = None
) -> ForeignTokens | None:
    """The tokens of `split` ("train" or "validation") at `path`; None where it has no such split.

    A file, a pattern and a PREFIX are one split whole: "train". kind: one of FORMATS, or None to
    tell it from an index beside the file or a magic number in it; without either it is nanogpt.
    """
    files = _files(path, split)
    if files is None:
        return None
    found = {file: kind_of(file) for file in files}
    if kind != NANOGPT:  # any bytes at all may be ids of a raw file, so that is believed
        kind = kind or found[files[0]]
        other = next((file for file in files if found[file] != kind), None)
        if other is not None:
            raise DataError(
                f"{other} is {found[other]}, not {kind}: set data.format to what it is, or name "
                "the files with a pattern"
            )
    readers = {NANOGPT: _nanogpt, LLMC: _llmc, MEGATRON: _megatron}
    pieces = [readers[kind](file) for file in files]
    return ForeignTokens(f"the {split} split of {path}", kind, pieces, vocabulary)


def foreign_files(path: str) -> set[Path]:
    """Of all splits."""
    return {file for split in ("train", "validation") for file in _files(path, split) or ()}


def is_foreign(path: str) -> bool:
    """Whether tokens of other projects could be meant: by names alone."""
    return _files(path, "train") is not None or _files(path, "validation") is not None


def kind_of(file: Path) -> str:
    """Which format a .bin file has."""
    if file.with_suffix(".idx").is_file():
        return MEGATRON
    head = np.fromfile(file, "<i4", 2)
    return LLMC if len(head) == 2 and (int(head[0]), int(head[1])) in LLMC_KINDS else NANOGPT


def _files(path: str, split: str) -> list[Path] | None:
    """The .bin files of a split, by name; None where there are none."""
    place = Path(path)
    if place.is_dir():
        pattern = "*train*.bin" if split == "train" else "*val*.bin"
        # neither ours, which a manifest lists, nor Megatron's, which are named by PREFIX
        return sorted(place.glob(pattern)) or None
    if split != "train":
        return None
    if any(mark in path for mark in "*?["):
        return sorted(map(Path, glob.glob(path))) or None
    for file in (place, Path(path + ".bin"), place.with_suffix(".bin")):
        if file.suffix == ".bin" and file.is_file():
            return [file]
    return None


def _nanogpt(file: Path) -> Piece:
    size = file.stat().st_size
    if size == 0 or size % 2:
        raise DataError(f"{file} has {size:,} bytes, which is no number of uint16 ids above 0")
    return Piece(file, np.dtype("<u2"), size // 2)


def _llmc(file: Path) -> Piece:
    head = np.fromfile(file, "<i4", 3)
    key = (int(head[0]), int(head[1])) if len(head) == 3 else (0, 0)
    if key not in LLMC_KINDS:
        raise DataError(
            f"{file} begins with {key}, which is no magic number and version of llm.c's "
            f"({', '.join(map(str, LLMC_KINDS))}): set data.format to what it is"
        )
    dtype, tokens = LLMC_KINDS[key], int(head[2])
    _need_bytes(file, LLMC_HEADER + tokens * dtype.itemsize, f"a header and {tokens:,} tokens")
    return Piece(file, dtype, tokens, LLMC_HEADER)


def _megatron(file: Path) -> Piece:
    index = file.with_suffix(".idx")
    if not index.is_file():
        raise DataError(f"{index} is not there, which says what {file} holds")
    head = _head(index)
    if len(head) < MEGATRON_HEADER or not head.startswith(MEGATRON_MAGIC):
        raise DataError(f"{index} does not begin with {MEGATRON_MAGIC!r}: it is no Megatron index")
    version, code = int.from_bytes(head[9:17], "little"), head[17]
    sequences = int.from_bytes(head[18:26], "little")
    documents = int.from_bytes(head[26:34], "little")
    if version != 1 or code not in MEGATRON_TYPES:
        raise DataError(
            f"{index} has version {version} and type code {code}: version 1 with integer ids "
            f"(codes {', '.join(map(str, MEGATRON_TYPES))}) is read"
        )
    _need_bytes(
        index, MEGATRON_HEADER + 12 * sequences + 8 * documents,
        f"{sequences:,} sequences and {documents:,} documents", exact=False,
    )  # fmt: skip
    dtype = np.dtype(MEGATRON_TYPES[code])
    lengths = np.memmap(index, "<i4", "r", MEGATRON_HEADER, (sequences,))
    starts = np.memmap(index, "<i8", "r", MEGATRON_HEADER + 4 * sequences, (sequences,))
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    if sequences == 0 or not np.array_equal(starts, ends - np.int64(dtype.itemsize) * lengths):
        raise DataError(
            f"the sequences of {index} do not lie end to end in {file.name}: write it again with "
            "Megatron's preprocess_data.py or merge_datasets.py"
        )
    _need_bytes(file, int(ends[-1]), f"{int(ends[-1]) // dtype.itemsize:,} tokens")
    return Piece(file, dtype, int(ends[-1]) // dtype.itemsize)


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(MEGATRON_HEADER)


def _need_bytes(file: Path, size: int, what: str, exact: bool = True) -> None:
    there = file.stat().st_size
    if there < size or (exact and there != size):
        state = "truncated" if there < size else "too long"
        raise DataError(
            f"{file} is {state}: it has {there:,} bytes, and {what} are {size:,}; copy it again"
        )
