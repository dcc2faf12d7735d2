"""Tiny models of every library, made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TINY_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TINY_OPEN_CLIP = {
    "tiny-vit": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2},
        "text_cfg": TINY_TEXT,
    },
    "tiny-rn": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None},
        "text_cfg": TINY_TEXT,
    },
    "tiny-timm": {
        "embed_dim": 24,
        "vision_cfg": {"timm_model_name": "test_resnet", "timm_proj": "linear", "image_size": 32},
        "text_cfg": TINY_TEXT,
    },
    "tiny-coca": {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 16,
            "width": 32,
            "head_width": 16,
            "layers": 2,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        "text_cfg": {**TINY_TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 76, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        "custom_text": True,
    },
}


@pytest.fixture(scope="session")
def tiny_open_clip(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of tiny configurations, registered with open_clip for this run."""
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    for name, config in TINY_OPEN_CLIP.items():
        Path(folder, f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return list(TINY_OPEN_CLIP)
