"""Detection and instance segmentation: the backbone as the body of a Mask R-CNN, tuned on annotated objects.

One recipe for every backbone: a feature pyramid over its maps (ViTs: a simple one), Mask R-CNN's heads, one of two
engines, one schedule (``preset``). Where the step is chosen (``select: best``) or a learning rate (``search``), a share
of the training images decides; the published schedules take their last weights and learn from all images.

What is reported are COCO's numbers for boxes and masks, ``mask_ap`` first. A row is an image, with its objects and what
was found, so that tables, intervals and paired tests are made again without the data. The unit of sampling is the
image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vlbench.adapters.common.classification import estimates, overlap_note
from vlbench.adapters.common.coco_rows import check_images, detection_outcomes, detection_rows
from vlbench.adapters.common.held_out import learn_and_choose
from vlbench.adapters.common.questions import CONSTANT, Chosen
from vlbench.core.errors import UserError
from vlbench.core.types import Estimate, Outcomes, Part, Provides, Rows, Source
from vlbench.finetune.detection.config import DetectionConfig
from vlbench.finetune.detection.types import Detections

if TYPE_CHECKING:
    from torch import nn


class Detection:
    """The adapter. Reports test, which a card may say is the data's val."""

    name: ClassVar[str] = "detection"
    Config: ClassVar[type[DetectionConfig]] = DetectionConfig
    metric: ClassVar[str] = "mask_ap"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "regions"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"pooled"})
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    trains: ClassVar[bool] = True

    def lack(self, config: DetectionConfig) -> str | None:
        """Why these settings cannot run on this machine; None where they can."""
        if config.engine != "detectron2":
            return None
        from vlbench.finetune.detection.detectron2_engine import detectron2_problem

        return detectron2_problem()

    def predict(self, encoder: Any, data: Any, config: DetectionConfig) -> Rows:
        """One row an image, as ``common.coco_rows`` describes them.

        Raises:
            UserError: where the splits do not list the same classes, or an image that is reported or chosen on is of
                another size than its annotations say. Both before anything is trained.
        """
        test = data.split("test")
        card = encoder.backbone.card
        if (card.loader, card.arch) == CONSTANT:
            return detection_rows(test, [_nothing()] * len(test), meta={"chosen": {}, "notes": []})
        learn, choose, roles, notes = _parts(encoder, data, config)
        judged = [source for source in (choose, test) if source is not None]
        for source in judged:
            _refuse_other_classes(data.spec, learn, source)
        for source in judged:
            check_images(source)
        seen = {image for source in (learn, choose) if source is not None for image in encoder.image_digests(source)}
        notes += [*overlap_note(seen, encoder.image_digests(test)), *config.notes_on_asking()]
        found, chosen = _tuned_detections(encoder, learn, choose, test, config, data.fingerprint(roles))
        rows = detection_rows(test, found, meta={"chosen": chosen, "notes": notes})
        if config.engine == "detectron2":
            from vlbench.finetune.detection.detectron2_evaluation import second_opinion

            rows = second_opinion(rows)
        return rows

    def outcomes(self, rows: Rows, config: DetectionConfig) -> dict[str, Outcomes]:
        """``mask_ap``, ``box_ap`` and their kin."""
        return detection_outcomes(rows)

    def score(self, rows: Rows, config: DetectionConfig) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


def _parts(
    encoder: Any, data: Any, config: DetectionConfig
) -> tuple[Source, Source | None, tuple[str, ...], list[str]]:
    """What is learnt from, what is chosen on (None: nothing is chosen), the splits that these are of, and notes."""
    if config.select == "last" and not config.search:
        return data.split("train"), None, ("train",), []
    return learn_and_choose(
        data,
        config.held_out,
        read=lambda source: source,
        take=lambda train, chosen: Chosen(train, chosen, split=train.split),
        images=lambda train: [(image,) for image in encoder.image_digests(train)],
        unit="images",
    )


def _refuse_other_classes(spec: str, learn: Source, source: Source) -> None:
    """A detector's answer is a place in the list of classes: another list would read it as another class."""
    learnt, told = learn.classes or (), source.classes or ()
    if learnt == told:
        return
    place = next((i for i, (one, other) in enumerate(zip(learnt, told)) if one != other), min(len(learnt), len(told)))
    one, other = (repr(names[place]) if place < len(names) else "absent" for names in (learnt, told))
    raise UserError(
        f"data {spec!r}: class {place} is {one} in {learn.split} and {other} in {source.split}; give both files one "
        "list of categories"
    )


def _tuned_detections(
    encoder: Any, learn: Source, choose: Source | None, test: Source, config: DetectionConfig, data_key: str
) -> tuple[list[Detections], dict[str, Any]]:
    from vlbench.finetune.detection.feed import DetectionFeed
    from vlbench.finetune.detection.recipe import DetectionTuner, detect_all, renew_norms
    from vlbench.finetune.folder import work_folder
    from vlbench.finetune.run import finetune

    def judge(model: nn.Module) -> float:
        assert choose is not None, "asked only where there is a choice"
        return _value(choose, detect_all(model, choose, config, device=encoder.device))

    card, feed = encoder.backbone.card, DetectionFeed(learn, config)
    folder = work_folder(card.arch, backbone=encoder.fingerprint, adapter="detection", config=config, data_key=data_key)
    tuned = finetune(
        DetectionTuner(encoder.backbone),
        config,
        feed=feed,
        judge=judge if choose is not None else None,
        folder=folder,
        device=encoder.device,
    )
    renew_norms(tuned.module, feed, config)
    asked = config.asked_in(encoder.precision)
    found = detect_all(tuned.module, test, asked, device=encoder.device, together=True)
    chosen: dict[str, Any] = {"learning_rate": tuned.learning_rate, "step": tuned.step}
    if choose is not None:
        chosen |= {"held_out": tuned.value, "history": list(tuned.history)}
    return found, chosen


def _value(source: Source, found: Sequence[Detections]) -> float:
    """Mask AP, or box AP where there are no masks."""
    numbers = detection_rows(source, found).meta["coco"]
    return float(numbers.get("mask_ap", numbers["box_ap"]))


def _nothing() -> Detections:
    return Detections(
        boxes_K4=np.zeros((0, 4), dtype=np.float32),
        scores_K=np.zeros(0, dtype=np.float32),
        classes_K=np.zeros(0, dtype=np.int64),
        masks=(),
    )


ADAPTER = Detection()
