"""Tokenizers by name: a path, a Hugging Face model in the local cache, or one of tiktoken's.

Nothing here downloads, except tiktoken itself where it lacks its own file.
"""

import importlib
import json
import os
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from flashtrain.data.documents import optional
from flashtrain.data.mapped import DataError
from flashtrain.data.tokenizer import (
    TOKENIZER_FILE,
    BpeTokenizer,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
)

TIKTOKEN = "tiktoken:"


def find_tokenizer(name: str) -> Tokenizer:
    """`bytes`, a tokenizer.json or its folder, `tiktoken:NAME`, or a Hugging Face model's name."""
    if name == "bytes":
        return ByteTokenizer()
    if name.startswith(TIKTOKEN):
        return from_tiktoken(name.removeprefix(TIKTOKEN))
    path = Path(name)
    if path.exists() or path.suffix == ".json" or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return load_tokenizer(path)
    return load_tokenizer(cached_file(name))


def cached_file(model: str) -> Path:
    """tokenizer.json of the newest snapshot that `hf download` left in Hugging Face's cache."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    folder = hub / f"models--{model.replace('/', '--')}"
    head = folder / "refs" / "main"
    if head.is_file():
        file = folder / "snapshots" / head.read_text().strip() / TOKENIZER_FILE
        if file.is_file():
            return file
    raise DataError(
        f"there is no file or folder {model}, and {folder} holds no {TOKENIZER_FILE} of a model of "
        f"that name: fetch it with `hf download {model} {TOKENIZER_FILE}`, or take `bpe` or `bytes`"
    )


def from_tiktoken(name: str) -> BpeTokenizer:
    """cl100k_base, o200k_base, .. by tiktoken's own registry and cache (TIKTOKEN_CACHE_DIR)."""
    optional("tiktoken", f"the tokenizer {TIKTOKEN}{name}")
    makers = importlib.import_module("tiktoken_ext.openai_public").ENCODING_CONSTRUCTORS
    if name not in makers:
        raise DataError(f"tiktoken has no {name}: choose from {', '.join(sorted(makers))}")
    try:
        found = makers[name]()
    except Exception as error:  # of whichever HTTP library it has
        raise DataError(
            f"tiktoken's files of {name} are neither in TIKTOKEN_CACHE_DIR nor to be had: "
            f"{type(error).__name__}"
        ) from error
    return from_ranks(found["mergeable_ranks"], found["pat_str"], found["special_tokens"])


def from_ranks(
    ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int]
) -> BpeTokenizer:
    """The tokenizer.json with the ids of tiktoken's `Encoding(pattern, ranks, special)`.

    tiktoken joins the neighbours whose union has the lowest rank. Inside the bytes of one token
    that always ends with the same last pair, or the token is never made: so one merge a token.
    """
    letter = byte_letters()
    text = {token: "".join(letter[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = _join(token, ranks, ranks[token])
        if len(parts) == 2:
            merges.append([text[part] for part in parts])
    tree: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": True}
            for token, number in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _for_oniguruma(pattern)},
                 "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                    "use_regex": False},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": True,  # tiktoken looks whole words up first
            "vocab": {text[token]: rank for token, rank in ranks.items()} | dict(special),
            "merges": merges,
        },
    }  # fmt: skip
    return BpeTokenizer(json.dumps(tree, ensure_ascii=False), "tiktoken's tokenizer")


def _join(token: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    """`token` after every merge of a rank below `limit`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        joined = [ranks.get(a + b, limit) for a, b in pairwise(parts)]
        best = min(joined)
        if best >= limit:
            break
        at = joined.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _for_oniguruma(pattern: str) -> str:
    """`{1,3}+` repeats there, where it is possessive here; `$` is the end of a line there."""
    return re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", pattern).replace("$", r"\z")


def byte_letters() -> dict[int, str]:
    """Byte -> the letter that stands for it in byte-level vocabularies (Radford et al. 2019).

    Visible Latin-1 characters stand for themselves, the other bytes for U+0100 onwards in turn.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(0x100 + n) for n, byte in enumerate(hidden)
    }
