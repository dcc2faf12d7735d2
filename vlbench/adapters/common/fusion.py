"""A backbone as the eyes of a fusion model: tuned on a task's questions, then asked those of its reported splits.

The image side is what the settings say: the backbone's frozen features, the backbone trained along, or a file of fixed
region features. Everything else is the same for every backbone, so that what differs in a table is the backbone.

Under ``torchrun`` every process calls ``tune_and_answer`` with the same questions: features are dealt out, training is
distributed, and every process has the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vlbench.adapters.common.region_features import region_features, visual_reader
from vlbench.core.errors import UserError
from vlbench.core.fingerprint import fingerprint

if TYPE_CHECKING:
    from vlbench.finetune.fusion.config import FusionConfig
    from vlbench.finetune.fusion.heads import Head
    from vlbench.finetune.fusion.questions import Questions
    from vlbench.finetune.fusion.views import Views
    from vlbench.models.roi import DeepestMaps


@dataclass(frozen=True)
class FusionAnswers:
    """What a tuned model says of the questions that it was asked."""

    logits: dict[str, list[np.ndarray]]
    """One array a question, float32: of the classes or answers, or of the regions of its first image."""
    chosen: dict[str, Any]
    """The learning rate and step that were taken, their value on held-out data, and every judgement."""
    notes: list[str] = field(default_factory=list)


def tune_and_answer(
    encoder: Any,
    head: Head,
    *,
    train: Questions,
    held_out: Questions,
    asked: Mapping[str, Questions],
    judge: Callable[[list[np.ndarray]], float],
    config: FusionConfig,
    data_key: str,
) -> FusionAnswers:
    """Tune a fusion model over ``encoder``'s backbone, and ask it.

    Args:
        encoder: the Encoder: backbone, precision, device, workers, store.
        head: a head of ``finetune.fusion.heads``.
        train: what is learnt from.
        held_out: what weights and learning rate are chosen on.
        asked: what the chosen model is asked, by name.
        judge: how good answers to ``held_out`` are, one array a question; higher is better.
        config: resolved settings.
        data_key: says which task and data these are; with the settings and the backbone it names the work folder.

    Raises:
        BadExample: where an image cannot be read.
        UserError: for a backbone that cannot be read or trained so, data that do not suit the head, bad features.
        RunError: as ``finetune.run.finetune``.
    """
    from vlbench.adapters.encoder import FEATURES_VERSION
    from vlbench.finetune.fusion.feed import QuestionFeed
    from vlbench.finetune.fusion.recipe import FusionTuner, answers
    from vlbench.finetune.run import finetune, work_folder

    _check(head, train, config)
    card = encoder.backbone.card
    visual = visual_reader(encoder.backbone, levels=config.levels, cells=config.cells) if _trains(config) else None
    views = ViewsOf(encoder, config, visual)
    learnt, chosen_on = views(train), views(held_out)
    recipe = FusionTuner(head, learnt.sight, visual=visual, card=card)
    feed = QuestionFeed(train, learnt, head)
    # The order of the questions decides a run, and the data's own fingerprint knows none.
    order = [{key: value for key, value in said.items() if key != "spec"} for said in feed.identity()]
    folder = work_folder(
        card.id,
        backbone=fingerprint([encoder.fingerprint, encoder.precision, FEATURES_VERSION]),
        adapter="fusion",
        config=config,
        data_key=fingerprint([data_key, repr(head), order, config.contents()]),
    )
    tuned = finetune(
        recipe,
        config,
        feed=feed,
        judge=lambda model: judge(answers(model, held_out, chosen_on, config, device=encoder.device)),
        folder=folder,
        device=encoder.device,
    )
    notes = _notes(tuned.module, config, {"train": train, "held-out": held_out, **asked})
    logits = {
        name: answers(tuned.module, questions, views(questions), config, device=encoder.device)
        for name, questions in asked.items()
    }
    chosen = {
        "learning_rate": tuned.learning_rate,
        "step": tuned.step,
        "held_out": tuned.value,
        "history": list(tuned.history),
    }
    return FusionAnswers(logits, chosen, notes)


def _trains(config: FusionConfig) -> bool:
    return config.features is None and config.backbone == "trained"


class ViewsOf:
    """The image side of questions, as the settings say."""

    def __init__(self, encoder: Any, config: FusionConfig, visual: DeepestMaps | None) -> None:
        self.encoder, self.config, self.visual = encoder, config, visual

    def __call__(self, questions: Questions) -> Views:
        """Their images: encoded now where the backbone is frozen, decoded in training where it is not."""
        from vlbench.finetune.fusion.model import Sight
        from vlbench.finetune.fusion.views import BankViews, DecodedViews

        config = self.config
        if config.features is not None:
            return self._fixed(questions, config.features)
        boxes = _boxes(questions) if questions.regions else None
        most = config.max_regions if questions.regions else config.grid**2
        if self.visual is None:
            bank = region_features(
                self.encoder,
                questions.views,
                levels=config.levels,
                cells=config.cells,
                grid=config.grid,
                boxes=boxes,
                pooled=config.image_token,
            )
            return BankViews(bank, most)
        pooled = self.visual.pooled_width if config.image_token else None
        sight = Sight(self.visual.parts, pooled, len(questions.views))
        preprocess = self.encoder.backbone.card.preprocess
        return DecodedViews(questions, preprocess, boxes=boxes, grid=config.grid, sight=sight, most=most)

    def _fixed(self, questions: Questions, path: str) -> Views:
        from vlbench.data.regions.open import open_regions
        from vlbench.finetune.fusion.views import FixedViews, image_key

        columns = [[image_key(source[index]) for index in range(len(source))] for source in questions.views]
        store = open_regions(path)
        missing = sorted({key for column in columns for key in column if key not in store})
        if missing:
            raise UserError(f"{path}: {len(missing)} images have no features there, first {missing[0]!r}")
        keys_NV = list(zip(*columns, strict=True))
        return FixedViews(store, keys_NV, self.config.feature_width, self.config.max_regions, path)


def _boxes(questions: Questions) -> list[list[np.ndarray]]:
    """The boxes of each image of each question."""
    from vlbench.finetune.fusion.views import annotated_boxes

    return [list(row) for row in zip(*map(annotated_boxes, questions.views), strict=True)]


def _check(head: Head, train: Questions, config: FusionConfig) -> None:
    if not len(train):
        raise UserError("there are no questions to learn from")
    if head.reads_regions and not (train.regions or config.features is not None):
        raise UserError("a region is chosen among the boxes of an image, and these questions come without any")
    if head.reads_regions and max(train.targets) >= config.max_regions:
        raise UserError(f"a training question means region {max(train.targets)}, the first being 0; raise max_regions")


def _notes(model: Any, config: FusionConfig, splits: Mapping[str, Questions]) -> list[str]:
    """What there is to say beside the numbers."""
    notes: list[str] = list(model.started)
    for name, questions in splits.items():
        _, cut = model.words(questions.texts)
        if cut:
            notes.append(f"{cut} of {len(questions)} {name} texts are longer than max_words={config.max_words}: cut")
    return notes
