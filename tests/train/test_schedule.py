from __future__ import annotations

import math

import pytest

from vlbench.train.config import ScheduleConfig
from vlbench.train.schedule import learning_rate, warmup_steps


def rates(steps: int, **settings: object) -> list[float]:
    schedule = ScheduleConfig.model_validate(settings)
    return [learning_rate(step, steps=steps, peak=2.0, schedule=schedule) for step in range(steps)]


def test_learning_rate_warms_up_to_the_peak_and_falls_to_the_final_share() -> None:
    found = rates(110, warmup=10, final=0.1)
    assert found[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert found[10] == 2.0
    assert found[60] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert found[-1] == pytest.approx(0.2, abs=1e-3)
    assert found[10:] == sorted(found[10:], reverse=True)


def test_learning_rate_warm_up_starts_where_it_is_told() -> None:
    found = rates(32, warmup=5 / 32, start=1e-3)
    assert found[0] == pytest.approx(2.0 * (1e-3 + 0.999 / 5))
    assert found[4] == pytest.approx(2.0)


def test_warmup_is_a_share_below_one_and_steps_above_and_never_more_than_the_run() -> None:
    assert warmup_steps(300, ScheduleConfig(warmup=0.1)) == 30
    assert warmup_steps(300, ScheduleConfig(warmup=200)) == 200
    assert warmup_steps(60, ScheduleConfig(warmup=200)) == 60
    assert warmup_steps(60, ScheduleConfig(warmup=0)) == 0


def test_learning_rate_kinds() -> None:
    assert rates(4, kind="constant", warmup=0) == [2.0] * 4
    assert rates(4, kind="linear", warmup=0) == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert rates(6, kind="step", warmup=0) == pytest.approx([2.0, 2.0, 0.2, 0.2, 0.02, 0.02])
    # cos^2(pi/2 p), as some papers write it, is the same curve.
    assert rates(10, warmup=0) == pytest.approx([2.0 * math.cos(math.pi / 2 * p / 10) ** 2 for p in range(10)])


def test_milestones_are_shares_of_all_steps_warm_up_included() -> None:
    found = rates(90, kind="milestones", milestones=[60 / 90, 80 / 90], warmup=5, start=0.001)
    assert found[4:60] == pytest.approx([2.0] * 56)
    assert found[60:80] == pytest.approx([0.2] * 20)
    assert found[80:] == pytest.approx([0.02] * 10)
    assert found[0] == pytest.approx(2.0 * (0.001 + 0.999 / 5))
    assert rates(4, kind="milestones", milestones=[0.5], factor=0.5, warmup=0) == [2.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize("milestones", [[], [0.8, 0.6], [0.5, 0.5], [0.0], [1.0]])
def test_milestones_that_are_none_are_refused(milestones: list[float]) -> None:
    with pytest.raises(ValueError, match="milestones"):
        ScheduleConfig(kind="milestones", milestones=tuple(milestones))
