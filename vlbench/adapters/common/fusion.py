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
from vlbench.data.regions.sized import SizedRegions, image_key
from vlbench.data.sources import without_images

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
        UserError: for a start (``init``, ``bert``) that cannot be taken, before any image is encoded; for a backbone
            that cannot be read or trained so, data that do not suit the head, bad features.
        RunError: as ``finetune.run.finetune``.
    """
    from vlbench.adapters.encoder import FEATURES_VERSION
    from vlbench.finetune.folder import work_folder
    from vlbench.finetune.fusion.feed import QuestionFeed
    from vlbench.finetune.fusion.recipe import FusionTuner, answers
    from vlbench.finetune.run import finetune

    config.check_start()
    _check(head, train, config)
    card = encoder.backbone.card
    visual = visual_reader(encoder.backbone, levels=config.levels, cells=config.cells) if _trains(config) else None
    views = ViewsOf(encoder, config, visual)
    learnt, chosen_on = views(train), views(held_out)
    ready = _looked_at(views, chosen_on, asked)
    recipe = FusionTuner(head, learnt.sight, visual=visual, card=card)
    feed = QuestionFeed(train, learnt, head)
    # The order of the questions decides a run, and the data's own fingerprint knows none.
    order = [{key: value for key, value in said.items() if key != "spec"} for said in feed.identity()]
    asked_under = config.asked_in(encoder.precision) if _holds_all(config) else config
    # The precision of the encoder is that of frozen features; what reads no such is trained the same in any.
    of_features = None if _holds_all(config) else encoder.precision
    folder = work_folder(
        card.arch,
        backbone=fingerprint([encoder.fingerprint, of_features, FEATURES_VERSION]),
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
    notes += config.notes_on_asking() if _holds_all(config) else []
    logits = {
        name: answers(tuned.module, questions, ready.get(name) or views(questions), asked_under, device=encoder.device)
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


def _holds_all(config: FusionConfig) -> bool:
    """Whether the tuned model computes all that it answers by: it reads no frozen features of the backbone."""
    return config.features is not None or config.backbone == "trained"


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
        from vlbench.finetune.fusion.views import FixedViews

        columns = [[image_key(without_images(view, index)) for index in range(len(view))] for view in questions.views]
        store = SizedRegions(open_regions(path), path, questions.views)
        missing = sorted({key for column in columns for key in column if key not in store})
        if missing:
            raise UserError(f"{path}: {len(missing)} images have no features there, first {missing[0]!r}")
        keys_NV = list(zip(*columns, strict=True))
        return FixedViews(store, keys_NV, self.config.feature_width, self.config.max_regions, path)


def _looked_at(views: ViewsOf, chosen_on: Views, asked: Mapping[str, Questions]) -> dict[str, Views]:
    """What is asked, where a file has its regions: they are light to have. No other views are made.

    All entries are looked at, those that weights are chosen on too: a wrong one would else be met after the training.
    """
    from vlbench.finetune.fusion.views import FixedViews

    ready = {name: views(questions) for name, questions in asked.items()} if views.config.features is not None else {}
    for found in (chosen_on, *ready.values()):
        if isinstance(found, FixedViews):
            found.check()
    return ready


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
