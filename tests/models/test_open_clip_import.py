"""open_clip imported without timm and transformers is the same open_clip, once they are asked for."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.models.conftest import TINY_OPEN_CLIP, TINY_TEXT

PROLOGUE = """
import contextlib, json, sys
import torch
from pathlib import Path
def loaded():
    return [name for name in ("timm", "transformers", "torch._dynamo", "torch._dynamo.utils") if name in sys.modules]
"""
# One image and one text of each architecture, as exact numbers; and what CoCa says of an image, where it can.
EVERY_KIND = """
import vlbench.models.loaders.open_clip as loader
folder = Path(sys.argv[1])
import open_clip
open_clip.add_model_config(folder)
torch.manual_seed(0)
image_BCHW, tokens_BL = torch.randn(1, 3, 32, 32), torch.randint(3, 90, (1, 16))
said = {}
for name in ("tiny-vit", "tiny-timm", "tiny-hf", "tiny-coca"):
    model = loader._model(name, None, quick_gelu=False, seed=0)
    if name == "tiny-coca":  # transformers of today has no longer what its captions need
        with contextlib.suppress(AssertionError):
            said["generated"] = model.generate(image_BCHW, seq_len=8, generation_type="top_k").tolist()
        said["generates"] = open_clip.coca_model._has_transformers
    text_BL = tokens_BL if name == "tiny-hf" else torch.nn.functional.pad(tokens_BL, (0, model.context_length - 16))
    with torch.inference_mode():
        said[name] = [model.encode_image(image_BCHW).tolist(), model.encode_text(text_BL).tolist()]
    said[name].append(type(loader._tower(model.visual, name, 24)).__name__)
said["loaded"] = loaded()
print(json.dumps(said))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tiny configurations, one with a text tower of transformers."""
    bert = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert |= {"intermediate_size": 32, "vocab_size": 99, "max_position_embeddings": 32}
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps(bert))
    text = {"hf_model_name": str(tmp_path / "bert"), "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"}
    with_bert = TINY_OPEN_CLIP["tiny-vit"] | {"text_cfg": TINY_TEXT | text | {"hf_model_pretrained": False}}
    (tmp_path / "configs").mkdir()
    for name, config in {**TINY_OPEN_CLIP, "tiny-hf": with_bert}.items():
        (tmp_path / "configs" / f"{name}.json").write_text(json.dumps(config))
    return tmp_path / "configs"


def run(code: str, *words: str) -> str:
    """What Python prints; of its own process, since modules are imported once in each."""
    call = [sys.executable, "-c", PROLOGUE + textwrap.dedent(code), *words]
    return subprocess.run(call, check=True, capture_output=True, text=True).stdout


def test_a_plain_clip_needs_neither_timm_nor_transformers_nor_the_compiler(folder: Path) -> None:
    run(
        """
        from vlbench.models.open_clip_import import import_open_clip
        open_clip = import_open_clip()
        assert not loaded(), loaded()
        open_clip.add_model_config(Path(sys.argv[1]))
        open_clip.create_model("tiny-vit", load_weights=False)
        from vlbench.data import transforms
        assert not loaded(), loaded()

        from torchvision.ops import roi_align
        supported = roi_align.__globals__["is_compile_supported"]("cpu")
        from torch._dynamo.utils import is_compile_supported
        assert supported == is_compile_supported("cpu")
        assert type(sys.modules["torch._dynamo.utils"]) is type(sys), "the stand-in is gone"
        import timm, transformers
        """,
        str(folder),
    )


def test_every_kind_of_tower_is_what_it_is_after_a_whole_import(folder: Path) -> None:
    pytest.importorskip("transformers")
    light = "from vlbench.models.open_clip_import import import_open_clip; import_open_clip(); assert not loaded()\n"
    found = [json.loads(run(first + EVERY_KIND, str(folder))) for first in (light, "import open_clip\n")]
    assert found[0] == found[1]
    assert [found[0][name][2] for name in ("tiny-vit", "tiny-timm")] == ["ClipViTTower", "ClipTimmTower"]
    assert {"timm", "transformers"} <= {*found[0]["loaded"]}
