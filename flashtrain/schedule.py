"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from flashtrain.config import ScheduleConfig, ScheduleKind


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Rate of 0-based optimizer step `step` of a run of `steps`.

    Linear warm-up to `peak`, then: `cosine` or `linear` down to `final_ratio * peak`; `constant`;
    or `wsd` (warm-up, stable, decay), flat until the last `decay_share` of the run and linear from
    there (Hagele et al. 2024, arXiv:2405.18392).
    """
    warmup = min(schedule.warmup_steps, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    floor = peak * schedule.final_ratio
    done = (step - warmup) / max(1, steps - warmup)  # 0 ... 1
    if schedule.kind is ScheduleKind.constant:
        return peak
    if schedule.kind is ScheduleKind.cosine:
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))
    if schedule.kind is ScheduleKind.wsd:
        begin = max(warmup, steps * (1 - schedule.decay_share))
        if step < begin or begin == steps:
            return peak
        done = (step - begin) / (steps - begin)
    return peak + (floor - peak) * done
