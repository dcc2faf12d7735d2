"""A linear probe over a whole grid of C: vlbench's regularisation path against scikit-learn's LogisticRegression.

    python benchmarks/probe_vs_sklearn.py --small                    3,000 x 64, 10 classes: seconds
    python benchmarks/probe_vs_sklearn.py --classes 10
    python benchmarks/probe_vs_sklearn.py --classes 100 --max-sklearn-seconds 900

Both get the same features, the same 45 values of C from 1e-6 to 1e5 and the same cores. The features are centred and
divided by one number, the root of their mean squared length, which is what vlbench does inside: so C means the same to
both. They are float32, as a feature store keeps them, and so scikit-learn's lbfgs computes too. Each value of C is a
fit of its own for scikit-learn, as its users write the loop. Validation accuracy is in both times.

scikit-learn fits from the strongest penalty to the weakest until its seconds are spent; what is compared are the fits
that both have finished.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from vlbench.adapters.common.softmax_regression import SoftmaxRegression
from vlbench.core.types import Outcomes
from vlbench.stats.paired import compare_outcomes

GRID = np.logspace(-6, 5, 45)
SIGNAL = 0.16
"""Spread of the class means beside that of the noise, on every axis."""
Fitted = tuple[np.ndarray, np.ndarray]
"""``weight_DC`` and ``bias_C``."""


def main() -> int:
    """Run both and print the ratio. Returns 1 where scikit-learn's best fit is better (exact McNemar, 5%)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--examples", type=int, default=20_000, help="a fifth of them for validation")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-sklearn-seconds", type=float, default=float("inf"))
    parser.add_argument("--small", action="store_true", help="3,000 examples of width 64")
    args = parser.parse_args()
    n, width = (3_000, 64) if args.small else (args.examples, args.width)
    features_ND, labels_N = problem(n, width, args.classes, seed=args.seed)
    n_train = n * 4 // 5
    train, val = slice(0, n_train), slice(n_train, n)
    features_ND -= features_ND[train].mean(axis=0)
    features_ND /= np.sqrt(np.square(features_ND[train], dtype=np.float64).sum(axis=1).mean())
    data = (features_ND[train], labels_N[train], features_ND[val], labels_N[val])

    print(f"{n_train:,} x {width} features, {args.classes} classes, {n - n_train:,} validation examples,", end=" ")
    print(f"{len(GRID)} values of C, {torch.get_num_threads()} CPU threads")
    ours = timed("vlbench", vlbench_fits(*data[:2], args.classes), data[2:])
    theirs = timed("scikit-learn", sklearn_fits(*data[:2]), data[2:], limit=args.max_sklearn_seconds)
    done = len(theirs.fits)
    if done < len(GRID):
        print(f"scikit-learn finished {done} of {len(GRID)} fits in its time, C up to {GRID[done - 1]:.3g};")
        print(f"only these are compared, for which vlbench took {ours.seconds[done - 1]:.1f} s")
    ratios = (theirs.seconds[-1] / ours.seconds[done - 1], theirs.cpu_seconds[-1] / ours.cpu_seconds[done - 1])
    print(f"ratio of the times: {ratios[0]:.1f} by the clock, {ratios[1]:.1f} by processor time")
    if done < len(GRID):
        wall, cpu = theirs.seconds[-1] / ours.seconds[-1], theirs.cpu_seconds[-1] / ours.cpu_seconds[-1]
        print(f"over all {len(GRID)}, all done here: at least {wall:.1f} by the clock, {cpu:.1f} by processor time")
    ours_best, theirs_best = np.argmax(ours.accuracies[:done]), np.argmax(theirs.accuracies)
    test = compare_outcomes(*(hits(fit, data[2:]) for fit in (ours.fits[ours_best], theirs.fits[theirs_best])))
    print("best accuracy on these fits:", end=" ")
    print(f"vlbench {ours.accuracies[ours_best]:.4f} at C = {GRID[ours_best]:.3g},", end=" ")
    print(f"scikit-learn {theirs.accuracies[theirs_best]:.4f} at C = {GRID[theirs_best]:.3g}")
    print(f"  difference {test.diff:+.4f} [{test.lo:+.4f}, {test.hi:+.4f}], p = {test.p:.3f} ({test.method})")
    print("objective, scikit-learn's divided by C * N, in float64:")
    worst = -np.inf
    for index in range(done):
        one, other = (objective(fit, *data[:2], GRID[index]) for fit in (ours.fits[index], theirs.fits[index]))
        worst = max(worst, one / other - 1)
        if index % 6 == 2:
            values = f"vlbench {one:.9f}  scikit-learn {other:.9f}  relative {one / other - 1:+.1e}"
            print(f"  C = {GRID[index]:<9.3g} {values}")
    print(f"largest excess of vlbench's objective over scikit-learn's on {done} fits: {worst:+.1e} (relative)")
    return int(test.diff < 0 and test.p < 0.05)


def problem(n: int, width: int, n_classes: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features like a network's: variances that fall as a power of the rank, class means, noise around them.

    Every axis carries the same signal beside its noise, and the noise of a class has a shape of its own: so more
    capacity helps, and too much of it overfits.
    """
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(0, n_classes, n)
    spread_D = (1.0 + np.arange(width)) ** -0.6
    means_CD = rng.standard_normal((n_classes, width)) * spread_D
    stretch_CD = np.exp(0.3 * rng.standard_normal((n_classes, width)))
    noise_ND = rng.standard_normal((n, width)) * spread_D * stretch_CD[labels_N]
    rotation_DD = np.linalg.qr(rng.standard_normal((width, width)))[0]
    return ((SIGNAL * means_CD[labels_N] + noise_ND) @ rotation_DD + 0.5).astype(np.float32), labels_N


def vlbench_fits(features_ND: np.ndarray, labels_N: np.ndarray, n_classes: int) -> Iterator[Fitted]:
    for fit in SoftmaxRegression(features_ND, labels_N, n_classes).path(GRID):
        yield fit.weight_DC, fit.bias_C


def sklearn_fits(features_ND: np.ndarray, labels_N: np.ndarray) -> Iterator[Fitted]:
    for c in GRID:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=c, solver="lbfgs", max_iter=1000).fit(features_ND, labels_N)
        yield model.coef_.T.astype(np.float64), model.intercept_.astype(np.float64)


@dataclass
class Timed:
    """Fits, and after each of them the seconds since the start and its validation accuracy."""

    fits: list[Fitted] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Of this process on all cores: other work on the machine does not lengthen them."""
    accuracies: list[float] = field(default_factory=list)


def timed(
    name: str, fits: Iterator[Fitted], val: tuple[np.ndarray, np.ndarray], *, limit: float = float("inf")
) -> Timed:
    found = Timed()
    start, cpu_start = time.perf_counter(), time.process_time()
    for weight_DC, bias_C in fits:
        found.accuracies.append(float(((val[0] @ weight_DC + bias_C).argmax(axis=1) == val[1]).mean()))
        found.fits.append((weight_DC, bias_C))
        found.seconds.append(time.perf_counter() - start)
        found.cpu_seconds.append(time.process_time() - cpu_start)
        if found.seconds[-1] > limit:
            break
    spent = f"{found.seconds[-1]:8.1f} s by the clock, {found.cpu_seconds[-1]:8.1f} s of processor time"
    print(f"{name:<13} {spent}, {len(found.fits)} fits, best accuracy {max(found.accuracies):.4f}", flush=True)
    return found


def hits(fit: Fitted, val: tuple[np.ndarray, np.ndarray]) -> Outcomes:
    """Which validation examples a fit names right."""
    right_N = (val[0] @ fit[0] + fit[1]).argmax(axis=1) == val[1]
    ids = [str(number) for number in range(len(right_N))]
    return Outcomes(ids, right_N.astype(np.float64), ids, binary=True)


def objective(fit: Fitted, features_ND: np.ndarray, labels_N: np.ndarray, c: float) -> float:
    """Mean cross-entropy plus ``||W||^2 / (2 C N)``, in float64."""
    weight_DC, bias_C = fit
    logits_NC = features_ND.astype(np.float64) @ weight_DC + bias_C
    logits_NC -= logits_NC.max(axis=1, keepdims=True)
    loss_N = np.log(np.exp(logits_NC).sum(axis=1)) - logits_NC[np.arange(len(labels_N)), labels_N]
    return float(loss_N.mean() + np.square(weight_DC).sum() / (2 * c * len(labels_N)))


if __name__ == "__main__":
    raise SystemExit(main())
