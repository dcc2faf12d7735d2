from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.adapters.fakes import FakeData, FakeEncoder, labelled, noise_of
from tests.adapters.multilabel_fakes import multilabel_data, multilabel_oracle
from vlbench.adapters.knn import ADAPTER as KNN
from vlbench.adapters.zeroshot_multilabel import ADAPTER as MANY_LABELS
from vlbench.verbs.precision import bf16_difference, say_difference


def _found(adapter, data: FakeData, metric: str, before: FakeEncoder, after: FakeEncoder) -> dict:
    config = adapter.Config()
    rows = adapter.predict(before, data, config)
    result = SimpleNamespace(metric=metric, estimates=adapter.score(rows, config))
    job = SimpleNamespace(adapter=adapter, config=config)
    return bf16_difference(result, rows, job, adapter.predict(after, data, config))


def test_a_ranking_has_a_difference_and_no_share_of_changed_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    """One image that moves in the ranking moves the pseudo-value of every image: nothing is to be counted there."""
    data = multilabel_data()
    found = _found(MANY_LABELS, data, "map11", multilabel_oracle(noise=0.5), multilabel_oracle(noise=0.6))
    assert found.keys() == {"metric", "difference"}
    assert found["difference"] < 0
    say_difference(SimpleNamespace(settings={"bf16_difference": found}))
    assert capsys.readouterr().out == f"  bf16: map11 {100 * found['difference']:+.2f} points\n"


def test_classes_that_change_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    data = FakeData({name: labelled(name, [0, 1] * 20, ("a", "b")) for name in ("train", "test")})
    before, after = (FakeEncoder(lambda image, salt=salt: noise_of(image, 8, salt)) for salt in ("x", "y"))
    found = _found(KNN, data, "acc1", before, after)
    assert 0.1 < found["predictions_changed"] < 0.9
    say_difference(SimpleNamespace(settings={"bf16_difference": found}))
    assert "% of predictions changed" in capsys.readouterr().out
