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
Parametrization = Enum("Parametrization", ["standard", "mup"])
PositionKind = Enum("PositionKind", ["learned", "sinusoidal", "rope", "alibi", "none"])
Target = Enum("Target", ["q", "k", "v", "embedding"])
RopeType = Enum("RopeType", ["default", "linear", "ntk", "yarn", "llama3"])
Source = Enum("Source", ["shards", "shakespeare", "random"])
TokenizerKind = Enum("TokenizerKind", ["bpe", "bytes"])
DataFormat = Enum("DataFormat", ["auto", "flashtrain", "nanogpt", "llmc", "megatron"])
Packing = Enum("Packing", ["none", "concatenate", "best_fit"])
OptimizerKind = Enum("OptimizerKind", ["adamw", "muon"])
Moments = Enum("Moments", ["fp32", "bf16"])
ScheduleKind = Enum("ScheduleKind", ["cosine", "linear", "wsd", "constant"])
EngineKind = Enum("EngineKind", ["native", "deepspeed"])
Compute = Enum("Compute", ["bf16", "fp32"])
LinearKind = Enum("LinearKind", ["compute", "fp8_tensorwise", "fp8_rowwise"])
Backend = Enum("Backend", ["auto", "hopper", "triton", "torch", "reference"])
ContextKind = Enum("ContextKind", ["gather", "ring", "ulysses"])
PipelineSchedule = Enum("PipelineSchedule", ["1f1b", "interleaved", "zero_bubble", "zbv"])
Overlap = Enum("Overlap", ["auto", "on", "off", "fused"])
Recompute = Enum("Recompute", ["none", "light", "selective", "full"])
CudaGraph = Enum("CudaGraph", ["auto", "on", "off"])
WandbMode = Enum("WandbMode", ["auto", "online", "offline", "disabled"])
OnBadSteps = Enum("OnBadSteps", ["stop", "rollback"])
OnSpike = Enum("OnSpike", ["ignore", "warn", "stop", "rollback"])


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
    # mup: initial weights, learning rates, logits and scores scale with the width, so that what was
    # tuned at base_width holds at any other (flashtrain/model/parametrization.py)
    parametrization: Parametrization = Parametrization.standard
    base_width: int | None = None  # mup: the d_model at which it is the standard one
    base_head_size: int | None = None  # mup: likewise; null: head_size, heads grow in number
    word_vectors: str | None = None  # word2vec / GloVe file that token embeddings start from
    # run folder or checkpoint whose weights training starts from, at step 0 with a new optimizer
    weights: str | None = None


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
class MixSource:
    path: str = MISSING
    weight: float = 1.0  # share of the sequences, in proportion to those of the other sources
    format: DataFormat = DataFormat.auto


@dataclass
class MixChange:
    at_tokens: int = MISSING  # of the run so far; the first sequence from there on is affected
    weights: dict[str, float] = field(default_factory=dict)  # sources not named keep theirs


@dataclass
class RampStage:
    until_tokens: int = MISSING  # of the run
    batch_size: int | None = None  # null: data.batch_size
    sequence_length: int | None = None  # null: data.sequence_length, which it has to divide


@dataclass
class DataConfig:
    source: Source = Source.shards
    # token shards: a folder from scripts/prepare_data.py or its URL, nanoGPT's or llm.c's folder or
    # files, or the prefix of Megatron's .bin and .idx
    path: str | None = None
    format: DataFormat = DataFormat.auto  # auto: told by the files themselves
    sources: dict[str, MixSource] = field(default_factory=dict)  # in place of path: a mixture
    mix_changes: list[MixChange] = field(default_factory=list)  # other weights later in the run
    # data to evaluate on; null: the held-out split of path, or of each source by its weight
    validation_path: str | None = None
    # likewise: the last tokens of path, which are not trained on; for data that hold out nothing
    validation_tokens: int | None = None
    # for data without a tokenizer of their own: bytes, a tokenizer.json or its folder, a model's
    # name in Hugging Face's cache, tiktoken:NAME
    tokenizer_path: str | None = None
    # none: attention runs over the ends of documents; concatenate: documents end to end, cut every
    # sequence_length tokens, and kept apart; best_fit: kept apart, cut only where too long
    packing: Packing = Packing.none
    # null: sequences are shuffled over all shards; k: shards are shuffled, and sequences over k of
    # them at a time, so that no more than 2 k have to be in reach: for remote ones and slow disks
    shuffle_shards: int | None = None
    # of shards at s3://, gs://, https://, file:// and others of fsspec's: where copies are kept, on
    # a disk of the machine, how much of it they may take, and after how many minutes without a byte
    # of one that is waited for a run ends
    cache_dir: str | None = None
    cache_gb: float = 64.0
    network_minutes: float = 10.0
    tokenizer: TokenizerKind = TokenizerKind.bpe  # for source=shakespeare only
    tokenizer_vocabulary: int = 4096  # likewise
    sequence_length: int = 1024
    batch_size: int = MISSING  # sequences per optimizer step, over all GPUs
    ramp: list[RampStage] = field(default_factory=list)  # smaller and shorter at the start
    # sequences per forward pass on one data-parallel rank; null: its whole share of the batch, and
    # with parallel.pipeline at most that share over the pipeline's ranks, so that it divides it
    micro_batch_size: int | None = None


@dataclass
class OptimizerConfig:
    name: OptimizerKind = OptimizerKind.adamw
    lr: float = 6e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95  # muon, of matrices; beta1, beta2, eps: of all that takes AdamW
    moments: Moments = Moments.fp32  # adamw: what both are kept in; bf16 saves 4 bytes a parameter
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
    """pipeline x tensor x context x shard x replicate = the processes of the run; null takes what
    is left. Ranks of the last two see different samples.
    """

    pipeline: int = 1  # ranks that each hold some of the layers
    # who computes when: 1f1b one forward, one backward; interleaved shorter waits, more traffic;
    # zero_bubble, zbv (in a V: rank 0 has the first and the last layers): backward in two halves,
    # of which the second, the gradients of weights, fills waits; both run uncompiled
    pipeline_schedule: PipelineSchedule = PipelineSchedule["1f1b"]
    # runs of layers on each pipeline rank; null: 1 for 1f1b and zero_bubble, 2 for the others
    stages_per_rank: int | None = None
    tensor: int | None = 1  # ranks that share the arithmetic of each layer; null: 2 where it fits
    # tensor ranks' transfers behind their products; auto: where GPUs see each other's memory, and
    # steps are CUDA graphs or products large (layout.py); fused: by PyTorch's operators
    overlap: Overlap = Overlap.auto
    context: int = 1  # ranks that hold parts of the same sequences
    # how attention sees the other parts: gather brings all keys and values to every rank, ring a
    # rank's at a time, ulysses exchanges tokens for heads
    context_kind: ContextKind = ContextKind.gather
    shard_context: bool = True  # weights are cut over context ranks too; false: copied over them
    shard: int | None = 1  # ranks that each keep a part of the same weights (FSDP, ZeRO)
    replicate: int | None = None  # ranks that keep the same part
    # what `shard` cuts: 1 weights and optimizer state, 2 gradients too, 3 gathered weights too
    zero: int = 3


@dataclass
class EngineConfig:
    name: EngineKind = EngineKind.native
    bucket_mb: int = 64  # native, shard=1: MiB of gradients that one all-reduce carries
    # DeepSpeed's own keys (zero_optimization.offload_optimizer.device=cpu, ..), checked by it
    deepspeed: dict[str, Any] = field(default_factory=dict)


@dataclass
class PrecisionConfig:
    compute: Compute = Compute.bf16  # activations and products; master weights are always fp32
    # products of the blocks' linear layers, not of the head: in `compute` too, or in fp8 with one
    # scale a tensor, or a row
    linear: LinearKind = LinearKind.compute
    keep_blocks: int = 0  # fp8: so many blocks at either end keep `compute`
    # fp8: products of backward accumulate fast, too, which keeps 14 bits of a partial sum (Hopper)
    fast_backward: bool = False


@dataclass
class LossConfig:
    # head and cross-entropy by chunks of tokens, the logits never in memory as a whole;
    # false: all logits, then their cross-entropy
    fused: bool = True
    # z: z lse^2 is added to a token's training loss, which keeps logits from drifting; 0: nothing
    z_loss: float = 0.0


@dataclass
class AttentionConfig:
    backend: Backend = Backend.auto


@dataclass
class CheckpointConfig:
    every: int = 500  # steps between checkpoints; one is always written at the end
    # a step waits until its state is copied to host memory, which takes as much again as the
    # weights and optimizer of each GPU; false: until it is on disk
    asynchronous: bool = True
    keep: int = 2  # the newest ones that stay on disk
    keep_every: int | None = None  # checkpoints of steps that it divides stay for ever
    keep_best: int = 0  # this many of the lowest validation loss stay too
    # where a job begins; after a failure its launcher's next starts go on from what it has saved
    resume: str = "auto"  # auto: newest valid one of this run | never | path of a checkpoint


@dataclass
class WandbConfig:
    mode: WandbMode = WandbMode.auto  # auto: online where a key is set, offline where none is
    project: str = "flashtrain"
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    artifact: bool = False  # the last checkpoint goes up too, when the run ends


@dataclass
class TrackingConfig:
    console: bool = True
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False  # event files in the run folder; needs the package tensorboard
    peak_tflops: float | None = None  # per GPU; null: looked up by the GPU's name, else no MFU


@dataclass
class SpikeConfig:
    """A spike: `steps` losses in a row above the median of the `window` before by `deviations`
    robust standard deviations (1.4826 x the median distance from the median)."""

    action: OnSpike = OnSpike.warn
    deviations: float = 8.0
    steps: int = 5
    window: int = 128  # losses; nothing is called a spike before half as many are known


@dataclass
class BenchmarkConfig:
    """What is measured at intervals besides the held-out loss; scripts/evaluate.py does it later.
    Troubles on the way, such as a data set out of reach, cost a warning and not the run."""

    texts: list[str] = field(default_factory=list)  # UTF-8 files: perplexity, bits per byte
    tasks: list[str] = field(default_factory=list)  # of lm-eval; needs the package lm-eval
    task_folder: str | None = None  # task files of your own
    shots: int | None = None  # examples before each question; null: as the task says
    limit: int | None = None  # questions of each task; null: all
    every: int = 1000  # steps


@dataclass
class TrainerConfig:
    steps: int = MISSING
    stop_at: int | None = None  # end after this step; the same command without it goes on
    time_limit: float | None = None  # minutes; then save and stop; the same command goes on
    log_every: int = 10
    # steps in a row with a gradient that is not finite before on_bad_steps; fewer are skipped
    bad_steps: int = 10
    # stop: end the run; rollback: go back to the newest checkpoint from before, and on without the
    # batches trained on since then
    on_bad_steps: OnBadSteps = OnBadSteps.stop
    rollbacks: int = 3  # of one run; the next one stops it
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    # every so many steps, do forward and backward twice and compare to the last bit, which finds
    # GPUs that miscalculate; the kernels must be deterministic. null: never
    check_determinism: int | None = None
    # minutes without a finished step or evaluation after which a run counts as hung: every rank
    # writes where it stands to hangs/ of the run folder and ends; a save may take longer
    hang_timeout: float = 10.0
    # seconds without a sign of life of a node and without a step after which it counts as lost
    node_timeout: float = 5.0
    evaluate_every: int = 250
    evaluate_sequences: int = 128  # held-out sequences of one evaluation
    sample_every: int = 500
    sample_prompt: str = "\n"
    sample_tokens: int = 128
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    compile: bool | None = None  # torch.compile each block; null: on CUDA
    # steps as CUDA graphs, which leave the host nothing to launch; auto: on one GPU, and on
    # tensor ranks or data ranks alone, where they can be; on: with both, too
    cuda_graph: CudaGraph = CudaGraph.auto
    recompute: Recompute = Recompute.none  # activation checkpointing
    # parts of its tokens that each MLP runs one after the other; its inside is recomputed part by
    # part, so that it never exists whole
    mlp_chunks: int = 1
    # recompute=full: what it keeps, the blocks' inputs, waits for backward in host memory; of the
    # last offload_keep blocks it stays on the GPU
    offload_activations: bool = False
    offload_keep: int = 1
    # [first, last]: rank 0 traces these steps into profile/ of the run folder
    profile: list[int] = field(default_factory=list)
    nvtx: bool = False  # NVTX ranges around every operation, for `nsys profile`
    # remember who allocated what, so that running out of GPU memory leaves a snapshot of it
    memory_history: bool = False


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
    loss: LossConfig = field(default_factory=LossConfig)
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
