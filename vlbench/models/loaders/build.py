"""``pkg.mod:build``: a user's own function that returns a backbone."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

from torch import nn

from vlbench.core.errors import UserError
from vlbench.core.registry import load_attribute
from vlbench.models.loaders.shared import NOT_CLAIMED, RANDOM, importing_from_here, seeded
from vlbench.models.weights import load_strictly, read_weights


def load(ref: str, *, weights: str | None = None, seed: int = 0) -> Any:
    """What the function ``ref`` returns.

    A function with a parameter ``weights`` gets the text of ``--weights`` and does with it what it likes. For any
    other one, a file is loaded into the module that it returned, and ``random`` re-initialises that module.
    Modules are found in the working directory too, after everything installed.

    Raises:
        UserError: where there is no such function, or it returns no backbone.
    """
    with importing_from_here():
        return _load(ref, weights, seed)


def _load(ref: str, weights: str | None, seed: int) -> Any:
    build = load_attribute(ref, what=f"--model {ref}")
    if not callable(build):
        raise UserError(f"--model {ref}: {ref.partition(':')[2]} is a {type(build).__name__}, not a function")
    takes_weights = "weights" in inspect.signature(build).parameters
    with seeded(seed):
        backbone = build(weights=weights) if takes_weights else build()
    # Not isinstance(backbone, Backbone): that would read weights_hash, before the weights are what they will be.
    if not all(hasattr(backbone, member) for member in ("card", "encode_image", "encode_text")):
        raise UserError(
            f"--model {ref}: it returned a {type(backbone).__name__}, not a backbone; "
            "return vlbench.models.wrap(module, preprocess=..., name=...)"
        )
    with contextlib.suppress(AttributeError):  # a user's own class may have no room for it; its own file is looked at
        backbone.built_by = build
    if weights is None or takes_weights:
        return backbone
    module = getattr(backbone, "module", None)
    if not isinstance(module, nn.Module):
        raise UserError(f"--model {ref}: give the function a parameter 'weights' to use --weights with it")
    if weights == RANDOM:
        with seeded(seed):
            _reinitialise(module, ref)
    else:
        load_strictly(module, read_weights(weights), where=f"{weights} in {ref}")
        backbone.card = backbone.card.model_copy(update=NOT_CLAIMED)
    return backbone


def _reinitialise(module: nn.Module, ref: str) -> None:
    """Draw every parameter again, by each layer's own rule."""
    for name, child in module.named_modules():
        own = list(child.parameters(recurse=False))
        reset = getattr(child, "reset_parameters", None) or getattr(child, "_reset_parameters", None)
        if reset is not None:
            reset()
        elif own:
            raise UserError(
                f"--model {ref}: {type(child).__name__} {name!r} has parameters and no reset_parameters(), so vlbench "
                "cannot initialise it again; give the function a parameter 'weights' and handle 'random' there"
            )
