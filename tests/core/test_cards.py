from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest

from vlbench.core import cards
from vlbench.core.catalog import ADAPTERS
from vlbench.core.config import parse
from vlbench.core.errors import UserError
from vlbench.data.prompting import class_names
from vlbench.data.spec import parse_spec
from vlbench.train.templates import named_templates

CARD = {"name": "linear/x", "version": 1, "title": "t", "adapter": "linear", "data": ["hf:x"], "metric": "acc1"}


ELEVATER = [
    *("caltech101", "cifar10", "cifar100", "country211", "dtd", "eurosat", "fer2013", "fgvc_aircraft", "food101"),
    *("gtsrb", "hateful_memes", "kitti_distance", "mnist", "flowers102", "pets", "pcam", "rendered_sst2", "resisc45"),
    *("cars", "voc2007"),
]
METRICS = dict.fromkeys(ELEVATER, "acc1") | {
    **dict.fromkeys(("caltech101", "fgvc_aircraft", "flowers102", "pets"), "mean_per_class_recall"),
    "voc2007": "map11",
    "hateful_memes": "roc_auc",
}
TEMPLATES = {
    "caltech101": 34, "cifar10": 18, "cifar100": 18, "country211": 5, "dtd": 8, "eurosat": 3, "fer2013": 6,
    "fgvc_aircraft": 2, "food101": 1, "gtsrb": 3, "hateful_memes": 1, "kitti_distance": 1, "mnist": 1,
    "flowers102": 1, "pets": 1, "pcam": 1, "rendered_sst2": 1, "resisc45": 18, "cars": 8, "voc2007": 1,
    "stl10": 2, "sun397": 2, "svhn": 6,
    "imagenet1k": 80, "imagenetv2": 80, "imagenet_a": 80, "imagenet_r": 80, "imagenet_sketch": 80, "objectnet": 80,
}  # fmt: skip
"""How many templates CLIP, ELEVATER and (for SVHN) CLIP_benchmark have for each."""


@pytest.mark.parametrize("name", sorted(cards.task_cards()))
def test_task_card_fits_its_adapter(name: str) -> None:
    card = cards.task_cards()[name]
    adapter = ADAPTERS.get(card.adapter)
    parse(adapter.Config, card.protocol, where=name)
    assert card.kind in {card.adapter, card.adapter.removesuffix("_multilabel")}
    assert card.chance is None or 0 < card.chance < 1
    assert card.source, f"{name} says not where its protocol comes from"
    assert card.how_to_get or all(spec.startswith("shapes") for spec in card.data), (
        f"{name} says not how to get its data"
    )
    assert len(card.fingerprint()) == 16


@pytest.mark.parametrize("name", sorted(cards.dataset_cards()))
def test_dataset_card_is_whole(name: str) -> None:
    card = cards.dataset_cards()[name]
    assert card.source
    assert card.how_to_get or all(spec.startswith("shapes") for spec in card.data)
    assert "test" in card.sizes
    for spec in card.data:
        parse_spec(spec)
    if card.metric in {"acc1", "mean_per_class_recall"}:
        assert card.n_classes is not None
        assert card.chance == pytest.approx(1 / card.n_classes)
    assert any(task.dataset == name for task in cards.task_cards().values()), "no task uses it"


@pytest.mark.parametrize("name", ELEVATER)
def test_elevater_set_has_its_metric_in_every_task(name: str) -> None:
    for kind in ("zeroshot", "linear", "knn", "elevater_probe", "fewshot"):
        card = cards.task_cards()[f"{kind}/{name}"]
        shots = "@5" if kind == "fewshot" else ""
        assert (card.metric, card.dataset) == (METRICS[name] + shots, name)
        assert card.adapter.endswith("_multilabel") == (name == "voc2007" and kind != "elevater_probe")
    assert cards.task_cards()[f"fewshot/{name}"].protocol == {"shots": [5, 20, 50], "seeds": [0, 1, 2]}


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_as_many_as_published(name: str) -> None:
    prompts = cards.dataset_cards()[name].prompts
    assert prompts.templates is not None
    lines = cards.prompt_lines(prompts.templates)
    assert len(lines) == len(set(lines)) == TEMPLATES[name]
    assert all(line.count("{}") == 1 for line in lines)


def test_imagenet81_is_the_80_and_the_bare_name() -> None:
    assert cards.prompt_lines("imagenet81") == (*cards.prompt_lines("imagenet80"), "{}.")
    assert cards.prompt_lines("imagenet81") == named_templates("imagenet81"), "what training means by this name"


def by_wnid() -> tuple[str, ...]:
    """The first table of the file."""
    lines = cards.prompt_lines("imagenet_classnames")
    return lines[: lines.index("---")]


def test_imagenet_names_are_clip_s_by_wnid() -> None:
    rows = [line.split("\t") for line in by_wnid()]
    wnids, names = zip(*rows, strict=True)
    assert len(rows) == 1000
    assert list(wnids) == sorted(set(wnids)), "the usual order of labels is that of the wnids"
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids)
    assert all(name.strip() for name in names)
    assert dict(rows)["n02012849"] == "crane bird"
    assert dict(rows)["n03126707"] == "construction crane"
    assert (names[0], names[999]) == ("tench", "toilet paper")
    twice = {name for name in names if names.count(name) > 1}
    assert twice == {"missile", "sunglasses"}, "CLIP's list has these two names twice"
    numbered = [line.split("\t") for line in cards.prompt_lines("imagenetv2_classnames")]
    assert numbered == [[str(number), name] for number, name in enumerate(names)]


def test_imagenet_names_are_those_that_open_clip_uses() -> None:
    open_clip = pytest.importorskip("open_clip")
    names = [line.split("\t")[1] for line in by_wnid()]
    assert names == list(open_clip.IMAGENET_CLASSNAMES)
    assert list(cards.prompt_lines("imagenet80")) == [make("{}") for make in open_clip.OPENAI_IMAGENET_TEMPLATES]


@pytest.mark.parametrize("name", ["imagenet1k", "imagenet_a", "imagenet_r"])
def test_imagenet_s_wnids_are_those_that_timm_lists(name: str) -> None:
    file = {"imagenet1k": "imagenet_synsets.txt"}.get(name, f"{name}_synsets.txt")
    wnids = (resources.files("timm.data") / "_info" / file).read_text().split()
    table = cards.prompt_lines("imagenet_classnames")
    found = class_names(table, wnids, where=name)
    assert len(wnids) == len(found) == cards.dataset_cards()[name].n_classes
    if name == "imagenet1k":
        assert wnids == [line.split("\t")[0] for line in by_wnid()]


def test_imagenet_of_the_hub_is_named_by_clip_s_list_too() -> None:
    lines = (resources.files("timm.data") / "_info" / "imagenet_synset_to_lemma.txt").read_text(encoding="utf-8")
    words = dict(line.split("\t", 1) for line in lines.splitlines())
    words["n03126707"] = "crane2"  # a ClassLabel's names differ
    rows = [line.split("\t") for line in by_wnid()]
    own = [words[wnid] for wnid, _ in rows]
    assert (own[0], own[-1]) == ("tench, Tinca tinca", "toilet tissue, toilet paper, bathroom tissue")
    assert class_names(cards.prompt_lines("imagenet_classnames"), own, where="") == tuple(name for _, name in rows)


BY_CODE = [
    *("country211", "eurosat", "fer2013", "flowers102", "gtsrb", "hateful_memes", "kitti_distance", "mnist", "pcam"),
    "svhn",
]


@pytest.mark.parametrize("name", BY_CODE)
def test_class_names_by_code_are_complete(name: str) -> None:
    card = cards.dataset_cards()[name]
    rows = [line.split("\t") for line in cards.prompt_lines(card.prompts.classnames or "")]
    assert len(rows) == card.n_classes == len({row[-1] for row in rows})
    keys = [key for *keys, _ in rows for key in dict.fromkeys(keys)]
    assert len(keys) == len(set(keys)) >= len(rows), "no own name stands for two classes"


@pytest.mark.parametrize("name", sorted(cards.model_cards()))
def test_model_card_sources_its_numbers(name: str) -> None:
    for number in cards.model_cards()[name].published:
        assert number.source
        assert 0 < number.value < 1, "fractions, not percentages"


def test_published_tasks_are_cards() -> None:
    published = {row.task for card in cards.model_cards().values() for row in card.published}
    assert published <= cards.task_cards().keys()


def test_protocols_suite_has_every_adapter_on_the_embedded_world() -> None:
    tasks = [cards.task_cards()[name] for name in cards.suites()["protocols"]]
    assert {task.adapter for task in tasks} == set(ADAPTERS.names())
    assert {task.kind for task in tasks} == {task.kind for task in cards.task_cards().values()}
    languages = {task.protocol.get("language", "en") for task in tasks if task.kind == "retrieval"}
    assert languages == {"en", "de", "fr", "cs"}
    assert all(spec.startswith("shapes") for task in tasks for spec in task.data)


def test_suites_name_known_tasks() -> None:
    suites = cards.suites()
    wanted = {"core", "smoke", "elevater", "elevater_fewshot", "virtex", "align", "robustness", "protocols"}
    assert wanted <= suites.keys()
    for tasks in suites.values():
        assert set(tasks) <= cards.task_cards().keys()
        assert len(tasks) == len(set(tasks))


@pytest.mark.parametrize(
    ("suite", "kind"),
    [
        ("elevater", "zeroshot"),
        ("elevater_linear", "linear"),
        ("elevater_protocol", "elevater_probe"),
        ("elevater_fewshot", "fewshot"),
    ],
)
def test_elevaters_suites_are_its_20_sets_in_its_order(suite: str, kind: str) -> None:
    assert list(cards.suites()[suite]) == [f"{kind}/{name}" for name in ELEVATER]


def test_no_suite_is_called_like_a_kind_or_a_task() -> None:
    tasks = cards.task_cards()
    taken = {*tasks, *(card.kind for card in tasks.values()), *ADAPTERS.names()}
    assert not taken & cards.suites().keys(), "--tasks would never come to the suite"


def test_task_card_takes_what_it_leaves_out_from_its_dataset(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("version: 1\ndataset: pets\nadapter: linear\nsource: s\n")
    card, pets = cards.read_task_card(path, "linear/pets"), cards.dataset_cards()["pets"]
    for key in ("data", "splits", "metric", "chance", "prompts", "how_to_get"):
        assert getattr(card, key) == getattr(pets, key)
    assert card.title == "Oxford-IIIT Pets, linear probe"
    assert card.expected_sizes == {"train": 3680, "test": 3669}
    path.write_text("version: 1\ndataset: pets\nadapter: linear\nmetric: acc1\ntitle: t\ndata: [shapes]\n")
    own = cards.read_task_card(path, "linear/pets")
    assert (own.metric, own.title, own.data) == ("acc1", "t", ("shapes",))
    assert parse(cards.TaskCard, CARD, where="").expected_sizes == {}


@pytest.mark.parametrize(("name", "message"), [("pet", "did you mean 'pets'"), ("[a]", "unknown dataset")])
def test_unknown_dataset_names_file_and_nearest(tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"version: 1\ndataset: {name}\nadapter: linear\n")
    with pytest.raises(UserError, match=rf"x\.yaml: .*{message}"):
        cards.read_task_card(path, "linear/x")


def test_dataset_card_with_a_wrong_key_or_size_is_refused() -> None:
    for values, message in (
        ({"metrc": "acc1"}, "did you mean 'metric'"),
        ({"sizes": {"tset": 3}}, "sizes.tset"),
        ({"sizes": {"test": 0}}, "sizes.test"),
        ({"n_classes": 1}, "n_classes"),
    ):
        with pytest.raises(UserError, match=message):
            parse(cards.DatasetCard, {"name": "x", "title": "t", "data": ["hf:x"], **values}, where="x.yaml")


def test_card_with_an_unknown_key_names_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("version: 1\ntitle: t\nadapter: linear\ndata: [a]\nmetrc: acc1\nmetric: acc1\n")
    with pytest.raises(UserError, match=r"x\.yaml: unknown key 'metrc'; did you mean 'metric'\?"):
        cards.read_task_card(path, "linear/x")


def test_card_that_is_no_yaml_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("version: 1\ntitle: [t\nadapter: linear\n")
    with pytest.raises(UserError, match=r"x\.yaml, line \d"):
        cards.read_task_card(path, "linear/x")


def test_yaml_cannot_build_python_objects(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("title: !!python/object/apply:os.system ['touch /tmp/never']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        cards.read_yaml(path)


def test_fingerprint_covers_what_moves_numbers_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    card = parse(cards.TaskCard, {**CARD, "prompts": {"templates": "simple"}}, where="")
    for change in ({"title": "other"}, {"data": ("hf:y",)}, {"how_to_get": "x"}, {"source": "x"}, {"dataset": "pets"}):
        assert card.fingerprint() == card.model_copy(update=change).fingerprint()
    moving = ({"version": 2}, {"protocol": {"k": 3}}, {"metric": "acc5"}, {"chance": 0.5}, {"splits": {"test": "val"}})
    for change in moving:
        assert card.fingerprint() != card.model_copy(update=change).fingerprint()
    before = card.fingerprint()
    monkeypatch.setattr(cards, "prompt_lines", lambda name: ("a {}.",))
    assert card.fingerprint() != before


def test_fingerprint_does_not_know_where_a_key_was_written(tmp_path: Path) -> None:
    short, whole = tmp_path / "short.yaml", tmp_path / "whole.yaml"
    short.write_text("version: 1\ndataset: mnist\nadapter: linear\n")
    whole.write_text(
        "version: 1\ntitle: t\nadapter: linear\ndata: [a]\nmetric: acc1\nchance: 0.1\n"
        "prompts: {templates: mnist, classnames: digits}\n"
    )
    one, two = (cards.read_task_card(path, "linear/mnist") for path in (short, whole))
    assert one.fingerprint() == two.fingerprint()
