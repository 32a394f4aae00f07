"""What was measured on H200s and an H100: cases of scripts/bench_train.py and bench_scaling.py.

H200: 2026-11-27, one host of four, driver 580.159, torch 2.11.0+cu130, triton 3.6.0, random tokens.
auto records steps as CUDA graphs that ran kernel by kernel then: those say trainer.cuda_graph=off.
The race of one GPU is of 2026-11-28; MLPs in fp8 became one operation, and casts fewer, between the
two. H100 80GB, to which nothing was fitted: 2026-11-28, before casts became fewer, otherwise the
same.
"""

from flashtrain.compose import load
from flashtrain.config import Config

OFF = "trainer.cuda_graph=off"
FP8 = "precision=fp8_tensorwise"
SMALL = "experiment=gpt2_124m data.sequence_length=1024 data.micro_batch_size=32"
MEDIUM = "experiment=gpt2_350m data.sequence_length=1024 data.micro_batch_size=16"
GPT = "experiment=gpt_1.3b data.sequence_length=2048 data.micro_batch_size=8"
SWIGLU = f"{GPT} model.norm=rmsnorm model.mlp=swiglu model.d_ff=5632 model.tied_head=false"
WIDE = (
    "experiment=gpt_1.3b model.norm=rmsnorm model.mlp=swiglu model.d_ff=11008 "
    "model.tied_head=false model.n_layers=8 model.d_model=4096 model.n_heads=32 "
    "data.sequence_length=8192 data.batch_size=2 data.micro_batch_size=2"
)
LLAMA = "experiment=llama_8b data.sequence_length=8192"
LAYERS8 = f"{LLAMA} model.n_layers=8 data.micro_batch_size=2 data.batch_size=2"
LONG = (
    "experiment=llama_8b data.batch_size=1 data.micro_batch_size=1 optimizer=adamw_bf16 "
    "trainer.recompute=full trainer.mlp_chunks=16 trainer.offload_activations=true "
    "parallel=fsdp parallel.context=4 parallel.context_kind=gather"
)
LIGHT = f"{LLAMA} data.batch_size=4 data.micro_batch_size=2 parallel=fsdp trainer.recompute=light"

# case, GPUs, tokens/s of all of them, peak GB (None: not noted); medians of 8 to 20 steps
MEASURED: list[tuple[str, int, int, float | None]] = [
    # the race of one GPU (README.md)
    (f"{SMALL} data.batch_size=32", 1, 603_955, 11.06),
    (f"{SMALL} data.batch_size=32 {FP8}", 1, 697_360, 10.8),
    (f"{SMALL} data.batch_size=32 {FP8} precision.fast_backward=true", 1, 707_998, 10.8),
    (f"{MEDIUM} data.batch_size=16", 1, 215_932, 16.89),
    (f"{MEDIUM} data.batch_size=16 {FP8}", 1, 267_720, 16.53),
    (f"{MEDIUM} data.batch_size=16 {FP8} precision.fast_backward=true", 1, 276_233, 16.53),
    (f"{GPT} data.batch_size=8", 1, 66_838, 41.86),
    (f"{GPT} data.batch_size=8 {FP8}", 1, 91_023, 41.09),
    (f"{GPT} data.batch_size=8 {FP8} precision.fast_backward=true", 1, 93_558, 41.09),
    (f"{GPT} data.batch_size=8 precision=fp8_rowwise", 1, 73_967, 45.09),
    # GPT-3 XL's shape
    (f"{GPT} data.batch_size=8 parallel=tensor2", 2, 120_843, 22.69),
    (f"{GPT} data.batch_size=8 parallel=tensor4", 4, 163_225, 11.47),
    (f"{GPT} data.batch_size=8 parallel=tensor4 parallel.overlap=off {OFF}", 4, 158_588, 13.92),
    (f"{GPT} data.batch_size=8 parallel=tensor2 {FP8}", 2, 123_948, 21.52),
    (f"{GPT} data.batch_size=8 parallel=tensor2 {FP8} {OFF}", 2, 92_546, 21.52),
    (f"{GPT} data.batch_size=8 parallel=tensor4 {FP8} {OFF}", 4, 92_606, 11.75),
    (f"{GPT} data.batch_size=16 parallel=fsdp", 2, 124_931, 31.54),
    (f"{GPT} data.batch_size=32 parallel=fsdp", 4, 252_288, 27.68),
    (f"{GPT} data.batch_size=32 parallel=fsdp {FP8}", 4, 302_455, 26.88),
    (f"{GPT} data.batch_size=16 parallel=fsdp parallel.tensor=2", 4, 154_398, 19.2),
    (f"{GPT} data.batch_size=64 parallel=data parallel.pipeline=2 parallel.tensor=2", 4, 192_896,
     23.43),
    # a Llama as wide and deep
    (f"{SWIGLU} data.batch_size=8", 1, 64_626, 43.85),
    (f"{SWIGLU} data.batch_size=8 parallel=tensor2", 2, 116_128, 23.75),
    (f"{SWIGLU} data.batch_size=16 parallel=fsdp", 2, 119_177, 32.76),
    (f"{SWIGLU} data.batch_size=16 parallel=zero1", 2, 122_039, 35.38),
    (f"{SWIGLU} data.batch_size=16 parallel=fsdp parallel.zero=2", 2, 122_164, 35.38),
    # layers twice as wide
    (f"{WIDE} parallel=data", 1, 46_205, 44.71),
    (f"{WIDE} parallel=tensor2", 2, 86_266, 23.71),
    (f"{WIDE} parallel=tensor4", 4, 158_735, 12.08),
    # Llama 3.1 8B: eight of its layers, and all
    (f"{LAYERS8} parallel=data", 1, 37_795, 57.35),
    (f"{LAYERS8} parallel=tensor2", 2, 71_926, 30.0),
    (f"{LAYERS8} parallel=tensor4", 4, 128_488, 15.23),
    (f"{LAYERS8} parallel=tensor4 parallel.overlap=off {OFF}", 4, 121_302, 16.84),
    (f"{LLAMA} data.batch_size=4 parallel=fsdp", 4, 39_553, 60.82),
    (f"{LLAMA} data.batch_size=4 parallel=fsdp {FP8}", 4, 51_146, 60.29),
    (f"{LLAMA} data.batch_size=4 parallel=fsdp trainer.recompute=selective", 4, 38_255, 51.16),
    (f"{LLAMA} data.batch_size=4 parallel=fsdp trainer.recompute=full", 4, 33_015, 36.94),
    (f"{LIGHT}", 2, 21_077, 102.71),
    (f"{LIGHT} {FP8}", 2, 28_664, 116.22),
    (f"{LIGHT} {FP8} precision.fast_backward=true", 2, 29_153, 116.15),
    (f"{LLAMA} data.batch_size=2 data.micro_batch_size=2 parallel=tensor4", 4, 37_731, 47.26),
    (f"{LLAMA} data.batch_size=2 data.micro_batch_size=2 parallel=tensor4 {FP8} {OFF}", 4, 44_595,
     48.06),
    (f"{LLAMA} data.batch_size=2 parallel=fsdp parallel.tensor=2", 4, 35_413, 46.86),
    (f"{LLAMA} data.batch_size=8 parallel=data parallel.pipeline=2 parallel.tensor=2", 4, 35_341,
     63.51),
    # GPT-2
    (f"{SMALL} data.batch_size=64 parallel=data", 2, 1_126_312, 11.56),
    (f"{SMALL} data.batch_size=64 parallel=data trainer.cuda_graph=off", 2, 1_076_354, 12.1),
    # earlier that day: weight gradients came out of their products in bf16, the embedding of tensor
    # ranks had no kernel of its own
    (f"{MEDIUM} data.batch_size=16 parallel=tensor2", 2, 294_264, 9.42),
    (f"{SMALL} data.batch_size=32 parallel=tensor2", 2, 815_950, 6.31),
    # the day after
    (f"{LONG} data.sequence_length=262144", 4, 6_192, 37.56),
    ("experiment=gpt_1.3b data.sequence_length=1024 data.batch_size=16 data.micro_batch_size=4 "
     "parallel=data", 4, 185_668, 30.02),
    ("experiment=gpt_1.3b data.sequence_length=1024 data.batch_size=16 data.micro_batch_size=2 "
     "parallel=data parallel.pipeline=2 parallel.tensor=2", 4, 31_428, 9.51),
]  # fmt: skip

LESS = "trainer.recompute=light"
MOMENTS = f"{LESS} optimizer=adamw_bf16"
FAST = f"{FP8} precision.fast_backward=true"
# of one H100: case, tokens/s, peak GB
ON_H100: list[tuple[str, int, float]] = [
    (f"{SMALL} data.batch_size=32", 569_383, 11.06),
    (f"{SMALL} data.batch_size=32 {LESS}", 554_097, 8.51),
    (f"{SMALL} data.batch_size=32 {MOMENTS}", 550_056, 8.02),
    (f"{MEDIUM} data.batch_size=16", 203_447, 16.92),
    (f"{MEDIUM} data.batch_size=16 {LESS}", 198_158, 13.1),
    (f"{MEDIUM} data.batch_size=16 {MOMENTS}", 199_296, 11.68),
    (f"{MEDIUM} data.batch_size=16 {FAST}", 229_159, 16.49),
    (f"{GPT} data.batch_size=8", 63_770, 41.86),
    (f"{GPT} data.batch_size=8 {LESS}", 62_009, 33.06),
    (f"{GPT} data.batch_size=8 {MOMENTS}", 62_583, 27.81),
    (f"{GPT} data.batch_size=8 {FAST}", 82_524, 41.06),
    (f"{LAYERS8} parallel=data {FAST}", 48_684, 57.08),
]


def config_of(case: str, gpus: int = 1) -> Config:
    return load([*case.split(), "data=random", "trainer.steps=1"], gpus)
