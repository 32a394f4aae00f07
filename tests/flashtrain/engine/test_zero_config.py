"""DeepSpeed's configuration: what follows from ours, what may be added, what is refused."""

import pytest

from flashtrain.compose import load
from flashtrain.config import Config, ConfigError
from flashtrain.engine.zero_config import zero_config


def config(*overrides: str) -> Config:
    small = ["experiment=null", "data=random", "model.vocabulary=64", "engine=deepspeed"]
    return load([*small, "data.batch_size=32", "data.micro_batch_size=4", *overrides], 4)


def test_batch_sizes_clip_and_stage_follow_from_the_run() -> None:
    made = zero_config(config("parallel=zero2", "optimizer.clip_norm=0.5"))
    assert made["train_batch_size"] == 32
    assert made["train_micro_batch_size_per_gpu"] == 4
    assert made["gradient_accumulation_steps"] == 2
    assert made["gradient_clipping"] == 0.5
    assert made["zero_optimization"]["stage"] == 2
    assert made["bf16"] == {"enabled": True}
    assert zero_config(config("optimizer.clip_norm=null"))["gradient_clipping"] == 0.0


def test_its_own_keys_are_added() -> None:
    line = "+engine.deepspeed.zero_optimization.offload_optimizer.device=cpu"
    made = zero_config(config(line))
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert made["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("+engine.deepspeed.train_batch_size=8", "train_batch_size data.batch_size"),
        ("+engine.deepspeed.zero_optimization.stage=1", "zero_optimization.stage parallel.zero"),
        ("+engine.deepspeed.gradient_clipping=1", "gradient_clipping optimizer.clip_norm"),
        ("+engine.deepspeed.fp16.enabled=true", "fp16 precision.compute"),
        ("+engine.deepspeed.zero_optimisation.x=1", "zero_optimisation zero_optimization"),
        ("+engine.deepspeed.zero_optimization=3", "zero_optimization=3 mapping"),
        (
            "parallel.zero=1 +engine.deepspeed.data_types.grad_accum_dtype=fp32",
            "data_types parallel.zero=1 parallel.zero=2",
        ),
    ],
)
def test_what_is_ours_or_unknown_is_refused_with_the_key_to_set(line: str, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        zero_config(config(*line.split(" ")))
    sentence = str(refusal.value)
    assert not [word for word in words.split(" ") if word not in sentence], sentence


def test_deepspeed_checks_the_keys_it_owns() -> None:
    pytest.importorskip("deepspeed", reason="engine=deepspeed is an extra")
    from flashtrain.engine.deepspeed import check_keys

    check_keys(config("+engine.deepspeed.zero_optimization.reduce_bucket_size=1000"))
    for line, words in (
        ("offload_optimizr.device=cpu", "offload_optimizr: Extra inputs are not permitted"),
        ("reduce_bucket_size=lots", "reduce_bucket_size: Input should be a valid integer"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_keys(config(f"+engine.deepspeed.zero_optimization.{line}"))
