import errno
import io
import json
import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from flashtrain.data import documents
from flashtrain.data.bars import Bars
from flashtrain.data.documents import Bad
from flashtrain.data.inputs import open_input
from flashtrain.data.manifest import Manifest
from flashtrain.data.mapped import DataError
from flashtrain.data.prepare import Progress, Recipe, prepare, prepare_shakespeare
from flashtrain.data.shards import TokenShards
from flashtrain.data.split import held_out
from flashtrain.data.survey import survey
from flashtrain.data.tokenizer import load_tokenizer
from flashtrain.data.writer import entropy
from tests.flashtrain.data.made import BYTES, TEXTS, contents, write_jsonl

ROOT = Path(__file__).resolve().parents[3]


def write_parquet(path: Path, texts: list[str | None] | list[bytes], key: str = "text") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({key: texts}), path)
    return path


def texts_of(folder: Path, split: str) -> list[str]:
    """Documents of a split, back from its tokens."""
    shards, tokenizer = TokenShards(folder, split), load_tokenizer(folder)
    assert shards.fingerprint == tokenizer.fingerprint
    ids = shards.read(0, shards.tokens)
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    assert ends[-1] == len(ids) - 1
    assert len(ends) == shards.split.documents
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends[:-1] + 1)]


def expected(share: float = 0.2) -> tuple[list[str], list[str]]:
    train = [text for text in TEXTS if not held_out(text, share)]
    return train, [text for text in TEXTS if held_out(text, share)]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "text"])
def test_every_format_gives_back_its_documents(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "in"
    source.mkdir()
    if kind == "text":
        (source / "below").mkdir()
        for i, text in enumerate(TEXTS):
            (source / "below" / f"{i:03d}.txt").write_text(text, encoding="utf-8", newline="")
    elif kind == "parquet":
        write_parquet(source / "a.parquet", TEXTS)
    else:
        write_jsonl(source / f"a.{kind}", TEXTS)
    manifest = prepare([source], tmp_path / "out", BYTES)
    train, validation = expected()
    assert validation  # the test would be empty otherwise
    assert texts_of(tmp_path / "out", "train") == train
    assert texts_of(tmp_path / "out", "validation") == validation
    assert manifest.bad_documents == {}
    assert manifest.splits["train"].text_bytes == sum(len(text.encode()) for text in train)
    TokenShards(tmp_path / "out").verify()


def test_bpe_gives_back_its_documents(tmp_path: Path) -> None:
    recipe = Recipe(tokenizer="bpe", vocabulary=300, validation_share=0.2)
    manifest = prepare([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out", recipe)
    assert manifest.vocabulary == 300
    assert (texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "validation")) == (
        expected()
    )
    counts = survey(TokenShards(tmp_path / "out"), None).counts
    assert manifest.splits["train"].unigram_entropy == pytest.approx(entropy(counts), abs=1e-6)
    # and a tokenizer that exists is used as it is
    again = prepare(
        [tmp_path / "a.jsonl"],
        tmp_path / "again",
        Recipe(tokenizer=str(tmp_path / "out"), validation_share=0.2),
    )
    assert again.tokenizer == manifest.tokenizer
    assert again.splits == manifest.splits


def test_output_depends_on_neither_workers_nor_the_day(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS * 40)
    recipe = Recipe(vocabulary=290, shard_tokens=1 << 14)
    for name, workers in (("one", 1), ("two", 2)):
        prepare([tmp_path / "a.jsonl"], tmp_path / name, recipe, workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    files = TokenShards(tmp_path / "one").split.files
    assert len(files) > 1
    assert all(file.tokens == 1 << 14 for file in files[:-1])


def test_repeated_documents_are_left_out_on_request(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [*TEXTS, TEXTS[3], *TEXTS[:5]])
    write_jsonl(tmp_path / "b.jsonl", TEXTS[50:])
    recipe = Recipe("bytes", validation_share=0.2, deduplicate=True)
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    manifest = prepare(files, tmp_path / "out", recipe)
    assert (texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "validation")) == (
        expected()
    )
    assert manifest.bad_documents == {"duplicate": 16}
    assert manifest.recipe["deduplicate"] is True
    assert prepare(files, tmp_path / "all", BYTES).bad_documents == {}


def test_documents_longer_than_the_limit_are_counted_and_left_out(tmp_path: Path) -> None:
    long = "x" * 400_000  # crosses several reads
    write_jsonl(tmp_path / "a.jsonl", [TEXTS[0], long, TEXTS[1], long])
    write_jsonl(tmp_path / "b.jsonl.gz", [long, TEXTS[2], long, long, TEXTS[3]])
    write_parquet(tmp_path / "c.parquet", [long, TEXTS[4]])
    (tmp_path / "d.txt").write_text(long)
    (tmp_path / "e.txt").write_text(TEXTS[5])
    recipe = Recipe("bytes", validation_share=0, longest=300_000)
    manifest = prepare(sorted(tmp_path.iterdir()), tmp_path / "out", recipe)
    assert manifest.bad_documents == {"longer than the limit": 7}
    assert texts_of(tmp_path / "out", "train") == TEXTS[:6]


@given(
    lines=st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=12),
    cuts=st.lists(st.integers(0, 400), max_size=20),
    longest=st.integers(1, 40),
)
@settings(max_examples=200, deadline=None)
def test_lines_do_not_depend_on_how_they_are_read(
    lines: list[bytes], cuts: list[int], longest: int
) -> None:
    data = b"\n".join(lines)
    ends = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    chunks = [data[one:two] for one, two in pairwise(ends)]
    found = list(documents._lines(iter(chunks), longest))
    assert found == [line if len(line) <= longest else None for line in lines or [b""]]


def test_a_hugging_face_data_set_is_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "a.jsonl", [*TEXTS, "", " "])
    name = f"hf:{tmp_path / 'set'}"
    manifest = prepare([name], tmp_path / "out", BYTES)
    assert (texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "validation")) == (
        expected()
    )
    assert manifest.source == name
    assert manifest.bad_documents == {"empty": 2}
    text = open_input([name], "text")
    assert [d.content for d in text.read((0, 55))] == [*TEXTS[55:], Bad.empty, Bad.empty]
    for bad, field, sentence in (
        (name, "body", "has no column 'body' .it has: text, other"),
        (f"{name}::dev", "text", "cannot be read: .*dev"),
    ):
        with pytest.raises(DataError, match=sentence):
            prepare([bad], tmp_path / "no", Recipe("bytes", field=field))
    with pytest.raises(DataError, match="stands beside 1 other inputs"):
        prepare([name, tmp_path / "set"], tmp_path / "no", BYTES)


def test_a_hugging_face_data_set_without_the_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="hf:some/set needs the package datasets: `pip install"):
        prepare(["hf:some/set"], tmp_path / "out", BYTES)
    assert list(tmp_path.iterdir()) == []


def test_bad_documents_are_counted_and_left_out(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}).encode() for text in TEXTS]
    lines[3:3] = [
        b'{"text": ""}',
        b'{"text": " \\n "}',
        b'{"text": "\\ud800"}',  # half a surrogate pair
        b'{"text": "\xff"}',
        b"{broken",
        b'{"body": "x"}',
        b'{"text": 7}',
        b"[1]",
        b"",  # blank lines are no documents at all
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_bytes(b"")
    write_parquet(tmp_path / "d.parquet", [b"\xff\xfe", b"", b"fine in Parquet"])
    files = sorted(tmp_path.iterdir())
    manifest = prepare(files, tmp_path / "out", BYTES)
    assert manifest.bad_documents == {
        "empty": 4,
        "invalid JSON": 1,
        "invalid UTF-8": 4,
        "no text in the field": 3,
    }
    both = texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "validation")
    assert sorted(both) == sorted([*TEXTS, "fine in Parquet"])


def test_byte_order_marks_and_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    prepare([tmp_path / "a.txt"], tmp_path / "out", Recipe("bytes", validation_share=0))
    assert texts_of(tmp_path / "out", "train") == ["one\r\ntwo"]


REFUSED = {
    "nothing there": ("gone.txt", BYTES, "no file or folder .*gone.txt"),
    "unknown kind": ("a.pdf", BYTES, "a.pdf is none of .txt, .md, .jsonl"),
    "folder without text": ("empty", BYTES, "the folder .*empty holds no .txt"),
    "cut gzip": ("cut.jsonl.gz", BYTES, "cut.jsonl.gz is truncated or damaged"),
    "cut gzip under BPE": ("cut.jsonl.gz", Recipe(), "cut.jsonl.gz is truncated or damaged"),
    "no gzip": ("no.jsonl.gz", BYTES, "no.jsonl.gz is truncated or damaged"),
    "no Parquet": ("no.parquet", BYTES, "no.parquet is no readable Parquet file"),
    "no such column": ("a.parquet", Recipe("bytes", field="b"), "no column 'b' .it has: text, n"),
    "column of numbers": ("a.parquet", Recipe("bytes", field="n"), "column 'n' .* is int64, not"),
    "no documents": ("bad.jsonl", BYTES, "bad.jsonl holds no usable.*: 2 documents, invalid JSON"),
    "nothing held out": ("one.txt", BYTES, "1 documents fell on one side, so the .* is empty"),
    "share of all": ("one.txt", Recipe("bytes", validation_share=1.0), "share 1.0 must be at"),
    "small BPE": ("one.txt", Recipe(vocabulary=10), "vocabulary of 10 is below 257"),
    "no tokenizer": ("one.txt", Recipe("nowhere/t.json"), "no tokenizer at nowhere/t.json"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_input_is_refused_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.pdf").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    whole = write_jsonl(tmp_path / "whole.jsonl.gz", TEXTS).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-40])
    (tmp_path / "no.jsonl.gz").write_bytes(b"plain text")
    (tmp_path / "no.parquet").write_bytes(b"plain text")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "n": [1]}), tmp_path / "a.parquet")
    (tmp_path / "bad.jsonl").write_text("{\n{\n")
    (tmp_path / "one.txt").write_text("one document")
    name, recipe, sentence = REFUSED[kind]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=sentence) as refusal:
        prepare([tmp_path / name], tmp_path / "out", recipe)
    assert "\n" not in str(refusal.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_library_names_its_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pyarrow", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)  # makes the import fail
    for name, library in (("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=f"needs the package {library}: `pip install {library}"):
            list(documents.read_documents(tmp_path / name))


def test_a_failing_disk_is_not_taken_for_a_damaged_file(tmp_path: Path) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    class File(type(tmp_path)):  # type: ignore[misc]
        def open(self, *_: object, **__: object) -> Failing:
            return Failing()

    for name in ("a.jsonl", "a.jsonl.gz"):
        with pytest.raises(OSError, match="Input/output error"):
            list(documents.read_documents(File(tmp_path / name)))


def test_zstandard_is_read_frame_after_frame(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    data = [write_jsonl(tmp_path / "a.jsonl", part).read_bytes() for part in (TEXTS[:9], TEXTS[9:])]
    packed = b"".join(zstandard.ZstdCompressor(write_checksum=True).compress(part) for part in data)
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    found = list(documents.read_documents(tmp_path / "a.jsonl.zst"))
    assert [document.content for document in found] == TEXTS
    for damaged in (packed[:-20], packed + b"more", packed[:50] + b"x" + packed[51:]):
        (tmp_path / "a.jsonl.zst").write_bytes(damaged)
        with pytest.raises(DataError, match="truncated or damaged"):
            list(documents.read_documents(tmp_path / "a.jsonl.zst"))


def test_an_existing_output_is_kept_unless_forced(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "out").mkdir()
    prepare([source], tmp_path / "out", BYTES)  # an empty folder is free
    first = contents(tmp_path / "out")
    write_jsonl(source, TEXTS[:40])
    with pytest.raises(DataError, match=r"out is not empty: .* --force"):
        prepare([source], tmp_path / "out", BYTES)
    assert contents(tmp_path / "out") == first
    prepare([source], tmp_path / "out", BYTES, force=True)
    assert contents(tmp_path / "out") != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_progress_runs_to_the_end(tmp_path: Path) -> None:
    seen: list[Progress] = []
    source = write_jsonl(tmp_path / "a.jsonl.gz", TEXTS)
    prepare([source, source], tmp_path / "out", Recipe(vocabulary=260), report=seen.append)
    assert {progress.stage for progress in seen} == {"tokenizer", "tokens"}
    for last in (seen[-1], [p for p in seen if p.stage == "tokenizer"][-1]):
        assert (last.documents, last.done_bytes) == (120, 2 * source.stat().st_size)
        assert last.all_bytes == last.done_bytes


RACER = """
import pathlib, sys, time
from flashtrain.data.prepare import prepare_shakespeare
folder = pathlib.Path(sys.argv[1])
folder.with_name(sys.argv[2]).touch()
while len(list(folder.parent.iterdir())) < 3:  # all have imported and are at the line
    time.sleep(0.001)
prepare_shakespeare(folder / "shakespeare", "bytes", 0)
"""


def test_racing_processes_leave_one_sound_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, str(out), name], cwd=ROOT) for name in "abc"
    ]
    assert [racer.wait(60) for racer in racers] == [0, 0, 0]
    assert [path.name for path in out.iterdir()] == ["shakespeare"]
    for split in ("train", "validation"):
        TokenShards(out / "shakespeare", split).verify()
    prepare_shakespeare(out / "shakespeare", "bytes", 0)  # there already: kept
    with pytest.raises(
        DataError, match=r"tokenizer bytes.* asks for tokenizer bpe, vocabulary 512"
    ):
        prepare_shakespeare(out / "shakespeare", "bpe", 512)


def test_losing_the_race_to_an_output_is_said(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)

    def rival(progress: Progress) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").write_text("x")

    with pytest.raises(DataError, match="out was filled by another process"):
        prepare([source], tmp_path / "out", BYTES, report=rival)
    assert contents(tmp_path / "out") == {"theirs": b"x"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_the_embedded_text_makes_the_default_shards(tmp_path: Path) -> None:
    prepare_shakespeare(tmp_path / "data" / "shakespeare", "bpe", 512)
    manifest = Manifest.load(tmp_path / "data" / "shakespeare")
    assert "Gutenberg" in manifest.source and "CC BY 2.5" in manifest.source
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    assert 0.045 < validation.tokens / (train.tokens + validation.tokens) < 0.055
    assert 1.8 < train.text_bytes / train.tokens < 2.0
    assert 5.1 < train.unigram_entropy < 5.3
    with pytest.raises(DataError, match="neither bpe nor bytes"):
        prepare_shakespeare(tmp_path / "other", "words", 512)


def test_the_script_prepares_and_refuses(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS, key="body")
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), str(tmp_path / "a.jsonl")]
    command += ["--output", str(tmp_path / "out"), "--tokenizer", "bytes", "--field", "body"]
    command += ["--validation-share", "0.2", "--source", "mine", "--shard-tokens", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "bytes per token, unigram entropy" in done.stdout
    assert Manifest.load(tmp_path / "out").source == "mine"
    assert texts_of(tmp_path / "out", "train") == expected()[0]
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2
    assert "is not empty" in again.stderr and "Traceback" not in again.stderr


def test_bars_are_drawn_of_known_and_unknown_sizes() -> None:
    for size in (1000, None):
        text = io.StringIO()
        with Bars(Console(file=text, force_terminal=True, width=120)) as bars:
            for done in (0, 10, 20):
                bars(Progress("tokens", done, 1000 * done, 50 * done, size))
        drawn = text.getvalue()
        assert "writing tokens" in drawn and "20 documents" in drawn and "M tokens/s" in drawn
        assert ("100%" in drawn) == ("%" in drawn) == (size is not None)


def test_a_full_disk_is_said_and_the_same_command_goes_on(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [text * 100 for text in TEXTS])
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), str(source), "--workers"]
    command += ["1", "--tokenizer", "bytes", "--output", str(tmp_path / "out")]
    limit = (200_000, 200_000)  # bytes of a file: writing more fails as on a full disk
    full = subprocess.run(
        command, capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )  # fmt: skip
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert "File too large: the same command goes on" in full.stderr
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    TokenShards(tmp_path / "out").verify()


def test_a_tokenizer_trained_apart_is_the_one_prepare_trains(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    command = [sys.executable, str(ROOT / "scripts" / "train_tokenizer.py"), str(source)]
    command += ["--output", str(tmp_path / "apart"), "--vocabulary", "280"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = load_tokenizer(tmp_path / "apart").fingerprint
    assert f"fingerprint {found}" in done.stdout
    assert prepare([source], tmp_path / "out", Recipe(vocabulary=280)).tokenizer == found
