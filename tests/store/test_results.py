from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from vlbench.core.errors import UserError
from vlbench.core.types import Result, Rows
from vlbench.stats.intervals import wilson
from vlbench.store.results import NO_EXAMPLES, ResultStore, result_in, result_schema, rows_beside

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "results" / "schema" / "result.v1.json"


def make_result(model: str = "clip-tiny-s0", task: str = "linear/cifar10", *, k: int = 6, n: int = 10) -> Result:
    lo, hi = wilson(k, n)
    estimate = {"value": k / n, "lo": lo, "hi": hi, "se": 0.1, "n": n, "n_clusters": n, "method": "wilson"}
    return Result.model_validate(
        {
            "model": {"name": model, "spec": f"runs/{model}/ckpt.pt", "weights_hash": "w", "backbone_fingerprint": "b"},
            "task": task,
            "task_version": 1,
            "task_fingerprint": "t",
            "adapter": "linear",
            "config": {"C": [0.1, 1.0], "nested": {"a": (1, 2)}},
            "metric": "acc1",
            "chance": 0.1,
            "estimates": {"acc1": estimate},
            "data": {"spec": "hf:cifar10", "split": "test", "n": n, "fingerprint": "d"},
            "examples": NO_EXAMPLES,
            "settings": {"precision": "fp32", "batch_size": 128},
            "versions": {"torch": "2.11"},
            "seconds": {"features": 1.5},
            "created": "2026-01-01T00:00:00Z",
        }
    )


def make_rows(k: int = 6, n: int = 10) -> Rows:
    return Rows({"id": [f"img{i}" for i in range(n)], "correct": np.arange(n) < k}, {"C": 1.0})


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path / "results")


def save(store: ResultStore, **changes: object) -> Result:
    return store.save(make_result(**changes), make_rows())  # type: ignore[arg-type]


def test_save_and_load_round_trip(store: ResultStore) -> None:
    saved = save(store)
    assert (saved.examples.file, saved.examples.rows) == ("cifar10@v1.parquet", 10)
    path = store.root / "clip-tiny-s0" / "linear" / "cifar10@v1.json"
    assert path.is_file()
    loaded = store.load("clip-tiny-s0", "linear/cifar10")
    assert loaded.model_dump(mode="json") == saved.model_dump(mode="json")
    rows = store.rows(loaded)
    assert rows["id"] == make_rows()["id"]
    assert np.array_equal(rows["correct"], make_rows()["correct"])
    assert rows.meta == {"C": 1.0}


def test_saving_again_is_byte_identical_and_replaces(store: ResultStore) -> None:
    save(store)
    before = {path: path.read_bytes() for path in store.root.rglob("*@v*")}
    save(store)
    assert {path: path.read_bytes() for path in store.root.rglob("*@v*")} == before
    store.save(make_result(k=7), make_rows(k=7))
    assert store.load("clip-tiny-s0", "linear/cifar10").estimates["acc1"].value == 0.7
    assert store.rows(store.load("clip-tiny-s0", "linear/cifar10"))["correct"].sum() == 7


def test_names_become_safe_paths(store: ResultStore) -> None:
    save(store, model="timm:../../etc/x.a1_in1k", task="linear/../../up")
    (path,) = store.root.rglob("*.json")
    assert path.is_relative_to(store.root)
    assert ".." not in path.relative_to(store.root).parts
    assert store.load("timm:../../etc/x.a1_in1k", "linear/../../up").task == "linear/../../up"


def test_a_result_is_read_where_it_lies_alone(store: ResultStore, tmp_path: Path) -> None:
    saved = store.save(make_result(), make_rows())
    place = store.path(saved.model.name, saved.task, saved.task_version)
    alone = tmp_path / "sent.json"
    alone.write_bytes(place.read_bytes())
    assert result_in(alone) == store.load(saved.model.name, saved.task)
    with pytest.raises(UserError, match=r"missing: .* ask for them again"):
        rows_beside(alone, saved)
    (tmp_path / saved.examples.file).write_bytes(place.with_name(saved.examples.file).read_bytes())
    assert list(rows_beside(alone, saved)) == list(make_rows())
    # A name with folders in it must not lead elsewhere.
    elsewhere = saved.examples.model_copy(update={"file": f"../{tmp_path.name}/{saved.examples.file}"})
    assert len(rows_beside(alone, saved.model_copy(update={"examples": elsewhere}))) == len(make_rows())
    with pytest.raises(UserError, match=r"gone\.json: not a stored result .* ask for it again"):
        result_in(tmp_path / "gone.json")


def test_two_models_of_one_file_name_are_refused(store: ResultStore) -> None:
    save(store, model="timm:x")
    with pytest.raises(UserError, match=r"already holds timm:x on linear/cifar10.*--name"):
        save(store, model="timm/x")
    assert store.load("timm:x", "linear/cifar10").model.name == "timm:x"


def test_load_takes_the_newest_version(store: ResultStore) -> None:
    for version in (1, 2, 10):
        store.save(make_result().model_copy(update={"task_version": version}), make_rows())
    assert store.load("clip-tiny-s0", "linear/cifar10").task_version == 10
    assert store.load("clip-tiny-s0", "linear/cifar10", 2).task_version == 2


def test_load_proposes_the_nearest_name(store: ResultStore) -> None:
    save(store)
    with pytest.raises(UserError, match="did you mean 'clip-tiny-s0'"):
        store.load("clip-tiny-s9", "linear/cifar10")
    with pytest.raises(UserError, match="did you mean 'linear/cifar10'"):
        store.load("clip-tiny-s0", "linear/cifar100")
    with pytest.raises(UserError, match="no result on"):
        store.load("clip-tiny-s0", "linear/cifar10", 3)


def test_all_is_sorted_and_find_filters(store: ResultStore) -> None:
    for model in ("b", "a"):
        for task in ("zeroshot/x", "linear/x"):
            save(store, model=model, task=task)
    found = [(result.model.name, result.task) for result in store.all()]
    assert found == [("a", "linear/x"), ("a", "zeroshot/x"), ("b", "linear/x"), ("b", "zeroshot/x")]
    assert len(store.find(model="a")) == 2
    assert len(store.find(task="linear/x", backbone_fingerprint="b")) == 2
    assert store.find(model="a", task_fingerprint="other") == []


def test_all_of_a_folder_that_is_not_there_is_empty(store: ResultStore) -> None:
    assert store.all() == []
    assert not store.root.exists()


@pytest.mark.parametrize("field", ["config", "chosen", "settings"])
def test_nan_is_refused_and_nothing_is_written(store: ResultStore, field: str) -> None:
    result = make_result().model_copy(update={field: {"deep": {"list": [1.0, float("nan")]}}})
    with pytest.raises(UserError, match=rf"{field}\.deep\.list is nan"):
        store.save(result, make_rows())
    assert not list(store.root.rglob("*@v*"))


# ------------------------------------------------------------------------------------------------------- damage


def damage_json(text: str) -> str:
    return text[: len(text) // 2]


def unknown_key(text: str) -> str:
    return text.replace('"metric":', '"metrik":')


def nan_value(text: str) -> str:
    return text.replace('"se": 0.1', '"se": NaN')


def newer(text: str) -> str:
    return text.replace('"schema_version": 1', '"schema_version": 2')


def elsewhere(text: str) -> str:
    return text.replace('"name": "clip-tiny-s0"', '"name": "another"')


@pytest.mark.parametrize(
    "change, words",
    [
        (damage_json, "not a stored result"),
        (lambda text: "[]", "no JSON object"),
        (lambda text: "", "not a stored result"),
        (unknown_key, "did you mean 'metric'"),
        (nan_value, "NaN is not JSON"),
        (newer, "schema version 2 is newer"),
        (elsewhere, "holds another on linear/cifar10"),
    ],
)
def test_a_damaged_result_is_one_line_naming_the_file(store: ResultStore, change, words: str) -> None:
    save(store)
    save(store, model="sound")
    path = store.path("clip-tiny-s0", "linear/cifar10", 1)
    path.write_text(change(path.read_text()))
    scan = store.scan()
    assert [result.model.name for result in scan.results] == ["sound"]
    (problem,) = scan.problems
    assert problem.startswith(str(path))
    assert words in problem
    assert "\n" not in problem
    with pytest.raises(UserError, match=r"cifar10@v1\.json"):
        store.all()
    with pytest.raises(UserError):
        store.load("clip-tiny-s0", "linear/cifar10")


def test_a_damaged_result_names_the_command_and_is_replaced_by_it(store: ResultStore) -> None:
    save(store)
    path = store.path("clip-tiny-s0", "linear/cifar10", 1)
    path.write_text("{")
    assert (
        f"vlbench eval --model clip-tiny-s0 --tasks linear/cifar10 --results {store.root}" in store.scan().problems[0]
    )
    save(store)
    assert not store.scan().problems


def test_missing_rows_are_said(store: ResultStore) -> None:
    result = save(store)
    (parquet,) = store.root.rglob("*.parquet")
    parquet.unlink()
    with pytest.raises(
        UserError, match=r"cifar10@v1\.parquet: missing.*vlbench eval --model runs/clip-tiny-s0/ckpt.pt"
    ):
        store.rows(result)


@pytest.mark.parametrize("cut", [True, False])
def test_changed_rows_are_said(store: ResultStore, cut: bool) -> None:
    result = save(store)
    (parquet,) = store.root.rglob("*.parquet")
    data = parquet.read_bytes()
    parquet.write_bytes(data[:-5] if cut else data[:40] + bytes([data[40] ^ 1]) + data[41:])
    with pytest.raises(UserError, match=r"cifar10@v1\.parquet.*checksum"):
        store.rows(result)


def test_a_result_cannot_point_at_another_file(store: ResultStore) -> None:
    result = save(store)
    moved = result.model_copy(update={"examples": result.examples.model_copy(update={"file": "../../secret"})})
    with pytest.raises(UserError, match="secret"):
        store.rows(moved)


# ------------------------------------------------------------------------------------------ writers and their kills

WRITER = """
import sys
sys.path.insert(0, {root!r})
from tests.store.test_results import make_result, make_rows
from vlbench.store.results import ResultStore
store = ResultStore(sys.argv[1])
store.save(make_result(f"own{{sys.argv[3]}}", "linear/first"), make_rows())
print("ready", flush=True)
for turn in range(int(sys.argv[2])):
    k = (turn + int(sys.argv[3])) % 11
    store.save(make_result("shared", "linear/x", k=k), make_rows(k=k))
    store.save(make_result(f"own{{sys.argv[3]}}", f"linear/t{{turn}}", k=k), make_rows(k=k))
"""


def start_writer(store: ResultStore, turns: int, number: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", WRITER.format(root=str(ROOT)), str(store.root), str(turns), str(number)]
    return subprocess.Popen(words, stdout=subprocess.PIPE)


def test_two_writers_never_mix_a_result_with_foreign_rows(store: ResultStore) -> None:
    writers = [start_writer(store, 40, number) for number in (1, 5)]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    results = store.all()
    assert len(results) == 83
    for result in results:
        assert store.rows(result)["correct"].sum() == round(10 * result.estimates["acc1"].value)


def test_a_killed_writer_leaves_no_half_result(store: ResultStore) -> None:
    for turn, delay in enumerate((0.05, 0.2, 0.35)):
        writer = start_writer(store, 10_000, turn)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait(60)
        for result in store.all():
            assert store.rows(result)["correct"].sum() == round(10 * result.estimates["acc1"].value)
    assert store.all()


def test_leftovers_of_a_killed_writer_are_ignored(store: ResultStore) -> None:
    save(store)
    folder = store.root / "clip-tiny-s0" / "linear"
    (folder / ".cifar10@v1.json.abc.tmp").write_text("{")
    (folder / ".cifar10@v1.json").write_text("{")
    (folder / "orphan@v1.parquet").write_bytes(b"")
    assert len(store.all()) == 1


# ------------------------------------------------------------------------------------------------------- schema


def test_published_schema_is_up_to_date() -> None:
    published = json.loads(SCHEMA.read_text())
    assert published == result_schema(), (
        "write it again: python -c 'import json; from vlbench.store.results import result_schema; "
        "print(json.dumps(result_schema(), indent=2))' > results/schema/result.v1.json"
    )


def test_stored_result_validates_against_the_published_schema(store: ResultStore) -> None:
    save(store)
    stored = json.loads(store.path("clip-tiny-s0", "linear/cifar10", 1).read_text())
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(stored, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**stored, "unheard_of": 1}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**stored, "schema_version": 2}, schema)


def test_every_result_in_the_repository_is_sound() -> None:
    store = ResultStore(ROOT / "results")
    for result in store.all():
        store.rows(result)


def test_the_command_that_makes_a_result_again_is_whole(store: ResultStore) -> None:
    model = {"spec": "timm:resnet18 --weights my file.pt", "name": "my net"}
    result = make_result(task="linear/my-folder")
    result = result.model_copy(
        update={
            "model": result.model.model_copy(update=model),
            "data": result.data.model_copy(update={"spec": "imagefolder:my folder"}),
        }
    )
    result = store.save(result, make_rows())
    next(iter(store.root.rglob("*.parquet"))).unlink()
    with pytest.raises(UserError) as caught:
        store.rows(result)
    assert str(caught.value).endswith(
        "make it again: vlbench eval --model timm:resnet18 --weights 'my file.pt' --tasks linear "
        f"--data 'imagefolder:my folder' --name 'my net' --results {store.root} --force"
    )
