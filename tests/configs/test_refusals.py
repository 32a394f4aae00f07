"""What cannot run is refused before anything starts, in one line that names key and numbers."""

import subprocess
import sys
from pathlib import Path

import pytest

from flashtrain.compose import load
from flashtrain.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SHARDS = "data=shards"

# (overrides, words of the sentence), on two processes, where tensor parallelism is 2
REFUSED = [
    # keys and groups that do not exist
    ("modle.n_layers=3", "modle no such key model"),
    ("model.n_layer=3", "model.n_layer no such key n_layers"),
    ("position.scaling.fator=2", "position.scaling.fator no such key factor"),
    ("+typo=1", "typo no such key"),
    ("+model.typo=1", "model.typo no such key"),
    ("++model.typo=1", "model.typo no such key"),
    ("+model._target_=os.system", "model._target_ no such key"),
    ("optimiser=adamw", "optimiser no such key optimizer"),
    ("position=ropee", "position=ropee alibi learned none rope sinusoidal"),
    ("experiment=gpt5", "experiment=gpt5 shakespeare gpt2_124m"),
    # values of the wrong type
    ("model.n_layers=many", "model.n_layers 'many'"),
    ("model.n_layers=1.5", "model.n_layers 1.5"),
    ("trainer.steps=true", "trainer.steps True"),
    ("optimizer.lr=fast", "optimizer.lr 'fast'"),
    ("tracking.console=maybe", "tracking.console 'maybe'"),
    ("model.norm=batchnorm", "model.norm 'batchnorm' layernorm rmsnorm"),
    ("position.applies_to=[q,z]", "position.applies_to 'z' embedding"),
    ("position.applies_to=q", "position.applies_to [q]"),
    ("model.n_heads=null", "model.n_heads null"),
    ("model=null", "model.n_layers must be set"),
    ("model=3", "model=3"),
    ("name=${nope}", "name nope"),
    ("trainer.steps=1,2", "trainer.steps=1,2 one run"),
    # what is not an override
    ("--config-name=x", "--config-name=x key=value"),
    ("trainer.steps", "trainer.steps key=value"),
    ("=3", "=3"),
    ('name="open', 'name="open key=value'),
    ("data.path=[1,2", "data.path=[1,2 key=value"),
    ("data.path=tokens(1)", "data.path=tokens(1)"),
    # missing
    ("trainer.steps=???", "trainer.steps must be set"),
    ("data.batch_size=???", "data.batch_size must be set"),
    (SHARDS, "data.path prepare_data.py"),
    ("data=random", "model.vocabulary data.source=random"),
    # numbers that mean nothing
    ("optimizer.lr=nan", "optimizer.lr nan"),
    ("optimizer.lr=inf", "optimizer.lr inf"),
    ("optimizer.lr=-1e-3", "optimizer.lr -0.001"),
    ("optimizer.beta1=1", "optimizer.beta1 1"),
    ("optimizer.weight_decay=nan", "optimizer.weight_decay nan"),
    ("optimizer.clip_norm=0", "optimizer.clip_norm 0"),
    ("schedule.final_ratio=2", "schedule.final_ratio 2"),
    ("schedule.warmup_steps=-3", "schedule.warmup_steps -3"),
    ("loss.z_loss=-1", "loss.z_loss -1"),
    ("trainer.steps=0", "trainer.steps 0"),
    ("model.n_heads=0", "model.n_heads 0"),
    ("model.n_kv_heads=0", "model.n_kv_heads 0"),
    ("data.batch_size=-32", "data.batch_size -32"),
    ("model.head_size=512", "512 256"),
    ("data=mixture", "data.path data.sources configs/data/mixture.yaml prepare_data"),
    # numbers that do not fit each other
    ("model.d_model=130 model.n_heads=4", "model.d_model=130 model.n_heads=4"),
    ("model.n_heads=4 model.n_kv_heads=3", "model.n_heads=4 model.n_kv_heads=3"),
    ("model.n_heads=3 model.d_model=96", "model.n_heads=3 parallel.tensor=2"),
    ("parallel=tensor4", "parallel.tensor=4 2 processes"),
    ("data.sequence_length=255", "data.sequence_length=255 parallel.tensor=2"),
    ("model.d_ff=511", "model.d_ff=511 parallel.tensor=2"),
    ("model.vocabulary=4097", "model.vocabulary=4097 parallel.tensor=2"),
    (
        "data.batch_size=33 data.micro_batch_size=4",
        "data.batch_size=33 data.micro_batch_size=4 1 data-parallel",
    ),
    # what the loss over all logits lacks
    ("loss.fused=false loss.z_loss=1e-4", "loss.z_loss=0.0001 loss.fused=true"),
    # matrices in parts of rows, which no optimizer makes orthogonal
    ("optimizer=muon parallel.tensor=1 parallel.shard=2", "optimizer=muon parallel.shard=2 adamw"),
    ("optimizer=muon engine=deepspeed", "optimizer=muon engine=deepspeed native"),
    ("optimizer=muon optimizer.momentum=1", "optimizer.momentum 1"),
    # what a kind of position cannot touch
    ("position=alibi position.applies_to=[q,k,v]", "position.applies_to=[q,k,v] ALiBi [q,k]"),
    ("position=rope position.applies_to=[embedding]", "[embedding] RoPE q, k, v"),
    ("position=learned position.applies_to=[q,embedding]", "[q,embedding] alone"),
    ("position=rope position.applies_to=[]", "position.applies_to position=none"),
    (
        "position=llama3 position.scaling.original_max_position_embeddings=0",
        "position.scaling.original_max_position_embeddings=0 above 0",
    ),
    ("position=llama3 position.scaling.low_freq_factor=4", "low_freq_factor=4.0 high_freq_factor"),
    ("position.scaling.beta_fast=-1", "position.scaling.beta_fast=-1.0 above 0"),
    (
        "position.scaling.rope_type=yarn position.scaling.original_max_position_embeddings=9 "
        "position.rope_theta=1",
        "position.rope_theta=1.0 above 1 yarn",
    ),
    (
        "position=rope position.scaling.rope_type=yarn position.scaling.factor=4",
        "yarn position.scaling.original_max_position_embeddings",
    ),
    (
        "position.scaling.rope_type=yarn position.scaling.original_max_position_embeddings=-1",
        "position.scaling.original_max_position_embeddings=-1",
    ),
    ("position=rope position.partial_rotary_factor=0.01", "position.partial_rotary_factor=0.01"),
    # memory for time
    ("trainer.mlp_chunks=0", "trainer.mlp_chunks=0 1"),
    (
        "trainer.mlp_chunks=4 trainer.recompute=selective",
        "trainer.mlp_chunks=4 trainer.recompute=selective full",
    ),
    (
        "trainer.offload_activations=true",
        "trainer.offload_activations=true trainer.recompute=none trainer.recompute=full",
    ),
    (
        "trainer.offload_activations=true trainer.recompute=full engine=deepspeed",
        "trainer.offload_activations=True engine=native engine=deepspeed",
    ),
    (
        "trainer.offload_keep=0 trainer.offload_activations=true trainer.recompute=full",
        "trainer.offload_keep=0 1",
    ),
    ("trainer.offload_keep=4", "trainer.offload_keep=4 trainer.offload_activations=true"),
    ("parallel.overlap=maybe", "parallel.overlap 'maybe' auto on off"),
]


@pytest.mark.parametrize(("line", "words"), REFUSED, ids=[line for line, _ in REFUSED])
def test_refusals_are_one_line_that_names_key_and_numbers(line: str, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(line.split(" "), world_size=2)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    assert not [word for word in words.split(" ") if word not in sentence], sentence


def test_key_value_heads_that_ranks_can_neither_hold_nor_share_are_refused() -> None:
    line = ["model.n_heads=12", "model.d_model=96", "model.n_kv_heads=3", "parallel=tensor2"]
    with pytest.raises(ConfigError, match=r"model\.n_kv_heads=3 and parallel\.tensor=2"):
        load(line, world_size=2)
    assert load([*line[:2], "model.n_kv_heads=2", "parallel=tensor4"], world_size=4)


def test_data_parallel_ranks_count_in_the_batch() -> None:
    line = ["data.batch_size=32", "data.micro_batch_size=16"]
    assert load(line, world_size=4)
    with pytest.raises(ConfigError, match=r"batch_size=32 .*micro_batch_size=16 x 4 .* = 64"):
        load(line, world_size=8)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["modle.n_layers=3"], "modle"),
        (["--config-name=x"], "--config-name=x"),
        (['name="open'], "open"),
        (["model.n_heads=3", "model.d_model=96"], "model.n_heads=3 parallel.tensor=2"),
        (["data=shards", "data.path=nowhere"], "nowhere"),
    ],
)
def test_the_launcher_refuses_without_a_traceback(
    line: list[str], words: str, tmp_path: Path
) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "flashtrain.launch", "--nproc", "2", *line],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 1, run.stderr
    assert not [word for word in words.split(" ") if word not in run.stderr], run.stderr
    assert not list(tmp_path.iterdir())
