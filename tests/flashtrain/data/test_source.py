from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashtrain.compose import load
from flashtrain.config import Config, ConfigError
from flashtrain.data.dataset import Part, RandomTokens
from flashtrain.data.mapped import DataError
from flashtrain.data.source import open_loader, open_tokenizer, prepare_source
from tests.flashtrain.data.foreign_writers import write_llmc, write_megatron, write_nanogpt
from tests.flashtrain.data.made import make_shards

SMALL = [
    "experiment=null", "data=shards", "data.sequence_length=10", "data.batch_size=8",
    "data.micro_batch_size=1", "trainer.steps=10", "trainer.evaluate_sequences=8",
]  # fmt: skip


def config(*overrides: str) -> Config:
    return prepare_source(load([*SMALL, *overrides]), 1)


def batch(config: Config, step: int, data_size: int = 1) -> Tensor:
    """Tokens [8, 10] of the global batch."""
    parts = []
    for rank in range(data_size):
        with open_loader(config, rank, data_size, torch.device("cpu")) as loader:
            parts += [b.tokens for b in loader.step(step)]
    return torch.cat(parts)


def mixture(tmp_path: Path, *overrides: str) -> Config:
    """web: ids 0 .. 999, three of four; code: ids 2000 .. 2299."""
    web = make_shards(tmp_path / "web")
    code = make_shards(tmp_path / "code", 300, first=2000)
    return config(
        f"+data.sources={{web:{{path:{web},weight:3}},code:{{path:{code},weight:1}}}}", *overrides
    )


def test_nanogpt_and_llmc_folders_train_at_once(tmp_path: Path) -> None:
    for name, write in (("nano", write_nanogpt), ("llmc", write_llmc)):
        folder = tmp_path / name
        folder.mkdir()
        write(folder / "web_train_0.bin", range(50000, 50400))
        write(folder / "web_val_0.bin", range(100))
        found = config(f"data.path={folder}", "model.vocabulary=50432")
        assert found.model.vocabulary == 50432
        tokens = batch(found, 0)
        assert (tokens[:, 1:] == tokens[:, :-1] + 1).all() and int(tokens.min()) >= 50000
        assert open_tokenizer(found) is None
        with pytest.raises(ConfigError, match=r"data\.tokenizer_path, or set model\.vocabulary"):
            config(f"data.path={folder}")
        with pytest.raises(DataError, match="holds id 50399 near token 0, and the vocabulary is 4"):
            config(f"data.path={folder}", "model.vocabulary=4096")


def test_a_megatron_prefix_holds_its_last_tokens_out(tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "web_text_document", [range(150), range(150, 230)])
    overrides = [f"data.path={prefix}", "data.tokenizer_path=bytes"]
    found = config(*overrides, "data.validation_tokens=90")
    assert found.model.vocabulary == 384  # 257 bytes, in steps of 128
    tokenizer = open_tokenizer(found)
    assert tokenizer is not None and tokenizer.kind == "bytes"
    with open_loader(found, 0, 1, torch.device("cpu")) as loader:
        assert loader.samples.n_samples == 13
        held_out = torch.cat([b.tokens for b in loader.evaluation(8)])
    assert held_out.flatten().tolist() == list(range(140, 220))
    assert int(batch(found, 0).max()) < 140
    with pytest.raises(DataError, match=r"no validation split: .*data\.validation_tokens"):
        config(*overrides)
    whole = config(*overrides, f"data.validation_path={prefix}")
    with open_loader(whole, 0, 1, torch.device("cpu")) as loader:
        assert loader.samples.n_samples == 22
        assert next(loader.evaluation(8)).tokens.flatten().tolist() == list(range(10))


def test_a_mixture_has_its_weights_in_every_batch(tmp_path: Path) -> None:
    found = mixture(tmp_path)
    seen: dict[bool, list[int]] = {False: [], True: []}
    for step in range(20):
        tokens = batch(found, step)
        from_code = tokens[:, 0] >= 2000
        assert from_code.sum() == 2
        for row, is_code in zip(tokens.tolist(), from_code.tolist(), strict=True):
            assert row == list(range(row[0], row[0] + 10))
            seen[is_code].append(row[0])
    # each source is an epoch of its own after the other: 99 and 29 samples
    assert sorted(seen[False][:99]) == list(range(0, 990, 10))
    assert sorted(seen[True][:29]) == list(range(2000, 2290, 10))
    with open_loader(found, 0, 1, torch.device("cpu")) as loader:
        assert loader.counters(20) == {
            "data/tokens/web": 1200, "data/epochs/web": 120 / 99,
            "data/tokens/code": 400, "data/epochs/code": 40 / 29,
        }  # fmt: skip
        held_out = torch.cat([b.tokens for b in loader.evaluation(20)])
    assert (held_out[:, 0] >= 2000).sum() == 5
    assert held_out[held_out[:, 0] < 2000].flatten().tolist() == list(range(7, 157))


@pytest.mark.parametrize("data_size", [2, 4, 8])
def test_a_mixture_is_the_same_on_every_layout(tmp_path: Path, data_size: int) -> None:
    found = mixture(tmp_path, "data.mix_changes=[{at_tokens:405,weights:{code:3}}]")
    for step in (0, 4, 5, 6, 19):
        assert torch.equal(batch(found, step, data_size), batch(found, step))


def test_a_mixture_changes_its_weights_at_a_token_count(tmp_path: Path) -> None:
    changed = mixture(tmp_path, "data.mix_changes=[{at_tokens:400,weights:{web:0}}]")
    for step in range(10):
        from_code = int((batch(changed, step)[:, 0] >= 2000).sum())
        assert from_code == (2 if step < 5 else 8)


def test_another_source_leaves_the_order_of_the_others_as_it_was(tmp_path: Path) -> None:
    found = mixture(tmp_path)
    web = [row[0] for step in range(9) for row in batch(found, step).tolist() if row[0] < 2000]
    path = found.data.sources["web"].path
    alone = config(f"+data.sources={{web:{{path:{path}}}}}")
    assert [row[0] for step in range(6) for row in batch(alone, step).tolist()] == web[:48]


@pytest.mark.parametrize(
    ("overrides", "error", "sentence"),
    [
        (["data.path=a", "+data.sources={b:{path:c}}"], ConfigError, "name one or the other"),
        (["data=random", "+data.sources={b:{path:c}}"], ConfigError, "set data.source=shards"),
        (["+data.sources={b:{weight:1}}"], ConfigError, "path must be set"),
        (["+data.sources={b:{path:c,weigth:1}}"], ConfigError, "weigth: no such key"),
        (["data.path=a", "data.mix_changes=[{at_tokens:5}]"], ConfigError, "there are none"),
        (["data.path=a", "data.validation_path=b", "data.validation_tokens=5"], ConfigError,
         "data.validation_path=b and data.validation_tokens=5"),
        (["data.path=a", "data.validation_tokens=0"], ConfigError, "must be a number above 0"),
        (["data.path=WEB", "data.format=llmc", "model.vocabulary=9"], DataError,
         "is nanogpt, not llmc"),
        (["data.path=WEB", "data.tokenizer_path=bytes"], DataError, "have different tokenizers"),
        (["data.path=WEB", "data.validation_tokens=1000"], DataError, "hold fewer tokens out"),
        (["+data.sources={b:{path:WEB,weight:-1}}"], DataError, "must be numbers of 0 or more"),
        (["+data.sources={b:{path:WEB}}", "data.mix_changes=[{at_tokens:5,weights:{c:1}}]"],
         DataError, "name c; the sources are b"),
        (["data.path=WEB", "trainer.evaluate_sequences=30"], ConfigError, "more than the 19 held"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(
    tmp_path: Path, overrides: list[str], error: type[Exception], sentence: str
) -> None:
    web = make_shards(tmp_path / "web")
    with pytest.raises(error, match=sentence) as refusal:
        config(*[override.replace("WEB", str(web)) for override in overrides])
    assert "\n" not in str(refusal.value)


def test_text_of_another_tokenizer_is_not_evaluated_on(tmp_path: Path) -> None:
    web, other = make_shards(tmp_path / "web"), make_shards(tmp_path / "other", vocabulary=4000)
    named = [f"data.path={web}", f"data.validation_path={other}"]
    assert config(*named).data.validation_path == str(other)
    file = other / "manifest.json"
    file.write_text(file.read_text().replace('"tokenizer": "none"', '"tokenizer": "another"'))
    with pytest.raises(DataError, match=f"validation_path={other} have different tokenizers"):
        config(*named)
    plain = write_nanogpt(tmp_path / "train.bin", range(200))  # says nothing of its tokenizer
    assert config(f"data.path={plain}", named[1], "model.vocabulary=4000").model.vocabulary == 4000


def test_a_part_reads_its_part_only() -> None:
    whole: Any = RandomTokens(100, 1, 1000)
    part = Part(whole, 200, 300)
    np.testing.assert_array_equal(part.read(10, 90), whole.read(210, 90))
    for start, length in ((-1, 5), (90, 11)):
        with pytest.raises(DataError, match="which has 100"):
            part.read(start, length)
    with pytest.raises(DataError, match="no part of random tokens of seed 1, which has 1,000"):
        Part(whole, 900, 1001)
