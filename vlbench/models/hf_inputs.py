"""What transformers does to images and texts before its models see them, in vlbench's words.

Images: the settings of ``preprocessor_config.json`` as a ``Preprocess``. It gives the pixels of transformers' own
processor on PIL images, with one exception: where a centre crop leaves an odd number of pixels over, transformers
puts the odd one always behind, while torchvision, and with it the evaluation code of CLIP's and DINOv2's authors,
rounds half to even; a quarter of all images is cropped one pixel further on than by transformers. Its processors on
tensors ("fast") crop as those on PIL images and resize in another arithmetic: up to 0.7% of the values differ, by one
grey level.

Shapes: B batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlbench.core.cards import Preprocess
from vlbench.core.errors import UserError
from vlbench.models.padding import padded_ids
from vlbench.models.tokenizer_files import VOCABULARIES, has_tokenizer, tokenizer_digest

_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
_CONVNEXT_SQUASHES_FROM = 384  # pixels; below it is resized by crop_pct and cropped


def hf_preprocess(folder: Path, *, where: str) -> Preprocess:
    """What the image processor in ``folder`` does.

    Raises:
        UserError: for a processor that cannot be read, or one that does more than resize, crop and normalise.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(
            str(folder), backend="pil", trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # transformers raises what it likes
        raise UserError(f"{where}: its preprocessor_config.json cannot be used: {_line(error)}") from None
    name = type(processor).__name__.removesuffix("Pil")
    if not _is_plain(processor):
        raise UserError(f"{where}: the image processor {name} is not supported; give the model through pkg.mod:build")
    interpolation = _INTERPOLATION.get(int(processor.resample))
    if not processor.do_resize or interpolation is None:
        raise UserError(f"{where}: {name} without a resize, or with interpolation {processor.resample}: not supported")
    mean, std = _normalisation(processor)
    return Preprocess(**_geometry(processor, name, where), interpolation=interpolation, mean=mean, std=std)


def _is_plain(processor: Any) -> bool:
    """Whether it does nothing but what is read here: the shared steps, or one of the two variants looked at below."""
    from transformers.image_processing_backends import PilBackend

    kind = type(processor)
    if kind.__name__ in ("EfficientNetImageProcessorPil", "ConvNextImageProcessorPil"):
        return True
    return all(getattr(kind, step) is getattr(PilBackend, step) for step in ("_preprocess", "resize", "center_crop"))


def _geometry(processor: Any, name: str, where: str) -> dict[str, Any]:
    size = processor.size
    if name == "ConvNextImageProcessor":
        edge = size.shortest_edge
        if edge >= _CONVNEXT_SQUASHES_FROM:
            return {"image_size": edge, "resize": "squash"}
        return {"image_size": edge, "resize_to": int(edge / processor.crop_pct)}
    crop = processor.crop_size if processor.do_center_crop else None
    cropped = (crop.height, crop.width) if crop is not None else None
    if size.shortest_edge and not size.longest_edge and cropped is not None:
        resized, resize = (size.shortest_edge, size.shortest_edge), "shortest"
    elif size.height and size.width:
        resized, resize = (size.height, size.width), "squash"
    else:
        raise UserError(f"{where}: {name} gives images of no fixed size ({size}), which is not supported")
    if cropped is None or cropped == resized:
        return {"image_size": resized, "resize": resize}
    if resized[0] != resized[1] or cropped[0] > resized[0] or cropped[1] > resized[1]:
        raise UserError(f"{where}: {name} crops {cropped} out of {resized}, which is not supported")
    return {"image_size": cropped, "resize": resize, "resize_to": resized[0]}


def _normalisation(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of values between 0 and 1 that give what rescale, offset and normalize give."""
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale  # 1/255 as it was rounded in the file
    offset = 1.0 if processor.do_rescale and getattr(processor, "rescale_offset", False) else 0.0
    mean = _three(processor.image_mean) if processor.do_normalize else (0.0,) * 3
    std = _three(processor.image_std) if processor.do_normalize else (1.0,) * 3
    again = _three(processor.image_std) if getattr(processor, "include_top", False) else (1.0,) * 3
    return (
        tuple((value + offset) / scale for value in mean),
        tuple(value * more / scale for value, more in zip(std, again, strict=True)),
    )


def _three(value: float | Sequence[float]) -> tuple[float, ...]:
    return (float(value),) * 3 if isinstance(value, int | float) else tuple(float(channel) for channel in value)


class HfTokenizer:
    """Texts to token ids by the tokenizer in a folder.

    Args:
        folder: holds ``tokenizer.json`` or a vocabulary.
        context_length: longer texts are cut, their end-of-text token kept.
        trim: pad on the right, to the longest text of the batch in steps of 16 tokens; else to the context, on the
            side that the tokenizer's own settings say.
        where: what to call the model in an error.
    """

    def __init__(self, folder: Path, *, context_length: int, trim: bool, where: str) -> None:
        from transformers import AutoTokenizer

        if not has_tokenizer(folder):  # transformers would make one that knows no word at all
            raise UserError(f"{where}: no tokenizer in {folder} ({', '.join(VOCABULARIES[:3])}, …)")
        try:
            self._own = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except Exception as error:  # transformers raises what it likes
            hint = "; pip install sentencepiece" if "sentencepiece" in str(error).lower() else ""
            raise UserError(f"{where}: its tokenizer cannot be made: {_line(error)}{hint}") from None
        if self._own.pad_token_id is None:
            raise UserError(f"{where}: its tokenizer has no padding token (pad_token in tokenizer_config.json)")
        self.pad_id = int(self._own.pad_token_id)
        self.context_length = context_length
        self._trim = trim
        # SigLIP 2 was trained on lower case, and its files name Gemma's tokenizer, which keeps capitals.
        self._lower = "Gemma" in str(self._own.init_kwargs.get("tokenizer_class", "")) + type(self._own).__name__
        self.name = f"hf:{type(self._own).__name__}-{tokenizer_digest(folder)}"

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """``tokens_BL``, int64."""
        assert not isinstance(texts, str), "a list of texts, not one text"
        texts = [text.lower() for text in texts] if self._lower else list(texts)
        cut = {"truncation": True, "max_length": self.context_length}
        if not self._trim:
            return self._own(texts, padding="max_length", return_tensors="pt", **cut)["input_ids"]
        rows = self._own(texts, **cut)["input_ids"] if texts else []
        return padded_ids(rows, most=self.context_length, pad=self.pad_id)


class MissingTokenizer:
    """In the place of a tokenizer that is not here: images are encoded, and the first text is the error ``line``."""

    name = "hf:none"
    pad_id = 0

    def __init__(self, line: str, *, context_length: int) -> None:
        self._line = line
        self.context_length = context_length

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Raises UserError."""
        raise UserError(self._line)


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
