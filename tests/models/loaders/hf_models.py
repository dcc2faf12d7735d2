"""Tiny models of transformers, written to folders as ``save_pretrained`` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = ("a", "red", "blue", "circle", "square", "two", "on", "white", "ground", "photo", "of", "the")
TEXTS = ["a red circle", "two blue square on a white ground", "a"]
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

_VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION = {**_VIT, "image_size": 32, "patch_size": 8}
_TEXT = {**_VIT, "vocab_size": 40, "max_position_embeddings": 20}
_CLIP_TOKENS = {"bos_token_id": 37, "eos_token_id": 38, "pad_token_id": 39}
_ALIGN_VISION = {
    "image_size": 48,
    "hidden_dim": 64,
    "in_channels": [32, 48],
    "out_channels": [48, 96],
    "strides": [1, 2],
    "kernel_sizes": [3, 3],
    "expand_ratios": [1, 4],
    "num_block_repeats": [1, 1],
    "depthwise_padding": [],
    "depth_divisor": 4,
    "width_coefficient": 0.25,
    "depth_coefficient": 1.0,
}


def processor(**settings: Any) -> dict[str, Any]:
    """A preprocessor_config.json; CLIP's where nothing else is said."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 32},
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
        "do_rescale": True,
        "rescale_factor": 0.00392156862745098,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "resample": 3,
        **settings,
    }


SIGLIP_PROCESSOR = processor(
    image_processor_type="SiglipImageProcessor", size={"height": 32, "width": 32}, do_center_crop=None, crop_size=None
)
DINO_PROCESSOR = processor(
    image_processor_type="BitImageProcessor", size={"shortest_edge": 40}, crop_size={"height": 28, "width": 28}
)
VIT_PROCESSOR = processor(
    image_processor_type="ViTImageProcessor",
    size={"height": 32, "width": 32},
    do_center_crop=None,
    crop_size=None,
    resample=2,
    image_mean=[0.5] * 3,
    image_std=[0.5] * 3,
)
ALIGN_PROCESSOR = processor(
    image_processor_type="EfficientNetImageProcessor",
    size={"height": 57, "width": 57},
    crop_size={"height": 48, "width": 48},
    do_normalize=False,
    include_top=False,
    resample=2,
    rescale_factor=0.00784313725490196,
    rescale_offset=True,
)
CONVNEXT_PROCESSOR = processor(
    image_processor_type="ConvNextImageProcessor", size={"shortest_edge": 64}, crop_pct=0.875, do_center_crop=None
)


def build(kind: str) -> Any:
    """A tiny model with random weights, LayerNorms and biases included."""
    import transformers as hf

    torch.manual_seed(3)
    makers = {
        "clip": lambda: hf.CLIPModel(
            hf.CLIPConfig(vision_config=_VISION, text_config=_TEXT | _CLIP_TOKENS, projection_dim=24)
        ),
        "siglip": lambda: hf.SiglipModel(hf.SiglipConfig(vision_config=_VISION, text_config=_TEXT)),
        "align": lambda: hf.AlignModel(
            hf.AlignConfig(
                vision_config=_ALIGN_VISION, text_config=_TEXT | {"max_position_embeddings": 80}, projection_dim=24
            )
        ),
        "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**_VIT, image_size=42, patch_size=14)),
        "dinov2_with_registers": lambda: hf.Dinov2WithRegistersModel(
            hf.Dinov2WithRegistersConfig(**_VIT, image_size=42, patch_size=14, num_register_tokens=3)
        ),
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**_VISION, num_labels=5)),
        "convnext": lambda: hf.ConvNextModel(
            hf.ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 2, 1], image_size=64)
        ),
    }
    model = makers[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh biases are zeros, which would hide a missing one
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


PROCESSORS = {
    "clip": processor(),
    "siglip": SIGLIP_PROCESSOR,
    "align": ALIGN_PROCESSOR,
    "dinov2": DINO_PROCESSOR,
    "dinov2_with_registers": DINO_PROCESSOR,
    "vit": VIT_PROCESSOR,
    "convnext": CONVNEXT_PROCESSOR,
}


def save(kind: str, folder: Path) -> Any:
    """Write the model, its processor and its tokenizer. Returns the model."""
    model = build(kind)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[kind]))
    if kind in ("clip", "siglip", "align"):
        tokenizer(kind).save_pretrained(folder)
    return model


def tokenizer(kind: str) -> Any:
    """A tokenizer of one token a word, with the special tokens that the family expects."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    begin, end, pad = ("[CLS]", "[SEP]", "[PAD]") if kind == "align" else ("<s>", "</s>", "<pad>")
    vocabulary = {word: number + 2 for number, word in enumerate(WORDS)} | {"<unk>": 1}
    vocabulary |= {begin: 37, end: 38, pad: 39 if kind == "clip" else 0}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    single = f"$A {end}" if kind == "siglip" else f"{begin} $A {end}"
    own.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(begin, 37), (end, 38)])
    return PreTrainedTokenizerFast(
        tokenizer_object=own, unk_token="<unk>", bos_token=begin, eos_token=end, pad_token=pad, padding_side="right"
    )
