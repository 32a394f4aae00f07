"""What fp8 layers and bf16 moments are refused for, before anything starts."""

import pytest
import torch

from flashtrain.build import plan_model
from flashtrain.compose import load
from flashtrain.config import ConfigError
from flashtrain.door import admit, bytes_per_parameter
from flashtrain.model.linear import Linear
from flashtrain.parallel.layers import ColumnLinear, RowLinear
from flashtrain.parallel.mesh import Axis
from flashtrain.precision import layer_sizes
from flashtrain.tracking.card import describe_precision

FP8 = "experiment=null data=random model.vocabulary=64 precision=fp8_tensorwise"
BF16_MOMENTS = "experiment=null optimizer.moments=bf16"

# (overrides, processes, words of the sentence)
REFUSED = [
    (f"{FP8} precision.compute=fp32", 1, "precision.linear=fp8_tensorwise compute=fp32 bf16"),
    (f"{FP8} engine=deepspeed", 1, "precision.linear=fp8_tensorwise engine=native DeepSpeed"),
    (f"{FP8} model.n_layers=4 precision.keep_blocks=2", 1, "precision.keep_blocks=2 none 4 blocks"),
    (f"{FP8} precision.keep_blocks=-1", 1, "precision.keep_blocks=-1 0"),
    ("experiment=null precision.keep_blocks=1", 1, "precision.keep_blocks=1 fp8_rowwise"),
    ("experiment=null precision.fast_backward=true", 1, "precision.fast_backward=true fp8_rowwise"),
    (f"{FP8} model.d_ff=1000", 1, "blocks.*.mlp.up 1000 output 16 precision=bf16"),
    (f"{FP8} model.d_ff=1040 parallel=tensor2", 2, "blocks.*.mlp.up 520 output parallel.tensor"),
    (f"{FP8} model.d_model=136 model.n_heads=1", 1, "blocks.*.attention.qkv 136 input 16"),
    (
        f"{FP8} data.sequence_length=24 data.batch_size=1 data.micro_batch_size=1",
        1,
        "data.micro_batch_size=1 24 16 precision.linear=fp8_tensorwise",
    ),
    (
        f"{FP8} parallel.pipeline=2 parallel.pipeline_schedule=zero_bubble",
        2,
        "parallel.pipeline_schedule=zero_bubble 1f1b",
    ),
    (f"{FP8} parallel=tensor2 parallel.overlap=on", 2, "parallel.overlap=on parallel.overlap=off"),
    (f"{BF16_MOMENTS} optimizer=muon", 1, "optimizer.moments=bf16 optimizer=adamw optimizer=muon"),
    (f"{BF16_MOMENTS} engine=deepspeed", 1, "optimizer.moments=bf16 engine=native"),
    (f"{BF16_MOMENTS} optimizer.beta2=0.999", 1, "optimizer.beta2=0.999 bf16 0.99"),
]


@pytest.mark.parametrize(("line", "world", "words"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refusals_are_one_line_that_names_key_and_numbers(
    line: str, world: int, words: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(line.split(), world)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    assert not [word for word in words.split(" ") if word not in sentence], sentence


@pytest.mark.parametrize("kind", ["fp8_tensorwise", "fp8_rowwise"])
def test_the_presets_compose(kind: str) -> None:
    config = load([f"precision={kind}", "precision.keep_blocks=1"])
    assert config.precision.linear.name == kind
    assert config.precision.compute.name == "bf16"
    assert describe_precision(config.precision) == f"bf16, linear layers {kind}"
    assert describe_precision(load(["precision=bf16"]).precision) == "bf16"
    fast = load([f"precision={kind}", "precision.fast_backward=true"]).precision
    assert describe_precision(fast) == f"bf16, linear layers {kind}, fast backward"


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize(("ranks", "kv_heads"), [(1, 4), (2, 4), (2, 1), (4, 2)])
def test_sizes_are_those_of_the_layers(mlp: str, ranks: int, kv_heads: int) -> None:
    overrides = [*FP8.split(), "model.n_heads=4", f"model.n_kv_heads={kv_heads}",
                 "model.d_model=256", f"model.mlp={mlp}", f"parallel.tensor={ranks}"]  # fmt: skip
    config = load(overrides, ranks)
    model = plan_model(config, Axis(ranks, 0, None))
    found = {
        name: (layer.in_features, layer.out_features)
        for name, layer in model.blocks[0].named_modules()
        if isinstance(layer, Linear | ColumnLinear | RowLinear)
    }
    assert layer_sizes(config) == found


@pytest.mark.parametrize(("capability", "admitted"), [((8, 0), False), ((8, 9), True)])
def test_a_gpu_without_fp8_is_refused(
    capability: tuple[int, int], admitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load([*FP8.split(), "attention=reference"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: "NVIDIA A100")
    monkeypatch.setattr("flashtrain.door._check_memory", lambda *_: None)
    monkeypatch.setattr("flashtrain.door.describe_attention", lambda *_: "")
    if admitted:
        assert admit(config, 1, 1).precision == config.precision
        return
    with pytest.raises(ConfigError, match=r"fp8_tensorwise: NVIDIA A100 .* 8\.0, .* need 8\.9"):
        admit(config, 1, 1)


def test_without_a_gpu_fp8_is_admitted() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert admit(load(FP8.split()), 1, 1).precision.linear.name == "fp8_tensorwise"


def test_moments_count_in_memory() -> None:
    wide, narrow = (
        bytes_per_parameter(load([f"optimizer.moments={kind}"])) for kind in ("fp32", "bf16")
    )
    assert wide - narrow == 4
