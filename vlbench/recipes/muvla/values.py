"""mu-VLA's published values, each with its source; the tags are those of the recipe (``muvla/__init__.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlbench.recipes.published import OURS

Values = Mapping[str, tuple[Any, str]]

ABOUT_PAPER = (
    "As the paper has it: VQA2 72.1, NLVR2 73.4, SNLI-VE 77.3 after fine-tuning [W]. It trains no visual network."
)
PAPER: Values = {
    "data": ((), "Conceptual Captions: 3,000,600 images with VinVL features [M@9a8ef56:data_explorer]"),
    "steps": (
        31_256,
        (
            "20 epochs [N], which count the samples of every task: the released run's 130,000 steps of 480 are 20.8 "
            "times the 3,000,600 images, and each of its steps trains one task of four. Here a step trains all, so "
            "that 5 passes are as many pairs of each: computed"
        ),
    ),
    "batch_size": (480, "[N]; [M:pretrain.yaml]"),
    "k": (5, "[N]; stored: 10 [M@9a8ef56:configs]"),
    "bert": ("bert-base-uncased", "the folder of its files [M:visual_bert.py]"),
    "features": (
        "vinvl.tsv",
        "X152-C4, at most 100 boxes [M:data_preparation/convert_cc_vinvl.py]: give your own path",
    ),
    "corpus": ("weakly_aligned.arrow", "`vlbench data weakly-align` makes it"),
    "feature_width": (2048, "the first 2048 of 2054 [M:data_preparation/convert_cc_vinvl.py]"),
    "max_words": (60, "[M:pretrain.yaml]"),
    "max_regions": (100, "[M:pretrain.yaml]"),
    "stream.width": (768, "BERT-base [M:visual_bert.py]"),
    "stream.layers": (12, "BERT-base [M:visual_bert.py]"),
    "stream.heads": (12, "BERT-base [M:visual_bert.py]"),
    "mask_words": (0.15, "[M:bert_processors.py]"),
    "mask_tags": (0.15, "[M:bert_processors.py]"),
    "mask_regions": (0.15, "[M:processors.py]"),
    "mask_linked": (0.15, "[M:processors.py]"),
    "rn_masking": ("linked", "[N]"),
    "mrfr": ("l2", "[N]"),
    "itm_weight": ("pair", "[N]"),
    "weigh_itm": (True, "[N], the formula; [M:visual_bert.py]"),
    "itm_from_epoch": (1.0, "m = 1 [N]"),
    "optim.name": ("adamw", "[M@9a8ef56:all_bc.yaml]"),
    "optim.lr": (6e-5, "[N]"),
    "optim.weight_decay": (
        0.01,
        (
            "not on biases and gains [M:mmf/utils/modeling.py], where a slip of names decays the gains of the norms of "
            "boxes, tags and regions"
        ),
    ),
    "optim.betas": ((0.9, 0.999), "unverified: PyTorch's default"),
    "optim.eps": (1e-8, "[M:pretrain.yaml]"),
    "optim.clip_norm": (5.0, "[M:pretrain.yaml]"),
    "optim.no_decay": ((), "biases and gains apart, nothing [M:mmf/utils/modeling.py]"),
    "schedule.kind": ("linear", "[M:pretrain.yaml]"),
    "schedule.warmup": (0.1, "[N]"),
    "schedule.final": (0.0, "[M:pretrain.yaml]"),
    "precision": ("bf16", "there fp16 [M:pretrain.yaml]"),
    "workers": (8, OURS),
    "checkpoint_every": (5000, "[M@9a8ef56:all_bc.yaml]"),
    "log_every": (100, OURS),
}

ABOUT_CODE = (
    "The released run on Conceptual Captions (today's pretrain.yaml). Not reproduced, by no setting: one task a step "
    "(a quarter each for RT, RN and, apart, MLM and ITM of IS), where here every step trains all four. What makes a "
    "batch is not told its step. So the same pairs of each task are seen in a quarter of the steps; --steps 130000 "
    "has as many updates, and four times the pairs. It follows that w_ITM, there the mean over the batch's own pairs "
    "(tags' in RT), is here that of the step's sentences. Where a batch has no place to predict a term is 0, there "
    "NaN. Three gains of norms decay there by a slip of names; here none does."
)
CODE: Values = {
    "steps": (32_500, "130,000 [M:pretrain.yaml], of one task of four each: computed"),
    "optim.lr": (5e-5, "[M:pretrain.yaml]"),
    "schedule.warmup": (3_250, "13,000 of 130,000 [M:pretrain.yaml]: computed"),
    "stream.modality_embedding": (False, "[M:mmf/modules/embeddings.py]"),
    "stream.sentence_norm": (False, "[M:mmf/modules/embeddings.py]"),
    "rn_masking": (
        "uniform",
        "the final configuration [M:pretrain.yaml]; RN alone: phrases [M@9a8ef56:phrase_region.yaml, bert_processors]",
    ),
    "rows": ("released", "[M:pretrain.yaml; visual_bert.py]"),
    "mrfr": ("smooth_l1", "[M:visual_bert.py]"),
    "mrfr_target": ("seen", "[M:visual_bert.py], whose regions are masked in place"),
    "region_mean": ("slots", "[M:visual_bert.py]"),
    "itm_weight": ("batch_mean", "[M:visual_bert.py]"),
    "itm_from_epoch": (1.0, "one pass of all its four loaders: 25,000 of its steps [M:multi_dataset_loader.py]"),
}

ABOUT_CODE_BC = (
    "The released run with sentences of BookCorpus in place of captions (all_bc.yaml), not with its scores: they were "
    "not read. Make the corpus from them (vlbench data weakly-align). As paper_code, but for what follows, and with "
    "what that cannot reproduce."
)
CODE_BC: Values = {
    "steps": (48_750, "195,000 [M@9a8ef56:all_bc.yaml], of one task of four each: computed"),
    "optim.lr": (6e-5, "[M@9a8ef56:all_bc.yaml]"),
    "schedule.warmup": (4_875, "19,500 of 195,000 [M@9a8ef56:all_bc.yaml]: computed"),
    "k": (10, "the lists of IS [M@9a8ef56:all_bc.yaml]; how many RN's have was not read"),
    "task_weights": (
        {"is": 1.2, "itm": 0.8, "rt": 1.2, "rn": 0.8},
        "its ratios, 0.3, 0.2, 0.3 and 0.2 of the steps [M@9a8ef56:all_bc.yaml], times its four tasks: computed",
    ),
    "itm_weight": (
        "none",
        (
            "asked for from epoch 2 on [M@9a8ef56:all_bc.yaml]; with ratios an epoch never ends, so the weights are "
            "never on [M:iteration_strategies.py]: read, not run"
        ),
    ),
}
