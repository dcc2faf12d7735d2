"""Class embeddings from a prompt ensemble: what zero-shot classifiers and language-initialised heads start from.

Shape suffixes: C classes, T templates, E joint width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vlbench.adapters.common.classification import unit
from vlbench.core.errors import UserError


def templates_of(data: Any) -> list[str]:
    """The prompt templates of a task's data. Raises UserError where there are none."""
    templates = list(data.templates or ())
    if not templates:
        raise UserError(f"{data.spec}: no prompt templates; name a file of them in the task card's prompts.templates")
    return templates


def class_embeddings(encoder: Any, classes: list[str], templates: list[str]) -> np.ndarray:
    """``class_CE``: the unit-length prompt ensemble of every class, float64.

    All texts of all classes are embedded in one stream of batches, not one call a class.
    """
    from vlbench.data.prompting import render

    words = [name.replace("_", " ") for name in classes]  # class names are often folder names
    texts = [render(template, name) for name in words for template in templates]
    text_CTE = unit(encoder.texts(texts)).reshape(len(classes), len(templates), -1)
    return unit(text_CTE.mean(axis=1))
