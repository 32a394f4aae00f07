import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrain.data import words
from flashtrain.data.published import byte_letters, from_ranks
from flashtrain.data.tokenizer import END_OF_TEXT, BpeTokenizer, train_bpe
from flashtrain.data.words import GPT2, RANGES, SETTLED, translate, word_encoder

TEXT = ["the cat's sat, they'll 123 4567  on\n\n the mat\t\n"] * 3 + ["naïve 漢字 Ωμέγα don't I'VE"]
# what cl100k-like tokenizers split at, in tiktoken's spelling
NEWER = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


def newer() -> BpeTokenizer:
    """A tokenizer with NEWER's pattern and the merges of one trained on TEXT."""
    tree = json.loads(train_bpe(TEXT, 300)._source)
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    vocabulary = [token for token in tree["model"]["vocab"] if token != END_OF_TEXT]
    ranks = {bytes(byte_of[letter] for letter in token): n for n, token in enumerate(vocabulary)}
    return from_ranks(ranks, NEWER, {END_OF_TEXT: len(ranks) + 3})


TOKENIZERS = {"gpt2": train_bpe(TEXT, 300), "newer": newer()}
EACH = pytest.mark.parametrize("name", TOKENIZERS)


def encode_fast(tokenizer: BpeTokenizer, text: str) -> list[int] | None:
    assert tokenizer._words is not None
    ids = tokenizer._words.encode(text)
    return None if ids is None else ids.tolist()


@EACH
@given(text=st.text(st.one_of(
    st.sampled_from("aZ'slverdt 09\n\r\t.,-_!é漢µ²½\u00a0\u2019\u3000"),
    st.characters(max_codepoint=0x2FFF)), max_size=40))  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_words_have_the_ids_of_the_library(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = encode_fast(tokenizer, text)
    assert ids is None or ids == tokenizer.encode(text)
    assert (ids is None) == (SETTLED.fullmatch(text) is None)


@EACH
def test_every_settled_character_is_split_as_the_library_splits_it(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    for low, high in RANGES:
        for first in range(low, high + 1, 512):
            step = 1 if low < 0x4E00 else 16  # ideographs and Hangul are all alike
            letters = [chr(code) for code in range(first, min(first + 512, high + 1), step)]
            text = "".join(f"a{c}b 1{c}2 {c}{c} .{c} \n{c}'{c}" for c in letters)
            assert encode_fast(tokenizer, text) == tokenizer.encode(text), (first, name)


def test_words_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "KNOWN_WORDS", 5)
    tokenizer = TOKENIZERS["gpt2"]
    for n in range(50):
        text = f"word {n} and {n + 1}"
        assert encode_fast(tokenizer, text) == tokenizer.encode(text)
        assert tokenizer._words is not None and len(tokenizer._words._words) < 12


@pytest.mark.parametrize(
    "pattern",
    [
        r"\p{Han}+",
        r"\w+",
        r"a$",
        r"^a",
        r"\p{N}{1,3}+",
        r"(a)|b",
        r"[[a]b]",
        r"[a&&b]",
        r"\h",
        "[a",
    ],
)
def test_patterns_that_might_differ_are_left_to_the_library(pattern: str) -> None:
    assert translate(pattern) is None


def test_gpt2_pattern_is_translated() -> None:
    found = translate(GPT2)
    assert found is not None
    assert found.findall("it's  12 o'clock\n\nnow!?") == [
        "it", "'s", " ", " 12", " o", "'", "clock", "\n", "\n", "now", "!?",
    ]  # fmt: skip


def test_tokenizers_that_do_more_are_left_to_the_library() -> None:
    tree = json.loads(TOKENIZERS["gpt2"]._source)
    changes = {
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True,
                          "trim_offsets": True, "use_regex": True},
        "added_tokens": [{**tree["added_tokens"][0], "special": False}],
        "model": {**tree["model"], "dropout": 0.1},
    }  # fmt: skip
    for key, value in changes.items():
        source = json.dumps(tree | {key: value})
        inner = tokenizers.Tokenizer.from_str(source)
        assert word_encoder(inner, tokenizers, source) is None, key
    source = json.dumps(tree)
    assert word_encoder(tokenizers.Tokenizer.from_str(source), tokenizers, source) is not None


def test_what_the_pattern_leaves_out_is_left_to_the_library() -> None:
    tree = json.loads(TOKENIZERS["newer"]._source)
    tree["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\p{L}+"}
    tokenizer = BpeTokenizer(json.dumps(tree))
    assert encode_fast(tokenizer, "a b") is None
    np.testing.assert_array_equal(tokenizer.encode_batch(["a b"])[0], tokenizer.encode("a b"))
