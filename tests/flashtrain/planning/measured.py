"""What was measured on H200s (README.md, "Measured"): cases of scripts/bench_train.py."""

from flashtrain.compose import load
from flashtrain.config import Config

# case, GPUs, tokens/s of all of them, peak GB
ONE_GPU = [
    ("experiment=gpt2_124m data.sequence_length=1024 data.batch_size=32 "
     "data.micro_batch_size=32", 1, 593_217, 11.06),
    ("experiment=gpt2_350m data.sequence_length=1024 data.batch_size=16 "
     "data.micro_batch_size=16", 1, 212_481, 16.92),
    ("experiment=gpt_1.3b data.sequence_length=2048 data.batch_size=8 "
     "data.micro_batch_size=8", 1, 65_369, 41.9),
]  # fmt: skip
# before the loss was fused, transfers were hidden and attention ran on hopper
TWO_GPUS = [
    ("experiment=gpt_1.3b data.sequence_length=2048 data.batch_size=8 data.micro_batch_size=8 "
     "parallel=tensor2 parallel.overlap=off attention=triton loss.fused=false", 2, 93_782, 26.4),
    ("experiment=gpt_1.3b data.sequence_length=2048 data.batch_size=16 data.micro_batch_size=8 "
     "parallel=data attention=triton loss.fused=false", 2, 111_167, 60.0),
]  # fmt: skip
# Four H200 of one host, while norms were kept for backward (scripts/scaling/README.md). rates.py is
# fitted to gpt_1.3b on tensor 4 without overlap, and on tensor 2 with it and without graphs. Left
# out are gpt_1.3b on fsdp x tensor 2, which the time model misses by +36 %, fp8 on several GPUs, by
# +13 to +30 %, and small widths with overlap and without graphs, which the host is faster at now.
WIDE = (
    "experiment=gpt_1.3b model.norm=rmsnorm model.mlp=swiglu model.d_ff=11008 "
    "model.tied_head=false model.n_layers=8 model.d_model=4096 model.n_heads=32 "
    "data.sequence_length=8192 data.batch_size=2 data.micro_batch_size=2"
)
GPT = "experiment=gpt_1.3b data.sequence_length=2048 data.micro_batch_size=8"
SWIGLU = "model.norm=rmsnorm model.mlp=swiglu model.d_ff=5632 model.tied_head=false"
LLAMA = "experiment=llama_8b data.sequence_length=8192"
FOUR_GPUS = [
    (f"{WIDE} parallel=tensor2 parallel.overlap=on", 2, 81_965, 23.64),
    (f"{WIDE} parallel=tensor4 parallel.overlap=on", 4, 140_033, 12.01),
    (f"{GPT} data.batch_size=8 parallel=tensor2 parallel.overlap=off", 2, 103_392, 24.27),
    (f"{GPT} data.batch_size=8 parallel=tensor4 parallel.overlap=off", 4, 109_289, 13.85),
    (f"{GPT} data.batch_size=32 parallel=fsdp", 4, 239_312, 30.83),
    (f"{GPT} data.batch_size=64 parallel=data parallel.pipeline=2 parallel.tensor=2 "
     "parallel.overlap=on", 4, 157_428, 21.67),
    (f"{LLAMA} data.batch_size=4 data.micro_batch_size=1 parallel=fsdp", 4, 37_140, 65.05),
    (f"{LLAMA} data.batch_size=4 data.micro_batch_size=1 parallel=fsdp "
     "trainer.recompute=selective", 4, 36_025, 51.09),
    (f"{LLAMA} data.batch_size=2 data.micro_batch_size=2 parallel=tensor4", 4, 35_109, 47.19),
    (f"{LLAMA} data.batch_size=2 data.micro_batch_size=1 parallel=fsdp parallel.tensor=2", 4,
     34_190, 44.65),
    (f"{LLAMA} data.batch_size=8 data.micro_batch_size=1 parallel=data parallel.pipeline=2 "
     "parallel.tensor=2", 4, 34_680, 61.11),
]  # fmt: skip
# two H200, norm, product and stream one operation, steps of tensor ranks CUDA graphs
SMALL = "data.sequence_length=1024 parallel=tensor2"
LATEST = [
    (f"{GPT} {SWIGLU} data.batch_size=16 parallel=fsdp", 2, 115_965, 32.83),
    (f"{GPT} data.batch_size=8 parallel=tensor2", 2, 116_854, 22.73),
    (f"{GPT} data.batch_size=8 parallel=tensor2 parallel.overlap=on trainer.cuda_graph=off", 2,
     93_498, 22.73),
    (f"{GPT} {SWIGLU} data.batch_size=8 parallel=tensor2", 2, 111_123, 23.71),
    (f"{WIDE} parallel=tensor2", 2, 85_038, 23.71),
    (f"experiment=gpt2_350m data.batch_size=16 data.micro_batch_size=16 {SMALL}", 2, 294_264,
     9.42),
    (f"experiment=gpt2_124m data.batch_size=32 data.micro_batch_size=32 {SMALL}", 2, 815_950,
     6.31),
]  # fmt: skip
LATEST += ONE_GPU
MEASURED = LATEST + FOUR_GPUS + TWO_GPUS


def config_of(case: str, gpus: int = 1) -> Config:
    return load([*case.split(), "data=random", "trainer.steps=1"], gpus)
