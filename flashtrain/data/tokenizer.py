"""Text to token ids and exactly back: bytes, or byte-level BPE.

Text is only ever text: "<|endoftext|>" inside a document becomes ordinary tokens, never the
separator, so no document can end another one.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashtrain.data.mapped import DataError
from flashtrain.data.words import word_encoder

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
# what published tokenizer.json files call the token between two documents, most usual first
KNOWN_END_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
SMALLEST_BPE = 257  # every byte and the end of text
UNKNOWN = "\ufffd"  # how ids outside the vocabulary are shown


class Tokenizer(Protocol):
    kind: str  # "bytes" or "bpe"
    size: int  # ids are in [0, size)
    end_of_text: int  # id of the separator between documents
    fingerprint: str  # 16 hex digits; equal exactly when the ids mean the same

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, no special tokens added. A lone surrogate is no text: it raises."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """What `encode` gives for each text, faster."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are no UTF-8 and ids outside [0, size) show as U+FFFD."""

    def token_strings(self) -> Mapping[str, int]:
        """Text of every token that is whole characters -> its id, leading blanks kept."""

    def save(self, path: str | Path) -> None:
        """Write a file (or `tokenizer.json` in a folder) that `load_tokenizer` reads."""


class ByteTokenizer:
    """UTF-8 bytes 0..255 and 256 for the end of text. Needs nothing installed and no training."""

    kind = "bytes"
    size = 257
    end_of_text = 256
    fingerprint = hashlib.sha256(b"flashtrain bytes 1").hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return _decode_inside(ids, self.size, self._decode)

    def _decode(self, ids: list[int]) -> str:
        data = b"".join(END_OF_TEXT.encode() if i == 256 else bytes((i,)) for i in ids)
        return data.decode("utf-8", errors="replace")

    def token_strings(self) -> Mapping[str, int]:
        return {chr(i): i for i in range(128)} | {END_OF_TEXT: 256}

    def save(self, path: str | Path) -> None:
        _write(path, json.dumps({"flashtrain": 1, "kind": "bytes"}) + "\n")


class BpeTokenizer:
    """Byte-level BPE of the Hugging Face `tokenizers` library, from the text of a tokenizer.json.

    The fingerprint is taken over that text as it was written, not as the installed version of the
    library would write it again, so that an update does not orphan token shards.
    """

    kind = "bpe"

    def __init__(self, source: str, name: str = TOKENIZER_FILE) -> None:
        try:
            library = _library()
            self._inner = library.Tokenizer.from_str(source)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{name} is not a Hugging Face tokenizer: {error}") from error
        # special tokens written out in a text are encoded as the letters they are
        self._inner.encode_special_tokens = True
        self._inner.no_truncation()  # a document is encoded whole, whatever the file was made for
        self._inner.no_padding()
        self._words = word_encoder(self._inner, library, source)
        self._source = source
        vocabulary: dict[str, int] = self._inner.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values()) + 1  # ids may have holes
        known = [token for token in KNOWN_END_OF_TEXT if token in vocabulary]
        if not known:
            raise DataError(
                f"{name} has no end-of-text token (looked for {', '.join(KNOWN_END_OF_TEXT)}): "
                "add one of them to its added_tokens"
            )
        self.end_of_text = vocabulary[known[0]]
        self.fingerprint = hashlib.sha256(source.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        fast = [self._words.encode(text) if self._words else None for text in texts]
        slow = [text for text, ids in zip(texts, fast, strict=True) if ids is None]
        # _fast leaves out character offsets, which nothing here reads
        found = iter(self._inner.encode_batch_fast(slow, add_special_tokens=False))
        return [np.array(next(found).ids, np.uint32) if ids is None else ids for ids in fast]

    def decode(self, ids: Iterable[int]) -> str:
        return _decode_inside(ids, self.size, self._decode)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._inner.decode(ids, skip_special_tokens=False)
        return text

    def token_strings(self) -> Mapping[str, int]:
        texts = self._inner.decode_batch([[i] for i in range(self.size)], skip_special_tokens=False)
        strings: dict[str, int] = {}
        for i, text in enumerate(texts):
            if text and UNKNOWN not in text:
                strings.setdefault(text, i)
        return strings

    def save(self, path: str | Path) -> None:
        _write(path, self._source)


def train_bpe(texts: Iterable[str], vocabulary: int) -> BpeTokenizer:
    """Byte-level BPE with GPT-2's word pattern, learned from `texts`; the same ids every time.

    `size` comes out below `vocabulary` where the texts hold too few repeated pairs.
    """
    if vocabulary < SMALLEST_BPE:
        raise DataError(
            f"a BPE vocabulary of {vocabulary} is below {SMALLEST_BPE}, the 256 bytes and the end "
            "of text: ask for more, or take the tokenizer `bytes`"
        )
    library = _library()
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,  # a pair seen once is a memory of the text, not a piece of the language
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return BpeTokenizer(inner.to_str())


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder (its tokenizer.json) or of a file: ours or any Hugging Face one."""
    file = Path(path)
    file = file / TOKENIZER_FILE if file.is_dir() else file
    try:
        source = file.read_text(encoding="utf-8")
        tree = json.loads(source)
    except FileNotFoundError:
        raise DataError(f"there is no tokenizer at {file}") from None
    except ValueError as error:  # bad UTF-8 or bad JSON
        raise DataError(f"{file} is not a tokenizer.json: {error}") from error
    if isinstance(tree, dict) and tree.get("kind") == "bytes":
        return ByteTokenizer()
    return BpeTokenizer(source, str(file))


def _decode_inside(ids: Iterable[int], size: int, decode: Callable[[list[int]], str]) -> str:
    """`decode` over the runs of ids inside [0, size); a model's padded vocabulary goes beyond."""
    parts: list[str] = []
    run: list[int] = []
    for i in ids:
        if 0 <= (i := int(i)) < size:
            run.append(i)
            continue
        parts += [decode(run), UNKNOWN]
        run = []
    return "".join([*parts, decode(run)])


def _library() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise DataError(
            "BPE needs the package tokenizers: `pip install tokenizers`, or take the tokenizer "
            "`bytes`"
        ) from error


def _write(path: str | Path, text: str) -> None:
    file = Path(path)
    file = file / TOKENIZER_FILE if file.is_dir() else file
    file.write_text(text, encoding="utf-8")
