"""Every shipped tile fits its card, and compiles to what tiles.py says of it."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.attention import tiles
from kernels.attention.tiles import Tile, Tiles

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CARDS = [(8, 0), (8, 6), (8, 9), (9, 0)]


@pytest.mark.parametrize("capability", tiles.SHARED_LIMIT)
def test_every_shipped_tile_fits_its_card(capability: tuple[int, int]) -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    either = (False, True)
    calls = itertools.product(range(1, 257), dtypes, either, either)
    for head_size, dtype, causal, crowded in calls:  # raises where one does not
        tiles.choose_for(capability, head_size, dtype, causal=causal, crowded=crowded)


def test_a_tile_too_big_for_the_card_is_refused() -> None:
    big = Tile(128, 128, 8, 3)
    chosen = Tiles(big, big, big)
    message = "forward tile for head size 128 .* needs 163840 bytes .* sm_89 has 101376"
    with pytest.raises(ValueError, match=message):
        tiles.check_shared((8, 9), chosen, 128, torch.bfloat16)


def test_kernels_of_the_first_model_compile_for_hopper_as_claimed() -> None:
    assert_as_claimed([{"capability": [9, 0], "head_size": 128, "alibi": True}])


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [32, 64, 128, 256])
@pytest.mark.parametrize("capability", CARDS)
def test_shipped_tiles_compile_as_claimed(capability: tuple[int, int], head_size: int) -> None:
    common = {"capability": capability, "head_size": head_size}
    jobs = [{**common, "causal": True}, {**common, "causal": False, "dtype": "float16"}]
    if head_size in (128, 256):
        jobs.append({**common, "dtype": "float32"})
    assert_as_claimed(jobs)


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("capability", CARDS)
def test_tiles_for_bias_and_dropout_compile_as_claimed(
    capability: tuple[int, int], head_size: int
) -> None:
    common = {"capability": capability, "head_size": head_size}
    # a bias in float32 takes the most room
    pairs = {**common, "bias": "ht", "bias_dtype": "float32"}
    assert_as_claimed([pairs, {**common, "dropout": 0.1}])


@pytest.mark.slow
def test_every_feature_compiles_and_fits() -> None:
    # the interpreter accepts code that the compiler does not
    jobs = [
        {
            "capability": capability,
            "head_size": head_size,
            "causal": causal,
            "alibi": True,
            "everything": True,
            **more,
        }
        for capability, head_size, causal, more in (
            ([9, 0], 128, True, {}),
            ([9, 0], 80, False, {}),
            ([8, 6], 128, False, {}),
            ([9, 0], 192, True, {"value_size": 128, "key_mask": True}),
            ([8, 6], 64, False, {"value_size": 128, "key_mask": True}),
            ([8, 9], 80, True, {"bias": "bht", "key_mask": True, "dropout": 0.5}),
            ([9, 0], 128, False, {"bias": "b", "dropout": 0.5, "value_size": 64}),
            ([8, 0], 32, True, {"dtype": "float32", "bias": "t", "bias_dtype": "float32"}),
        )
    ]
    for found in compiled(jobs):
        limit = tiles.SHARED_LIMIT[tuple(found["capability"])]
        assert found["shared"] <= limit, found


@pytest.mark.slow
def test_lengths_of_one_compile() -> None:
    # Triton turns an argument of 1 into a constant, which some expressions do not survive
    lengths = ((1, 512), (512, 1), (1, 1))
    jobs = [{"capability": [9, 0], "head_size": 64, "T": T, "S": S} for T, S in lengths]
    assert len(compiled(jobs)) == 4 * len(lengths)


def assert_as_claimed(jobs: list[dict[str, Any]]) -> None:
    for found in compiled(jobs):
        capability = tuple(found["capability"])
        dtype = getattr(torch, found["dtype"])
        head_size = found["head_size"]
        crowded = found["bias"] is not None or found["dropout"] > 0
        chosen = tiles.choose_for(
            capability, head_size, dtype, causal=found["causal"], crowded=crowded
        )
        given = (capability, head_size, dtype)
        kernel = found["kernel"]
        if "fwd" in kernel:
            estimate = tiles.forward_shared(capability, chosen.forward, head_size, dtype)
            claimed = chosen.forward.spills
        elif "dkdv" in kernel:
            estimate = tiles.dkdv_shared(capability, chosen.dkdv, head_size, dtype)
            claimed = chosen.dkdv.spills
        elif "dq" in kernel:
            estimate = tiles.dq_shared(capability, chosen.dq, head_size, dtype)
            claimed = chosen.dq.spills
        elif "dbias" in kernel:
            assert chosen.dbias is not None
            estimate, claimed = 0, chosen.dbias.spills  # not estimated
        else:
            continue  # delta: a few hundred bytes
        about = f"{kernel} for {given}"
        assert found["shared"] <= tiles.SHARED_LIMIT[capability], about
        # the estimate refuses at the door, so it must not refuse what fits
        assert estimate <= found["shared"] + 1024, about
        assert found["spilled"] <= claimed, f"{about} spills {found['spilled']} bytes"


def compiled(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What compile_kernels.py says of the jobs, from a process that never saw the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_kernels.py"), json.dumps(jobs)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
