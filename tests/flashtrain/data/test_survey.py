import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashtrain.data import survey as module
from flashtrain.data.prepare import Recipe, prepare
from flashtrain.data.survey import bit_length, documents_of, histogram, survey
from tests.flashtrain.data.foreign_writers import write_nanogpt

ROOT = Path(__file__).resolve().parents[3]


class Ids:
    name, vocabulary = "ids", 50

    def __init__(self, ids: list[int]) -> None:
        self.ids = np.array(ids, np.uint16)
        self.tokens = len(ids)

    def read(self, start: int, length: int) -> np.ndarray[Any, Any]:
        return self.ids[start : start + length]


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_documents_are_measured_across_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    random = np.random.default_rng(chunk)
    lengths = [0, 1, 5, 2, 0, 17, *random.integers(0, 12, 40).tolist()]
    ids = [id_ for length in lengths for id_ in [*random.integers(1, 40, length).tolist(), 0]]
    found = survey(Ids([*ids, 3, 3]), 0)
    assert (found.tokens, found.documents) == (len(ids) + 2, len(lengths))
    assert (found.length_sum, found.shortest, found.longest) == (sum(lengths), 0, 17)
    bits = [length.bit_length() for length in lengths]
    np.testing.assert_array_equal(found.lengths, np.bincount(bits, minlength=module.BUCKETS))
    np.testing.assert_array_equal(found.counts, np.bincount([*ids, 3, 3], minlength=50))
    part = survey(Ids(ids), 0, limit=9)  # 0 | x 0 | xxxxx 0: 1 + 2 + 6 tokens
    assert (part.tokens, part.documents, part.length_sum) == (9, 3, 6)
    assert survey(Ids(ids), None).documents == 0


def test_bit_lengths_are_exact() -> None:
    values = [0, 1, 2, 3, 4, 7, 8, 2**31 - 1, 2**31, 2**52 - 1]
    assert bit_length(np.array(values)).tolist() == [value.bit_length() for value in values]


def test_the_histogram_has_a_line_for_each_bucket_between_the_used_ones() -> None:
    lines = histogram(np.array([0, 0, 10, 0, 5, *[0] * 20]), width=10)
    assert [line.split() for line in lines] == [
        ["2", "-", "3", "10", "█" * 10], ["4", "-", "7", "0"], ["8", "-", "15", "5", "█" * 5],
    ]  # fmt: skip
    assert histogram(np.zeros(5, np.int64)) == []


def test_documents_are_cut_behind_their_separator() -> None:
    parts = documents_of(np.array([5, 0, 0, 7]), 0)
    assert [part.tolist() for part in parts] == [[5, 0], [0], [7]]
    assert len(documents_of(np.array([5, 0]), None)) == 1


def test_the_script_shows_samples_lengths_sources_and_coverage(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one document"}\n{"text": "the other"}\n' * 40)
    prepare([tmp_path / "a.jsonl"], tmp_path / "own", Recipe("bytes", validation_share=0))
    (tmp_path / "nano").mkdir()
    write_nanogpt(tmp_path / "nano" / "train.bin", [1, 2, 99, 4] * 20)
    command = [sys.executable, str(ROOT / "scripts" / "inspect_data.py")]
    options = ["--samples", "1", "--length", "30"]
    own = subprocess.run(
        [*command, str(tmp_path / "own"), *options], capture_output=True, text=True, timeout=60
    )
    assert own.returncode == 0, own.stderr
    assert "documents 80: 9 to 12 tokens, 10.5 on average" in own.stdout
    assert "of 257 ids occur" in own.stdout
    assert "<|end of a document" in own.stdout and "document" in own.stdout
    both = [str(tmp_path / "nano"), str(tmp_path / "nano" / "train.bin"), "--end-of-text", "99"]
    foreign = subprocess.run([*command, *both], capture_output=True, text=True, timeout=60)
    assert foreign.returncode == 0, foreign.stderr
    assert " 50.00%                 80 tokens" in foreign.stdout
    for flag in ("--length", "--limit"):
        refused = subprocess.run([*command, *both, flag, "0"], capture_output=True, text=True)
        assert (refused.returncode, f"{flag} 0 must be 1 or more" in refused.stderr) == (2, True)
