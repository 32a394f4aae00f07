"""lm-eval's own loop over tasks written here, which need no network."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from flashtrain import checkpoint
from flashtrain.build import build_model
from flashtrain.compose import load
from flashtrain.config import to_dict
from flashtrain.data.tokenizer import train_bpe
from flashtrain.examinee import Examinee
from flashtrain.parallel.mesh import SINGLE
from flashtrain.scoring import Scorer, windows
from flashtrain.trained import open_trained

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed: pip install 'flashtrain[lm-eval]'",
)
TEXT = "the quick brown fox jumps over the lazy dog. "
COMMON = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
"""
TASKS = {
    "choices": """doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: [" fox", " dog"]
metric_list: [{metric: acc}]
""",
    "rolling": """doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
    "answers": """doc_to_text: "{{question}}"
doc_to_target: "fox"
generation_kwargs: {until: ["."], max_gen_toks: 5}
metric_list: [{metric: exact_match}]
""",
}
KINDS = {
    "choices": "multiple_choice",
    "rolling": "loglikelihood_rolling",
    "answers": "generate_until",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = load(
        ["data=random", "precision=fp32", "model.vocabulary=384", "model.d_model=32",
         "model.n_layers=1", "model.init_std=0.3", "data.sequence_length=32"]
    )  # fmt: skip
    model = build_model(config, SINGLE, torch.device("cpu"))
    meta = {"config": to_dict(config)}
    checkpoint.save(folder / "checkpoints", 1, checkpoint.collect(model), meta)
    train_bpe([TEXT] * 20, 290).save(folder / "tokenizer.json")
    return folder


def write_tasks(folder: Path) -> None:
    """Task files and the data they name."""
    rows = [{"question": TEXT * n + "the quick brown", "answer": n % 2} for n in (1, 2, 5)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rest in TASKS.items():
        head = COMMON.format(name=name, data=folder / "rows.jsonl", kind=KINDS[name])
        (folder / f"{name}.yaml").write_text(head + rest)


def test_lm_eval_finds_what_the_model_says(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from flashtrain.integrations.lm_eval import evaluate, unknown_tasks

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_tasks(tmp_path)
    assert unknown_tasks(["choices", "arc_easy", "arc_esay"], tmp_path) == ["arc_esay"]
    trained = open_trained(run, torch.device("cpu"))
    asked = Examinee(trained.decoder, trained.tokenizer, 32, batch_size=2)
    found: dict[str, Any] = evaluate(asked, list(TASKS), folder=tmp_path)

    scorer, tokenizer = Scorer(trained.decoder, 32), trained.tokenizer
    texts = [TEXT * n + "the quick brown" for n in (1, 2, 5)]
    right, nats, size = 0, 0.0, 0
    for text, answer in zip(texts, (1, 0, 1), strict=True):
        context = tokenizer.encode(text)
        ends = [tokenizer.encode(text + word)[len(context) :] for word in (" fox", " dog")]
        scores = scorer.score([(context, end) for end in ends])
        right += (scores[1].log_probability > scores[0].log_probability) == answer
        ids = [tokenizer.end_of_text, *context]
        nats -= sum(s.log_probability for s in scorer.score(list(windows(ids, 32, 32))))
        size += len(text.encode())
    assert found["choices"]["acc,none"] == pytest.approx(right / 3)
    assert found["rolling"]["bits_per_byte,none"] == pytest.approx(nats / size / math.log(2))
    assert 0 <= found["answers"]["exact_match,none"] <= 1
