"""Training speed on the CPU: the row, the race with a stand-in for nanoGPT, what cannot race."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flashtrain.data.loader import Batch
from scripts import bench_start, bench_train
from scripts.parts.training_peer import peer_step

CASE = (
    "model=gpt_tiny model.n_layers=2 model.vocabulary=640 model.bias=true position=gpt2 "
    "data=random data.sequence_length=64 data.batch_size=4 data.micro_batch_size=2 precision=fp32 "
    "trainer.compile=false"
)
# what the race uses of nanoGPT's model.py, over a model of its own
STAND_IN = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.dropout == 0.0 and config.bias and config.block_size == 64
        self.table = nn.Embedding(config.vocab_size, config.n_embd)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas)

    def forward(self, tokens, targets):
        logits = self.table(tokens) @ self.table.weight.t()
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
"""


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(STAND_IN)
    return tmp_path


def row_of(arguments: list[str], path: Path) -> dict[str, Any]:
    status = bench_train.main(
        ["--cpu", "--steps", "2", "--warmup", "1", "--json", str(path), *arguments]
    )
    assert status == 0
    (row,) = json.loads(path.read_text())["rows"]
    return dict(row)


def test_both_are_timed_on_the_same_sizes(peer: Path) -> None:
    row = row_of(["--case", CASE, "--peer", str(peer)], peer / "rows.json")
    for who in ("", "peer "):
        assert row[f"{who}tokens/s"] == pytest.approx(256 / row[f"{who}ms/step"] * 1e3, rel=0.1)
    assert row["speed ratio"] == pytest.approx(row["peer ms/step"] / row["ms/step"], rel=0.01)
    assert 6 < row["loss"] < 7  # ln 640 = 6.46
    assert row["peer loss"] > 0


def test_cases_of_the_same_sizes_share_one_race(peer: Path) -> None:
    cases = [CASE, f"{CASE} trainer.recompute=full", f"{CASE} data.batch_size=2"]
    arguments = [word for case in cases for word in ("--case", case)]
    path = peer / "rows.json"
    status = bench_train.main(
        ["--cpu", "--steps", "2", "--warmup", "1", "--peer", str(peer), "--json", str(path),
         *arguments]
    )  # fmt: skip
    first, same, other = json.loads(path.read_text())["rows"]
    assert status == 0
    assert same["peer ms/step"] == first["peer ms/step"] != other["peer ms/step"]
    assert same["peer loss"] == first["peer loss"] and same["ms/step"] != first["ms/step"]
    assert same["speed ratio"] == pytest.approx(first["peer ms/step"] / same["ms/step"], rel=0.01)


def test_what_nanogpt_has_not_is_refused(peer: Path) -> None:
    for change, what in (("model.mlp=swiglu", "model.mlp=swiglu"), ("optimizer=muon", "muon")):
        row = row_of(["--case", f"{CASE} {change}", "--peer", str(peer)], peer / "rows.json")
        assert what in row["error"]
    row = row_of(["--case", CASE, "--peer", str(peer / "elsewhere")], peer / "rows.json")
    assert "no model.py there" in row["error"]


def test_the_peers_loss_is_a_mean_over_micro_batches(peer: Path) -> None:
    config = bench_train.read_case(f"{CASE} optimizer.lr=0.0001", 1)
    ids = torch.randint(640, (4, 65))
    parts = [Batch(ids[i : i + 2, :-1], ids[i : i + 2, 1:]) for i in (0, 2)]
    losses = []
    for batches in ([Batch(ids[:, :-1], ids[:, 1:])], parts):
        torch.manual_seed(0)
        losses.append(peer_step(peer, config, torch.device("cpu"))(batches))
    torch.testing.assert_close(*losses)


def test_a_start_is_timed_cold_and_warm(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert bench_start.main(["--cpu", "--steps", "2", "--case", CASE, "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    for kind in ("cold", "warm"):
        assert 0 < row[f"{kind} first step s"] <= row[f"{kind} step 2 s"]
    with pytest.raises(RuntimeError, match="a start ended with"):
        bench_start.main(["--cpu", "--case", f"{CASE} model.n_layers=0"])
