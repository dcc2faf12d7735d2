"""The second engine: detectron2, where a user has built it. It is on no package index, so nothing here depends on it.

This module loads without it; ``detectron2_model.py`` does not.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlbench.core.errors import UserError
from vlbench.finetune.detection.config import DetectionConfig

if TYPE_CHECKING:
    from vlbench.finetune.detection.detectron2_model import Detectron2Detector
    from vlbench.models.towers import VisualTower

HOW_TO_INSTALL = (
    "git clone https://github.com/facebookresearch/detectron2, then "
    "pip install wheel ninja && FORCE_CUDA=0 pip install --no-build-isolation ./detectron2"
)


def detectron2_problem() -> str | None:
    """Why the engine cannot be used here, in one line that says how to mend it; None where it can."""
    try:
        with warnings.catch_warnings():  # of torch.jit, which it still uses
            warnings.simplefilter("ignore", FutureWarning)
            importlib.import_module("detectron2.modeling")
        importlib.import_module("detectron2._C")  # the compiled part: one built for another torch fails here
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "detectron2":
            return f"engine detectron2 lacks {error.name}: pip install {error.name}"
        return f"engine detectron2 is not installed: {HOW_TO_INSTALL}; or take engine: torchvision"
    except ImportError as error:
        text = " ".join(str(error).split())
        return f"engine detectron2 does not load ({text}); build it again with the torch that is installed"
    return None


def build_detectron2(
    tower: VisualTower, config: DetectionConfig, *, n_classes: int, mean: Sequence[float], std: Sequence[float]
) -> Detectron2Detector:
    """detectron2's Mask R-CNN on a copy of ``tower``: see ``Detectron2Detector``.

    Raises:
        UserError: where detectron2 is not there, and as ``Detectron2Detector``.
    """
    problem = detectron2_problem()
    if problem is not None:
        raise UserError(problem)
    from vlbench.finetune.detection.detectron2_model import Detectron2Detector

    return Detectron2Detector(tower, config, n_classes=n_classes, mean=mean, std=std)
