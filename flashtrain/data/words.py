"""Byte-level BPE a word at a time: every word is encoded once and looked up afterwards.

Text repeats its words, and the `tokenizers` library splits and merges each occurrence anew. Here
Python's own regular expressions split, and the library's model merges only what is new. The ids
are the library's own: where that is not certain, the answer is None and the caller asks the
library. Certain are tokenizer.json files of byte-level BPE without a normalizer whose splitting
pattern `translate` knows, and texts of characters whose classes are settled (`SETTLED`).
"""

import json
import re
import unicodedata
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Radford et al. 2019: what ByteLevel with use_regex splits at
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Ranges whose characters are letters, numbers, blanks or neither in every version of Unicode of the
# last ten years. Not 1C-1F: blanks to Python only. Not 17F and 212A: s and k to some when case is
# ignored.
RANGES = (
    (0x00, 0x1B), (0x20, 0x17E), (0x180, 0x377), (0x384, 0x38A), (0x38E, 0x3A1), (0x3A3, 0x3FF),
    (0x400, 0x52F), (0x5D0, 0x5EA), (0x620, 0x669), (0x1E00, 0x1EFF), (0x2010, 0x2027),
    (0x2030, 0x205E), (0x2074, 0x208E), (0x20A0, 0x20BD), (0x2100, 0x2129), (0x212B, 0x214F),
    (0x2190, 0x22FF), (0x2460, 0x27BF), (0x3000, 0x303F), (0x3041, 0x3096), (0x30A1, 0x30FF),
    (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xFE00, 0xFE0F), (0xFF01, 0xFF5E), (0xFFFD, 0xFFFD),
    (0x1F300, 0x1F6D0),
)  # fmt: skip
SETTLED = re.compile("[" + "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in RANGES) + "]*")

KNOWN_WORDS = 1 << 20  # about 150 MB; then they are forgotten and learned again
# escapes that mean the same to Python as to Oniguruma, which the library splits with
_SAME = set("sSrnt") | set(r"""\'"-[](){}.*+?|/^$#&~""")


class WordEncoder:
    """ids [n] uint32 of a text under the tokenizer of a tokenizer.json."""

    def __init__(self, inner: Any, library: Any, pattern: "re.Pattern[str]") -> None:
        self._split = pattern.findall
        self._words = _Words(inner, library)

    def encode(self, text: str) -> NDArray[np.uint32] | None:
        """None for a text that only the library is certain about."""
        if not SETTLED.fullmatch(text):
            return None
        words = self._split(text)
        if sum(map(len, words)) != len(text):  # the pattern left something between two words
            return None
        if len(self._words) > KNOWN_WORDS:
            self._words.clear()
        return np.frombuffer(b"".join(map(self._words.__getitem__, words)), np.uint32)


def word_encoder(inner: Any, library: Any, source: str) -> WordEncoder | None:
    """For a tokenizer of the library made from the text `source`; None where ids could differ."""
    tree = json.loads(source)
    model = tree.get("model") or {}
    plain = (
        model.get("type", "BPE") == "BPE"
        and tree.get("normalizer") is None
        and all(token["special"] for token in tree.get("added_tokens") or [])
        and not any(model.get(key) for key in ("dropout", "continuing_subword_prefix",
                                               "end_of_word_suffix", "byte_fallback"))
    )  # fmt: skip
    pattern = _pattern(tree.get("pre_tokenizer")) if plain else None
    found = translate(pattern) if pattern is not None else None
    return WordEncoder(inner, library, found) if found is not None else None


def _pattern(tree: Any) -> str | None:
    """What a pre_tokenizer splits at, if it then maps bytes and does nothing else."""
    steps = tree["pretokenizers"] if tree and tree.get("type") == "Sequence" else [tree]
    last = steps[-1] if steps else None
    if not last or last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if len(steps) == 1:
        return GPT2 if last.get("use_regex", True) else None
    first = steps[0]
    if len(steps) > 2 or first.get("type") != "Split" or last.get("use_regex", True):
        return None
    if first.get("behavior") != "Isolated" or first.get("invert"):
        return None
    pattern: str | None = first["pattern"].get("Regex")
    return pattern


def translate(pattern: str) -> "re.Pattern[str] | None":
    """The same pattern for Python, over `SETTLED` text; None if a part of it is not known to be."""
    parts: list[str] = []
    at, inside = 0, False  # inside [...]
    while at < len(pattern):
        if (found := re.match(r"\\p\{(\w+)\}", pattern[at:])) is not None:
            ranges = _category(found[1])
            if not ranges:
                return None
            parts.append(ranges if inside else f"[{ranges}]")
            at += found.end()
            continue
        if pattern.startswith(r"\z", at) and not inside:
            parts.append(r"\Z")
            at += 2
            continue
        char = pattern[at]
        if char == "\\":
            if pattern[at + 1 : at + 2] not in _SAME:
                return None
            parts.append(pattern[at : at + 2])
            at += 2
            continue
        # Oniguruma: ^ and $ at every line, {m,n}+ a repetition; [[ and && are sets of sets
        if not inside and (char in "^$" or re.match(r"\{[^}]*\}\+", pattern[at:])):
            return None
        if inside and (char == "[" or pattern.startswith("&&", at)):
            return None
        if char == "[":
            inside = True
        elif char == "]":
            inside = False
        parts.append(char)
        at += 1
    try:
        compiled = re.compile("".join(parts))
    except re.error:
        return None
    return compiled if compiled.groups == 0 else None


@cache
def _category(name: str) -> str:
    """The `SETTLED` characters of a general category, "L" or "Lu", as ranges of a set."""
    ranges: list[list[int]] = []
    for low, high in RANGES:
        for code in range(low, high + 1):
            if not unicodedata.category(chr(code)).startswith(name):
                continue
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in ranges)


class _Words(dict[str, bytes]):
    """Word -> its ids as bytes of uint32, learned when first asked for."""

    def __init__(self, inner: Any, library: Any) -> None:
        super().__init__()
        self._model = inner.model
        self._to_bytes = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def __missing__(self, word: str) -> bytes:
        letters = self._to_bytes.pre_tokenize_str(word)[0][0]
        ids = np.array([token.id for token in self._model.tokenize(letters)], np.uint32)
        found = self[word] = ids.tobytes()
        return found
