"""Beam search: the most likely sequence that a left-to-right model can be led to, for a batch of beginnings.

As VirTex decodes (kdexd/virtex, virtex/utils/beam_search.py): the score is the sum of log-probabilities, with no
correction for length; no token follows itself; a beam proposes its ``per_beam`` best tokens.

Shapes: B sequences asked for, K beams of each, L tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def beam_search(
    next_token: Callable[[torch.Tensor], torch.Tensor],
    *,
    start_B: torch.Tensor,
    end: int,
    max_length: int,
    beams: int = 5,
    per_beam: int | None = None,
    never: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best sequence of each row and its score.

    Args:
        next_token: ``tokens_RL`` of ``R = B * K`` rows, row ``b * K + k`` being beam k of b, to log-probabilities of
            the token after them, ``(R, V)``.
        start_B: the first token of each, int64.
        end: the token that ends a sequence.
        max_length: of a sequence, first and last token included; one that reaches it has no end.
        beams: K.
        per_beam: tokens that each beam proposes at a step; None: ``beams``. At the first step it is always ``beams``.
        never: tokens that are never written.

    Returns:
        ``tokens_BL``, filled up with ``end``, and ``score_B``, the sum of log-probabilities.
    """
    assert beams >= 1, "a search needs a beam"
    n = len(start_B)
    tokens_BKL = start_B[:, None, None].expand(n, beams, 1)
    # The beams begin as one: all but the first are impossible until they differ.
    score_BK = torch.full((n, beams), -torch.inf, device=start_B.device)
    score_BK[:, 0] = 0.0
    ended_BK = torch.zeros_like(score_BK, dtype=torch.bool)
    for step in range(max_length - 1):
        log_p_BKV = next_token(tokens_BKL.reshape(n * beams, -1)).float().reshape(n, beams, -1).clone()
        log_p_BKV[..., list(never)] = -torch.inf
        if step:
            log_p_BKV.scatter_(2, tokens_BKL[..., -1:], -torch.inf)
        # An ended sequence goes on with its end alone, at no cost.
        log_p_BKV.masked_fill_(ended_BK[..., None], -torch.inf)
        log_p_BKV[..., end].masked_fill_(ended_BK, 0.0)
        width = min(beams if per_beam is None or not step else per_beam, log_p_BKV.shape[-1])
        proposed_BKP, token_BKP = log_p_BKV.topk(width, dim=-1)
        candidates_BC = (score_BK[..., None] + proposed_BKP).flatten(1)
        # Stable: of equal candidates the better beam's stands first, whatever the device.
        ordered_BC, order_BC = candidates_BC.sort(dim=1, descending=True, stable=True)
        score_BK, chosen_BK = ordered_BC[:, :beams], order_BC[:, :beams]
        if score_BK.shape[1] < beams:  # a vocabulary smaller than the beam
            score_BK, chosen_BK = _padded(score_BK, beams, -torch.inf), _padded(chosen_BK, beams, 0)
        token_BK = token_BKP.flatten(1).gather(1, chosen_BK)
        parent_BK = chosen_BK // width
        before_BKL = tokens_BKL.gather(1, parent_BK[..., None].expand(-1, -1, tokens_BKL.shape[2]))
        tokens_BKL = torch.cat([before_BKL, token_BK[..., None]], dim=2)
        ended_BK = token_BK == end
        # Scores only fall, so that an ended sequence at the top stays there.
        if bool(ended_BK[:, 0].all()):
            break
    return tokens_BKL[:, 0], score_BK[:, 0]


def _padded(values_BX: torch.Tensor, width: int, value: float) -> torch.Tensor:
    return torch.nn.functional.pad(values_BX, (0, width - values_BX.shape[1]), value=value)
