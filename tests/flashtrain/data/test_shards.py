import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flashtrain.data.dataset import RandomTokens
from flashtrain.data.manifest import MANIFEST, Manifest
from flashtrain.data.mapped import DataError
from flashtrain.data.shards import TokenShards
from tests.flashtrain.data.made import make_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_shards(tmp_path / "shards")


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    tree = json.loads((folder / MANIFEST).read_text())
    change(tree)
    (folder / MANIFEST).write_text(json.dumps(tree))


def train_file(tree: dict, index: int = 1) -> dict:
    return tree["splits"]["train"]["files"][index]


def test_reads_cross_the_ends_of_files(folder: Path) -> None:
    shards = TokenShards(folder)
    assert [file.tokens for file in shards.split.files] == [300, 300, 300, 100]
    assert shards.tokens == 1000
    for start, length in ((0, 1000), (299, 2), (300, 300), (10, 800), (999, 1), (5, 0), (1000, 0)):
        np.testing.assert_array_equal(shards.read(start, length), np.arange(start, start + length))
    np.testing.assert_array_equal(TokenShards(folder, "validation").read(0, 200), np.arange(7, 207))


@pytest.mark.parametrize(("start", "length"), [(-1, 5), (990, 11), (1001, 0), (3, -1)])
def test_reads_outside_the_data_are_refused(folder: Path, start: int, length: int) -> None:
    with pytest.raises(DataError, match="which has 1,000"):
        TokenShards(folder).read(start, length)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_ids_take_the_smallest_type_that_holds_them(
    tmp_path: Path, vocabulary: int, dtype: str
) -> None:
    folder = make_shards(tmp_path / "shards", 70_000, limit=50_000, vocabulary=vocabulary)
    shards = TokenShards(folder)
    assert shards.manifest.dtype == dtype
    np.testing.assert_array_equal(shards.read(0, 70_000), np.arange(70_000) % vocabulary)
    shards.verify()


def test_sound_shards_verify_and_survive_a_round_trip(folder: Path) -> None:
    TokenShards(folder).verify()
    TokenShards(folder, "validation").verify()
    manifest = Manifest.load(folder)
    assert manifest.to_json() == (folder / MANIFEST).read_text()


def shorten(path: Path, change: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0" * change)


BROKEN = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "no folder of token shards at .*shards"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "holds no manifest.json"),
    "manifest cut off": (lambda f: shorten(f / MANIFEST, -50), "manifest.json is damaged"),
    "manifest is a list": (lambda f: (f / MANIFEST).write_text("[]"), "manifest.json is damaged"),
    "format of tomorrow": (
        lambda f: edit(f, lambda t: t.update(format=99)),
        "format 99 .* reads 1",
    ),
    "field missing": (lambda f: edit(f, lambda t: t.pop("vocabulary")), "lacks or misnames"),
    "unknown dtype": (lambda f: edit(f, lambda t: t.update(dtype="int7")), "dtype 'int7'"),
    "file missing": (lambda f: (f / "train-00001.bin").unlink(), "train-00001.bin is named in"),
    "file empty": (
        lambda f: (f / "train-00001.bin").write_bytes(b""),
        "00001.bin is truncated: it has 0 bytes",
    ),
    "listed empty": (
        lambda f: edit(f, lambda t: train_file(t).update(tokens=0)),
        "train-00001.bin has 600 bytes and 0 tokens",
    ),
    "truncated": (lambda f: shorten(f / "train-00001.bin", -2), "is truncated: it has 598 bytes"),
    "half a token": (lambda f: shorten(f / "train-00003.bin", -1), "truncated: it has 199 bytes"),
    "too long": (lambda f: shorten(f / "train-00001.bin", 2), "is too long: it has 602 bytes"),
    "wrong size listed": (
        lambda f: edit(f, lambda t: train_file(t).update(bytes=7)),
        "says that train-00001.bin has 7 bytes and 300 tokens",
    ),
    "id too large": (
        lambda f: edit(f, lambda t: train_file(t).update(max_id=5000)),
        "holds id 5000, outside its tokenizer's 5000 ids",
    ),
    "sum wrong": (
        lambda f: edit(f, lambda t: t["splits"]["train"].update(tokens=1001)),
        "counts 1,001 tokens in train but its files hold 1,000",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_shards_are_refused_in_one_sentence(folder: Path, kind: str) -> None:
    damage, sentence = BROKEN[kind]
    damage(folder)
    with pytest.raises(DataError, match=sentence) as refusal:
        TokenShards(folder)
    assert "\n" not in str(refusal.value)
    assert "prepare_data.py" in str(refusal.value)  # the way out


def test_a_split_without_tokens_is_refused(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "shards", validation=0)
    TokenShards(folder)
    with pytest.raises(DataError, match=r"no validation tokens \(it has: train"):
        TokenShards(folder, "validation")
    with pytest.raises(DataError, match="no test tokens"):
        TokenShards(folder, "test")


def test_a_model_with_too_few_ids_is_refused(folder: Path) -> None:
    TokenShards(folder, vocabulary=5000)
    with pytest.raises(DataError, match="tokenizer of 5000 ids and the model's vocabulary is 4999"):
        TokenShards(folder, vocabulary=4999)


@pytest.mark.parametrize("at", [0, 301, 599])
def test_verify_finds_one_flipped_bit(folder: Path, at: int) -> None:
    path = folder / "train-00001.bin"
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    shards = TokenShards(folder)  # the size is right, so opening cannot see it
    with pytest.raises(DataError, match=r"train-00001.bin is damaged: its xxh3"):
        shards.verify()


def test_verify_finds_a_false_largest_id(folder: Path) -> None:
    edit(folder, lambda tree: train_file(tree).update(max_id=12))
    with pytest.raises(DataError, match=r"holds id 599 and manifest\.json says that 12"):
        TokenShards(folder).verify()


def test_unigram_entropy_is_that_of_the_counts(folder: Path, tmp_path: Path) -> None:
    found = TokenShards(folder).split.unigram_entropy
    assert found == pytest.approx(np.log(1000), abs=1e-6)  # 1000 ids once each
    two = make_shards(tmp_path / "two", vocabulary=2)
    assert TokenShards(two).split.unigram_entropy == pytest.approx(np.log(2), abs=1e-5)


def test_random_tokens_do_not_depend_on_how_they_are_read() -> None:
    random = RandomTokens(1000, seed=4)
    whole = random.read(0, 10_000)
    parts = [random.read(start, 100) for start in range(0, 10_000, 100)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert (whole != RandomTokens(1000, seed=5).read(0, 10_000)).mean() > 0.99
    assert whole.min() >= 0
    assert whole.max() < 1000
    counts = np.bincount(whole, minlength=1000)
    assert ((counts - 10) ** 2 / 10).sum() < 999 + 5 * np.sqrt(2 * 999)  # chi-square, 5 sigma
    assert random.read(random.tokens - 5, 5).shape == (5,)
