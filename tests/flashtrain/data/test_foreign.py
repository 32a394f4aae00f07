from pathlib import Path

import numpy as np
import pytest

from flashtrain.data.foreign import ForeignTokens, is_foreign, open_foreign
from flashtrain.data.mapped import DataError
from tests.flashtrain.data.foreign_writers import write_llmc, write_megatron, write_nanogpt

IDS = [(7 * i) % 50257 for i in range(1000)]
LARGE = [(70001 * i) % 128256 for i in range(1000)]
DOCUMENTS = [IDS[:1], IDS[1:400], IDS[400:400], IDS[400:]]


def opened(path: Path | str, split: str = "train", vocabulary: int = 50257) -> ForeignTokens:
    tokens = open_foreign(str(path), split, vocabulary)
    assert tokens is not None
    return tokens


def check(tokens: ForeignTokens, ids: list[int], kind: str) -> None:
    assert (tokens.tokens, tokens.kind) == (len(ids), kind)
    for start, length in ((0, len(ids)), (0, 1), (390, 30), (len(ids) - 1, 1), (5, 0)):
        np.testing.assert_array_equal(tokens.read(start, length), ids[start : start + length])
    with pytest.raises(DataError, match="which has 1,000"):
        tokens.read(len(ids) - 1, 2)


def test_nanogpt(tmp_path: Path) -> None:
    write_nanogpt(tmp_path / "train.bin", IDS)
    write_nanogpt(tmp_path / "val.bin", IDS[5:] + IDS[:5])
    check(opened(tmp_path), IDS, "nanogpt")
    check(opened(tmp_path, "validation"), IDS[5:] + IDS[:5], "nanogpt")
    check(opened(tmp_path / "train.bin"), IDS, "nanogpt")
    assert open_foreign(str(tmp_path / "train.bin"), "validation", 50257) is None


def test_llmc(tmp_path: Path) -> None:
    for n in range(3):
        write_llmc(tmp_path / f"web_train_{n:06d}.bin", IDS[400 * n : 400 * (n + 1)])
    write_llmc(tmp_path / "web_val_000000.bin", IDS)
    check(opened(tmp_path), IDS, "llmc")
    check(opened(tmp_path, "validation"), IDS, "llmc")
    check(opened(f"{tmp_path}/web_train_*.bin"), IDS, "llmc")
    write_llmc(tmp_path / "llama.bin", LARGE, 20240801, 7)
    check(opened(tmp_path / "llama.bin", vocabulary=128256), LARGE, "llmc")


@pytest.mark.parametrize("code", [4, 5, 8])
def test_megatron(tmp_path: Path, code: int) -> None:
    ids = IDS if code == 8 else LARGE
    documents = [ids[:1], ids[1:400], ids[400:400], ids[400:]]
    prefix = write_megatron(tmp_path / "web.v1_text_document", documents, code)
    for path in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
        check(opened(path, vocabulary=128256), ids, "megatron")


def test_more_bytes_after_the_index_are_its_modes(tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "web", DOCUMENTS)
    index = tmp_path / "web.idx"
    index.write_bytes(index.read_bytes() + bytes(len(DOCUMENTS)))
    check(opened(prefix), IDS, "megatron")


def test_ids_outside_the_vocabulary_are_refused_where_they_are_read(tmp_path: Path) -> None:
    write_nanogpt(tmp_path / "train.bin", [1, 2, 3, 300, 4])
    tokens = opened(tmp_path, vocabulary=300)
    assert tokens.read(0, 3).tolist() == [1, 2, 3]
    with pytest.raises(DataError, match="holds id 300 near token 2, and the vocabulary is 300"):
        tokens.read(2, 3)
    write_megatron(tmp_path / "m", [[1, -1]], 4)
    with pytest.raises(DataError, match="holds id 4294967295"):
        opened(tmp_path / "m").read(0, 2)


def cut(file: Path, change: int) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:change] if change < 0 else data + bytes(change))


def overwrite(file: Path, at: int, data: bytes) -> None:
    whole = bytearray(file.read_bytes())
    whole[at : at + len(data)] = data
    file.write_bytes(whole)


BROKEN = {
    "odd bytes": ("n.bin", lambda f: cut(f, -1), "has 1,999 bytes, which is no number of uint16"),
    "empty": ("n.bin", lambda f: f.write_bytes(b""), "has 0 bytes"),
    "llm.c cut": ("l.bin", lambda f: cut(f, -2), "is truncated: it has 3,022 bytes, and a header"),
    "llm.c long": ("l.bin", lambda f: cut(f, 2), "is too long: it has 3,026"),
    "Megatron cut": ("m.bin", lambda f: cut(f, -2), "m.bin is truncated: it has 1,998 bytes"),
    "Megatron long": ("m.bin", lambda f: cut(f, 2), "m.bin is too long"),
    "index cut": ("m.idx", lambda f: cut(f, -3), "m.idx is truncated: .* 4 sequences and 5 docum"),
    "index header cut": ("m.idx", lambda f: cut(f, -90), "does not begin with"),
    "no index": ("m.idx", lambda f: overwrite(f, 0, b"TNTIDX"), "m.idx does not begin with"),
    "version 2": ("m.idx", lambda f: overwrite(f, 9, b"\x02"), "version 2 and type code 8"),
    "floats": ("m.idx", lambda f: overwrite(f, 17, b"\x07"), "version 1 and type code 7"),
    "gaps": ("m.idx", lambda f: overwrite(f, 34 + 16 + 8, b"\x09"), "do not lie end to end"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    write_nanogpt(tmp_path / "n.bin", IDS)
    write_llmc(tmp_path / "l.bin", IDS)
    write_megatron(tmp_path / "m", DOCUMENTS)
    name, damage, sentence = BROKEN[kind]
    damage(tmp_path / name)
    with pytest.raises(DataError, match=sentence) as refusal:
        open_foreign(str(tmp_path / name), "train", 50257)
    assert "\n" not in str(refusal.value)


def test_a_format_that_is_named_is_held_to(tmp_path: Path) -> None:
    file = str(write_nanogpt(tmp_path / "train.bin", IDS))
    with pytest.raises(DataError, match=r"is nanogpt, not llmc: set data\.format"):
        open_foreign(file, "train", 50257, "llmc")
    with pytest.raises(DataError, match="is nanogpt, not megatron"):
        open_foreign(file, "train", 50257, "megatron")
    write_llmc(tmp_path / "train2.bin", IDS)
    with pytest.raises(DataError, match=r"train2\.bin is llmc, not nanogpt"):
        opened(tmp_path)
    # a raw file may begin with any bytes at all, so nanogpt is believed
    raw = open_foreign(str(tmp_path / "train2.bin"), "train", 65536, "nanogpt")
    assert raw is not None and raw.tokens == 1512


def test_names_tell_what_could_be_foreign(tmp_path: Path) -> None:
    assert not is_foreign(str(tmp_path))
    assert not is_foreign(str(tmp_path / "nothing"))
    write_megatron(tmp_path / "m", DOCUMENTS)
    assert is_foreign(str(tmp_path / "m"))
    assert not is_foreign(str(tmp_path))
    write_nanogpt(tmp_path / "val.bin", IDS)
    assert is_foreign(str(tmp_path))
