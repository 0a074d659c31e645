"""Learning rates as a function of the step (0-based), set before the step."""

from __future__ import annotations

import math

from segvit.engine.settings import Schedule


def learning_rate(schedule: Schedule, step: int, *, base: float, steps: int) -> float:
    """The rate at `step` of a parameter group whose initial rate is `base`, in a run of `steps`."""
    progress = step / steps
    if schedule.kind == "poly":
        rate = (base - schedule.min_lr) * (1 - progress) ** schedule.power + schedule.min_lr
    elif schedule.kind == "cosine":
        rate = schedule.min_lr + (base - schedule.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    else:
        rate = base
    if step < schedule.warmup:
        rate *= 1 - (1 - step / schedule.warmup) * (1 - schedule.warmup_ratio)
    return rate
