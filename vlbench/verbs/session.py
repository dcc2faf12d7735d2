"""One call of ``vlbench eval``: the model, its encoders, the data that are open, and where results go."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlbench.core.cards import model_cards
from vlbench.core.fingerprint import fingerprint
from vlbench.core.types import ModelRef
from vlbench.store.features import FeatureStore
from vlbench.store.results import ResultStore
from vlbench.verbs import machine
from vlbench.verbs.crew import Crew, own_device
from vlbench.verbs.progress import EncodingProgress

if TYPE_CHECKING:
    from vlbench.adapters.encoder import Encoder


@dataclass
class Session:
    """One call of ``vlbench eval``."""

    model: ModelRef
    encode_with: Callable[[str], Encoder]
    """An encoder by its precision."""
    results: ResultStore
    settings: dict[str, Any]
    force: bool
    provenance: dict[str, Any]
    """``versions`` and ``commit`` of the software."""
    spread: bool = False
    """Whether every task is also measured in bf16, to say what that changes."""
    crew: Crew = field(default_factory=Crew)
    encoders: dict[str, Encoder] = field(default_factory=dict)
    tuned: list[Path] = field(default_factory=list)
    """Where the models are that the task at hand was fine-tuned to."""
    data: dict[str, Any] = field(default_factory=dict)
    """Opened task data by spec and splits: tasks on the same data share them."""

    @property
    def encoder(self) -> Encoder:
        """The encoder of the precision that was asked for."""
        return self.encoder_in(self.settings["precision"])

    def encoder_in(self, precision: str) -> Encoder:
        """The encoder of one precision; made when it is first asked for."""
        if precision not in self.encoders:
            self.encoders[precision] = self.encode_with(precision)
        return self.encoders[precision]

    def opened(self, spec: str, splits: Mapping[str, str]) -> Any:
        """The ``data.taskdata.TaskData`` of ``spec``, opened and read once for all tasks on these splits."""
        from vlbench.data.taskdata import TaskData

        key = fingerprint([spec, dict(splits)])
        if key not in self.data:
            self.data[key] = TaskData(spec, splits, pretrained_on=self.model.pretrain_data)
        return self.data[key]


def open_session(args: argparse.Namespace, crew: Crew) -> Session:
    """Load the model and prepare stores and encoders."""
    from vlbench.adapters.encoder import FEATURES_VERSION, Encoder
    from vlbench.models.backbone import backbone_fingerprint
    from vlbench.models.known import open_backbone
    from vlbench.models.user_code import has_known_code

    device = machine.choose_device(own_device(args.device))
    _make_current(device)
    backbone = open_backbone(args.model, weights=args.weights, name=args.name, device=device)
    card = backbone.card
    model = ModelRef(
        name=card.id,
        spec=_asked_for(args.model, args.weights),
        weights_hash=backbone.weights_hash,
        backbone_fingerprint=backbone_fingerprint(backbone),
        **{key: getattr(card, key) for key in ("recipe", "arch", "params", "pretrain_data", "images_seen")},
        seed=card.seed,
        random=card.random,
    )
    code_is_known = has_known_code(backbone)
    if not code_is_known:
        print("note: the source of the model's code cannot be read: features are not kept, results not used again")
    keeps = code_is_known and not args.no_store
    store = FeatureStore() if keeps else FeatureStore(crew.scratch) if crew.scratch else None
    progress = EncodingProgress() if crew.first else None

    def encode_with(precision: str) -> Encoder:
        return Encoder(
            backbone,
            store,
            batch_size=args.batch_size,
            precision=precision,
            device=device,
            workers=machine.choose_workers(args.workers, sharing=crew.local),
            progress=progress,
            share=crew.dealing(precision) if crew.world > 1 else None,
        )

    settings = {"precision": args.precision, "batch_size": args.batch_size, **machine.describe(device)}
    settings["features_version"] = FEATURES_VERSION
    if crew.world > 1:
        settings["processes"] = crew.world
    provenance = {"versions": machine.versions(), "commit": machine.commit()}
    print(f"model: {model.name} ({card.arch}, weights {model.weights_hash}) on {settings['device_name']}")
    results = ResultStore(args.results)
    return Session(model, encode_with, results, settings, args.force, provenance, args.precision_spread, crew)


def _asked_for(model: str, weights: str | None) -> str:
    """The model as a result names it. A path that is called like a reference card is not taken for the card."""
    if ":" not in model and Path(model).exists() and model in model_cards():
        model = f"./{model}"
    return model if weights is None else f"{model} --weights {weights}"


def _make_current(device: str) -> None:
    """Let torch use this GPU for what names none (pinned memory, say): else every process also fills the first one."""
    if device.startswith("cuda:"):
        import torch

        torch.cuda.set_device(device)
