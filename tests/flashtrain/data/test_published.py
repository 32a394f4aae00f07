import json
import sys
from pathlib import Path

import pytest

from flashtrain.data.mapped import DataError
from flashtrain.data.published import byte_letters, find_tokenizer, from_ranks
from flashtrain.data.tokenizer import END_OF_TEXT, train_bpe

TEXT = [f"the cat number {n} sat on the mat, didn't it? {n * 7919}\n" for n in range(300)]
BPE = train_bpe(TEXT, 400)


def ranks() -> dict[bytes, int]:
    """BPE's vocabulary as tiktoken keeps it: bytes of a token -> its place in the order."""
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    vocabulary = json.loads(BPE._source)["model"]["vocab"]
    order = sorted((i, token) for token, i in vocabulary.items() if token != END_OF_TEXT)
    return {bytes(byte_of[letter] for letter in token): n for n, (_, token) in enumerate(order)}


def test_ranks_become_a_tokenizer_with_tiktokens_ids() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    pattern = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    )
    special = {END_OF_TEXT: 500}
    theirs = tiktoken.Encoding(
        "t", pat_str=pattern, mergeable_ranks=ranks(), special_tokens=special
    )
    ours = from_ranks(ranks(), pattern, special)
    assert (ours.size, ours.end_of_text) == (501, 500)
    for text in [*TEXT, "naïve 漢字 WE'LL  \n\n x\r\n 1234567 ", " \n \n", f"a{END_OF_TEXT}b", ""]:
        assert ours.encode(text) == theirs.encode(text, disallowed_special=())
        assert ours.encode_batch([text])[0].tolist() == ours.encode(text)
        assert ours.decode(ours.encode(text)) == text


def test_ranks_join_as_the_merges_they_came_from() -> None:
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ours = from_ranks(ranks(), pattern, {END_OF_TEXT: 999})
    for text in TEXT:
        assert ours.decode(ours.encode(text)) == text
        shift = [i - 1 for i in BPE.encode(text)]  # END_OF_TEXT is id 0 there
        assert ours.encode(text) == shift


def test_a_model_in_hugging_faces_cache_is_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("small", "owner/small"):
        with pytest.raises(DataError, match=f"hf download {name} tokenizer.json"):
            find_tokenizer(name)
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("abc123")
        (folder / "snapshots" / "abc123").mkdir(parents=True)
        BPE.save(folder / "snapshots" / "abc123")
        assert find_tokenizer(name).fingerprint == BPE.fingerprint
    BPE.save(tmp_path / "other.json")
    assert find_tokenizer("other.json").fingerprint == BPE.fingerprint
    assert find_tokenizer("bytes").kind == "bytes"


def test_tiktoken_names_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tiktoken")
    with pytest.raises(DataError, match="tiktoken has no words: choose from cl100k_base"):
        find_tokenizer("tiktoken:words")


def test_a_missing_tiktoken_names_its_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(DataError, match="needs the package tiktoken: `pip install tiktoken`"):
        find_tokenizer("tiktoken:gpt2")
