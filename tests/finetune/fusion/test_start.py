"""What a model begins with: a learnt vocabulary, mu-VLA's stream, BERT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.finetune.fusion.quadrants import settings
from vlbench.core.errors import UserError
from vlbench.data.wordpiece import train_wordpiece
from vlbench.finetune.fusion.config import PAPER, FusionConfig
from vlbench.finetune.fusion.heads import AnswerHead, ClassHead
from vlbench.finetune.fusion.model import Sight
from vlbench.finetune.fusion.questions import Questions
from vlbench.finetune.fusion.recipe import FusionTuner
from vlbench.finetune.fusion.words import Words
from vlbench.models.single_stream import Heads, SingleStream
from vlbench.models.weights import asset_tensors
from vlbench.recipes.muvla import TINY, Muvla
from vlbench.train import checkpoint

TEXTS = ["the red one", "what colour is the circle?", "blue over green"] * 4
STREAM = {"width": 32, "layers": 2, "heads": 2, "hidden": None, "dropout": 0.0, "positions": 32, "init_std": 0.1}


def asked() -> Questions:
    from tests.finetune.fusion.quadrants import colours_of, source

    return Questions((source(colours_of(4, 0), 0),), tuple(TEXTS[:4]), (0, 1, 2, 3))


def tuned(config: Any, *, parts: tuple[int, ...] = (4, 3), pooled: int | None = 5, head: Any = ClassHead(4)) -> Any:  # noqa: B008
    recipe: Any = FusionTuner(head, Sight(parts, pooled, 1))
    recipe = recipe.with_assets(recipe.learn_assets(config, asked()))
    torch.manual_seed(0)
    return recipe.build(config, ())


@pytest.fixture(scope="module")
def muvla(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run folder of mu-VLA, untrained, and its weights."""
    config = TINY.model_copy(update={"stream": TINY.stream.model_validate(STREAM | {"positions": 20})})
    words = train_wordpiece(TEXTS, 150)
    recipe = Muvla({"words": words, "tags": b'["a", "b"]'})
    torch.manual_seed(1)
    weights = recipe.build(config, ()).state_dict()
    folder = tmp_path_factory.mktemp("muvla")
    checkpoint.save(
        folder / "ckpt.pt",
        recipe="muvla",
        config=config.model_dump(mode="json"),
        classes=[],
        assets=asset_tensors({"words": words}),
        card={},
        model=weights,
        step=1,
        samples_seen=1,
    )
    return folder, weights


def test_a_learnt_vocabulary_knows_the_training_texts() -> None:
    model = tuned(settings())
    rows, cut = model.words(["the red one"])
    assert cut == 0
    assert len(rows[0]) == 5
    again = tuned(settings())
    assert again.words.size == model.words.size


def test_long_texts_keep_their_end_and_are_counted() -> None:
    words = Words(train_wordpiece(TEXTS, 150), 6)
    rows, cut = words(["the red one", "the red one the red one", "the red one the red one"])
    assert cut == 2
    assert [len(row) for row in rows] == [5, 6, 6]
    assert rows[1][-1] == rows[0][-1]
    assert rows[1][:4] == rows[0][:4]


def test_muvlas_stream_and_words_are_taken(muvla: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, weights = muvla
    model = tuned(settings(init=str(folder), stream=STREAM))
    own = model.state_dict()
    for name in ("word.weight", "layers.1.up.weight", "box.weight", "box_norm.bias", "kind.weight"):
        assert torch.equal(own[f"stream.{name}"], weights[f"text_stream.{name}"]), name
    assert torch.equal(own["pooler.weight"], weights["text_heads.pooler.weight"])
    # There are fewer positions there: those that there are.
    assert torch.equal(own["stream.position.weight"][:20], weights["text_stream.position.weight"])
    assert len(own["stream.position.weight"]) == 32
    (said,) = model.started
    assert str(folder) in said
    assert "begun anew" in said
    assert "image, image_norm, region, region_norm, the head" in said


def test_muvlas_projections_are_taken_where_they_fit_and_mean_the_same(
    muvla: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    folder, weights = muvla
    width = weights["text_stream.region.weight"].shape[1]
    pooled = weights["text_stream.image.weight"].shape[1]
    model = tuned(settings(init=str(folder), stream=STREAM, scale_features=False), parts=(width - 8, 8), pooled=pooled)
    assert torch.equal(model.stream.region.weight, weights["text_stream.region.weight"])
    assert torch.equal(model.stream.image.weight, weights["text_stream.image.weight"])
    scaled = tuned(settings(init=str(folder), stream=STREAM), parts=(width - 8, 8), pooled=pooled)
    assert not torch.equal(scaled.stream.region.weight, weights["text_stream.region.weight"])


def test_a_stream_of_other_sizes_is_refused_with_what_to_set(muvla: tuple[Path, dict[str, torch.Tensor]]) -> None:
    with pytest.raises(UserError, match=r"set stream\.layers=2 stream\.heads=2"):
        tuned(settings(init=str(muvla[0]), stream=STREAM | {"layers": 1, "heads": 4}))


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    checkpoint.save(
        tmp_path / "ckpt.pt", recipe="clip", config={}, classes=[], card={}, model={"w": torch.zeros(1)}, step=1
    )
    with pytest.raises(UserError, match="a checkpoint of clip"):
        tuned(settings(init=str(tmp_path)))


def make_bert(folder: Path) -> tuple[SingleStream, Heads]:
    """A folder as BERT's are published, and what is in it."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red", "one", "blue"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    torch.manual_seed(3)
    stream = SingleStream(settings(stream=STREAM).stream, words=len(tokens), feature_width=2)
    heads = Heads(32, words=len(tokens), match=True)
    from vlbench.models.single_stream import _HEAD_NAMES, _stream_names

    published = {there: stream.state_dict()[here] for here, there in _stream_names(2).items() if "tag" not in here}
    published |= {there: heads.state_dict()[here] for here, there in _HEAD_NAMES.items()}
    torch.save(published, folder / "pytorch_model.bin")
    return stream, heads


def test_what_cannot_be_begun_with_is_said_without_a_model(
    muvla: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = muvla[0]
    settings(init=str(folder), stream=STREAM).check_start()
    settings().check_start()
    for size, there in (("layers", 2), ("heads", 2), ("width", 32)):
        other = settings(init=str(folder), stream=STREAM | {size: 4})
        with pytest.raises(UserError, match=rf"its stream has other sizes; set stream\.{size}={there}"):
            other.check_start()
    with pytest.raises(UserError, match="nowhere"):
        settings(init=str(tmp_path / "nowhere")).check_start()
    (tmp_path / "ckpt.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"ckpt\.pt"):
        settings(init=str(tmp_path)).check_start()


def test_a_bert_that_does_not_fit_is_said_without_a_model(tmp_path: Path) -> None:
    make_bert(tmp_path)
    at_hand = torch.random.get_rng_state()
    settings(bert=str(tmp_path), stream=STREAM).check_start()
    assert torch.equal(torch.random.get_rng_state(), at_hand)
    for size, line in (
        ({"width": 16}, "set stream's sizes"),
        ({"hidden": 16}, "set stream's sizes"),
        ({"positions": 40}, "set stream's sizes"),
        ({"layers": 3}, "BERT's weights lack 'encoder.layer.2"),
    ):
        with pytest.raises(UserError, match=line):
            settings(bert=str(tmp_path), stream=STREAM | size).check_start()
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    with pytest.raises(UserError, match=r"config\.json says 4 attention heads; set stream\.heads=4"):
        settings(bert=str(tmp_path), stream=STREAM).check_start()
    settings(bert=str(tmp_path), stream=STREAM | {"heads": 4}).check_start()
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor pytorch_model\.bin is there"):
        settings(bert=str(tmp_path), stream=STREAM | {"heads": 4}).check_start()


def test_berts_weights_and_vocabulary_are_taken(tmp_path: Path) -> None:
    stream, heads = make_bert(tmp_path)
    model = tuned(settings(bert=str(tmp_path), stream=STREAM))
    assert model.words.size == 9
    assert torch.equal(model.stream.layers[1].query.weight, stream.layers[1].query.weight)
    assert torch.equal(model.pooler.weight, heads.pooler.weight)
    last = tuned(settings(bert=str(tmp_path), stream=STREAM, pooler="last_word"))
    assert last.pooler is None
    with pytest.raises(UserError, match="set stream's sizes"):
        tuned(settings(bert=str(tmp_path), stream=STREAM | {"width": 16}))
    with pytest.raises(UserError, match="no folder with a vocab"):
        tuned(settings(bert=str(tmp_path / "nowhere"), stream=STREAM))


def test_two_starts_are_one_too_many() -> None:
    with pytest.raises(ValueError, match="give one"):
        settings(init="a", bert="b")


@pytest.mark.parametrize(
    ("task", "lr", "steps", "warmup", "batch", "words", "clip"),
    [
        ("vqa", 5e-5, 28_000, 2_800, 480, 30, 5.0),
        ("nlvr2", 3e-5, 14_000, 1_400, 60, 128, 5.0),
        ("entailment", 8e-5, 5_000, 500, 480, 60, 5.0),
        ("grounding", 2e-4, 20_000, 2_000, 256, 60, 2.0),
    ],
)
def test_paper_settings_are_the_sheets(
    task: str, lr: float, steps: int, warmup: int, batch: int, words: int, clip: float
) -> None:
    class Own(FusionConfig):
        PRESETS = {"tiny": {}, "paper": PAPER[task]}  # noqa: RUF012

    config = Own(preset="paper")
    assert (config.optim.lr, config.steps, config.schedule.warmup) == (lr, steps, warmup)
    assert (config.batch_size, config.max_words, config.optim.clip_norm) == (batch, words, clip)
    assert config.schedule.kind == "linear"
    assert (config.stream.width, config.stream.layers, config.stream.heads) == (768, 12, 12)
    assert config.pooler == ("last_word" if task == "vqa" else "cls")


def test_the_full_answer_head_has_3129_logits() -> None:
    model = tuned(settings(), head=AnswerHead(3129)).eval()
    given = {
        "words_BL": torch.tensor([[2, 5, 3]]),
        "features_BVRF": torch.zeros(1, 1, 2, 7),
        "box_BVR5": torch.zeros(1, 1, 2, 5),
        "valid_BVR": torch.ones(1, 1, 2, dtype=torch.bool),
        "pooled_BVP": torch.zeros(1, 1, 5),
    }
    assert model(given).shape == (1, 3129)
    assert np.isfinite(model(given).detach().numpy()).all()
