"""Documents out of files: text, JSON lines (plain, gzip, Zstandard) and Parquet.

A bad document (see `Bad`) is counted and left out; a file that cannot be read at all ends the
preparation, because half of a data set is not what was asked for.
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

from flashtrain.data.shards import DataError

TEXT = (".txt", ".md")
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)
SUFFIXES = (*TEXT, *JSONL, *PARQUET)
ROWS = 1024  # of a Parquet file that are in memory at once


class Bad(Enum):
    """Why a document is left out."""

    empty = "empty"
    utf8 = "invalid UTF-8"
    json = "invalid JSON"
    field = "no text in the field"


@dataclass(frozen=True)
class Document:
    content: str | Bad
    read_bytes: int  # of the file, up to and with this document: for the time that is left


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


def read_documents(file: Path, field: str = "text") -> Iterator[Document]:
    """Documents of one file, in its order; `field` names the text in JSON lines and Parquet."""
    if file.name.endswith(TEXT):
        data = file.read_bytes()
        yield Document(_decode(data), len(data))
    elif file.name.endswith(PARQUET):
        yield from _read_parquet(file, field)
    else:
        yield from _read_jsonl(file, field)


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


def _read_jsonl(file: Path, field: str) -> Iterator[Document]:
    with file.open("rb") as raw:
        try:
            for line in _lines(file, raw):
                if not line.isspace():
                    yield Document(_parse(line, field), raw.tell())
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{file} is truncated or damaged: {error}") from error


def _lines(file: Path, raw: IO[bytes]) -> Iterable[bytes]:
    if file.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if file.name.endswith(".zst"):
        return _zstandard_lines(raw, optional("zstandard", f"reading {file}"))
    return raw


def _zstandard_lines(raw: IO[bytes], library: Any) -> Iterator[bytes]:
    """Lines of all frames. The library's own reader ends silently where a file is cut off."""
    frame, rest = None, b""
    while data := raw.read(1 << 17):
        while data:
            frame = frame or library.ZstdDecompressor().decompressobj()
            try:
                rest += frame.decompress(data)
            except library.ZstdError as error:
                raise EOFError(str(error)) from error
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
        *lines, rest = rest.split(b"\n")
        yield from (line for line in lines if line)
    if frame is not None:
        raise EOFError("it ends inside a frame")
    if rest:
        yield rest


def _parse(line: bytes, field: str) -> str | Bad:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Bad.utf8
    except (ValueError, RecursionError):
        return Bad.json
    return checked(record.get(field)) if isinstance(record, dict) else Bad.field


def _read_parquet(file: Path, field: str) -> Iterator[Document]:
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
                    content = Bad.field if value is None else _decode(value)
                    yield Document(content, size * done // rows)
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"{file} is damaged: {error}") from error


def optional(package: str, purpose: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(
            f"{purpose} needs the package {package}: `pip install {package}`"
        ) from error
