from __future__ import annotations

import os

import pytest

from tests.train.conftest import on_ranks
from vlbench.core.errors import RunError, UserError
from vlbench.train.distributed import barrier, ranks, session


def test_one_gpu_for_all_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    refused = pytest.raises(UserError, match="--device cuda:1: every process of torchrun would take the same GPU")
    with refused, session("cuda:1"):
        pass


def test_the_death_of_another_process_is_told_in_a_line() -> None:
    def wait_for_the_dead() -> None:
        with session("cpu"):
            if ranks().rank == 1:
                os._exit(0)
            barrier()

    def rank() -> None:
        with pytest.raises(RunError, match="process 0: the connection to another process broke") as error:
            wait_for_the_dead()
        assert "\n" not in str(error.value)

    on_ranks(rank)


def test_other_errors_of_a_session_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), session("cpu"):
        raise RuntimeError("shapes differ")
    for error in (UserError("connect"), RunError("gloo connect")):
        with pytest.raises(type(error)), session("cpu"):
            raise error
