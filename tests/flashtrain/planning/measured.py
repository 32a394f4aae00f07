"""What was measured on H200s (README.md, "Measured"): cases of scripts/bench_train.py."""

from flashtrain.compose import load
from flashtrain.config import Config

# case, GPUs, tokens/s of all of them, peak GB
ONE_GPU = [
    ("experiment=gpt2_124m data.sequence_length=1024 data.batch_size=32 "
     "data.micro_batch_size=32", 1, 540_679, 12.27),
    ("experiment=gpt2_350m data.sequence_length=1024 data.batch_size=16 "
     "data.micro_batch_size=16", 1, 190_236, 18.53),
    ("experiment=gpt_1.3b data.sequence_length=2048 data.batch_size=8 "
     "data.micro_batch_size=8", 1, 65_413, 45.12),
]  # fmt: skip
# before the loss was fused, transfers were hidden and attention ran on hopper
TWO_GPUS = [
    ("experiment=gpt_1.3b data.sequence_length=2048 data.batch_size=8 data.micro_batch_size=8 "
     "parallel=tensor2 parallel.overlap=off attention=triton loss.fused=false", 2, 93_782, 26.4),
    ("experiment=gpt_1.3b data.sequence_length=2048 data.batch_size=16 data.micro_batch_size=8 "
     "parallel=data attention=triton loss.fused=false", 2, 111_167, 60.0),
]  # fmt: skip
MEASURED = ONE_GPU + TWO_GPUS


def config_of(case: str, gpus: int = 1) -> Config:
    return load([*case.split(), "data=random", "trainer.steps=1"], gpus)
