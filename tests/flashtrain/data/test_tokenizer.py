import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrain.data.mapped import DataError
from flashtrain.data.tokenizer import (
    END_OF_TEXT,
    BpeTokenizer,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)

ROOT = Path(__file__).resolve().parents[3]
TEXT = ["the cat sat on the mat\n", "the dog sat on the log\n" * 3, "naïve 漢字 the end"]
BPE = train_bpe(TEXT, 265)
BOTH = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])


@BOTH
@given(text=st.text())
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.size and i != tokenizer.end_of_text for i in ids)


@BOTH
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\r\n\t\x00\x7f  \n\n ",
        "\ufeff\u200f\ufffd\u2028",
        "👩‍👩‍👧 é e\u0301 \U0010ffff",
        f"a {END_OF_TEXT} b{END_OF_TEXT}",
    ],
)
def test_awkward_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids  # a document cannot end another one


@BOTH
def test_a_batch_is_its_texts_one_by_one(tokenizer: Tokenizer) -> None:
    texts = [*TEXT, "", f"x{END_OF_TEXT}", "\n"]
    found = tokenizer.encode_batch(texts)
    assert all(ids.dtype == np.uint32 for ids in found)
    assert [ids.tolist() for ids in found] == [tokenizer.encode(text) for text in texts]


@BOTH
def test_ids_outside_the_vocabulary_are_shown_not_dropped(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("a") + tokenizer.encode("b")
    ids = [a, tokenizer.size, tokenizer.end_of_text, b, -1]
    assert tokenizer.decode(ids) == f"a\ufffd{END_OF_TEXT}b\ufffd"
    assert "\ufffd" in tokenizer.decode(tokenizer.encode("漢")[:1])


@BOTH
def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    tokenizer.save(tmp_path / "other.json")
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "other.json"):
        found = load_tokenizer(path)
        assert found.kind == tokenizer.kind
        assert found.fingerprint == tokenizer.fingerprint
        assert (found.size, found.end_of_text) == (tokenizer.size, tokenizer.end_of_text)
        assert found.encode(TEXT[2]) == tokenizer.encode(TEXT[2])


@BOTH
def test_token_strings_encode_to_their_id(tokenizer: Tokenizer) -> None:
    strings = tokenizer.token_strings()
    assert len(set(strings.values())) == len(strings)
    for text, i in strings.items():
        assert tokenizer.decode([i]) == text
    assert tokenizer.kind == "bytes" or " the" in strings


def test_bpe_learns_the_vocabulary_asked_for() -> None:
    assert BPE.size == 265
    assert len(BPE.encode("the cat sat on the mat")) < 16
    assert train_bpe(["ab"], 1000).size == 257  # nothing repeats: the bytes and end of text


def test_bpe_is_the_same_in_another_process() -> None:
    code = (
        "from tests.flashtrain.data.test_tokenizer import TEXT, train_bpe;"
        "print(train_bpe(TEXT, 265).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == BPE.fingerprint, done.stderr


def test_fingerprints_tell_tokenizers_apart() -> None:
    other = train_bpe(TEXT, 264)
    assert len({ByteTokenizer().fingerprint, BPE.fingerprint, other.fingerprint}) == 3


def test_too_small_a_bpe_is_refused() -> None:
    with pytest.raises(DataError, match="vocabulary of 256 is below 257"):
        train_bpe(TEXT, 256)


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer at .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path / "text.json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"other\.json is not a Hugging Face tokenizer"):
        load_tokenizer(tmp_path / "other.json")


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    tree["added_tokens"] = []
    tree["model"]["vocab"]["other"] = tree["model"]["vocab"].pop(END_OF_TEXT)
    with pytest.raises(DataError, match="no end-of-text token"):
        BpeTokenizer(json.dumps(tree))


def test_a_file_made_to_cut_or_pad_does_neither_here(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    tree["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst",
                          "stride": 0}  # fmt: skip
    tree["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
                       "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
    assert BpeTokenizer(json.dumps(tree)).encode(TEXT[1]) == BPE.encode(TEXT[1])


def test_a_place_that_cannot_hold_a_tokenizer_is_refused_before_training(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the quick brown fox " * 50)
    command = [sys.executable, str(ROOT / "scripts" / "train_tokenizer.py"), str(text)]
    refused = subprocess.run([*command, "--output", str(text)], capture_output=True, text=True)
    assert refused.returncode == 2
    assert f"--output {text} cannot be made" in refused.stderr and "Traceback" not in refused.stderr
