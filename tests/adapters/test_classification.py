from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import recall_score, roc_auc_score

from tests.adapters.fakes import FakeSource, labelled
from vlbench.adapters.common.classification import (
    classification_outcomes,
    decide,
    labels_of,
    levels,
    majority_guess,
    prediction_rows,
    same_classes,
    unit,
)
from vlbench.adapters.encoder import ImageFeatures
from vlbench.core.errors import UserError
from vlbench.core.types import Rows
from vlbench.stats.intervals import estimate, mean_of
from vlbench.stats.paired import compare_outcomes
from vlbench.store.examples import rows_from_parquet, rows_to_parquet


def _names(n: int) -> list[str]:
    return [f"class {i}" for i in range(n)]


def test_decide_agrees_with_sorting_where_nothing_ties() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.standard_normal((200, 12)), rng.integers(0, 12, 200)
    pred, rank = decide(scores, labels, ids=[str(i) for i in range(200)], classes=_names(12))
    order = np.argsort(-scores, axis=1)
    assert (pred == order[:, 0]).all()
    assert (rank == 1 + (order == labels[:, None]).argmax(axis=1)).all()


def test_decide_breaks_ties_evenly_and_whatever_the_order_of_classes() -> None:
    n, classes = 6000, _names(6)
    scores = np.tile([0.5, 0.5 + 1e-13, 0.1, 0.5, 0.1, 0.1], (n, 1))
    ids = [f"image {i}" for i in range(n)]
    labels = np.full(n, 1)
    pred, rank = decide(scores, labels, ids=ids, classes=classes)
    shares = np.bincount(pred, minlength=6) / n
    assert shares[[0, 1, 3]] == pytest.approx(1 / 3, abs=0.03)
    assert shares[[2, 4, 5]].sum() == 0
    assert np.array_equal(pred == labels, rank == 1)
    assert set(rank.tolist()) == {1, 2, 3}

    order = np.array([4, 2, 0, 5, 1, 3])
    moved, moved_rank = decide(
        scores[:, order], np.full(n, order.tolist().index(1)), ids=ids, classes=[classes[i] for i in order]
    )
    assert (order[moved] == pred).all()
    assert (moved_rank == rank).all()


def test_decide_of_an_example_does_not_depend_on_the_others() -> None:
    scores, labels, ids = np.ones((50, 4)), np.arange(50) % 4, [str(i) for i in range(50)]
    pred, _ = decide(scores, labels, ids=ids, classes=_names(4))
    alone, _ = decide(scores[7:8], labels[7:8], ids=ids[7:8], classes=_names(4))
    assert alone[0] == pred[7]


def test_outcomes_equal_sklearn_on_uneven_classes() -> None:
    rng = np.random.default_rng(1)
    labels = rng.choice(4, 300, p=[0.6, 0.2, 0.15, 0.05])
    pred = np.where(rng.random(300) < 0.6, labels, rng.integers(0, 4, 300))
    rank = np.where(pred == labels, 1, 2)
    rows = Rows(
        {"id": [str(i) for i in range(300)], "image": [f"{i:04d}" for i in range(300)], "label": labels, "rank": rank},
        {"classes": _names(4)},
    )
    found = {name: estimate(values) for name, values in classification_outcomes(rows, top5=True).items()}
    assert set(found) == {"acc1", "mean_per_class_recall"}, "a top five of four classes is always right"
    assert found["acc1"].value == pytest.approx((pred == labels).mean())
    assert found["acc1"].method == "wilson"
    assert found["mean_per_class_recall"].value == pytest.approx(recall_score(labels, pred, average="macro"))


def test_mean_per_class_recall_has_the_error_of_a_macro_recall() -> None:
    # Ten classes of 100 with recalls from 0.2 to 1: what separates the classes is no sampling error.
    recalls = np.array([20, 30, 40, 50, 60, 70, 80, 90, 95, 100])
    labels = np.repeat(np.arange(10), 100)
    rank = np.where(np.tile(np.arange(100), 10) < recalls[labels], 1, 2)
    ids = [f"{i:04d}" for i in range(1000)]
    rows = Rows({"id": ids, "image": ids, "label": labels, "rank": rank}, {"classes": _names(10)})
    outcomes = classification_outcomes(rows, top5=False)["mean_per_class_recall"]
    found, p = estimate(outcomes), recalls / 100
    assert found.value == pytest.approx(p.mean()) == pytest.approx(mean_of(outcomes))
    assert found.se == pytest.approx(np.sqrt((p * (1 - p) / 100).sum()) / 10, rel=0.06)


def test_copies_of_an_image_are_one_cluster() -> None:
    rows = Rows(
        {"id": ["a", "b", "c"], "image": ["x", "x", "y"], "label": np.array([0, 0, 1]), "rank": np.array([1, 1, 2])},
        {"classes": _names(2)},
    )
    found = estimate(classification_outcomes(rows, top5=True)["acc1"])
    assert (found.n, found.n_clusters) == (3, 2)


def test_labels_of_refuses_missing_labels() -> None:
    source = FakeSource([b"a", b"b"], split="test", labels=[0, -1], classes=["x", "y"])
    with pytest.raises(UserError, match="1 examples have no label, first 'test/1'"):
        labels_of(source)
    with pytest.raises(UserError, match="no labels"):
        labels_of(FakeSource([b"a"], split="test"))


def test_same_classes_names_the_odd_one() -> None:
    with pytest.raises(UserError, match="'cow'"):
        same_classes([labelled("train", [0], ["ant", "bee"]), labelled("test", [0], ["ant", "cow", "bee"])])


def test_unit_and_majority() -> None:
    assert unit(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[0.6, 0.8], [0.0, 0.0]]
    assert majority_guess(np.array([1, 1, 0]), np.array([0, 0, 0, 1])) == 0.25


# ------------------------------------------------------------------------------------------------- two classes


def _two_classes(scores_NC: np.ndarray, labels_N: np.ndarray, *, block: int = 64) -> Rows:
    names = tuple(f"{i:04d}" for i in range(len(labels_N)))
    features = ImageFeatures(names, names, np.zeros((len(names), 1)), None)
    blocks = [scores_NC[start : start + block] for start in range(0, len(names), block)]
    meta = {"classes": _names(scores_NC.shape[1]), "chance": {"acc1": 0.5}}
    return prediction_rows(features, labels_N, blocks, meta=meta)


def test_two_classes_have_the_roc_auc_of_sklearn() -> None:
    rng = np.random.default_rng(5)
    labels = np.array([0, 1] * 100)
    scores = rng.standard_normal((200, 2)) + np.eye(2)[labels] + 30
    rows = rows_from_parquet(rows_to_parquet(_two_classes(scores, labels)))
    outcomes = classification_outcomes(rows, top5=True)
    assert list(outcomes) == ["acc1", "mean_per_class_recall", "roc_auc"]
    assert estimate(outcomes["roc_auc"]).value == pytest.approx(roc_auc_score(labels, scores[:, 1] - scores[:, 0]))
    assert rows.meta["chance"]["roc_auc"] == 0.5
    other = _two_classes(scores + rng.standard_normal((200, 2)), labels)
    test = compare_outcomes(outcomes["roc_auc"], classification_outcomes(other, top5=True)["roc_auc"])
    assert test.diff == pytest.approx(mean_of(outcomes["roc_auc"]) - mean_of(_auc(other)))
    assert test.p < 0.05


def _auc(rows: Rows):
    return classification_outcomes(rows, top5=True)["roc_auc"]


def test_order_of_classes_and_rounding_leave_the_roc_auc_alone() -> None:
    rng = np.random.default_rng(6)
    labels, scores = np.array([0, 1] * 50), rng.standard_normal((100, 2))
    swapped = _auc(_two_classes(scores[:, ::-1], 1 - labels))
    assert mean_of(_auc(_two_classes(scores, labels))) == pytest.approx(mean_of(swapped))
    noise = 1e-13 * rng.standard_normal((100, 2))
    assert mean_of(_auc(_two_classes(np.full((100, 2), 0.3) + noise, labels))) == 0.5


def test_roc_auc_is_left_out_where_there_is_none_and_that_is_said() -> None:
    rows = _two_classes(np.random.default_rng(0).random((9, 2)), np.array([0] * 8 + [1]))
    assert "roc_auc" not in classification_outcomes(rows, top5=True)
    assert "roc_auc" not in rows.meta["chance"]
    assert rows.meta["notes"] == ["roc_auc is left out: it needs two images of each class"]
    three = _two_classes(np.random.default_rng(0).random((9, 3)), np.array([0, 1, 2] * 3))
    assert "score" not in three.columns


def test_rows_stored_before_there_were_scores_keep_their_metrics() -> None:
    rows = _two_classes(np.random.default_rng(0).random((8, 2)), np.array([0, 1] * 4))
    old = Rows({name: rows[name] for name in rows if name != "score"}, rows.meta)
    assert list(classification_outcomes(old, top5=True)) == ["acc1", "mean_per_class_recall"]


def test_levels_tie_what_rounding_separates_and_nothing_else() -> None:
    assert len(set(levels(np.array([0.3, 0.3 + 1e-13, 0.1 + 0.2])).tolist())) == 1
    assert len(set(levels(np.array([0.3, 0.3 + 1e-8])).tolist())) == 2
    assert levels(np.array([1e6, 5.0])) == pytest.approx([1e6, 5.0])


def test_two_classes_of_one_name_are_never_both_right():
    scores_NC = np.tile([0.1, 0.9, 0.9], (400, 1))  # one text, hence one embedding: the tie that CLIP's names make
    labels_N = np.full(400, 2)
    ids = [str(number) for number in range(400)]
    pred_N, rank_N = decide(scores_NC, labels_N, ids=ids, classes=("cat", "missile", "missile"))
    assert ((pred_N == 2) == (rank_N == 1)).all()
    assert 0.4 < (rank_N == 1).mean() < 0.6
