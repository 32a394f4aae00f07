"""Documents that can be gone through again, from any place on: once for the tokenizer, once for the
tokens, and once more after an interruption."""

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from flashtrain.data.documents import (
    LONGEST,
    Bad,
    Document,
    Place,
    checked,
    find_files,
    optional,
    read_documents,
)
from flashtrain.data.folders import UnreachableError
from flashtrain.data.mapped import DataError
from flashtrain.data.split import part_size

HUB = "hf:"
WHOLE = 1 << 62  # characters: no document is cut


@dataclass(frozen=True)
class Input:
    read: Callable[[Place], Iterator[Document]]
    source: str  # what the manifest says the text is
    size: int | None  # bytes; None: not known before it is read
    part: int  # characters above which a document is cut to hold some of it out (split.py)
    identity: list[Any] = field(default_factory=list)  # JSON; another input has another


def open_input(inputs: Iterable[str | Path], column: str, longest: int = LONGEST) -> Input:
    """Files and folders, or one Hugging Face data set `hf:NAME[@REVISION][:CONFIG[:SPLIT]]`."""
    items = list(inputs)
    hub = [str(item) for item in items if str(item).startswith(HUB)]
    if not hub:
        return files_input(items, column, longest)
    if len(items) > 1:
        raise DataError(
            f"{hub[0]} stands beside {len(items) - 1} other inputs: prepare a Hugging Face data "
            "set by itself and mix folders of shards with data.sources"
        )
    return hub_input(hub[0], column, longest)


def files_input(inputs: Iterable[str | Path], column: str, longest: int = LONGEST) -> Input:
    """Files and folders of text, JSON lines and Parquet."""
    files = find_files(inputs)
    stats = [file.stat() for file in files]
    starts = list(accumulate((stat.st_size for stat in stats), initial=0))
    names = ", ".join(file.name for file in files[:3])

    def read(start: Place) -> Iterator[Document]:
        for number in range(start[0], len(files)):
            done = start[1] if number == start[0] else 0
            documents = islice(read_documents(files[number], column, longest), done, None)
            for after, document in enumerate(documents, done + 1):
                read_bytes = starts[number] + document.read_bytes
                yield Document(document.content, read_bytes, (number, after))

    return Input(
        read,
        source=names if len(files) <= 3 else f"{names} and {len(files) - 3} more files",
        size=starts[-1],
        part=part_size(starts[-1]),
        identity=[[str(f), s.st_size, s.st_mtime_ns] for f, s in zip(files, stats, strict=True)],
    )


def hub_input(name: str, column: str, longest: int = LONGEST) -> Input:
    """A data set streamed by the package `datasets`, from the hub or from a local folder.

    Its size is unknown, so no document is cut. Without a revision, an interrupted preparation
    resumes on the data as they are then.
    """
    path, config, split = [*name.removeprefix(HUB).split(":"), "", ""][:3]
    path, _, revision = path.partition("@")
    library = optional("datasets", f"reading {name}")

    def read(start: Place) -> Iterator[Document]:
        after = start[1]
        try:
            rows = library.load_dataset(
                path, config or None, split=split or "train", revision=revision or None,
                streaming=True,
            )  # fmt: skip
            if rows.column_names is not None:
                if column not in rows.column_names:
                    raise DataError(
                        f"{name} has no column {column!r} (it has: {', '.join(rows.column_names)});"
                        " name the text with --field"
                    )
                rows = rows.select_columns([column])
            read_bytes = 0
            for row in rows.skip(after):
                after += 1
                content = checked(row.get(column))
                if isinstance(content, str):
                    size = len(content.encode())
                    read_bytes += size
                    content = content if size <= longest else Bad.huge
                yield Document(content, read_bytes, (0, after))
        except DataError:
            raise
        except _hub_errors(library) as error:
            sentence = f"{name} cannot be read: {' '.join(str(error).split())}"
            if after:
                again = "the same command goes on from its last save"
                raise UnreachableError(f"{sentence}; when it can be again, {again}") from error
            raise DataError(sentence) from error

    return Input(read, source=name, size=None, part=WHOLE, identity=[name])


def _hub_errors(library: Any) -> tuple[type[BaseException], ...]:
    """What `datasets` raises for a name, config, split or network that is not there."""
    errors = importlib.import_module("datasets.exceptions")
    return (errors.DatasetsError, ValueError, OSError)
