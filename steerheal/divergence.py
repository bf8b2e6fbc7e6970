"""Divergence from a reference: per-position KL, its aggregate over a completion, the hinge.

    kl_rev_t = KL(student || ref) = sum_v p_s (log p_s - log p_ref)        kl_fwd_t = KL(ref || student)
    D_i      = aggregate over the positions t of completion i              barrier  = relu(D_i - tau)

in float32 and nats. The reverse direction is mode-seeking: it charges the student for mass where the reference has
little. Incoherence is outlier-driven, so rmse, p95 and max see a short token loop that the mean dilutes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOSS_ROWS = 256  # positions whose vocabulary-wide logits exist at once, forward and backward
RMSE_EPS = 1e-8  # a fresh adapter has kl = 0 everywhere, where sqrt' is infinite


def per_position_kl(student: Tensor, reference: Tensor, kind: str) -> Tensor:
    """KL at each position, in nats.

    Args:
        student, reference: float32 logits [n, vocabulary].
        kind: kl_rev or kl_fwd.

    Returns:
        [n], never negative beyond rounding.
    """
    s, r = student.log_softmax(-1), reference.log_softmax(-1)
    if kind == "kl_rev":
        return (s.exp() * (s - r)).sum(-1)
    if kind == "kl_fwd":
        return (r.exp() * (r - s)).sum(-1)
    raise ValueError(f"kind = {kind!r}: kl_rev or kl_fwd")


def aggregate(kl: Tensor, how: str) -> Tensor:
    """One number per completion from its per-position KL [n]. p95 interpolates linearly."""
    if how == "mean":
        return kl.mean()
    if how == "rmse":
        return (kl.square().mean() + RMSE_EPS).sqrt()
    if how == "p95":
        return kl.quantile(0.95)
    if how == "max":
        return kl.max()
    raise ValueError(f"aggregate = {how!r}: mean, rmse, p95 or max")


def nll_and_kl(hidden: Tensor, targets: Tensor, logits: Callable[[Tensor], Tensor], reference: Tensor | None,
               kind: str) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy and KL at every position, with at most LOSS_ROWS x vocabulary logits alive.

    Each chunk of positions recomputes its logits in the backward pass, so memory does not grow with the batch.

    Args:
        hidden: the student's final states [n, d], with gradient.
        targets: ids [n].
        logits: states [m, d] -> float32 logits [m, vocabulary].
        reference: the reference's final states [n, d]; None where there is no barrier.
        kind: kl_rev, kl_fwd or nll.

    Returns:
        (nll [n], kl [n] or None).
    """
    def chunk(h: Tensor, t: Tensor, ref: Tensor | None) -> tuple[Tensor, Tensor | None]:
        student = logits(h)
        nll = torch.nn.functional.cross_entropy(student, t, reduction="none")
        return nll, None if ref is None else per_position_kl(student, logits(ref), kind)

    references = [None] * len(hidden.split(LOSS_ROWS)) if reference is None else reference.split(LOSS_ROWS)
    pieces = [checkpoint(chunk, h, t, ref, use_reentrant=False)
              for h, t, ref in zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS), references)]
    nll = torch.cat([p[0] for p in pieces])
    return nll, None if reference is None else torch.cat([p[1] for p in pieces])
