"""mu-VLA: unsupervised pretraining by retrieval-based multi-granular alignment (Zhou et al., CVPR 2022, 2203.00242).

Sentences are retrieved by the tags of an image's regions (``data.weak``), and a single-stream transformer is trained
on region-tag (RT), region-phrase (RN) and image-sentence (IS) pairs. No pairing of captions with images is read, but a
pool of the data's own captions may give an image its own one back (the log says how often): as in the released code,
unless ``exclude_own`` leaves it out.

    ``L = L_RT + L_RN + L_IS`` in the first ``m = 1`` epochs, then ``L = L_RT + w_ITM (L_RN + L_IS)``,

    ``L_RT = MLM(tags) + MRC + MRFR``, ``L_RN = MLM(phrases) + p-MRTC``, ``L_IS = MLM + ITM``,

where ``w_ITM`` is the ITM head's probability that the sentence matches the image. It weighs each pair by itself, and
no gradient flows through it. In ITM it weighs the retrieved pairs alone, as the released code has it: to weigh
negatives by their probability of matching would forgive the very errors that ITM learns from. Every term is a mean over
what is masked in the whole batch of all ranks, padding left out, and 0 where nothing is. One masked row of IS serves
MLM and ITM; the ``w_ITM`` of RN and IS is read off each row's own [CLS]. Every step trains all objectives.

The released code does otherwise in most of this. Each difference is a setting (rn_masking, rows, mrfr, mrfr_target,
region_mean, itm_weight, stream.modality_embedding, stream.sentence_norm), the preset ``paper_code`` sets them all, and
says what no setting restores. Its ablation of RN alone masks words in another way than its final run
(rn_masking=phrases). How sentences are retrieved differs too: ``vlbench data weakly-align`` (metric, order).

The paper's mode reads fixed region features (``features``) and trains no visual network: its export can match and
nothing else. OUR ADAPTATION (the ``tiny`` preset; ``features`` unset): the regions' features come from a tower trained
along with the stream (``models.roi``), which is the backbone that frozen tasks score. MRFR is left out there: a target
that the tower makes itself is best met by making all features equal. Its boxes and tags are the data's, or a detector's
(``boxes``). The tower may also learn what the detector in its place had learnt before, the classes of regions
(``roi.classify``, one more term of the loss: ``roi_tags``): through the masked words alone, 600 steps teach it colours
and no shapes. Where there are no boxes, the cells of the tower's last map are the regions (``roi.grid``). They have no
tags, so that RT, which reads each tag with its region's box, and MRC are refused. IS needs none. Half of RN is left:
words of phrases are masked beside the whole image; p-MRTC, which predicts a phrase from its region, has no region.

Source tags: [N] notes of the paper; [W] its scores on an aggregator's page; [M:file] zmykevin/UVLP at 254e4e5, the
released code; [M@9a8ef56:file] its commit of 2022-04-08, which still holds the configurations that were run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vlbench.core.errors import UserError
from vlbench.core.types import Backbone, Example, Part, Region, Sample
from vlbench.data.stream import Mixture
from vlbench.data.wordpiece import WordPieceConfig, read_wordpiece, train_wordpiece
from vlbench.models.export import export_matcher
from vlbench.models.roi import RegionTower
from vlbench.models.single_stream import StreamConfig
from vlbench.models.vision import build_visual
from vlbench.recipes.base import ABOUT_TINY, TINY_RUN, BaseRecipe
from vlbench.recipes.muvla import values
from vlbench.recipes.muvla.batch import Batcher, Vocabulary
from vlbench.recipes.muvla.config import MuvlaConfig, RoiConfig
from vlbench.recipes.muvla.corpus import corpus_of, find_corpus, own_line, tags_of
from vlbench.recipes.muvla.features import Stored
from vlbench.recipes.muvla.grid import GridTower
from vlbench.recipes.muvla.loss import muvla_loss
from vlbench.recipes.muvla.matching import Matcher
from vlbench.recipes.muvla.model import RegionTextModel
from vlbench.recipes.muvla.start import load_bert
from vlbench.recipes.published import Preset, configs, published

TINY = MuvlaConfig(
    **TINY_RUN,
    data=("shapes:pairs",),
    stream=StreamConfig(width=128, layers=2, heads=4, dropout=0.0, positions=32, init_std=0.08),
    vocabulary=WordPieceConfig(size=200, alphabet=1000),
    max_words=32,
    max_regions=4,
    weigh_itm=False,
    roi=RoiConfig(strides=(16, 32), classify=True),
    mask_linked=0.5,
)

_PAPER = published(MuvlaConfig, values.ABOUT_PAPER, values.PAPER)
_PAPER_CODE = published(_PAPER, values.ABOUT_CODE, values.CODE)
PRESETS: Mapping[str, Preset] = {
    "tiny": Preset(
        TINY,
        ABOUT_TINY + " OUR ADAPTATION: a tower is trained along.",
        {
            "weigh_itm": "ours: three epochs; at the end of the first, ITM knows nothing yet",
            "mask_linked": "ours: a scene has one to three regions, 15% of those linked would be one in four images",
        },
    ),
    "paper": _PAPER,
    "paper_code": _PAPER_CODE,
    "paper_code_bc": published(_PAPER_CODE, values.ABOUT_CODE_BC, values.CODE_BC),
}


class Muvla(BaseRecipe):
    """Regions, their tags, and sentences that the tags have found.

    Args:
        assets: the vocabulary (``words``), the tags (``tags``), where the corpus lies (``corpus``) and what it says of
            itself (``corpus_counts``), once known.
    """

    name = "muvla"
    Config = MuvlaConfig
    presets: Mapping[str, Any] = configs(PRESETS)
    described = PRESETS
    needs: frozenset[Part] = frozenset({"image", "regions"})

    def __init__(self, assets: Mapping[str, bytes] | None = None) -> None:
        self.assets = dict(assets or {})
        self._opened: tuple[MuvlaConfig, Batcher, Stored | None] | None = None
        self._vocabulary: Vocabulary | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What is opened is opened again where it is needed.
        return self.__dict__ | {"_opened": None, "_vocabulary": None}

    def needs_of(self, config: Any) -> frozenset[Part]:
        """Images and regions; images alone where boxes are given or none are read.

        Nothing but ids, and so not a pixel, where the regions come with fixed features.
        """
        if config.features is not None:
            return frozenset()
        return self.needs if config.boxes is None and config.roi.grid is None else frozenset({"image"})

    def regions_of(self, config: Any, example: Example, size: tuple[int, int] | None) -> tuple[Region, ...]:
        """What is read of an example in place of its own regions; see ``train.batches``.

        Args:
            config: of the run.
            example: one of the data.
            size: width and height of its image in pixels; None where it is not decoded.

        Raises:
            BadExample: for one that the file of features or boxes lacks, or the corpus.
        """
        if config.features is None and config.boxes is None:
            return example.regions if config.roi.grid is None else ()
        _, stored = self._open(config)
        assert stored is not None, "there is a file of regions"
        stored.require(example.id)
        return stored.regions(example.id, size) if size is not None else ()

    def learn_assets(self, config: Any, data: Mixture) -> dict[str, bytes]:
        """The vocabulary of words, the tags that regions are classified by, where the corpus lies and what it counts.

        One line on standard error says how many images have their own caption among their sentences.
        """
        corpus = find_corpus(config, data.sources) if config.needs_corpus else None
        tags, texts = tags_of(config, data.sources, corpus)
        assets = {"words": _words(config, [*tags, *texts]), "tags": json.dumps(tags, ensure_ascii=False).encode()}
        if corpus is None:
            return assets
        counts = corpus.made_of.get("counts", {})
        if "own_found" in counts:  # once a run: the first rank alone learns
            Console(stderr=True).print(own_line(counts), highlight=False, markup=False, soft_wrap=True)
        return assets | {"corpus": str(corpus.path.resolve()).encode(), "corpus_counts": json.dumps(counts).encode()}

    def with_assets(self, assets: Mapping[str, bytes]) -> Muvla:
        """The recipe that knows its words and tags."""
        return Muvla(assets)

    @property
    def vocabulary(self) -> Vocabulary:
        """The words."""
        assert "words" in self.assets, "mu-VLA is built after its assets are known"
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self.assets["words"])
        return self._vocabulary

    @property
    def tags(self) -> dict[str, int]:
        """Class of a region by its tag."""
        return {tag: number for number, tag in enumerate(json.loads(self.assets["tags"]))}

    def build(self, config: Any, classes: Sequence[str]) -> RegionTextModel:
        """A fresh model; on BERT's weights where ``bert`` names a folder that is here."""
        visual: RegionTower | GridTower | None = None
        if config.features is None:
            side = config.visual.image_size
            tower = build_visual(config.visual)
            if config.roi.grid is not None:
                visual = GridTower(tower, grid=config.roi.grid, image_size=side)
            else:
                visual = RegionTower(tower, strides=config.roi.strides, cells=config.roi.cells, image_size=side)
        model = RegionTextModel(
            config.stream,
            objectives=config.objectives,
            words=self.vocabulary.size,
            tags=len(self.tags),
            visual=visual,
            feature_width=config.feature_width,
            regress=config.mrfr is not None,
            regress_seen=config.mrfr_target == "seen",
            released_rows=config.rows == "released",
            image_token=config.roi.image_token,
            mask_pixels=config.roi.mask_pixels,
            classify=config.roi.classify,
        )
        # ``learn_assets`` has refused a folder that is not there; a checkpoint needs none.
        if config.bert is not None and Path(config.bert).expanduser().is_dir():
            load_bert(model, Path(config.bert).expanduser())
        return model

    def collate(self, config: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Regions, and each objective's words and masks."""
        batcher, _ = self._open(config)
        return batcher(samples)

    def loss(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """The sum over the objectives, and every term by name."""
        images_BCHW = self.images(batch, config) if "images_BCHW" in batch else None
        return muvla_loss(
            model(batch, images_BCHW),
            itm_weight=config.itm_weight,
            weigh_itm=config.weigh_itm,
            weighted=batch["epoch"] >= config.itm_from_epoch,
            mrfr=config.mrfr,
            slots=len(batch["valid_BR"]) * config.max_regions if config.region_mean == "slots" else None,
            task_weights=config.task_weights,
        )

    def export(self, model: torch.nn.Module, config: Any, classes: Sequence[str]) -> Backbone:
        """The tower, where there is one, and the matching of images with sentences, where IS was trained."""
        assert isinstance(model, RegionTextModel), "mu-VLA trains a RegionTextModel"
        roi = f", roi {'+'.join(map(str, config.roi.strides))} cells={config.roi.cells}, an adaptation of mu-VLA"
        if config.roi.grid is not None:
            roi = f", grid {config.roi.grid}, an adaptation of mu-VLA"
        read = f"{config.stream.identity()} {self.vocabulary.name}" if config.objectives else "region tags"
        return export_matcher(
            model,
            tower=model.visual.tower if model.visual is not None else None,
            match=Matcher(model, self.vocabulary, config) if "is" in config.objectives else None,
            described=f"{read}{roi if model.visual is not None else ''}",
            model_id=self.name,
            recipe=self.name,
            preprocess=config.preprocess(),
            pretrain_data=config.data,
        )

    def _open(self, config: MuvlaConfig) -> tuple[Batcher, Stored | None]:
        if self._opened is not None and self._opened[0] == config:
            return self._opened[1:]
        corpus = corpus_of(config, self.assets) if config.needs_corpus else None
        stored = Stored(config, corpus) if config.features is not None or config.boxes is not None else None
        batcher = Batcher(
            self.vocabulary,
            self.tags,
            objectives=config.objectives,
            masking=config.masking(),
            corpus=corpus,
            k=config.k,
            longest=config.max_words,
            most_regions=config.max_regions,
            features=stored.view if stored is not None and config.features is not None else None,
            grid=config.roi.grid,
            released_rows=config.rows == "released",
        )
        self._opened = config, batcher, stored
        return batcher, stored


def _words(config: MuvlaConfig, texts: Sequence[str]) -> bytes:
    """The vocabulary: BERT's, a file's, or one learnt from sentences and tags."""
    words = config.vocabulary
    file = words.file
    if config.bert is not None and file is None:
        folder = Path(config.bert).expanduser()
        found = [folder / name for name in ("tokenizer.json", "vocab.txt") if (folder / name).is_file()]
        if not found:
            raise UserError(f"bert {folder}: no folder with a vocab.txt or tokenizer.json; give --set bert=FOLDER")
        file = str(found[0])
    if file is not None:
        return read_wordpiece(file, lower=words.lower, strip_accents=words.strip_accents)
    return train_wordpiece(
        texts, words.size, lower=words.lower, strip_accents=words.strip_accents, alphabet=words.alphabet
    )


RECIPE = Muvla()
