r"""A whole regularisation path of softmax regression: many penalties, one factorisation, a few passes each.

The penalties are taken from the strongest to the weakest. What one fit has found out serves the next:

- it starts at the last minimum, and its first direction is the way that the last two minima point: the logits along
  it are known, so that this step costs no product with the features;
- L-BFGS keeps its memory. A pair (step, change of gradient) belongs to the data term plus ``lambda`` times the step,
  so it is carried over to another ``lambda`` exactly;
- the first guess at the inverse Hessian is a Kronecker product: class covariance of the predicted probabilities, by
  eigenvalues, times the features' variances on their principal axes, plus ``lambda``. At ``W = 0`` this is the exact
  Hessian, and it follows the probabilities as they sharpen.

Along a line the objective is a function of the logits alone, so Newton's method in one dimension finds the length of a
step without another product: an iteration is one product forwards and one backwards. Products are made in float32,
losses and slopes summed in float64. A fit ends where the decrease still to be had is a small share of the objective,
far below what moves a validation accuracy.

Shape suffixes: N examples, Q principal axes and, last, the intercept, C classes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # never at run time: adapters must load without torch
    import torch

MEMORY = 12
"""Pairs that L-BFGS remembers."""
LINE_STEPS = 8
"""Evaluations along one line, at most."""
FLAT = 0.1
"""A line is followed until its slope is this share of what it was."""
FLOOR = 1e-4
"""Least share of the largest that an eigenvalue of the class covariance counts for."""


@dataclass(frozen=True)
class Minimum:
    """What was found for one penalty."""

    weight_CQ: torch.Tensor
    objective: float
    """Mean cross-entropy plus ``penalty / 2`` times the squared length of the weights, the intercept's left out."""
    iterations: int
    converged: bool


class Path:
    """One training set, fitted for one penalty after another: from strong to weak is quick.

    Args:
        features_NQ: features on their principal axes, centred, and a column of ones; float32.
        labels_N: classes 0..n_classes-1.
        n_classes: how many.
        tolerance: stop where no more than this share of the objective is still to be gained.
        max_iterations: give up on a penalty after this many.
    """

    def __init__(
        self,
        features_NQ: torch.Tensor,
        labels_N: torch.Tensor,
        n_classes: int,
        *,
        tolerance: float,
        max_iterations: int,
    ) -> None:
        import torch

        n, width = features_NQ.shape
        self.features_NQ = features_NQ
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self._spread_Q = features_NQ.square().mean(dim=0)
        self._is_axis_Q = torch.ones_like(self._spread_Q)
        self._is_axis_Q[-1] = 0.0
        self._right_N = labels_N * n + torch.arange(n, device=labels_N.device)
        self._weight_CQ = features_NQ.new_zeros(n_classes, width)
        self._logits_CN = features_NQ.new_zeros(n_classes, n)
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None
        """Weights and logits of the minimum before the last."""
        self._pairs: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=MEMORY)
        """Steps, and how the data term's gradient changed over them."""

    def minimum(self, penalty: float) -> Minimum:
        """The minimum for ``penalty``, starting at that of the call before."""
        # Made anew: many small steps have left their rounding in the logits.
        self._logits_CN = self._weight_CQ @ self.features_NQ.T
        last, before = (self._weight_CQ, self._logits_CN), self._before
        lead = (last[0] - before[0], last[1] - before[1]) if before is not None else None
        penalty_Q = penalty * self._is_axis_Q
        point = _Point(self._logits_CN, self._right_N)
        metric = _Metric(point.p_CN, self._spread_Q, penalty_Q)
        data_CQ = self._data_gradient(point)
        converged, iteration = False, 0
        while True:
            objective = point.loss + 0.5 * float((penalty_Q * self._weight_CQ.square()).sum())
            gradient_CQ = _centred(data_CQ + penalty_Q * self._weight_CQ)
            direction_CQ = -self._inverse_hessian(gradient_CQ, penalty_Q, metric)
            converged = -0.5 * _dot(gradient_CQ, direction_CQ) <= self.tolerance * objective
            if converged or iteration == self.max_iterations:
                break
            if iteration == 0 and lead is not None and _dot(gradient_CQ, lead[0]) < 0:
                direction_CQ, change_CN = lead
            else:
                change_CN = direction_CQ @ self.features_NQ.T
            line = _Line(self._weight_CQ, direction_CQ, penalty_Q, slope=_dot(gradient_CQ, direction_CQ))
            length, point = line.search(self._logits_CN, change_CN, self._right_N)
            self._weight_CQ = self._weight_CQ + length * direction_CQ
            self._logits_CN = self._logits_CN + length * change_CN
            before_CQ, data_CQ = data_CQ, self._data_gradient(point)
            self._pairs.append((length * direction_CQ, data_CQ - before_CQ))
            iteration += 1
        self._before = last
        return Minimum(self._weight_CQ, objective, iteration, converged)

    def _data_gradient(self, point: _Point) -> torch.Tensor:
        residual_CN = point.p_CN  # in place: nobody asks for the probabilities again
        residual_CN.view(-1)[self._right_N] -= 1.0
        return (residual_CN @ self.features_NQ).div_(len(self.features_NQ))

    def _inverse_hessian(self, gradient_CQ: torch.Tensor, penalty_Q: torch.Tensor, metric: _Metric) -> torch.Tensor:
        """The inverse Hessian times the gradient, as L-BFGS knows it (the two-loop recursion)."""
        pairs = [(step, change + penalty_Q * step) for step, change in self._pairs]
        known = [(step, change, _dot(step, change)) for step, change in pairs]
        known = [(step, change, product) for step, change, product in known if product > 0]
        rest_CQ = gradient_CQ
        shares = []
        for step, change, product in reversed(known):
            share = _dot(step, rest_CQ) / product
            rest_CQ = rest_CQ - share * change
            shares.append(share)
        found_CQ = metric.solve(rest_CQ)
        if known:
            _, change, product = known[-1]
            found_CQ = found_CQ * (product / _dot(change, metric.solve(change)))
        for (step, change, product), share in zip(known, reversed(shares)):
            found_CQ = found_CQ + (share - _dot(change, found_CQ) / product) * step
        return found_CQ


class _Point:
    """The data term at some logits."""

    def __init__(self, logits_CN: torch.Tensor, right_N: torch.Tensor) -> None:
        shifted_CN = logits_CN - logits_CN.amax(dim=0)
        right_logit_N = shifted_CN.view(-1)[right_N]
        self.p_CN = shifted_CN.exp_()
        total_N = self.p_CN.sum(dim=0)
        self.p_CN /= total_N
        self.loss = float((total_N.log() - right_logit_N).double().mean())


class _Metric:
    """A first guess at the Hessian, inverted: class covariance (by its eigenvalues) times variances, plus penalty."""

    def __init__(self, p_CN: torch.Tensor, spread_Q: torch.Tensor, penalty_Q: torch.Tensor) -> None:
        import torch

        covariance_CC = (torch.diag(p_CN.sum(dim=1)) - p_CN @ p_CN.T) / p_CN.shape[1]
        values_C, self._vectors_CC = torch.linalg.eigh(covariance_CC.double())
        values_C = values_C.clamp(min=FLOOR * float(values_C.max())).to(p_CN.dtype)
        self._vectors_CC = self._vectors_CC.to(p_CN.dtype)
        self._curvature_CQ = values_C[:, None] * spread_Q + penalty_Q

    def solve(self, gradient_CQ: torch.Tensor) -> torch.Tensor:
        return self._vectors_CC @ ((self._vectors_CC.T @ gradient_CQ) / self._curvature_CQ)


class _Line:
    """The objective along one direction: a convex function of the step's length."""

    def __init__(
        self, weight_CQ: torch.Tensor, direction_CQ: torch.Tensor, penalty_Q: torch.Tensor, *, slope: float
    ) -> None:
        self._penalty_slope = _dot(penalty_Q * weight_CQ, direction_CQ)
        self._penalty_bend = _dot(penalty_Q * direction_CQ, direction_CQ)
        self._slope = slope

    def search(self, logits_CN: torch.Tensor, change_CN: torch.Tensor, right_N: torch.Tensor) -> tuple[float, _Point]:
        """A length where the line is nearly flat, and the point there: Newton's method inside a shrinking bracket."""
        right_change_N = change_CN.view(-1)[right_N]
        low, high, length = 0.0, float("inf"), 1.0
        for _ in range(LINE_STEPS):
            here = length
            point = _Point(logits_CN + here * change_CN, right_N)
            weighted_CN = point.p_CN * change_CN
            mean_N = weighted_CN.sum(dim=0)
            slope = float((mean_N - right_change_N).double().mean())
            slope += self._penalty_slope + length * self._penalty_bend
            if abs(slope) <= FLAT * abs(self._slope):
                break
            bend = float(((weighted_CN * change_CN).sum(dim=0) - mean_N.square()).double().mean()) + self._penalty_bend
            low, high = (length, high) if slope < 0 else (low, length)
            length = length - slope / bend if bend > 0 else 2 * length
            if not low < length < high:
                length = 0.5 * (low + high) if high < float("inf") else 2 * low
            length = min(length, 10 * low) if low > 0 and high == float("inf") else length
        return here, point  # not the length that would have been tried next


def _centred(gradient_CQ: torch.Tensor) -> torch.Tensor:
    """Without what moves all classes alike: the data term does not see it, and rounding would make it grow."""
    return gradient_CQ - gradient_CQ.mean(dim=0)


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one * other).sum())
