r"""Multinomial logistic regression with an L2 penalty, fitted by full-batch L-BFGS in float64.

The objective is scikit-learn's: ``C * sum_i CE_i + ||W||^2 / 2`` with an unpenalised intercept. Two changes of
coordinates leave its minimum where it is and make it quick to reach:

- Features are centred (the intercept absorbs it) and rotated to their principal axes (the penalty does not see it);
  axes without variance are dropped, since the penalised weight on them is zero.
- Each axis is stretched by ``1 / sqrt(variance / classes + lambda)``, from the objective's curvature at ``W = 0``.
  L-BFGS then needs tens of iterations where the plain problem needs hundreds.

Features are also divided by *one* number, the root of their mean squared length after centring, so that C means the
same for a model whose features have length 0.1 and one whose have length 100. Directions keep their proportions:
standardising each would be another classifier.

Shape suffixes: N examples, D pooled width, P principal axes kept, C classes. The penalty's C is the plain float ``c``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlbench.adapters.common.axes import OnAxes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Fit:
    """A fitted classifier, in the coordinates of the features as they came."""

    c: float
    weight_DC: np.ndarray
    bias_C: np.ndarray
    objective: float
    """Mean cross-entropy plus the penalty: scikit-learn's objective divided by ``C * N``."""
    iterations: int
    converged: bool
    weight_PC: np.ndarray
    """The weights on the scaled principal axes, where the next fit may start."""

    def logits(self, features_ND: np.ndarray) -> np.ndarray:
        """``logits_NC``, float64."""
        return np.asarray(features_ND, dtype=np.float64) @ self.weight_DC + self.bias_C


class SoftmaxRegression(OnAxes):
    """One training set, prepared once and fitted for as many penalties as are asked for.

    Args:
        features_ND: training features.
        labels_N: classes 0..n_classes-1, each occurring at least once.
        n_classes: how many.
        device: where the arithmetic happens.
    """

    def __init__(self, features_ND: np.ndarray, labels_N: np.ndarray, n_classes: int, *, device: str = "cpu") -> None:
        import torch

        super().__init__(features_ND, device=device)
        self.n_classes = n_classes
        self.labels_N = torch.from_numpy(labels_N).to(device)

    def fit(self, c: float, *, tolerance: float = 1e-6, max_iterations: int = 1000, start: Fit | None = None) -> Fit:
        """The minimum for penalty ``c``.

        Args:
            c: the inverse strength of the penalty, as scikit-learn counts it.
            tolerance: stop where no entry of the gradient (in stretched coordinates) is larger.
            max_iterations: give up after this many; ``converged`` is then False.
            start: begin at this fit's weights.
        """
        import torch
        from scipy.optimize import minimize

        n_axes, device = len(self.spread_P), self.spread_P.device
        penalty = 1.0 / (c * len(self.labels_N))
        stretch = torch.cat(
            [1.0 / (self.spread_P / self.n_classes + penalty).sqrt(), self.spread_P.new_full((1,), self.n_classes**0.5)]
        )[:, None]

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            stretched = torch.from_numpy(flat).to(device).reshape(n_axes + 1, self.n_classes)
            value, gradient = self._objective(stretched * stretch, penalty)
            return value, (gradient * stretch).cpu().numpy().ravel()

        first = np.zeros((n_axes + 1, self.n_classes)) if start is None else start.weight_PC / stretch.cpu().numpy()
        options = {
            "maxiter": max_iterations,
            "maxfun": 2 * max_iterations,
            "gtol": tolerance,
            "ftol": 1e-15,
            "maxcor": 20,
        }
        found = minimize(objective, first.ravel(), jac=True, method="L-BFGS-B", options=options)
        weight_PC = torch.from_numpy(found.x).to(device).reshape(n_axes + 1, self.n_classes) * stretch
        return self._as_fit(c, weight_PC, float(found.fun), int(found.nit), bool(found.success))

    def path(self, cs: Sequence[float], *, tolerance: float = 1e-7, max_iterations: int = 100) -> Iterator[Fit]:
        """The minima for many penalties, each found from the ones before: see ``common.softmax_path``.

        In float32, and a fit ends by the objective rather than by its gradient: good to choose C with. ``fit`` then
        makes the classifier that is reported.

        Args:
            cs: from small to large, the strongest penalty first.
            tolerance: stop where no more than this share of the objective is still to be gained.
            max_iterations: give up on a penalty after this many; ``converged`` is then False.

        Yields:
            One Fit for each of ``cs``, in their order.
        """
        import torch

        from vlbench.adapters.common.softmax_path import Path

        n, n_axes = self.rotated_NP.shape
        features_NQ = torch.ones(n, n_axes + 1, device=self.rotated_NP.device)
        features_NQ[:, :-1] = self.rotated_NP
        options = {"tolerance": tolerance, "max_iterations": max_iterations}
        path = Path(features_NQ, self.labels_N, self.n_classes, **options)
        for c in cs:
            found = path.minimum(1.0 / (float(c) * n))
            counts = (found.objective, found.iterations, found.converged)
            yield self._as_fit(float(c), found.weight_CQ.T.double(), *counts)

    def _objective(self, weight_PC: torch.Tensor, penalty: float) -> tuple[float, torch.Tensor]:
        """Mean cross-entropy plus ``penalty / 2 * ||W||^2``, and its gradient; the weights' last row is the bias."""
        import torch

        n = len(self.labels_N)
        logits_NC = torch.addmm(weight_PC[-1], self.rotated_NP, weight_PC[:-1])
        log_p_NC = logits_NC - logits_NC.logsumexp(dim=1, keepdim=True)
        right_N1 = self.labels_N[:, None]
        value = -log_p_NC.gather(1, right_N1).mean() + 0.5 * penalty * weight_PC[:-1].square().sum()
        residual_NC = log_p_NC.exp_()
        residual_NC.scatter_add_(1, right_N1, residual_NC.new_full((n, 1), -1.0))
        residual_NC /= n
        gradient = torch.cat(
            [self.rotated_NP.T @ residual_NC + penalty * weight_PC[:-1], residual_NC.sum(dim=0, keepdim=True)]
        )
        return float(value), gradient

    def _as_fit(self, c: float, weight_PC: torch.Tensor, objective: float, iterations: int, converged: bool) -> Fit:
        weight_DC = self.axes_DP @ weight_PC[:-1] / self.scale
        bias_C = weight_PC[-1] - self.mean_D @ weight_DC
        return Fit(
            c=c,
            weight_DC=weight_DC.cpu().numpy(),
            bias_C=bias_C.cpu().numpy(),
            objective=objective,
            iterations=iterations,
            converged=converged,
            weight_PC=weight_PC.cpu().numpy(),
        )
