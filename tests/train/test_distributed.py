from __future__ import annotations

import pytest

from vlbench.core.errors import UserError
from vlbench.train.distributed import session


def test_one_gpu_for_all_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    refused = pytest.raises(UserError, match="--device cuda:1: every process of torchrun would take the same GPU")
    with refused, session("cuda:1"):
        pass
