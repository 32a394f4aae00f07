"""The whole configuration tree: what YAML and the command line may set, and nothing else.

Hydra fills it (`compose.py`, which also checks it); past that the program sees these plain
dataclasses and no OmegaConf.
"""

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


class ConfigError(ValueError):
    """A configuration that cannot run, said in one sentence."""


# OmegaConf matches the *names* of enum members, so they are spelt as in YAML.
Norm = Enum("Norm", ["layernorm", "rmsnorm"])
Mlp = Enum("Mlp", ["gelu", "swiglu", "relu2"])
PositionKind = Enum("PositionKind", ["learned", "sinusoidal", "rope", "alibi", "none"])
Target = Enum("Target", ["q", "k", "v", "embedding"])
RopeType = Enum("RopeType", ["default", "linear", "ntk", "yarn", "llama3"])
Source = Enum("Source", ["shards", "shakespeare", "random"])
TokenizerKind = Enum("TokenizerKind", ["bpe", "bytes"])
OptimizerKind = Enum("OptimizerKind", ["adamw"])
ScheduleKind = Enum("ScheduleKind", ["cosine", "linear", "wsd", "constant"])
EngineKind = Enum("EngineKind", ["native"])
Compute = Enum("Compute", ["bf16", "fp32"])
Backend = Enum("Backend", ["auto", "hopper", "triton", "torch", "reference"])
Recompute = Enum("Recompute", ["none", "selective", "full"])
WandbMode = Enum("WandbMode", ["auto", "online", "offline", "disabled"])


@dataclass
class ModelConfig:
    n_layers: int = MISSING
    n_heads: int = MISSING
    d_model: int = MISSING  # width of the residual stream
    n_kv_heads: int | None = None  # null: n_heads; fewer is grouped-query attention
    head_size: int | None = None  # null: d_model / n_heads
    d_ff: int | None = None  # null: 4 d_model; SwiGLU: 8/3 d_model, rounded up to 256
    vocabulary: int | None = None  # null: the tokenizer's, rounded up to a multiple of 128
    norm: Norm = Norm.layernorm
    norm_eps: float = 1e-5
    mlp: Mlp = Mlp.gelu
    bias: bool = False  # in linear layers and LayerNorm
    tied_head: bool = True  # the head shares the embedding's weight
    qk_norm: bool = False  # RMSNorm on each head of q and k, before a rotation
    logit_softcap: float | None = None  # c: logits become c tanh(logits / c)
    init_std: float = 0.02
    word_vectors: str | None = None  # word2vec / GloVe file that token embeddings start from


@dataclass
class RopeScaling:
    """Keys as Hugging Face's `rope_parameters` names them."""

    rope_type: RopeType = RopeType.default
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass
class PositionConfig:
    kind: PositionKind = PositionKind.rope
    # q, k, v: what receives the position in every layer; embedding: added once to the token
    # embedding, as in GPT-2, so that everything after it sees it
    applies_to: list[Target] = field(default_factory=lambda: [Target.q, Target.k])
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0  # share of each head that RoPE rotates
    scaling: RopeScaling = field(default_factory=RopeScaling)


@dataclass
class DataConfig:
    source: Source = Source.shards
    path: str | None = None  # folder of token shards, from scripts/prepare_data.py
    tokenizer: TokenizerKind = TokenizerKind.bpe  # for source=shakespeare only
    tokenizer_vocabulary: int = 4096  # likewise
    sequence_length: int = 1024
    batch_size: int = MISSING  # sequences per optimizer step, over all GPUs
    # sequences per forward pass on one data-parallel rank; null: its whole share of the batch
    micro_batch_size: int | None = None


@dataclass
class OptimizerConfig:
    name: OptimizerKind = OptimizerKind.adamw
    lr: float = 6e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only, never on norms, biases and position tables
    clip_norm: float | None = 1.0  # on the norm of the whole gradient, over all ranks


@dataclass
class ScheduleConfig:
    kind: ScheduleKind = ScheduleKind.cosine
    warmup_steps: int = 100
    final_ratio: float = 0.1  # learning rate at the end, as a share of optimizer.lr
    decay_share: float = 0.2  # wsd: the last share of the run that decays


@dataclass
class ParallelConfig:
    tensor: int | None = 1  # ranks that share one copy of each layer; null: 2 in an even world


@dataclass
class EngineConfig:
    name: EngineKind = EngineKind.native
    bucket_mb: int = 64  # MiB of gradients a data-parallel all-reduce carries


@dataclass
class PrecisionConfig:
    compute: Compute = Compute.bf16  # activations and products; master weights are always fp32


@dataclass
class AttentionConfig:
    backend: Backend = Backend.auto


@dataclass
class CheckpointConfig:
    every: int = 500  # steps between checkpoints; one is always written at the end
    keep: int = 2  # the newest ones that stay on disk
    resume: str = "auto"  # auto: newest valid one of this run | never | path of a checkpoint


@dataclass
class WandbConfig:
    mode: WandbMode = WandbMode.auto  # auto: online where a key is set, offline where none is
    project: str = "flashtrain"
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class TrackingConfig:
    console: bool = True
    wandb: WandbConfig = field(default_factory=WandbConfig)
    peak_tflops: float | None = None  # per GPU; null: looked up by the GPU's name, else no MFU


@dataclass
class TrainerConfig:
    steps: int = MISSING
    stop_at: int | None = None  # end after this step; the same command without it goes on
    time_limit: float | None = None  # minutes; then save and stop; the same command goes on
    log_every: int = 10
    evaluate_every: int = 250
    evaluate_sequences: int = 128  # held-out sequences of one evaluation
    sample_every: int = 500
    sample_prompt: str = "\n"
    sample_tokens: int = 128
    compile: bool | None = None  # torch.compile each block; null: on CUDA
    recompute: Recompute = Recompute.none  # activation checkpointing


@dataclass
class Config:
    name: str = "run"
    seed: int = 1337
    # null: runs/<name>-<fingerprint of everything that changes the numbers>, so that the same
    # command finds its own run again
    run_dir: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    position: PositionConfig = field(default_factory=PositionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


ConfigStore.instance().store(name="schema", node=Config)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON types; enum members by name."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.name
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result
