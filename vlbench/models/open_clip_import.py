"""open_clip, imported in a seventh of the time: without the libraries of towers that nobody has asked for yet."""

from __future__ import annotations

import importlib
import sys
import threading
from typing import Any

from vlbench.core.later import absent, compiler_later, complete_at

# What open_clip imports where it finds it, and where it first needs it.
_OPTIONAL = ("timm", "transformers")
_NEEDED_BY = (
    ("open_clip.timm_model", "TimmModel", "__init__"),
    ("open_clip.hf_model", "HFTextEncoder", "__init__"),
    ("open_clip.coca_model", "CoCa", "generate"),
)
_IMPORTING = threading.Lock()


def import_open_clip() -> Any:
    """The package ``open_clip``. Its towers of timm and transformers import those when the first one is made.

    Code that imports open_clip by itself, before or after, can make all of its towers.
    """
    with _IMPORTING:
        if "open_clip" not in sys.modules:
            with absent(*_OPTIONAL), compiler_later():
                importlib.import_module("open_clip")
            for module, owner, method in _NEEDED_BY:
                complete_at(sys.modules[module], owner, method)
    return importlib.import_module("open_clip")  # waits for another thread that is in the midst of it
