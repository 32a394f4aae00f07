"""Text that lies on this machine: documentation and source code of what is installed.

For measurements that need more text than a repository can carry. Every document is real and stands
once (by hash); with the same software installed, it is the same text in the same order.
"""

import gzip
import html
import json
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import xxhash

from flashtrain.data import corpus

# what packages bring along: manuals, Python's and Rust's documentation, sources of many languages
PLACES = (
    "/usr/share/doc", "/usr/share/man", "/usr/share", "/usr/lib", "/usr/local/lib", "/usr/include",
    sysconfig.get_path("stdlib"), *site.getsitepackages(), sys.prefix, sys.base_prefix,
    "~/.rustup", "~/.cargo", "~/.pyenv", "~/go",
)  # fmt: skip
SUFFIXES = {
    ".txt", ".md", ".rst", ".html", ".gz", ".py", ".pyi", ".rs", ".go", ".c", ".cc", ".h", ".hpp",
    ".cu", ".cuh", ".js", ".ts", ".java", ".pl", ".pm", ".pod", ".sh", ".tex",
}  # fmt: skip
SMALLEST, LARGEST = 200, 2_000_000  # bytes; longer files are tables more often than text
MARKUP = re.compile(r"<(script|style|svg)\b.*?</\1>|<[^>]*>", re.DOTALL)


def documents() -> Iterator[str]:
    """The embedded plays, then one file after the other, in an order that mixes all places."""
    seen: set[int] = set()
    for text in chain((play for _, play in corpus.documents()), map(read, files())):
        if text is None or len(text) < SMALLEST:
            continue
        digest = xxhash.xxh3_64_intdigest(text.encode())
        if digest not in seen:
            seen.add(digest)
            yield text


def files() -> list[Path]:
    """By a hash of their paths, so that any part of them is alike."""
    found = set()
    for place in PLACES:
        for folder, _, names in os.walk(Path(place).expanduser()):
            found.update(f"{folder}/{name}" for name in names if Path(name).suffix in SUFFIXES)
    ordered = sorted(found, key=lambda path: xxhash.xxh3_64_intdigest(os.fsencode(path)))
    return [Path(path) for path in ordered]


def read(file: Path) -> str | None:
    """Its text, without HTML's tags; None where it holds none."""
    try:
        if file.is_symlink() or not SMALLEST <= file.stat().st_size <= LARGEST:
            return None
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, ValueError):  # unreadable, or in another encoding
        return None
    if "\0" in text:
        return None
    if file.suffix == ".html":
        text = re.sub(r"\s*\n\s*", "\n", html.unescape(MARKUP.sub("", text)))
    return text


def write(output: Path, size: int) -> int:
    """JSON lines with `size` bytes of text, or all there is; how many bytes of text it has."""
    written = 0
    with output.open("w", encoding="utf-8") as stream:
        for text in documents():
            if written >= size:
                break
            written += len(text.encode())
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return written
