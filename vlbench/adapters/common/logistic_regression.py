r"""One-vs-rest logistic regression with an L2 penalty for all classes at once, by full-batch L-BFGS in float64.

For each class the objective is scikit-learn's, ``C * sum_i log(1 + exp(-y_i f_i)) + ||w||^2 / 2`` with an unpenalised
intercept; images whose label is -1 are left out of that class's sum. The classes do not touch one another: their sum is
minimised as one problem, so that one product of matrices serves them all. A class whose images are all positive, or all
not, cannot be learnt: its weights and intercept are zero.

Features are centred, divided by one number and rotated to their principal axes, as in ``softmax_regression``, so that
C means the same for features of any length; each axis of each class is stretched by its curvature at the start.

Shape suffixes: N examples, D pooled width, P principal axes kept, C classes, L those of them that can be learnt. The
penalty's C is the plain float ``c``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlbench.adapters.common.axes import OnAxes
from vlbench.adapters.common.multilabel import training_gaps
from vlbench.core.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OneVsRest:
    """Fitted classifiers, in the coordinates of the features as they came."""

    c: float
    weight_DC: np.ndarray
    bias_C: np.ndarray
    iterations: int
    converged: bool
    weight_PL: np.ndarray
    """The weights on the principal axes and the biases, where the next fit may start."""

    def logits(self, features_ND: np.ndarray) -> np.ndarray:
        """``logits_NC``, float64."""
        return np.asarray(features_ND, dtype=np.float64) @ self.weight_DC + self.bias_C


class LogisticRegressions(OnAxes):
    """One training set, prepared once and fitted for as many penalties as are asked for.

    Args:
        features_ND: training features.
        labels_NC: 1, 0 or -1.
        device: where the arithmetic happens.

    Raises:
        UserError: where no class has both a 1 and a 0.
    """

    def __init__(self, features_ND: np.ndarray, labels_NC: np.ndarray, *, device: str = "cpu") -> None:
        import torch

        self.learnt_C = ~training_gaps(labels_NC)
        if not self.learnt_C.any():
            raise UserError("no class has both a positive and a negative training image: there is nothing to learn")
        super().__init__(features_ND, device=device)
        labels = torch.from_numpy(np.ascontiguousarray(labels_NC[:, self.learnt_C])).to(device)
        self.known_NL, self.target_NL = (labels >= 0).double(), (labels == 1).double()
        share_L = self.target_NL.sum(dim=0) / self.known_NL.sum(dim=0)
        self.curvature_L = share_L * (1 - share_L)
        self.prior_L = torch.logit(share_L)

    def fit(
        self, c: float, *, tolerance: float = 1e-6, max_iterations: int = 1000, start: OneVsRest | None = None
    ) -> OneVsRest:
        """The minimum for penalty ``c``: see ``SoftmaxRegression.fit``."""
        import torch
        from scipy.optimize import minimize

        n, shape = len(self.rotated_NP), (len(self.spread_P) + 1, len(self.prior_L))
        penalty = 1.0 / (c * n)
        stretch_PL = torch.cat(
            [
                (self.spread_P[:, None] * self.curvature_L + penalty).rsqrt(),
                self.curvature_L.clamp(min=1.0 / n).rsqrt()[None],
            ]
        )

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            stretched_PL = torch.from_numpy(flat).to(stretch_PL.device).reshape(shape)
            value, gradient_PL = self._objective(stretched_PL * stretch_PL, penalty)
            return value, (gradient_PL * stretch_PL).cpu().numpy().ravel()

        # Without weights the best bias is the log-odds of the class.
        first_PL = torch.cat([torch.zeros_like(stretch_PL[:-1]), self.prior_L[None]])
        if start is not None:
            first_PL = torch.from_numpy(start.weight_PL).to(stretch_PL.device)
        options = {
            "maxiter": max_iterations,
            "maxfun": 2 * max_iterations,
            "gtol": tolerance,
            "ftol": 1e-15,
            "maxcor": 20,
        }
        begin = (first_PL / stretch_PL).cpu().numpy().ravel()
        found = minimize(objective, begin, jac=True, method="L-BFGS-B", options=options)
        weight_PL = torch.from_numpy(found.x).to(stretch_PL.device).reshape(shape) * stretch_PL
        weight_DL = self.axes_DP @ weight_PL[:-1] / self.scale
        bias_L = weight_PL[-1] - self.mean_D @ weight_DL
        weight_DC = np.zeros((len(self.mean_D), len(self.learnt_C)))
        weight_DC[:, self.learnt_C] = weight_DL.cpu().numpy()
        bias_C = np.zeros(len(self.learnt_C))
        bias_C[self.learnt_C] = bias_L.cpu().numpy()
        return OneVsRest(
            c=c,
            weight_DC=weight_DC,
            bias_C=bias_C,
            iterations=int(found.nit),
            converged=bool(found.success),
            weight_PL=weight_PL.cpu().numpy(),
        )

    def _objective(self, weight_PL: torch.Tensor, penalty: float) -> tuple[float, torch.Tensor]:
        """Sum over classes of the mean log-loss plus ``penalty / 2 * ||w||^2``, and its gradient."""
        import torch
        import torch.nn.functional as F

        n = len(self.rotated_NP)
        logits_NL = torch.addmm(weight_PL[-1], self.rotated_NP, weight_PL[:-1])
        loss_NL = F.softplus(logits_NL) - self.target_NL * logits_NL
        value = (loss_NL * self.known_NL).sum() / n + 0.5 * penalty * weight_PL[:-1].square().sum()
        residual_NL = (torch.sigmoid(logits_NL) - self.target_NL) * self.known_NL / n
        gradient_PL = torch.cat(
            [self.rotated_NP.T @ residual_NL + penalty * weight_PL[:-1], residual_NL.sum(dim=0, keepdim=True)]
        )
        return float(value), gradient_PL
