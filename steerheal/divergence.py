"""Divergence from a reference: per-position KL, its aggregate over a completion, the hinge.

    kl_rev_t = KL(student || ref) = sum_v p_s (log p_s - log p_ref)        kl_fwd_t = KL(ref || student)
    D_i      = aggregate over the positions t of completion i              barrier  = relu(D_i - tau)

in float32 and nats. The reverse direction is mode-seeking: it charges the student for mass where the reference has
little. Incoherence is outlier-driven, so rmse, p95 and max see a short token loop that the mean dilutes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LOSS_LOGITS = {"cpu": 2**23, "cuda": 2**25}  # of one model that exist at once, whatever the vocabulary: 32, 128 MiB
RMSE_EPS = 1e-8  # a fresh adapter has kl = 0 everywhere, where sqrt' is infinite


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


def nll_and_kl(hidden: Tensor, targets: Tensor, logits: Callable[[Tensor], Tensor], vocabulary: int,
               reference: Tensor | None, kind: str) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy and KL at every position, with at most LOSS_LOGITS logits of each model alive at once.

    Args:
        hidden: the student's final states [n, d], with gradient.
        targets: ids [n].
        logits: states [m, d] -> float32 logits [m, vocabulary].
        reference: the reference's final states [n, d]; None where there is no barrier.
        kind: kl_rev, kl_fwd or nll.

    Returns:
        (nll [n], kl [n] or None).
    """
    rows = max(LOSS_LOGITS[hidden.device.type] // vocabulary, 1)
    nll, kl = _Chunked.apply(hidden, targets, logits, rows, reference, kind)
    return nll, None if reference is None else kl


class _Chunked(torch.autograd.Function):
    """The gradients of each position's nll and kl with respect to its state are taken while its logits are there.

    They are two [n, d], which the backward pass scales and adds: no logits are kept and none are made again. With
    p = softmax(z) of the student's logits z, and q of the reference's:

        d nll/dz = p - onehot(target)      d kl_rev/dz = p (log p - log q - kl_rev)      d kl_fwd/dz = p - q
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, logits: Callable[[Tensor], Tensor], rows: int,
                reference: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
        pieces = []
        for i in range(0, len(hidden), rows):
            h = hidden[i : i + rows].detach().requires_grad_()
            with torch.enable_grad():
                z = logits(h)
            values, gradients = _with_gradients(z.detach(), targets[i : i + rows],
                                                None if reference is None else logits(reference[i : i + rows]), kind)
            pieces.append((*values, *(torch.autograd.grad(z, h, g, retain_graph=True)[0] for g in gradients)))
        nll, kl, *kept = (torch.cat(piece) for piece in zip(*pieces))
        ctx.save_for_backward(*kept)
        return nll, kl

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden = sum(u[:, None] * g for u, g in zip(upstream, ctx.saved_tensors))
        return hidden.to(ctx.saved_tensors[0].dtype), None, None, None, None, None


def _with_gradients(z: Tensor, targets: Tensor, reference: Tensor | None,
                    kind: str) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Float32 logits [n, vocabulary] -> ((nll, kl), their gradients with respect to z; no second one without a reference)."""
    s = z.log_softmax(-1)
    nll = -s.gather(1, targets[:, None])[:, 0]
    p = s.exp()
    kl = torch.zeros_like(nll)
    gradients = [p]
    if reference is not None:
        r = reference.log_softmax(-1)
        if kind == "kl_rev":
            apart = s.sub_(r)
            kl = (p * apart).sum(-1)
            gradients.append(apart.sub_(kl[:, None]).mul_(p))
        else:
            q = r.exp()
            kl = (q * r.sub_(s)).sum(-1)
            gradients.append(p - q)
    p.scatter_add_(1, targets[:, None], -torch.ones_like(p[:, :1]))
    return (nll, kl), gradients
