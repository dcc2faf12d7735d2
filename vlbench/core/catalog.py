"""Everything that vlbench knows by name. To add a recipe, adapter, reader or loader, add one line here."""

from __future__ import annotations

from vlbench.core.registry import Registry

RECIPES = Registry(
    "recipe",
    {
        "supervised": "vlbench.recipes.supervised:RECIPE",
        "clip": "vlbench.recipes.clip:RECIPE",
        "unicl": "vlbench.recipes.unicl:RECIPE",
    },
    group="vlbench.recipes",
)

ADAPTERS = Registry(
    "adapter",
    {
        "zeroshot": "vlbench.adapters.zeroshot:ADAPTER",
        "linear": "vlbench.adapters.linear:ADAPTER",
        "knn": "vlbench.adapters.knn:ADAPTER",
        "retrieval": "vlbench.adapters.retrieval:ADAPTER",
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
        "build": "vlbench.models.loaders.build:load",
    },
    group="vlbench.loaders",
)
