"""What DeepSpeed is given: its own keys as `engine.deepspeed` sets them, and those that follow from
the rest of the configuration. No DeepSpeed is needed to read this."""

from typing import Any

from flashtrain.config import Compute, Config, ConfigError
from flashtrain.layout import data_ranks

# what flashtrain derives: set these instead, so that both cannot disagree
OWNED = {
    "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "data.micro_batch_size",
    "gradient_accumulation_steps": "data.batch_size and data.micro_batch_size",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "bf16": "precision.compute",
    "bfloat16": "precision.compute",
    "fp16": "precision.compute",
    "tensor_parallel": "parallel.tensor",
    "zero_optimization.stage": "parallel.zero",
}

# what of DeepSpeed's own may be set; it overlooks a section that it does not know
SECTIONS = (
    *("zero_optimization", "data_types", "communication_data_type", "prescale_gradients"),
    *("gradient_predivide_factor", "aio", "comms_logger", "flops_profiler"),
    *("wall_clock_breakdown", "memory_breakdown", "steps_per_print", "dump_state"),
)


def zero_config(config: Config) -> dict[str, Any]:
    """The configuration of `deepspeed.initialize`; `config` is resolved.

    Raises ConfigError for a key that is ours, an unknown section, and types it cannot hold.
    """
    own, stage = config.engine.deepspeed, config.parallel.zero
    zero = own.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(
            f"engine.deepspeed.zero_optimization={zero} must be a mapping of DeepSpeed's ZeRO keys"
        )
    for key, ours in OWNED.items():
        if key in own or (key == "zero_optimization.stage" and "stage" in zero):
            raise ConfigError(f"engine.deepspeed.{key} follows from {ours}: set that instead")
    for key in own:
        if key not in SECTIONS:
            raise ConfigError(f"engine.deepspeed.{key}: choose from {', '.join(SECTIONS)}")
    bf16 = config.precision.compute is Compute.bf16
    if bf16 and stage == 1 and "data_types" in own:
        raise ConfigError(
            f"engine.deepspeed.data_types={own['data_types']} with parallel.zero=1 and "
            "precision=bf16, for which DeepSpeed has another optimizer, one not saved here: use "
            "parallel.zero=2"
        )
    micro_batch = config.data.micro_batch_size
    assert micro_batch is not None
    return {
        **({"data_types": {"grad_accum_dtype": "fp32"}} if stage > 1 else {}),
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,  # torch's AdamW, as in every engine
        "zero_force_ds_cpu_optimizer": False,  # also where its state is offloaded
        **own,
        "train_batch_size": config.data.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.data.batch_size
        // (micro_batch * data_ranks(config.parallel)),
        "gradient_clipping": config.optimizer.clip_norm or 0.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            # small parameters would otherwise stay gathered, out of step with a loaded checkpoint
            "stage3_param_persistence_threshold": 0,
            **zero,
            "stage": stage,
        },
    }
