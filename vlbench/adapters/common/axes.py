"""The principal axes of training features: where probes are fitted.

Shape suffixes: N examples, D width, P axes kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

FLAT = 1e-12
"""Axes with less than this share of the largest variance are rounding noise of float32 features."""


def principal_axes(centred_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance along each principal axis ``(P,)``, and the axes as columns ``(D, P)``; those without variance dropped.

    Fewer images than dimensions span a small space: the axes are looked for there, which for 80 images of 2,048
    features takes a hundredth of the time.
    """
    import torch

    inside_NK, basis_DK = centred_ND, None
    if centred_ND.shape[0] < centred_ND.shape[1]:
        basis_DK, upper_KN = torch.linalg.qr(centred_ND.T)
        inside_NK = upper_KN.T
    spread_K, axes_KK = torch.linalg.eigh(inside_NK.T @ inside_NK / len(inside_NK))
    kept = spread_K > FLAT * spread_K.max().clamp(min=FLAT)
    axes_KP = axes_KK[:, kept]
    return spread_K[kept], axes_KP if basis_DK is None else basis_DK @ axes_KP


class OnAxes:
    """Training features centred, divided by one number and turned to their axes.

    The number is the root of their mean squared length after centring.

    Args:
        features_ND: training features.
        device: where the arithmetic happens, in float64.
    """

    def __init__(self, features_ND: np.ndarray, *, device: str) -> None:
        import torch

        features = torch.from_numpy(np.ascontiguousarray(features_ND)).to(device, torch.float64)
        self.mean_D = features.mean(dim=0)
        centred_ND = features - self.mean_D
        self.scale = float(centred_ND.square().sum(dim=1).mean().sqrt()) or 1.0
        centred_ND /= self.scale
        self.spread_P, self.axes_DP = principal_axes(centred_ND)
        self.rotated_NP = centred_ND @ self.axes_DP
