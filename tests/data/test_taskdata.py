from __future__ import annotations

import pytest

from tests.data.making import image_folder, png, write_files, write_tar
from vlbench.core.cards import prompt_lines, task_cards
from vlbench.core.errors import BadExample, UserError
from vlbench.data.digests import image_digests
from vlbench.data.prompting import class_names
from vlbench.data.taskdata import TaskData, class_notes


@pytest.fixture
def unsplit(tmp_path):
    files = {f"{name}/{i}.png": png(seed * 100 + i) for seed, name in enumerate(("cat", "dog")) for i in range(20)}
    return write_files(tmp_path / "pets", files)


def test_taskdata_opens_the_splits_that_are_there(tmp_path):
    data = TaskData(f"imagefolder:{image_folder(tmp_path, splits=('train', 'val', 'test'))}")
    assert [data.split(role).split for role in ("train", "validation", "test")] == ["train", "val", "test"]
    assert data.split("test") is data.split("test")
    assert data.notes == ()
    assert data.classnames == ("cat", "dog")
    assert data.templates is None


def test_taskdata_follows_the_card_s_splits(tmp_path):
    folder = image_folder(tmp_path, splits=("train", "val", "test"))
    data = TaskData(f"imagefolder:{folder}", {"test": "validation"})
    assert data.split("test").split == "val"
    assert not data.has("val")  # never choose on what is reported
    with pytest.raises(UserError, match="is to be 'extra', but it has train, val, test"):
        TaskData(f"imagefolder:{folder}", {"test": "extra"})


def test_taskdata_reports_val_where_there_is_no_test(tmp_path):
    data = TaskData(f"imagefolder:{image_folder(tmp_path, splits=('train', 'val'))}")
    assert data.split("test").split == "val"
    assert not data.has("val")
    assert data.notes == ("the data have no test split: val is reported",)
    with pytest.raises(UserError, match="no val split; there is"):
        data.split("val")


def test_taskdata_takes_undivided_data_whole_where_the_card_says_all(unsplit, tmp_path):
    data = TaskData(f"imagefolder:{unsplit}", {"test": "all"})
    assert len(data.split("test")) == 40
    assert (data.notes, data.has("train"), data.has("val")) == ((), False, False)
    only_train = TaskData(f"imagefolder:{image_folder(tmp_path / 'a', splits=('train',))}", {"test": "all"})
    assert len(only_train.split("test")) == 6
    divided = TaskData(f"imagefolder:{image_folder(tmp_path / 'b', splits=('train', 'test'))}", {"test": "all"})
    assert (divided.split("test").split, divided.has("train")) == ("test", True), "shards of it may be divided"


def test_taskdata_maps_folder_names_to_class_names(tmp_path):
    data = TaskData(f"imagefolder:{image_folder(tmp_path)}", classes=("dog\ta hound", "bird\ta bird", "cat\ta tabby"))
    assert data.classnames == ("a tabby", "a hound")


@pytest.mark.parametrize(
    ("file", "folders", "names"),
    [
        ("imagenet_classnames", ("n03126707", "n02012849"), ("crane bird", "construction crane")),
        ("imagenetv2_classnames", ("517", "134", "2"), ("crane bird", "great white shark", "construction crane")),
        ("gtsrb_classnames", ("00014", "00001"), ("red and white circle 30 kph speed limit", "stop")),
        ("country211_classnames", ("DE", "CZ"), ("Czech Republic", "Germany")),
        ("flowers102_classnames", ("10", "1"), ("pink primrose", "globe thistle")),
    ],
)
def test_taskdata_names_the_classes_of_folders_by_code(tmp_path, file, folders, names):
    """Folder names sort as text ("134", "2", "517"): by place, ImageNetV2 would have every name wrong."""
    write_files(tmp_path, {f"{folder}/1.png": png(seed) for seed, folder in enumerate(folders)})
    data = TaskData(f"imagefolder:{tmp_path}", {"test": "all"}, classes=prompt_lines(file))
    assert data.classnames == names


def test_taskdata_says_that_numbers_make_no_prompts(tmp_path):
    numbered = f"imagefolder:{write_files(tmp_path / 'a', {f'test/{i}/1.png': png(i) for i in range(3)})}"
    data = TaskData(numbered)
    assert data.notes == (), "a probe asks for no prompt"
    assert [note for note in data.with_prompts(templates=["a {}."]).notes if "class names are numbers" in note]
    assert data.with_prompts(classes=prompt_lines("digits"), templates=["a {}."]).notes == ()
    assert TaskData(f"imagefolder:{image_folder(tmp_path / 'b')}", templates=["a {}."]).notes == ()


@pytest.mark.parametrize("task", ["zeroshot/mnist", "zeroshot/svhn"])
def test_digits_are_names_enough_for_the_tasks_on_digits(task):
    prompts = task_cards()[task].prompts
    assert class_names(prompt_lines(prompts.classnames), "0123456789", where=task) == tuple("0123456789")


def test_class_notes_compare_with_the_card():
    assert task_cards()["linear/cifar10"].expected_classes == 10
    assert task_cards()["zeroshot/shapes_heldout"].expected_classes is None
    assert class_notes(tuple("ab"), 1000) == ("1,000 classes expected, 2 found",)
    assert class_notes(tuple("ab"), 2) == class_notes(None, 2) == class_notes(tuple("ab"), None) == ()


def test_taskdata_divides_unsplit_data_by_content(unsplit, tmp_path):
    data = TaskData(f"imagefolder:{unsplit}")
    assert "60% train" in data.notes[0]
    parts = {role: image_digests(data.split(role)) for role in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [24, 8, 8]
    for role, part in (("train", 12), ("val", 4), ("test", 4)):
        labels = list(data.split(role).labels())
        assert labels.count(0) == labels.count(1) == part
    assert len({image for part in parts.values() for image in part}) == 40
    assert data.split("test").split == "test"
    renamed = tmp_path / "elsewhere"
    unsplit.rename(renamed)
    for i, path in enumerate(sorted(renamed.rglob("*.png"))[::-1]):
        path.rename(path.with_name(f"renamed{i}.png"))
    again = TaskData(f"imagefolder:{renamed}")
    assert {role: set(image_digests(again.split(role))) for role in parts} == {r: set(p) for r, p in parts.items()}


def test_taskdata_warns_where_the_model_was_pretrained_on_the_same_unsplit_data(unsplit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = f"imagefolder:{unsplit}"
    for said in (spec, "imagefolder:pets", f"{spec}/@2", "imagefolder:./x/../pets"):
        assert any("pretrained on these very images" in note for note in TaskData(spec, pretrained_on=[said]).notes)
    for said in ("imagefolder:pets2", f"wds:{unsplit}", "some words", "ImageNet-1k"):
        assert len(TaskData(spec, pretrained_on=["shapes", said]).notes) == 1
    split = f"imagefolder:{image_folder(tmp_path / 'split', splits=('train', 'test'))}"
    assert TaskData(split, pretrained_on=[split]).notes == ()


def test_taskdata_shares_what_is_opened_between_prompts(unsplit):
    data = TaskData(f"imagefolder:{unsplit}")
    other = data.with_prompts(classes=["a", "b"], templates=["{}"])
    assert other.split("test") is data.split("test")
    assert data.split("train") is other.split("train")
    assert (data.classnames, other.classnames) == (("cat", "dog"), ("a", "b"))
    assert (data.templates, other.templates) == (None, ("{}",))
    assert other.with_prompts().classnames == ("cat", "dog")


def test_taskdata_keeps_equal_bytes_in_one_split(unsplit):
    for i in range(20):
        write_files(unsplit, {f"dog/copy{i}.png": png(i)})  # every cat again, as a dog
    data = TaskData(f"imagefolder:{unsplit}")
    parts = {role: set(image_digests(data.split(role))) for role in ("train", "val", "test")}
    assert not parts["train"] & parts["test"]
    assert not parts["train"] & parts["val"]
    assert not parts["val"] & parts["test"]
    assert sum(len(data.split(role)) for role in parts) == 60


def test_taskdata_divides_data_that_have_only_train(tmp_path):
    data = TaskData(f"imagefolder:{image_folder(tmp_path, splits=('train',), per_class=10)}")
    assert [len(data.split(role)) for role in ("train", "val", "test")] == [12, 4, 4]
    assert data.notes


def test_taskdata_names_a_bad_image_and_too_few(unsplit, tmp_path):
    (unsplit / "cat" / "3.png").write_bytes(b"")
    with pytest.raises(BadExample, match=r"3\.png: empty file"):
        TaskData(f"imagefolder:{unsplit}").split("test")
    few = write_files(tmp_path / "few", {"cat/0.png": png(1), "dog/0.png": png(2)})
    with pytest.raises(UserError, match="too few images"):
        TaskData(f"imagefolder:{few}").split("test")


def test_taskdata_takes_class_names_and_templates_from_the_card(tmp_path):
    write_tar(tmp_path / "test/0.tar", {"a.png": png(), "a.cls": b"1"})
    write_files(tmp_path, {"test/nshards.txt": "1", "classnames.txt": "n01\nn02\n"})
    write_files(tmp_path, {"zeroshot_classification_templates.txt": "a {c}.\nthe {c}.\n"})
    data = TaskData(f"wds:{tmp_path}")
    assert data.classnames == ("n01", "n02")
    assert data.templates == ("a {}.", "the {}.")
    given = TaskData(f"wds:{tmp_path}", classes=["cat", "dog"], templates=["{}"])
    assert (given.classnames, given.templates) == (("cat", "dog"), ("{}",))
    with pytest.raises(UserError, match="3 class names were given for 2"):
        _ = TaskData(f"wds:{tmp_path}", classes=["a", "b", "c"]).classnames


def test_taskdata_fingerprint_depends_on_role_and_content(tmp_path):
    folder = image_folder(tmp_path)
    data = TaskData(f"imagefolder:{folder}")
    before = data.fingerprint(["test"])
    assert before == TaskData(f"imagefolder:{folder}").fingerprint(["test"])
    assert data.fingerprint(["train"]) != before
    assert data.fingerprint(["train", "test"]) == data.fingerprint(["test", "train"])
    (folder / "test/dog/0.png").write_bytes(png(77))
    assert TaskData(f"imagefolder:{folder}").fingerprint(["test"]) != before
