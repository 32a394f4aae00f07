import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from flashtrain.config import ConfigError
from flashtrain.model.shard import Piece, Shard, Span, shard_of
from flashtrain.model.word_vectors import (
    WordVectors,
    load_word_vectors,
    start_from_word_vectors,
)

WORDS = ["the", "cat", "Paris", "naïve"]
ROWS = np.array([[0.5, -1.25, 2.0], [1.0, 0.0, -3.5], [7.0, 8.0, 9.0], [-0.1, 0.2, 0.3]], "<f4")
VOCABULARY = {" the": 0, "The": 1, "cat": 2, "dog": 3, " Paris": 4, "paris": 5, " ": 6, "naïve": 7}
MATCHED = {0: 0, 1: 0, 2: 1, 4: 2, 7: 3}  # token -> row; "paris" is not "Paris"


def glove(words: list[str] = WORDS) -> bytes:
    lines = (" ".join((word, *map(str, row))) for word, row in zip(words, ROWS, strict=True))
    return ("\n".join(lines) + "\n").encode()


def word2vec_text() -> bytes:
    return b"4 3\n" + glove()


def word2vec_binary(newline: bytes = b"") -> bytes:
    entries = (
        word.encode() + b" " + row.tobytes() + newline
        for word, row in zip(WORDS, ROWS, strict=True)
    )
    return b"4 3\n" + b"".join(entries)


def write(tmp_path: Path, content: bytes, name: str = "vectors") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content", [glove(), word2vec_text(), word2vec_binary(), word2vec_binary(b"\n")]
)
def test_every_format_gives_the_same_vectors(content: bytes, tmp_path: Path) -> None:
    found = load_word_vectors(write(tmp_path, content), VOCABULARY, 3)
    assert found.ids.tolist() == list(MATCHED)
    assert torch.equal(found.values, torch.from_numpy(ROWS[list(MATCHED.values())]))
    assert found.matched_share == len(MATCHED) / len(VOCABULARY)


def test_a_gzipped_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, gzip.compress(glove()), "vectors.txt.gz")
    assert load_word_vectors(path, VOCABULARY, 3).ids.tolist() == list(MATCHED)


def test_a_large_binary_file_is_read_in_pieces(tmp_path: Path) -> None:
    n, size = 6000, 100  # 2.4 MB, read 1 MiB at a time
    rows = np.random.default_rng(0).normal(size=(n, size)).astype("<f4")
    entries = (f"w{i} ".encode() + row.tobytes() for i, row in enumerate(rows))
    path = write(tmp_path, f"{n} {size}\n".encode() + b"".join(entries))
    found = load_word_vectors(path, {f" w{i}": i for i in range(n)}, size)
    assert found.matched_share == 1.0
    assert torch.equal(found.values, torch.from_numpy(rows))


def test_own_case_beats_lower_case_wherever_it_stands(tmp_path: Path) -> None:
    for words in (["the", "The", "x", "y"], ["The", "the", "x", "y"]):
        found = load_word_vectors(write(tmp_path, glove(words)), {"The": 0}, 3)
        assert_close(found.values[0], torch.from_numpy(ROWS[words.index("The")]))


def test_words_with_spaces_keep_their_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, glove(["the", ". . .", "cat", "x"]))
    found = load_word_vectors(path, {". . .": 0, "cat": 1}, 3)
    assert torch.equal(found.values, torch.from_numpy(ROWS[[1, 2]]))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (glove() + b"dog 1 2\n", "line 5 has 2 numbers after its word instead of 3"),
        (glove() + b"dog 1 x 2\n", "line 5: could not convert"),
        (glove() + b"dog 1 nan 2\n", "line 5 holds a number that is not finite"),
        (b"5 3\n" + glove(), "line 1 promises 5 words, the file holds 4"),
        (word2vec_binary()[:-3], "ends inside word 4 of the 4"),
        (b"\x7fELF\x02\x01 1 2 3\n", "line 1 is neither"),
        (b"", "line 1 is neither"),
        (glove(["a", "b", "c", "d"]), "none of its words is among the 8 tokens"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(
    content: bytes, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_word_vectors(write(tmp_path, content), VOCABULARY, 3)


@pytest.mark.parametrize("content", [glove(), word2vec_text(), word2vec_binary()])
def test_another_size_is_refused_with_both_numbers(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vectors of size 3, but model\.d_model=768"):
        load_word_vectors(write(tmp_path, content), VOCABULARY, 768)


def test_an_absent_file_is_refused_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.word_vectors=.*nowhere cannot be read"):
        load_word_vectors(tmp_path / "nowhere", VOCABULARY, 3)


def embedding(rows: int, *pieces: Piece) -> nn.Module:
    model = nn.Module()
    model.embedding = nn.Embedding.from_pretrained(torch.full((rows, 3), 9.0), freeze=False)
    if pieces:
        model.embedding.weight.shard = Shard((8, 3), pieces)
    return model


def started(model: nn.Module) -> Tensor:
    vectors = WordVectors(torch.from_numpy(ROWS), torch.tensor([0, 2, 4, 7]), 0.5)
    weight = model.get_parameter("embedding.weight")
    start_from_word_vectors(weight, shard_of(weight).boxes, vectors, init_std=0.02)
    return weight.detach()


def test_matched_rows_start_from_their_vectors_at_the_embedding_s_scale() -> None:
    weight = started(embedding(8))
    assert (weight[[1, 3, 5, 6]] == 9.0).all()
    rows = weight[[0, 2, 4, 7]]
    assert float(rows.square().mean().sqrt()) == pytest.approx(0.02, rel=1e-5)
    assert_close(rows / rows[0, 0], torch.from_numpy(ROWS / ROWS[0, 0]))


def test_a_shard_takes_its_rows_of_the_whole() -> None:
    whole = started(embedding(8))
    upper = started(embedding(4, Piece(0, 0, 4, 4, True)))
    assert torch.equal(upper, whole[4:])
    inner = embedding(2)  # of the table [8, 3]: the end of row 4, and on until the first of row 6
    inner.embedding.weight.data = torch.full((6,), 9.0)
    inner.embedding.weight.shard = Shard((8, 3), (Piece(0, 0, 0, 8, True),), Span((8, 3), 13, 6))
    assert torch.equal(started(inner), whole.flatten()[13:19])
    mixed = started(embedding(4, Piece(0, 0, 6, 2, True), Piece(0, 2, 1, 2, True)))
    assert torch.equal(mixed, whole[[6, 7, 1, 2]])
