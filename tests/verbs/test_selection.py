from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.making import png, write_files, write_tar
from vlbench.core.cards import dataset_cards, suites, task_cards
from vlbench.core.catalog import ADAPTERS
from vlbench.core.config import parse
from vlbench.core.errors import UserError
from vlbench.verbs.selection import find_data, is_meant, own_card, select, with_settings


def _names(selection) -> list[str]:
    return [choice.card.name for choice in selection.choices]


def _clothing(root: Path) -> Path:
    for split in ("train", "val", "test"):
        folder = root / "clothing" / split / "hat"
        folder.mkdir(parents=True)
        (folder / "1.jpg").write_bytes(b"x")
    return root


def test_full_names_kinds_and_suites(tmp_path: Path) -> None:
    found = select("zeroshot/shapes, linear", data=(), root=tmp_path)
    assert _names(found) == ["zeroshot/shapes", "linear/shapes", "linear/shapes_multilabel"]
    assert [choice.named for choice in found.choices] == [True, False, False]
    assert {"linear/cifar10", "linear/clothing", "linear/imagenet1k"} <= {skip.task for skip in found.skipped}
    assert all("to get it:" in skip.reason and str(tmp_path) in skip.reason for skip in found.skipped)
    assert _names(select("smoke", data=(), root=tmp_path)) == list(suites()["smoke"])


def test_the_readme_line_needs_no_data(tmp_path: Path) -> None:
    found = select("zeroshot,linear,retrieval", data=(), root=tmp_path)
    zeroshot = ["zeroshot/shapes", "zeroshot/shapes_heldout", "zeroshot/shapes_multilabel"]
    retrieval = [f"retrieval/shapes{language}" for language in ("", "_cs", "_de", "_fr")]
    assert _names(found) == [*zeroshot, "linear/shapes", "linear/shapes_multilabel", *retrieval]


def test_each_task_runs_once_and_a_full_name_stays_a_demand(tmp_path: Path) -> None:
    found = select("linear,linear/shapes,smoke", data=(), root=tmp_path)
    assert sorted(_names(found)) == sorted(set(_names(found)))
    assert next(choice for choice in found.choices if choice.card.name == "linear/shapes").named


def test_data_that_are_there_are_chosen_with_their_place(tmp_path: Path) -> None:
    found = select("linear", data=(), root=_clothing(tmp_path))
    spec = next(choice.spec for choice in found.choices if choice.card.name == "linear/clothing")
    assert spec == f"imagefolder:{tmp_path}/clothing"


def test_texts_without_their_images_are_no_task_s_data(tmp_path: Path) -> None:
    texts = {"test_2016_flickr.txt": "1.png\n", "test_2016_flickr.de": "ein Hund\n"}
    write_files(tmp_path / "multi30k", texts)
    entry = {"filename": "1.png", "filepath": "val2014", "split": "test", "sentences": [{"raw": "a dog"}]}
    write_files(tmp_path / "coco", {"dataset_coco.json": json.dumps({"images": [entry]})})
    for name in ("retrieval/multi30k_de", "retrieval/coco5k"):
        assert find_data(task_cards()[name], tmp_path) is None
        with pytest.raises(UserError, match=f"task {name}: no data under .*images, say, are missing; to get it: "):
            select(name, data=(), root=tmp_path)
    write_files(tmp_path, {"flickr30k/flickr30k-images/1.png": png(), "coco/val2014/1.png": png()})
    assert find_data(task_cards()["retrieval/multi30k_de"], tmp_path) == f"multi30k:{tmp_path}/multi30k"
    assert find_data(task_cards()["retrieval/coco5k"], tmp_path) == f"karpathy:{tmp_path}/coco/dataset_coco.json"


def test_hub_names_never_stand_in_for_a_card_s_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlbench.data import sources

    monkeypatch.setattr(sources, "is_present", lambda spec: True)
    card = task_cards()["linear/cifar10"].model_copy(update={"data": ("hf:cifar10",)})
    monkeypatch.setitem(task_cards(), "linear/cifar10", card)
    with pytest.raises(UserError, match="no data under"):
        select("linear/cifar10", data=(), root=tmp_path)
    (tmp_path / "cifar10").mkdir()
    found = select("linear/cifar10", data=(), root=tmp_path).choices[0]
    assert (found.spec, found.said) == (f"hf:{tmp_path}/cifar10", "hf:cifar10")


def test_absent_data_of_a_named_task_are_an_error(tmp_path: Path) -> None:
    wanted = r"task linear/cifar10: no data under .*hf:cifar10.* and \d more\); to get it: .*--data-root"
    with pytest.raises(UserError, match=wanted):
        select("linear/cifar10", data=(), root=tmp_path)


def _shards(root: Path, name: str) -> None:
    for split in ("train", "test"):
        write_tar(root / name / split / "0.tar", {"0.webp": png(), "0.cls": b"0"})
        write_files(root, {f"{name}/{split}/nshards.txt": "1"})


@pytest.mark.parametrize("folder", ["wds_vtab-caltech101", "vtab-caltech101", "caltech101"])
def test_data_are_found_under_any_of_their_usual_names(tmp_path: Path, folder: str) -> None:
    _shards(tmp_path, folder)
    assert find_data(dataset_cards()["caltech101"], tmp_path) == f"wds:{tmp_path}/{folder}"


def test_the_layout_that_is_there_is_found_not_another_of_its_name(tmp_path: Path) -> None:
    """One folder name, three formats: what lies in it decides."""
    card = dataset_cards()["cifar10"]
    (tmp_path / "cifar10").mkdir()
    assert find_data(card, tmp_path) is None
    _shards(tmp_path, "cifar10")
    assert find_data(card, tmp_path) == f"wds:{tmp_path}/cifar10"
    write_files(tmp_path / "a/cifar10", {"train/cat/1.png": png(), "test/cat/2.png": png()})
    assert find_data(card, tmp_path / "a") == f"imagefolder:{tmp_path}/a/cifar10"
    write_files(tmp_path / "b/cifar10", {"plain_text/train-00000-of-00001.parquet": b"PAR1"})
    assert find_data(card, tmp_path / "b") == f"hf:{tmp_path}/b/cifar10"


def test_training_images_alone_do_not_stand_in_the_way_of_the_whole_set(tmp_path: Path) -> None:
    card = dataset_cards()["cifar10"]
    write_files(tmp_path / "cifar10", {"plain_text/train-00000-of-00001.parquet": b"PAR1"})
    assert find_data(card, tmp_path) == f"hf:{tmp_path}/cifar10", "all that is there"
    _shards(tmp_path, "wds_vtab-cifar10")
    assert find_data(card, tmp_path) == f"wds:{tmp_path}/wds_vtab-cifar10"


def test_why_nothing_runs_is_one_reason_not_a_page_of_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^nothing to run: retrieval/.* and \d+ more such tasks") as error:
        select("align", data=(), root=tmp_path)
    assert len(str(error.value)) < 700


def test_imagenet_s_folder_and_vocdevkit_are_found(tmp_path: Path) -> None:
    write_files(tmp_path, {"imagenet/val/n01440764/1.JPEG": png(), "VOCdevkit/VOC2007/ImageSets/Main/cat_test.txt": ""})
    assert find_data(dataset_cards()["imagenet1k"], tmp_path) == f"imagefolder:{tmp_path}/imagenet"
    assert find_data(task_cards()["svm/voc2007"], tmp_path) == f"voc:{tmp_path}/VOCdevkit/VOC2007"


def test_a_card_with_several_places_takes_the_first_that_is_there(tmp_path: Path) -> None:
    _shards(tmp_path, "wds_vtab-pets")
    _shards(tmp_path, "pets")
    assert find_data(dataset_cards()["pets"], tmp_path) == f"wds:{tmp_path}/pets"


@pytest.mark.parametrize(
    "typo, meant", [("zeroshot/cifar1", "zeroshot/cifar10"), ("liner", "linear"), ("smok", "smoke"), ("KNN", "knn")]
)
def test_typing_errors_get_the_nearest_name(tmp_path: Path, typo: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
        select(typo, data=(), root=tmp_path)


def test_no_task_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no task"):
        select(" , ", data=(), root=tmp_path)


def test_own_data_run_the_named_kinds(tmp_path: Path) -> None:
    folder = tmp_path / "my photos"
    found = select("linear,knn", data=[f"imagefolder:{folder}"], root=tmp_path)
    assert _names(found) == ["linear/my-photos", "knn/my-photos"]
    assert {choice.spec for choice in found.choices} == {f"imagefolder:{folder}"}
    assert found.choices[0].card.metric == "acc1"
    two = select("linear", data=["imagefolder:a", "imagefolder:b"], root=tmp_path)
    assert _names(two) == ["linear/a", "linear/b"]


def test_own_data_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"imagefolder:x/a and --data imagefolder:y/a: both .* linear/a"):
        select("linear", data=["imagefolder:x/a", "imagefolder:y/a"], root=tmp_path)
    assert _names(select("linear", data=["imagefolder:x/a", "imagefolder:x/a"], root=tmp_path)) == ["linear/a"]


def test_own_data_never_take_a_shipped_name(tmp_path: Path) -> None:
    assert _names(select("linear", data=["imagefolder:x/cifar10"], root=tmp_path)) == ["linear/own-cifar10"]
    named = select("linear/cifar10", data=["imagefolder:x/cifar10"], root=tmp_path)
    assert _names(named) == ["linear/cifar10"], "by full name it is the card's protocol on these data"
    assert named.choices[0].spec == "imagefolder:x/cifar10"


def test_own_card_does_not_depend_on_the_place() -> None:
    assert own_card("knn", "imagefolder:/a/photos").fingerprint() == own_card("knn", "wds:/b/photos").fingerprint()
    assert own_card("knn", "wds:/b/cc3m/{000..331}.tar").name == "knn/cc3m"
    assert own_card("knn", "shapes:seen").name == "knn/shapes_seen"


def test_own_data_with_wrong_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'linear'"):
        select("liner", data=["imagefolder:x"], root=tmp_path)
    with pytest.raises(UserError, match="suite 'smoke' names its own data"):
        select("smoke", data=["imagefolder:x"], root=tmp_path)
    with pytest.raises(UserError, match="kind of data"):
        select("linear", data=["imagfolder:x"], root=tmp_path)


@pytest.mark.parametrize("name", task_cards())
def test_every_card_is_sound(name: str) -> None:
    """Its protocol fits its adapter, its metric is one the adapter can give, its prompts exist, its data parse."""
    card = task_cards()[name]
    adapter = ADAPTERS.get(card.adapter)
    parse(adapter.Config, card.protocol, where=name)
    metrics = {
        "acc1",
        "mean_per_class_recall",
        "roc_auc",
        "map",
        "map11",
        "image_retrieval_recall@1",
        "mean_recall",
        "cider",
        "accuracy",
        "accuracy/val",
        "mask_ap",
    }
    assert card.metric.removesuffix("@5" if card.kind == "fewshot" else "") in metrics
    left_to_data = {"retrieval", "captioning", "vqa", "nlvr2", "entailment", "grounding", "detection"}
    known = card.chance is not None or card.metric.startswith("map") or card.kind in left_to_data
    assert known, "only prevalences and what depends on captions, questions and boxes are left to the data"
    assert card.fingerprint()
    find_data(card, Path("/nowhere"))
    if card.data[0].startswith("shapes"):
        assert find_data(card, Path("/nowhere")) == card.data[0]
    else:
        assert card.how_to_get, "a user without the data must learn where they are"


def test_choosing_tasks_loads_no_torch() -> None:
    code = (
        "import sys, pathlib; from vlbench.verbs.selection import select; "
        "select('zeroshot,linear', data=(), root=pathlib.Path('.')); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_other_settings_are_a_task_of_their_own() -> None:
    (choice,) = select("vqa/shapes", data=[], root=Path("/nowhere")).choices
    changed = with_settings(choice, ["optim.lr=1e-3", "search=[0.3, 1, 3]"])
    assert changed.card.name == "vqa/shapes-optim.lr-1e-3-search-0.3-1-3"
    assert changed.card.kind == "vqa"
    assert changed.card.protocol == {"preset": "tiny", "optim": {"lr": 1e-3}, "search": [0.3, 1, 3]}
    assert choice.card.protocol == {"preset": "tiny"}
    assert changed.card.fingerprint() != choice.card.fingerprint()
    config = parse(ADAPTERS.get("vqa").Config, changed.card.protocol, where="here")
    plain = parse(ADAPTERS.get("vqa").Config, choice.card.protocol, where="here")
    assert config.optim.lr == 1e-3
    assert config.search == (0.3, 1.0, 3.0)
    assert config.optim.clip_norm == plain.optim.clip_norm, "the preset's other values stay"
    long = with_settings(choice, [f"init={'x' * 200}"])
    assert len(long.card.name) < 40


def test_wrong_settings_name_the_nearest() -> None:
    (choice,) = select("knn/shapes", data=[], root=Path("/nowhere")).choices
    with pytest.raises(UserError, match="--set k: write it as key=value"):
        with_settings(choice, ["k"])
    with pytest.raises(UserError, match="unknown key 'kk'; did you mean 'k'"):
        parse(ADAPTERS.get("knn").Config, with_settings(choice, ["kk=3"]).card.protocol, where="task knn/shapes")


@pytest.mark.parametrize(
    "task, names, data, meant",
    [
        ("knn/shapes", "linear,knn", [], True),
        ("knn/shapes", "linear,knn/shapes", [], True),
        ("knn/shapes", "smoke", [], True),
        ("knn/shapes", "linear", [], False),
        ("knn/shapes-k-3", "knn", [], False),  # of --set: select gives the card alone
        ("knn/mine", "knn", [], False),  # of --data
        ("knn/mine", "knn", ["imagefolder:/nowhere/mine"], True),
        ("knn/mine", "linear", ["imagefolder:/nowhere/mine"], False),
        ("knn/shapes", "knn", ["imagefolder:/nowhere/mine"], False),
        ("knn/imagenet_a", "knn/imagenet_a", ["imagefolder:/nowhere/mine"], True),  # what it learns from is absent too
    ],
)
def test_results_are_meant_by_what_chose_their_tasks(task: str, names: str, data: list[str], meant: bool) -> None:
    assert is_meant(task, names, data=data) is meant
