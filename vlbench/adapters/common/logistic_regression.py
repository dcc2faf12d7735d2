r"""One-vs-rest logistic regression with an L2 penalty for all classes at once, by full-batch L-BFGS in float64.

For each class the objective is scikit-learn's, ``C * sum_i log(1 + exp(-y_i f_i)) + ||w||^2 / 2`` with an unpenalised
intercept; images whose label is -1 are left out of that class's sum. The classes do not touch one another: their sum is
minimised as one problem, so that one product of matrices serves them all.

Features are centred, divided by one number and rotated to their principal axes, as in ``softmax_regression``, so that
C means the same for features of any length; each axis of each class is stretched by its curvature at the start.

Shape suffixes: N examples, D pooled width, P principal axes kept, C classes. The penalty's C is the plain float ``c``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

FLAT = 1e-12
"""Axes with less than this share of the largest variance are rounding noise of float32 features."""


@dataclass(frozen=True)
class OneVsRest:
    """Fitted classifiers, in the coordinates of the features as they came."""

    c: float
    weight_DC: np.ndarray
    bias_C: np.ndarray
    iterations: int
    converged: bool
    weight_PC: np.ndarray
    """The weights on the principal axes and the biases, where the next fit may start."""

    def logits(self, features_ND: np.ndarray) -> np.ndarray:
        """``logits_NC``, float64."""
        return np.asarray(features_ND, dtype=np.float64) @ self.weight_DC + self.bias_C


class LogisticRegressions:
    """One training set, prepared once and fitted for as many penalties as are asked for.

    Args:
        features_ND: training features.
        labels_NC: 1, 0 or -1; every class needs a 1 and a 0.
        device: where the arithmetic happens.
    """

    def __init__(self, features_ND: np.ndarray, labels_NC: np.ndarray, *, device: str = "cpu") -> None:
        import torch

        features = torch.from_numpy(np.ascontiguousarray(features_ND)).to(device, torch.float64)
        self.mean_D = features.mean(dim=0)
        centred_ND = features - self.mean_D
        self.scale = float(centred_ND.square().sum(dim=1).mean().sqrt()) or 1.0
        centred_ND /= self.scale
        spread_D, axes_DD = torch.linalg.eigh(centred_ND.T @ centred_ND / len(centred_ND))
        kept = spread_D > FLAT * spread_D.max().clamp(min=FLAT)
        self.spread_P, self.axes_DP = spread_D[kept], axes_DD[:, kept]
        self.rotated_NP = centred_ND @ self.axes_DP
        labels = torch.from_numpy(np.ascontiguousarray(labels_NC)).to(device)
        self.known_NC, self.target_NC = (labels >= 0).double(), (labels == 1).double()
        share_C = self.target_NC.sum(dim=0) / self.known_NC.sum(dim=0)
        self.curvature_C = share_C * (1 - share_C)
        self.prior_C = torch.logit(share_C)

    def fit(
        self, c: float, *, tolerance: float = 1e-6, max_iterations: int = 1000, start: OneVsRest | None = None
    ) -> OneVsRest:
        """The minimum for penalty ``c``: see ``SoftmaxRegression.fit``."""
        import torch
        from scipy.optimize import minimize

        n, shape = len(self.rotated_NP), (len(self.spread_P) + 1, len(self.prior_C))
        penalty = 1.0 / (c * n)
        stretch_PC = torch.cat(
            [
                (self.spread_P[:, None] * self.curvature_C + penalty).rsqrt(),
                self.curvature_C.clamp(min=1.0 / n).rsqrt()[None],
            ]
        )

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            stretched_PC = torch.from_numpy(flat).to(stretch_PC.device).reshape(shape)
            value, gradient_PC = self._objective(stretched_PC * stretch_PC, penalty)
            return value, (gradient_PC * stretch_PC).cpu().numpy().ravel()

        # Without weights the best bias is the log-odds of the class.
        first_PC = torch.cat([torch.zeros_like(stretch_PC[:-1]), self.prior_C[None]])
        if start is not None:
            first_PC = torch.from_numpy(start.weight_PC).to(stretch_PC.device)
        options = {
            "maxiter": max_iterations,
            "maxfun": 2 * max_iterations,
            "gtol": tolerance,
            "ftol": 1e-15,
            "maxcor": 20,
        }
        begin = (first_PC / stretch_PC).cpu().numpy().ravel()
        found = minimize(objective, begin, jac=True, method="L-BFGS-B", options=options)
        weight_PC = torch.from_numpy(found.x).to(stretch_PC.device).reshape(shape) * stretch_PC
        weight_DC = self.axes_DP @ weight_PC[:-1] / self.scale
        return OneVsRest(
            c=c,
            weight_DC=weight_DC.cpu().numpy(),
            bias_C=(weight_PC[-1] - self.mean_D @ weight_DC).cpu().numpy(),
            iterations=int(found.nit),
            converged=bool(found.success),
            weight_PC=weight_PC.cpu().numpy(),
        )

    def _objective(self, weight_PC: torch.Tensor, penalty: float) -> tuple[float, torch.Tensor]:
        """Sum over classes of the mean log-loss plus ``penalty / 2 * ||w||^2``, and its gradient."""
        import torch
        import torch.nn.functional as F

        n = len(self.rotated_NP)
        logits_NC = torch.addmm(weight_PC[-1], self.rotated_NP, weight_PC[:-1])
        loss_NC = F.softplus(logits_NC) - self.target_NC * logits_NC
        value = (loss_NC * self.known_NC).sum() / n + 0.5 * penalty * weight_PC[:-1].square().sum()
        residual_NC = (torch.sigmoid(logits_NC) - self.target_NC) * self.known_NC / n
        gradient_PC = torch.cat(
            [self.rotated_NP.T @ residual_NC + penalty * weight_PC[:-1], residual_NC.sum(dim=0, keepdim=True)]
        )
        return float(value), gradient_PC
