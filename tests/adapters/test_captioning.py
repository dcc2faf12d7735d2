from __future__ import annotations

import builtins
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.adapters.fakes import FakeData, FakeEncoder, FakeSource
from tests.data.making import encoded
from vlbench.adapters.captioning import ADAPTER
from vlbench.adapters.common.caption_scores import bleu, bleu_counts, cider, words
from vlbench.adapters.encoder import Encoder
from vlbench.core.cards import ModelCard, Preprocess, task_cards
from vlbench.core.errors import UserError
from vlbench.core.types import Rows
from vlbench.models.backbone import TorchBackbone
from vlbench.models.rows import ROW_STEP
from vlbench.stats.intervals import mean_of
from vlbench.store.examples import rows_from_parquet, rows_to_parquet

REFERENCES = [
    ["a red square left of a blue circle", "a red square", "a large red square on a dark background"],
    ["a green star at the top", "a green star", "a green star on a light background"],
    ["two blue hearts above a brown cross", "blue hearts", "a heart and a cross"],
    ["a purple crescent right of a star", "a purple crescent"],
    ["a yellow hexagon on the left", "a small yellow hexagon on the left, on a spotted background"],
]
GENERATED = [
    "a red square left of a blue star",
    "a green star",
    "a brown cross above two blue hearts on the left",
    "a purple crescent right of a star",
    "",
]


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("A man, riding a wave.", "a man riding a wave"),
        ("The man's dog doesn't bark!", "the man 's dog does n't bark"),
        ("They\u2019re on a black-and-white floor...", "they 're on a black-and-white floor"),
        ("1,000 people (at 10:30) -- \"no\" 'quotes'; a: b", "1,000 people at 10:30 no quotes a b"),
        ("left,right", "left right"),
        (" ?! ", ""),
    ],
)
def test_words_are_what_the_treebank_makes_of_captions(caption: str, expected: str) -> None:
    assert words(caption) == expected
    assert words(expected) == expected


# ------------------------------------------------------------------------------------------------ metrics


def test_bleu_is_the_public_scorers_and_its_leave_one_out_is_recomputed() -> None:
    from pycocoevalcap.bleu.bleu import Bleu

    def public(captions: Sequence[str], references: Sequence[list[str]]) -> float:
        given = {i: [caption] for i, caption in enumerate(captions)}
        return float(Bleu(4).compute_score(dict(enumerate(references)), given, verbose=0)[0][3])

    found = bleu(bleu_counts(GENERATED, REFERENCES))
    assert found.value == pytest.approx(public(GENERATED, REFERENCES), abs=1e-12)
    assert 0.2 < found.value < 0.9
    for i in range(len(GENERATED)):
        rest = [GENERATED[j] for j in range(5) if j != i], [REFERENCES[j] for j in range(5) if j != i]
        assert found.without_N[i] == pytest.approx(public(*rest), abs=1e-12)


def test_bleu_of_a_worked_example() -> None:
    """5 words, 4/5, 3/4, 2/3, 1/2 n-grams right, the nearest reference of 6 words."""
    counts = bleu_counts(["a b c d x"], [["a b c d e f", "a b"]])
    assert counts[0].tolist() == [5, 6, 4, 3, 2, 1, 5, 4, 3, 2]
    expected = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 6 / 5)
    assert bleu(counts).value == pytest.approx(expected, abs=1e-8)


def tf_idf(text: str, n: int, frequency: Counter, images: int) -> dict[tuple[str, ...], float]:
    tokens = text.split()
    grams = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    return {gram: count * (math.log(images) - math.log(max(1, frequency[gram]))) for gram, count in grams.items()}


def test_cider_is_the_formula() -> None:
    """CIDEr-D of Vedantam et al., times ten: clipped, with a penalty for another length (sigma 6)."""
    frequency: Counter = Counter()
    for texts in REFERENCES:
        grams = {
            tuple(t.split()[i : i + n]) for t in texts for n in (1, 2, 3, 4) for i in range(len(t.split()) - n + 1)
        }
        frequency.update(grams)
    expected = []
    for caption, texts in zip(GENERATED, REFERENCES):
        total = 0.0
        for text in texts:
            # Lengths are counted in bigrams, as the public scorer does.
            delta = max(0, len(caption.split()) - 1) - max(0, len(text.split()) - 1)
            for n in (1, 2, 3, 4):
                ours, theirs = (tf_idf(t, n, frequency, len(REFERENCES)) for t in (caption, text))
                norm = math.sqrt(sum(v * v for v in ours.values())) * math.sqrt(sum(v * v for v in theirs.values()))
                dot = sum(min(v, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, v in ours.items())
                total += dot / (norm or 1.0) * math.exp(-(delta**2) / 72) / 4
        expected.append(10 * total / len(texts))
    np.testing.assert_allclose(cider(GENERATED, REFERENCES), expected, atol=1e-9)


# ------------------------------------------------------------------------------------------------ the adapter


class Speaker(FakeEncoder):
    """An encoder that says what it is told of each image."""

    def __init__(self, said: dict[bytes, str]) -> None:
        super().__init__(lambda image: np.ones(2))
        self.said = said

    def captions(self, source: FakeSource) -> list[str]:
        return [self.said[image] for image in source.images]


def data_of(references: Sequence[Sequence[str]] = REFERENCES, **changes: Any) -> FakeData:
    images = [f"image/{i}".encode() for i in range(len(references))]
    texts = [{"en": tuple(of_image)} for of_image in references]
    return FakeData({"test": FakeSource(images, split="test", texts=texts, **changes)})


def measured(captions: Sequence[str], data: FakeData) -> tuple[Rows, dict[str, Any]]:
    said = dict(zip(data.split("test").images, captions))
    rows = ADAPTER.predict(Speaker(said), data, ADAPTER.Config())
    return rows, ADAPTER.score(rows, ADAPTER.Config())


def test_rows_hold_caption_and_references_and_score_again_after_storing() -> None:
    rows, estimates = measured(GENERATED, data_of())
    assert rows["id"] == [f"test/{i}" for i in range(5)]
    assert rows["caption"] == GENERATED
    assert rows["references"] == REFERENCES
    assert rows.meta["distinct_captions"] == 5
    again = rows_from_parquet(rows_to_parquet(rows))
    assert ADAPTER.score(again, ADAPTER.Config()) == estimates
    assert estimates["cider"].value == pytest.approx(cider(GENERATED, REFERENCES).mean())
    assert estimates["bleu4"].value == pytest.approx(bleu(bleu_counts(GENERATED, REFERENCES)).value, abs=1e-9)
    for metric, outcome in ADAPTER.outcomes(rows, ADAPTER.Config()).items():
        assert mean_of(outcome) == pytest.approx(estimates[metric].value)
        assert estimates[metric].lo < estimates[metric].value < estimates[metric].hi
        assert estimates[metric].n_clusters == 5
        assert outcome.pseudo == (metric == "bleu4")


def test_order_of_images_does_not_matter() -> None:
    order = [3, 0, 4, 1, 2]
    _, before = measured(GENERATED, data_of())
    _, after = measured([GENERATED[i] for i in order], data_of([REFERENCES[i] for i in order]))
    for metric, estimate in before.items():
        assert after[metric].value == pytest.approx(estimate.value, abs=1e-12)


def many(n: int = 60) -> list[list[str]]:
    rng = np.random.default_rng(0)
    colours, things, places = (
        ("red", "blue", "green", "brown", "yellow"),
        ("star", "heart", "cross", "ring"),
        (
            "at the top",
            "on the left",
            "in the middle",
            "at the bottom",
            "on a dark background",
        ),
    )
    rows = []
    for _ in range(n):
        colour, thing, place, other = (str(rng.choice(words)) for words in (colours, things, places, things))
        rows.append(
            [f"a {colour} {thing} {place}", f"a {colour} {thing} above a {other} {place}", f"a {colour} {thing}"]
        )
    return rows


def test_degenerate_captions_are_far_below_the_right_ones() -> None:
    """The right captions; the same caption for all; the right captions shuffled over images; nothing at all."""
    references = many()
    right = [texts[1] for texts in references]
    rows, knows = measured(right, data_of(references))
    _, constant = measured(["a red star at the top"] * len(right), data_of(references))
    order = np.random.default_rng(1).permutation(len(right))
    _, shuffled = measured([right[i] for i in order], data_of(references))
    _, silent = measured([""] * len(right), data_of(references))
    chance = rows.meta["chance"]
    assert set(chance) == set(knows) == {"cider", "bleu4"}
    assert knows["bleu4"].value > 0.99
    for metric in chance:
        assert constant[metric].hi < 0.5 * knows[metric].value
        assert shuffled[metric].hi < 0.5 * knows[metric].value
        assert silent[metric].value == pytest.approx(0, abs=1e-6)
    # Chance: somebody else's caption. Shuffling is that too, of other lengths.
    assert chance["cider"] < 0.4 * knows["cider"].value
    assert measured(["x"] * len(right), data_of(references))[0].meta["distinct_captions"] == 1


def test_copies_of_an_image_are_one_row_with_all_references() -> None:
    data = data_of()
    source = data.split("test")
    source.images[4] = source.images[1]
    ids = source.ids()
    rows, estimates = measured(GENERATED, data)
    assert len(rows) == 4
    assert rows["references"][1] == REFERENCES[1] + REFERENCES[4]
    assert rows.meta["notes"] == [
        f"1 entry repeats an earlier image byte for byte and joined it: {ids[4]} (of {ids[1]})"
    ]
    assert estimates["cider"].n_clusters == 4


def test_an_image_without_references_is_one_clear_line() -> None:
    config = ADAPTER.Config(language="de")
    with pytest.raises(UserError, match=r"fake:data \(test\): test/0: no caption in language 'de' \(there: en\)"):
        ADAPTER.predict(Speaker({}), data_of(), config)


def test_an_absent_scorer_is_one_line_before_the_model_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("pycocoevalcap"):
            raise ImportError(name)
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'vlbench\[captions\]'"):
        ADAPTER.predict(Speaker({}), data_of(), ADAPTER.Config())


@pytest.mark.parametrize("name", [name for name in task_cards() if name.startswith("captioning/")])
def test_cards_report_cider_without_a_fixed_chance(name: str) -> None:
    card = task_cards()[name]
    assert (card.adapter, card.metric, card.chance) == ("captioning", "cider", None)


# ------------------------------------------------------------------------------------------------ a real encoder


class Pictures(FakeSource):
    """Real PNGs, two of them the same."""

    def __init__(self) -> None:
        colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 0, 0), (90, 90, 90)]
        images = [encoded(np.full((8, 8, 3), colour, dtype=np.uint8)) for colour in colours]
        super().__init__(images, split="test", texts=[{"en": ("x",)}] * 5)


def speaking(batches: list[int]) -> TorchBackbone:
    def describe(images_BCHW: torch.Tensor) -> list[str]:
        batches.append(len(images_BCHW))
        return [f"colour {image.mean((1, 2)).argmax().item()}" for image in images_BCHW]

    card = ModelCard(
        id="speaker",
        loader="build",
        arch="x",
        preprocess=Preprocess(image_size=(8, 8)),
        provides={"pooled", "captions"},
    )
    return TorchBackbone(card, torch.nn.Flatten(), captions_fn=describe)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_encoder_describes_each_image_once_in_the_order_of_the_source(batch_size: int) -> None:
    batches: list[int] = []
    shown: list[tuple[int, int]] = []
    encoder = Encoder(speaking(batches), None, batch_size=batch_size, progress=lambda *at: shown.append(at))
    captions = encoder.captions(Pictures())
    assert captions[:4] == ["colour 0", "colour 1", "colour 2", "colour 0"]
    assert batches == [ROW_STEP] * -(-4 // batch_size), "four different images, each batch filled up"
    assert shown[-1] == (4, 4)
    assert encoder.stats.images_encoded == 4
    assert encoder.stats.images_per_second is not None


def test_encoder_refuses_another_number_of_captions() -> None:
    backbone = speaking([])
    backbone._captions_fn = lambda images: ["one"]
    with pytest.raises(UserError, match="speaker: 1 captions of 4 images"):
        Encoder(backbone, None).captions(Pictures())


# ------------------------------------------------------------------------------------------------ what is shown


def test_three_captions_are_shown_the_same_in_any_order_of_the_data() -> None:
    rows, _ = measured(GENERATED, data_of())
    for order in (range(5), (3, 0, 4, 1, 2)):
        turned = Rows({name: [rows[name][i] for i in order] for name in rows}, rows.meta)
        assert ADAPTER.shown(turned) == [
            "test/0: a red square left of a blue star",
            "    a reference: a red square left of a blue circle",
            "test/1: a green star",
            "    a reference: a green star at the top",
            "test/2: a brown cross above two blue hearts on the left",
            "    a reference: two blue hearts above a brown cross",
        ]


def test_what_is_shown_of_a_caption_is_one_line() -> None:
    rows = Rows({"id": ["a", "b"], "caption": ["", "two\nlines"], "references": [["x\r\n y", "z"], ["w"]]})
    assert ADAPTER.shown(rows) == ["a: (nothing)", "    a reference: x y", "b: two lines", "    a reference: w"]
