"""The shipped reference cards: what each names exists, its images are prepared as its library prepares them, every
number says where it was read, and the loaders find in the architecture what the card says of it.

Networks are built on the meta device: all their shapes and none of their memory.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from dataclasses import asdict
from datetime import date
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from vlbench.core.cards import ModelCard, Preprocess, model_cards, read_yaml
from vlbench.core.catalog import LOADERS
from vlbench.core.errors import UserError
from vlbench.core.paths import card_dir
from vlbench.models.backbone import count_params
from vlbench.models.load import load_backbone
from vlbench.models.loaders.timm import timm_preprocess
from vlbench.models.loaders.torchvision import torchvision_preprocess
from vlbench.models.weights import WEIGHT_SUFFIXES

CARDS = model_cards()
KINDS = {"zeroshot", "linear", "knn", "fewshot", "svm", "elevater_probe", "retrieval"}
METRICS = {"acc1", "acc5", "mean_per_class_recall", "map11", "map", "roc_auc", "mean_recall"}
RECALLS = {f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)}
KEYS = [
    "loader",
    "arch",
    "weights",
    "sha256",
    "recipe",
    "config",
    "preprocess",
    "text",
    "provides",
    "feature",
    "pretrain_data",
    "images_seen",
    "params",
    "licence",
    "published",
]
GENERAL = ("pooled", "trunk output", "input of the last linear layer")
"""What a loader says of a feature where it cannot know more; a card may."""


AS_THEIR_AUTHORS = {f"dino-vit-{size}-{patch}" for size in "sb" for patch in (8, 16)}
"""Cards that resize to 256 as the evaluation whose numbers they hold, where timm resizes to 248."""
A_REPOSITORY_S_FILE = re.compile(r"(?:^|\s)[\w-][\w.-]*/[\w.-]+, [\w./-]*\w\.[a-z]\w*")
A_STATE = re.compile(r"\(commit [0-9a-f]{7,40}\)|\(read \d{4}-\d\d-\d\d\)")


def of(loader: str) -> list[str]:
    return sorted(name for name, card in CARDS.items() if card.loader == loader)


def tagged(loader: str) -> list[str]:
    return [name for name in of(loader) if CARDS[name].weights and "://" not in CARDS[name].weights]


# ------------------------------------------------------------------------------------------------ as files


def test_cards_are_many_and_their_ids_unique() -> None:
    assert len(CARDS) >= 30
    assert len(list(card_dir("reference_models").rglob("*.yaml"))) == len(CARDS)
    assert {card.loader for card in CARDS.values()} <= set(LOADERS.names())


@pytest.mark.parametrize("name", sorted(CARDS))
def test_card_reads_like_the_others(name: str) -> None:
    path = card_dir("reference_models") / f"{name}.yaml"
    assert path.read_text(encoding="utf-8").startswith("# "), "the first line names the paper"
    keys = list(read_yaml(path))
    assert keys == [key for key in KEYS if key in keys], "the order of the keys"


@pytest.mark.parametrize("name", sorted(CARDS))
def test_published_rows_are_numbers_that_somebody_printed(name: str) -> None:
    rows = CARDS[name].published
    assert rows, "a reference model without a published number is no reference"
    for row in rows:
        kind, _, data = row.task.partition("/")
        assert kind in KINDS, row.task
        assert data.replace("_", "").isalnum(), row.task
        assert row.metric in METRICS | RECALLS, row.metric
        assert (kind == "retrieval") == (row.metric in RECALLS | {"mean_recall"}), f"{row.task}: {row.metric}"
        assert 0 < row.value <= 1, "fractions, not percentages"
        assert len(row.source) >= 10
        assert "memory" not in row.source.lower()
    often = [key for key, n in Counter((row.task, row.metric, row.source) for row in rows).items() if n > 1]
    assert not often


def test_recall_rises_with_k() -> None:
    for name, card in CARDS.items():
        found = {(row.source, row.task, row.metric): row.value for row in card.published if row.metric in RECALLS}
        for (source, task, metric), value in found.items():
            way, _, k = metric.partition("@")
            for wider in (5, 10):
                if wider > int(k) and (source, task, f"{way}@{wider}") in found:
                    assert value < found[source, task, f"{way}@{wider}"], f"{name}: {task} {metric}"


# ----------------------------------------------------------------------------- what the libraries know of it


@pytest.mark.parametrize("name", of("open_clip"))
def test_open_clip_card_is_prepared_as_open_clip_does(name: str) -> None:
    import open_clip
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    card = CARDS[name]
    assert card.weights in open_clip.list_pretrained_tags_by_model(card.arch)
    own = open_clip.get_pretrained_cfg(card.arch, card.weights)
    merged = merge_preprocess_dict(asdict(PreprocessCfg()), own)
    size = open_clip.get_model_config(card.arch)["vision_cfg"]["image_size"]
    assert card.preprocess == Preprocess(
        image_size=size,
        resize=merged["resize_mode"],
        interpolation=merged["interpolation"],
        mean=merged["mean"],
        std=merged["std"],
    )
    assert card.arch.endswith("-quickgelu") == bool(own.get("quick_gelu")), "the activation follows the weights"
    assert (card.sha256 or "") in own.get("url", ""), "OpenAI's addresses hold the checksums of their files"


def test_openai_s_cards_have_the_checksums_of_their_addresses() -> None:
    named = {name: card for name, card in CARDS.items() if (card.loader, card.weights) == ("open_clip", "openai")}
    assert len(named) == 9
    assert all(card.sha256 is not None and len(card.sha256) == 64 for card in named.values())


@pytest.mark.parametrize("name", sorted(CARDS))
def test_card_says_its_licence_or_that_there_is_none(name: str) -> None:
    assert CARDS[name].licence


@pytest.mark.parametrize("name", tagged("timm"))
def test_timm_card_is_prepared_as_timm_does(name: str) -> None:
    import timm

    card = CARDS[name]
    ref = f"{card.arch}.{card.weights}"
    assert ref in timm.list_pretrained(f"{card.arch}.*")

    class Net:
        pretrained_cfg = timm.get_pretrained_cfg(ref).to_dict()

    own = timm_preprocess(Net())
    if name in AS_THEIR_AUTHORS:
        assert (own.resize_to, card.preprocess.resize_to) == (248, 256)
        own = own.model_copy(update={"resize_to": 256})
    assert card.preprocess == own


@pytest.mark.parametrize("name", tagged("torchvision"))
def test_torchvision_card_is_prepared_as_torchvision_does(name: str) -> None:
    import torchvision

    card = CARDS[name]
    assert card.preprocess == torchvision_preprocess(torchvision.models.get_model_weights(card.arch)[card.weights])


# ------------------------------------------------------------------------------------ what the loaders find


@pytest.fixture(scope="module")
def found() -> Any:
    """A function from a card's id to what its loader says of a fresh initialisation."""
    import open_clip

    known: dict[tuple[str, str, str | None], ModelCard] = {}
    create = open_clip.create_model

    def find(name: str) -> ModelCard:
        card = CARDS[name]
        # Tags of one architecture differ in no shape.
        key = (card.loader, card.arch, card.weights if card.loader == "torchvision" else None)
        if key not in known:
            with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
                patch.setattr(open_clip, "create_model", lambda *args, **kwargs: create(*args, **kwargs, device="meta"))
                known[key] = load_backbone(name, weights="random", device="meta").card
        return known[key]

    return find


@pytest.mark.parametrize("name", [*of("open_clip"), *of("timm"), *of("torchvision"), *of("unicl")])
def test_card_says_what_its_loader_finds(name: str, found: Any) -> None:
    card, loaded = CARDS[name], found(name)
    for field in ("arch", "text", "provides", "params"):
        assert getattr(loaded, field) == getattr(card, field), field
    assert loaded.feature == card.feature or loaded.feature in GENERAL


@pytest.mark.parametrize("name", of("hf"))
def test_hub_card_says_what_its_architecture_holds(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    from vlbench.models.hf_towers import FAMILIES

    card = CARDS[name]
    assert card.config is not None
    family = FAMILIES[card.config["model_type"]]
    with torch.device("meta"):
        model = getattr(transformers, family.model)(transformers.AutoConfig.for_model(**card.config))
    tower = family.tower(model, card.arch)
    assert count_params(tower) == card.params
    assert tower.feature == card.feature
    assert tower.parts | ({"text"} if family.text else set()) == card.provides
    assert (card.text is not None) == (family.text is not None)


def test_card_without_a_tag_never_stands_for_the_librarys_default_weights(tmp_path: Any) -> None:
    by_hand = [name for loader in ("timm", "torchvision", "open_clip", "unicl") for name in of(loader)]
    by_hand = [name for name in by_hand if name not in tagged(CARDS[name].loader)]
    assert {"virtex-r50", "unicl-swin-t-in21k-yfcc14m"} <= set(by_hand)
    for name in by_hand:
        with pytest.raises(
            UserError, match=f"{name}: its weights are not downloaded from here; .*--weights FILE"
        ) as said:
            load_backbone(name)
        address = CARDS[name].weights
        assert address is not None
        assert f"fetch {address} and pass them with --weights FILE" in str(said.value), "which file, and where it is"
        assert PurePosixPath(urlsplit(address).path).suffix in WEIGHT_SUFFIXES


def test_no_card_leaves_open_which_feature_is_probed() -> None:
    vague = [name for name, card in CARDS.items() if card.feature in GENERAL]
    assert not vague


def test_every_source_can_be_looked_up() -> None:
    sources = {row.source for card in CARDS.values() for row in card.published}
    assert not [source for source in sources if "transcription" in source or "third-party" in source]
    files = {source for source in sources if A_REPOSITORY_S_FILE.search(source)}
    assert len(files) > 20, "most numbers were read in a repository"
    undated = sorted(source for source in files if not A_STATE.search(source))
    assert not undated, "a repository's file changes: (commit 1234567) or (read 2026-11-22) says which was read"
    for source in files:
        for read in re.findall(r"\(read ([\d-]+)\)", source):
            assert date.fromisoformat(read) >= date(2020, 1, 1)


@pytest.mark.parametrize(
    ("source", "names_one", "says_when"),
    [
        ("kdexd/virtex, docs/virtex/usage/model_zoo.rst, bicaptioning_R_50 (commit ae67b23)", True, True),
        ("arXiv 2103.00020, table 11, as copied in some-body/Notes, models/clip.viz.js (read 2026-11-22)", True, True),
        ("some-body/Notes, models/clip.viz.js", True, False),
        ("some-body/Notes, README.md (commit main)", True, False),
        ("openai.com/index/clip (5 January 2021), table of ResNet101 and CLIP ViT-L", False, False),
        ('torchvision 0.29, the weights\' own meta["_metrics"]', False, False),
    ],
)
def test_what_counts_as_a_repository_s_file_and_as_its_state(source: str, names_one: bool, says_when: bool) -> None:
    assert bool(A_REPOSITORY_S_FILE.search(source)) is names_one
    assert bool(A_STATE.search(source)) is says_when


@pytest.mark.parametrize(
    ("name", "feature_of"),
    [
        ("vit-b-16-tv", lambda net, x: net.encoder(torch.cat([net.class_token, net._process_input(x)], 1))[:, 0]),
        ("swin-t-tv", lambda net, x: net.norm(net.features(x)).mean((1, 2))),
        ("convnext-t-tv", lambda net, x: net.classifier[0](net.features(x).mean((2, 3), keepdim=True)).flatten(1)),
    ],
)
def test_torchvision_card_names_the_feature_that_is_probed(name: str, feature_of: Any) -> None:
    backbone = load_backbone(name, weights="random")
    pixels = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        expected = feature_of(backbone.module.net.eval(), pixels)
    torch.testing.assert_close(backbone.encode_image(pixels).pooled_BD, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dino-vit-s-16", "dino-resnet50"])
@pytest.mark.parametrize("whole", [False, True])
def test_dinos_files_load_the_backbone_alone_and_the_teacher_of_the_full_checkpoint(
    name: str, whole: bool, tmp_path: Any
) -> None:
    import timm
    import torchvision

    torch.manual_seed(0)
    if name == "dino-resnet50":
        net: Any = torchvision.models.resnet50()
        net.fc = torch.nn.Identity()  # as facebookresearch/dino's hubconf.py has it
    else:
        net = timm.create_model(CARDS[name].arch, num_classes=0)  # whose names are those of their vision_transformer.py
    file: dict[str, Any] = net.state_dict()
    if whole:
        teacher = {f"backbone.{key}": value for key, value in file.items()}
        student = {f"module.backbone.{key}": torch.zeros_like(value) for key, value in file.items()}
        file = {"student": student, "teacher": teacher | {"head.mlp.0.weight": torch.zeros(2, 2)}, "epoch": 100}
    torch.save(file, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="read as DINO's") if whole else contextlib.nullcontext():
        loaded = load_backbone(name, weights=str(tmp_path / "w.pth"))
    found = loaded.module.net.state_dict()
    assert all(torch.equal(found[key], value) for key, value in net.state_dict().items())
    assert loaded.card.preprocess == CARDS[name].preprocess
    assert loaded.card.preprocess.resize_to == 256


def test_dinos_nearest_neighbours_are_judged_and_its_probes_of_other_features_are_not() -> None:
    for name in sorted(card for card in CARDS if card.startswith("dino-")):
        judged = {row.task: row.comparable for row in CARDS[name].published}
        assert judged == {"knn/imagenet1k": True, "linear/imagenet1k": False}, name


def test_virtex_file_in_the_layout_of_its_own_hub_function_loads(tmp_path: Any) -> None:
    import torchvision

    net = torchvision.models.resnet50()
    net.fc = torch.nn.Identity()  # as kdexd/virtex's hubconf.py has it
    torch.save(net.state_dict(), tmp_path / "backbone.pth")
    loaded = load_backbone("virtex-r50", weights=str(tmp_path / "backbone.pth"))
    assert loaded.card.preprocess == CARDS["virtex-r50"].preprocess
    assert loaded.card.id == "virtex-r50@backbone"
    assert torch.equal(loaded.module.net.conv1.weight, net.conv1.weight)
