"""Decoding's tiles fit their cards, and the number of splits fills them."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.attention import decode_tiles, tiles

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def test_splits_leave_none_idle_and_cost_no_more_than_not_splitting() -> None:
    for _ in range(500):
        slots, programs = random.randint(1, 1000), random.randint(1, 5000)
        tiles_of_keys, merge = random.randint(0, 2000), random.uniform(0, 10)
        n = decode_tiles.splits_for(slots, programs, tiles_of_keys, merge)
        assert 1 <= n <= max(1, min(tiles_of_keys, decode_tiles.MOST_SPLITS))
        share = -(-tiles_of_keys // n)
        assert n == 1 or share * (n - 1) < tiles_of_keys
        waves, unsplit = -(-programs * n // slots), -(-programs // slots)
        start = decode_tiles.START
        if n > 1:
            cost = waves * (start + share + merge)
            assert cost <= decode_tiles.WITHIN * unsplit * (start + tiles_of_keys)


def test_one_long_sequence_fills_the_card() -> None:
    # 8 kv heads, 1024 tiles of keys, 396 slots: 49 splits would be the whole card
    assert decode_tiles.splits_for(396, 8, 1024, 3.5) >= 45


@pytest.mark.parametrize("capability", tiles.SHARED_LIMIT)
def test_every_shipped_tile_fits_its_card(capability: tuple[int, int]) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for head_size in range(1, 257):
            for rows in {decode_tiles.query_rows(n, dtype) for n in (1, 17, 33, 500)}:
                decode_tiles.choose_for(capability, rows, head_size, 256, dtype)  # or raises
                decode_tiles.choose_for(capability, rows, head_size, head_size, dtype)


def test_a_tile_too_big_for_the_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decode_tiles._SM80, (32, 128), decode_tiles.DecodeTile(128, 4, 3))
    message = "head sizes 128 and 96 .* needs 139264 bytes .* sm_89 has 101376: choose a smaller"
    with pytest.raises(ValueError, match=message):
        decode_tiles.choose_for.__wrapped__((8, 9), 16, 128, 96, torch.bfloat16)


def test_the_first_model_compiles_for_hopper() -> None:
    assert_fits([{"capability": [9, 0], "head_size": 128, "page": 64}])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)])
def test_shipped_tiles_compile_and_fit(capability: tuple[int, int]) -> None:
    common = {"capability": capability}
    jobs = [{**common, "head_size": D, "rows": 16} for D in (32, 64, 128, 256)]
    jobs += [{**common, "head_size": D, "rows": 64} for D in (64, 128, 256)]
    jobs += [{**common, "head_size": D, "dtype": "float32", "rows": 64} for D in (64, 128, 256)]
    jobs += [
        {**common, "head_size": 80, "page": 16, "everything": True},
        {**common, "head_size": 192, "v_head_size": 128, "rows": 64, "everything": True},
        {**common, "head_size": 256, "dtype": "float32", "rows": 64, "everything": True},
    ]
    assert_fits(jobs)


def assert_fits(jobs: list[dict[str, Any]]) -> None:
    """What compile_decode.py says of the jobs, from a process that never saw the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_decode.py"), json.dumps(jobs)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2 * len(jobs)
    for found in lines:
        assert found["shared"] <= tiles.SHARED_LIMIT[tuple(found["capability"])], found
        assert found["spilled"] == 0, found
        if found["kernel"] == "attention_decode_kernel":
            # the estimate refuses at the door, so it must not refuse what fits
            assert found["estimate"] <= found["shared"] + 1024, found
