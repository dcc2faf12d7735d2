"""The learning rate of a step: a pure function, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from vlbench.train.run_config import ScheduleConfig


def learning_rate(step: int, *, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The rate of step ``step``, counted from 0, of a run of ``steps``.

    Linear warm-up reaches ``peak`` at its last step; what follows starts at ``peak`` and, for cosine and linear, would
    reach ``final * peak`` one step after the last. Milestones count from the first step, warm-up included, as in the
    schedules of detectors; a drop that falls into the warm-up is made there.
    """
    warmup = warmup_steps(steps, schedule)
    if schedule.kind == "milestones":
        peak *= schedule.factor ** sum(step >= round(mark * steps) for mark in schedule.milestones)
    if step < warmup:
        return peak * (schedule.start + (1 - schedule.start) * (step + 1) / warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule.kind == "cosine":
        return peak * (schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * progress)) / 2)
    if schedule.kind == "linear":
        return peak * (schedule.final + (1 - schedule.final) * (1 - progress))
    if schedule.kind == "step":
        return peak * schedule.factor ** int(progress * (schedule.drops + 1))
    return peak


def warmup_steps(steps: int, schedule: ScheduleConfig) -> int:
    """Warm-up in whole steps, at most the run."""
    return min(steps, round(schedule.warmup * steps if schedule.warmup < 1 else schedule.warmup))
