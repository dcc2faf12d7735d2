"""What of a stored result was set, and what was found: only the first explains a difference of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlbench.core.types import Result

FINDINGS = frozenset({"notes", "chance", "chosen", "fit", "best_epoch_on_test", "bf16_difference", "processes"})
"""Kept among settings or with rows, and no setting: what was found, what is shown under another name, and how many
processes shared the work, which moves no number."""
_HYPER_PARAMETERS = ("C", "lr", "weight_decay")
"""What of ``chosen`` decides the classifier; the rest says how good it was: held out or, of few shots, on test."""


def features_version(result: Result) -> int:
    """``adapters.encoder.FEATURES_VERSION`` of the features behind ``result``, recorded since version 1 was current."""
    return int(result.settings.get("features_version", 1))


def run_settings(result: Result) -> dict[str, Any]:
    """The settings of the run: precision, device and so on."""
    settings = {**result.settings, "features_version": features_version(result)}
    return {name: value for name, value in settings.items() if name not in FINDINGS}


def chosen_settings(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters among ``chosen``; of several draws of shots, one list a number of shots: ``C@5``."""
    found = {name: value for name, value in chosen.items() if name in _HYPER_PARAMETERS}
    for ending, draws in chosen.items():
        if isinstance(draws, list) and draws and all(isinstance(draw, Mapping) for draw in draws):
            known = [name for name in _HYPER_PARAMETERS if all(name in draw for draw in draws)]
            found |= {f"{name}{ending}": [draw[name] for draw in draws] for name in known}
    return found
