"""LookAhead: k steps forward, one step back (Zhang et al., 1907.08610), around any optimizer.

Slow weights phi start as the weights themselves. After every k steps of the optimizer, ``phi += alpha (theta - phi)``
and ``theta = phi`` (algorithm 1); the optimizer's own state (momentum) goes on.

Not a wrapper but two hooks, so that the optimizer stays what it is for everything that handles optimizers: slow weights
lie in its state beside the momentum, the count of steps in its parameter groups. Both are in ``state_dict`` and come
back from it, which wrappers are known to forget: VirTex's starts from the resumed weights, with a new count. (timm's
keeps both, but takes its first slow weights after the first k steps, so that the first step back never happens.)
"""

from __future__ import annotations

from typing import Any

import torch

_SLOW, _COUNT = "lookahead_slow", "lookahead_count"


def look_ahead(optimizer: torch.optim.Optimizer, *, steps: int, alpha: float) -> None:
    """Make ``optimizer`` look ahead from its next step on.

    Args:
        optimizer: before its first step, or before its state is loaded.
        steps: k, at least 1.
        alpha: the share of the way that is kept; 1 leaves the optimizer as it was.
    """
    assert steps >= 1, "k counts steps"
    for group in optimizer.param_groups:
        group[_COUNT] = 0

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # Where a parameter has no state yet it has not moved yet. Optimizers set up an empty state, so that ours comes
        # only after theirs; and a parameter without a gradient gets none and does not move.
        fresh.update(
            (parameter, parameter.detach().clone())
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and _SLOW not in optimizer.state.get(parameter, {})
        )

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, weights in fresh.items():
            optimizer.state[parameter][_SLOW] = weights
        fresh.clear()
        for group in optimizer.param_groups:
            group[_COUNT] = (group[_COUNT] + 1) % steps
            if group[_COUNT] == 0:
                for parameter in group["params"]:
                    _step_back(parameter, optimizer.state.get(parameter, {}).get(_SLOW), alpha)

    fresh: dict[torch.Tensor, torch.Tensor] = {}
    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


@torch.no_grad()
def _step_back(parameter: torch.Tensor, slow: torch.Tensor | None, alpha: float) -> None:
    if slow is not None:  # it has had a gradient
        slow.lerp_(parameter, alpha)
        parameter.copy_(slow)
