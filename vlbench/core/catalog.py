"""Everything that vlbench knows by name. To add a recipe, adapter, reader or loader, add one line here."""

from __future__ import annotations

from vlbench.core.registry import Registry

RECIPES = Registry(
    "recipe",
    {
        "supervised": "vlbench.recipes.supervised:RECIPE",
        "clip": "vlbench.recipes.clip:RECIPE",
        "unicl": "vlbench.recipes.unicl:RECIPE",
        "virtex": "vlbench.recipes.virtex:RECIPE",
        "align": "vlbench.recipes.align:RECIPE",
        "muvla": "vlbench.recipes.muvla:RECIPE",
    },
    group="vlbench.recipes",
)

ADAPTERS = Registry(
    "adapter",
    {
        "zeroshot": "vlbench.adapters.zeroshot:ADAPTER",
        "linear": "vlbench.adapters.linear:ADAPTER",
        "knn": "vlbench.adapters.knn:ADAPTER",
        "zeroshot_multilabel": "vlbench.adapters.zeroshot_multilabel:ADAPTER",
        "linear_multilabel": "vlbench.adapters.linear_multilabel:ADAPTER",
        "knn_multilabel": "vlbench.adapters.knn_multilabel:ADAPTER",
        "fewshot": "vlbench.adapters.fewshot:ADAPTER",
        "fewshot_multilabel": "vlbench.adapters.fewshot_multilabel:ADAPTER",
        "svm": "vlbench.adapters.svm:ADAPTER",
        "elevater_probe": "vlbench.adapters.elevater_probe:ADAPTER",
        "clip_benchmark_probe": "vlbench.adapters.clip_benchmark_probe:ADAPTER",
        "retrieval": "vlbench.adapters.retrieval:ADAPTER",
        "matching": "vlbench.adapters.matching:ADAPTER",
        "captioning": "vlbench.adapters.captioning:ADAPTER",
        "vqa": "vlbench.adapters.vqa:ADAPTER",
        "nlvr2": "vlbench.adapters.nlvr2:ADAPTER",
        "entailment": "vlbench.adapters.entailment:ADAPTER",
        "grounding": "vlbench.adapters.grounding:ADAPTER",
        "detection": "vlbench.adapters.detection:ADAPTER",
    },
    group="vlbench.adapters",
)

READERS = Registry(
    "reader",
    {
        "shapes": "vlbench.data.shapes.reader:READER",
        "imagefolder": "vlbench.data.readers.imagefolder:READER",
        "wds": "vlbench.data.readers.wds:READER",
        "hf": "vlbench.data.readers.hf:READER",
        "csv": "vlbench.data.readers.csv:READER",
        "coco": "vlbench.data.readers.coco:READER",
        "karpathy": "vlbench.data.readers.karpathy:READER",
        "multi30k": "vlbench.data.readers.multi30k:READER",
        "voc": "vlbench.data.readers.voc:READER",
        "objectnet": "vlbench.data.readers.objectnet:READER",
        "vqa": "vlbench.data.readers.vqa:READER",
        "nlvr2": "vlbench.data.readers.nlvr2:READER",
        "snli_ve": "vlbench.data.readers.snli_ve:READER",
        "refcoco": "vlbench.data.readers.refcoco:READER",
    },
    group="vlbench.readers",
)

LOADERS = Registry(
    "loader",
    {
        "native": "vlbench.models.loaders.native:load",
        "timm": "vlbench.models.loaders.timm:load",
        "open_clip": "vlbench.models.loaders.open_clip:load",
        "torchvision": "vlbench.models.loaders.torchvision:load",
        "hf": "vlbench.models.loaders.hf:load",
        "unicl": "vlbench.models.loaders.unicl:load",
        "build": "vlbench.models.loaders.build:load",
        "baseline": "vlbench.models.loaders.baseline:load",
    },
    group="vlbench.loaders",
)
