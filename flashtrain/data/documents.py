"""Documents out of files: text, JSON lines (plain, gzip, Zstandard) and Parquet.

Memory holds one document, or ROWS rows of Parquet, at a time.

A bad document (see `Bad`) is counted and left out; a damaged file ends the preparation, because
half of a data set is not what was asked for.
"""

import gzip
import importlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any

from flashtrain.data.mapped import DataError

TEXT = (".txt", ".md")
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)
SUFFIXES = (*TEXT, *JSONL, *PARQUET)
ROWS = 1024  # of a Parquet file that are in memory at once
LONGEST = 1 << 28  # bytes; a longer document is more often a broken file than a text
READ = 1 << 17  # bytes of JSON lines read at a time


class Bad(Enum):
    """Why a document is left out."""

    empty = "empty"
    utf8 = "invalid UTF-8"
    json = "invalid JSON"
    field = "no text in the field"
    huge = "longer than the limit"
    duplicate = "duplicate"


Place = tuple[int, int]  # number of a file, how many of its documents came before


@dataclass(frozen=True)
class Document:
    content: str | Bad
    read_bytes: int  # of the input, up to and with this document: for the time that is left
    after: Place = (0, 0)  # where reading goes on behind it


def find_files(inputs: Iterable[str | Path]) -> list[Path]:
    """Files named in `inputs`, and those with a known suffix in its folders: sorted by name."""
    files: list[Path] = []
    for item in map(Path, inputs):
        if item.is_dir():
            found = sorted(p for p in item.rglob("*") if p.is_file() and _known(p))
            if not found:
                raise DataError(f"the folder {item} holds no {', '.join(SUFFIXES)} file")
            files += found
        elif not item.is_file():
            raise DataError(f"there is no file or folder {item}")
        elif not _known(item):
            raise DataError(f"{item} is none of {', '.join(SUFFIXES)}: convert or rename it")
        else:
            files.append(item)
    if not files:
        raise DataError("no input was named: give files or folders of " + ", ".join(SUFFIXES))
    return files


def read_documents(file: Path, field: str = "text", longest: int = LONGEST) -> Iterator[Document]:
    """Documents of one file, in its order; `field` names the text in JSON lines and Parquet.

    longest: bytes (of the line, in JSON lines) above which a document is `Bad.huge`.
    """
    if file.name.endswith(TEXT):
        size = file.stat().st_size
        yield Document(Bad.huge if size > longest else _decode(file.read_bytes()), size)
    elif file.name.endswith(PARQUET):
        yield from _read_parquet(file, field, longest)
    else:
        yield from _read_jsonl(file, field, longest)


def checked(text: object) -> str | Bad:
    """`text` if it is a document: text with something in it, and no lone surrogates."""
    if not isinstance(text, str):
        return Bad.field
    if not text or text.isspace():
        return Bad.empty
    # JSON can spell half a surrogate pair, which no encoding of text can hold
    return Bad.utf8 if not _encodable(text) else text


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _decode(data: bytes) -> str | Bad:
    try:
        return checked(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Bad.utf8


def _known(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def _read_jsonl(file: Path, field: str, longest: int) -> Iterator[Document]:
    with file.open("rb") as raw:
        try:
            for line in _lines(_chunks(file, raw), longest):
                if line is None:
                    yield Document(Bad.huge, raw.tell())
                elif line and not line.isspace():
                    yield Document(_parse(line, field), raw.tell())
        except (EOFError, OSError, zlib.error) as error:
            _not_of_the_disk(error)
            raise DataError(f"{file} is truncated or damaged: {error}") from error


def _lines(chunks: Iterable[bytes], longest: int) -> Iterator[bytes | None]:
    """Lines without their ends; None for one of more than `longest` bytes, never held whole."""
    begun: list[bytes] = []  # of the line that the chunks so far have not ended
    size = 0
    for chunk in chunks:
        first, *lines = chunk.split(b"\n")
        size += len(first)
        begun = [*begun, first] if size <= longest else []
        if not lines:
            continue
        yield b"".join(begun) if size <= longest else None
        *whole, rest = lines
        for line in whole:
            yield line if len(line) <= longest else None
        begun, size = [rest], len(rest)
    yield b"".join(begun) if size <= longest else None


def _chunks(file: Path, raw: IO[bytes]) -> Iterator[bytes]:
    if file.name.endswith(".zst"):
        yield from _zstandard_chunks(raw, optional("zstandard", f"reading {file}"))
        return
    stream: Any = gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw
    while data := stream.read(READ):
        yield data


def _zstandard_chunks(raw: IO[bytes], library: Any) -> Iterator[bytes]:
    """Content of all frames. The library's own reader ends silently where a file is cut off."""
    frame = None
    while data := raw.read(READ):
        while data:
            frame = frame or library.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(data)
            except library.ZstdError as error:
                raise EOFError(str(error)) from error
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends inside a frame")


def _parse(line: bytes, field: str) -> str | Bad:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Bad.utf8
    except (ValueError, RecursionError):
        return Bad.json
    return checked(record.get(field)) if isinstance(record, dict) else Bad.field


def _read_parquet(file: Path, field: str, longest: int) -> Iterator[Document]:
    arrow = optional("pyarrow", f"reading {file}")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        table = parquet.ParquetFile(file)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is no readable Parquet file: {error}") from error
    with table:
        columns = table.schema_arrow
        if field not in columns.names:
            raise DataError(
                f"{file} has no column {field!r} (it has: {', '.join(columns.names)}); "
                "name the text with --field"
            )
        kind = str(columns.field(field).type)
        if kind not in ("string", "large_string", "binary", "large_binary"):
            raise DataError(f"column {field!r} of {file} is {kind}, not text: name another --field")
        size, rows, done = file.stat().st_size, table.metadata.num_rows, 0
        # bytes, not strings: Arrow does not check UTF-8, and one bad row would end the file
        binary = arrow.large_binary() if kind.startswith("large") else arrow.binary()
        try:
            for batch in table.iter_batches(batch_size=ROWS, columns=[field]):
                for value in batch.column(0).cast(binary).to_pylist():
                    done += 1
                    content: str | Bad = Bad.field
                    if value is not None:
                        content = _decode(value) if len(value) <= longest else Bad.huge
                    yield Document(content, size * done // rows)
        except (arrow.ArrowException, OSError) as error:
            _not_of_the_disk(error)
            raise DataError(f"{file} is damaged: {error}") from error


def _not_of_the_disk(error: BaseException) -> None:
    """Raise it if a disk or its network failed: the file may be sound, and read another time."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def optional(package: str, purpose: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(
            f"{purpose} needs the package {package}: `pip install {package}`"
        ) from error
