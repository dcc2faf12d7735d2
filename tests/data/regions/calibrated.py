"""A detector without published weights whose regions still differ from one another."""

from __future__ import annotations

import torch

from vlbench.data.regions.detector import TorchvisionDetector

NAME = "fasterrcnn_mobilenet_v3_large_320_fpn"  # the smallest of them
SMALL = {"min_size": 64, "max_size": 96}


def calibrated() -> TorchvisionDetector:
    """A random network whose statistics were set by a forward pass, so that its features differ between regions."""
    made = TorchvisionDetector(NAME, weights="random", max_regions=7, min_score=0.0, **SMALL)
    net = made._net
    for module in net.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.inference_mode():
        net.backbone.train()(torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 4 - 2)
        for weight in (net.roi_heads.box_predictor.cls_score.weight, net.roi_heads.box_head.fc6.weight):
            weight.mul_(20)
    net.eval()
    return made
