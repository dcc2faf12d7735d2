"""Fusion models as a fine-tuning recipe: what is built, and its loss. And their answers.

Shapes: B questions, C classes, R regions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from vlbench.core.cards import ModelCard
from vlbench.core.errors import UserError
from vlbench.data.loading import in_batches, loaded
from vlbench.finetune.fusion.feed import question_batch
from vlbench.finetune.fusion.heads import NO_REGION, Head
from vlbench.finetune.fusion.model import FusionModel, Sight
from vlbench.finetune.fusion.questions import Questions
from vlbench.finetune.fusion.start import start_from, vocabulary_of
from vlbench.finetune.fusion.views import Views
from vlbench.finetune.fusion.words import Words
from vlbench.finetune.recipe import FineTuner
from vlbench.models.roi import DeepestMaps
from vlbench.train.batches import Batch


class FusionTuner(FineTuner):
    """A stream over words and an image's tokens, with one head.

    Where the backbone is trained, its tower is copied into the model and its BatchNorms learn with it: they use the
    statistics of the batch and keep running ones, as in pretraining. Its text tower and projections stay behind.

    Args:
        head: what is predicted.
        sight: the image side.
        visual: the tower, where it is trained. It is copied, never changed.
        card: of the backbone.
        assets: the vocabulary (``words``), once known.
    """

    name = "fusion"

    def __init__(
        self,
        head: Head,
        sight: Sight,
        *,
        visual: DeepestMaps | None = None,
        card: ModelCard | None = None,
        assets: Mapping[str, bytes] | None = None,
    ) -> None:
        self.head, self.sight, self.visual, self.card = head, sight, visual, card
        self.assets = dict(assets or {})

    def learn_assets(self, config: Any, data: Any) -> dict[str, bytes]:
        """The vocabulary, of the training questions or of what the run begins with; the answers, one a line."""
        found = {"words": vocabulary_of(config, data.texts)}
        names: tuple[str, ...] = getattr(self.head, "names", ())
        return found | ({"answers": "\n".join(names).encode()} if names else {})

    def with_assets(self, assets: Mapping[str, bytes]) -> FusionTuner:
        """The recipe that knows its words."""
        return FusionTuner(self.head, self.sight, visual=self.visual, card=self.card, assets=assets)

    def words(self, config: Any) -> Words:
        """What texts are read with."""
        assert "words" in self.assets, "a fusion model is built after its vocabulary is known"
        return Words(self.assets["words"], config.max_words)

    def build(self, config: Any, classes: Sequence[str]) -> FusionModel:
        """A fresh stream and head, on the weights of ``init`` or ``bert``; the tower as it was pretrained."""
        model = FusionModel(
            config,
            self.head,
            self.sight,
            words=self.words(config),
            visual=copy.deepcopy(self.visual),
            preprocess=self.card.preprocess if self.card is not None else None,
        )
        model.started = start_from(model, config)
        return model

    def loss(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """The head's."""
        return {"loss": self.head.loss(model(batch), batch["target"])}


def answers(
    model: Any, questions: Questions, views: Views, config: Any, *, device: str | torch.device
) -> list[np.ndarray]:
    """What the model says of each question: ``logits_C``, or ``logits_R`` of its first image's regions; float32.

    Questions of like length share a batch; what is padding in it has no part in an answer. Regions beyond those that
    are read have the logit of no region.

    Raises:
        UserError: for an image that cannot be read, and for logits that are not finite.
    """
    rows, _ = model.words(questions.texts)
    order = sorted(range(len(rows)), key=lambda question: (len(rows[question]), question))
    batches = in_batches(order, config.batch_size)
    counts = views.counts() if model.reads_regions else None
    found: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(rows)
    device, training = torch.device(device), model.training
    model.eval()
    try:
        for chosen, batch in zip(batches, _loaded(rows, views, batches, config.workers), strict=True):
            here = {name: part.to(device, non_blocking=True) for name, part in batch.items()}
            with (
                torch.inference_mode(),
                torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"),
            ):
                logits = model(here).float().cpu().numpy()
            if not np.isfinite(logits).all():
                raise UserError("the fine-tuned model gives answers that are not finite; try a lower optim.lr")
            for question, logits_C in zip(chosen, logits, strict=True):
                found[question] = logits_C if counts is None else _of_regions(logits_C, int(counts[question]))
    finally:
        model.train(training)
    return found


def _of_regions(logits_R: np.ndarray, count: int) -> np.ndarray:
    """The logits of ``count`` regions: padding is cut off, and what was not read is no region."""
    whole = np.full(count, NO_REGION, dtype=np.float32)
    read = min(count, len(logits_R))
    whole[:read] = logits_R[:read]
    return whole


def _loaded(
    rows: Sequence[Sequence[int]], views: Views, batches: Sequence[Sequence[int]], workers: int
) -> Iterator[Batch]:
    workers = min(workers, len(batches)) if views.decodes else 0
    return loaded(partial(question_batch, rows, views), batches, workers=workers)
