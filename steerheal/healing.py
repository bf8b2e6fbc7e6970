"""Heal: distil one round's steered completions into a LoRA under a KL barrier.

    loss = token-mean cross-entropy + lam_r * mean_i relu(D_i - tau) [+ spectral_lam * mean sigma_max(BA)]

over an effective batch, D_i from `divergence`. The reference's final states are computed once and serve every epoch.
AdamW with betas (0.9, 0.95), cosine schedule with a tenth of warm-up, gradients clipped to norm 1, and a held-out
eighth of the completions for validation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steerheal import divergence
from steerheal.forward import hidden_states, token_logps
from steerheal.history import Factors, Student
from steerheal.settings import HealSettings
from steerheal.stages import seed_of

PRESSURE_EVERY = 8  # steps between measurements of the two terms' gradient norms


@dataclass
class Sample:
    """One completion to learn: ids of the prompt, and ids to predict (the end token only if it was drawn)."""

    prompt: list[int]
    targets: list[int]

    @property
    def inputs(self) -> list[int]:
        return self.prompt + self.targets[:-1]


def heal(student: Student, samples: Sequence[Sample], settings: HealSettings, lam: float, run_seed: int,
         round_index: int) -> tuple[Factors, dict[str, Any]]:
    """Train one round's adapter on top of the student's history.

    Args:
        lam: the barrier's weight in this round, lam_r.

    Returns:
        (factors, record): record holds per-step nll, D and gradient norms, validation NLL per epoch, duty cycle.

    Raises:
        FloatingPointError: a loss that is not finite; the message names step and samples.
    """
    # The float32 adapters multiply in the base's bfloat16: a fifth faster, and the reference sees the same rounding.
    # Without cache_enabled=False autocast would go on using the bfloat16 copies of the first step's weights.
    with torch.autocast(student.lm.device.type, torch.bfloat16, cache_enabled=False,
                        enabled=student.lm.model.dtype == torch.bfloat16):
        return _train(student, samples, settings, lam, run_seed, round_index)


def _train(student: Student, samples: Sequence[Sample], settings: HealSettings, lam: float, run_seed: int,
           round_index: int) -> tuple[Factors, dict[str, Any]]:
    order = _permutation(len(samples), run_seed, round_index, "split")
    n_val = max(len(samples) // 8, 1)
    val, train = [samples[i] for i in order[:n_val]], [samples[i] for i in order[n_val:]]
    reference = None if settings.barrier == "nll" else _reference_states(student, train, settings.ref)
    parameters = student.start_round(student.targets(*settings.band), settings.r, run_seed, round_index)
    optimiser = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay)
    per_epoch = math.ceil(len(train) / settings.batch)
    steps = per_epoch * settings.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: _cosine(s, steps))

    record: dict[str, Any] = dict(n_train=len(train), n_val=n_val, steps=[], val_nll=[_validation_nll(student, val)])
    over: list[bool] = []
    for epoch in range(settings.epochs):
        order = _permutation(len(train), run_seed, round_index, f"order {epoch}")
        for batch in (order[i : i + settings.batch] for i in range(0, len(train), settings.batch)):
            step = len(record["steps"])
            row = _step(student, [train[i] for i in batch], None if reference is None else [reference[i] for i in batch],
                        settings, lam, parameters, measure=step % PRESSURE_EVERY == 0)
            if not math.isfinite(row["loss"]):
                student.finish_round()
                raise FloatingPointError(f"healing: the loss is {row['loss']} at step {step} of {steps}, samples {batch}. "
                                         f"A smaller heal.lr (now {settings.lr:g}) is the usual way out.")
            row["gradient_norm"] = float(nn.utils.clip_grad_norm_(parameters, 1.0))
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
            over += [d > settings.tau for d in row["D"]]
            record["steps"].append(row)
        record["val_nll"].append(_validation_nll(student, val))
    record["duty"] = sum(over) / len(over) if over else 0.0
    record["train_nll"] = [sum(r["nll"] for r in record["steps"][e * per_epoch : (e + 1) * per_epoch]) / per_epoch
                           for e in range(settings.epochs)]
    return student.finish_round(), record


def _step(student: Student, samples: list[Sample], reference: list[Tensor] | None, settings: HealSettings, lam: float,
          parameters: list[nn.Parameter], measure: bool) -> dict[str, Any]:
    """Accumulate the gradient of one effective batch in `parameters`; what was seen, as numbers."""
    tokens = sum(len(s.targets) for s in samples)
    row: dict[str, Any] = dict(nll=0.0, loss=0.0, D=[])
    terms: list[list[Tensor]] = [[], []]  # gradients of the two terms, summed over micro-batches
    for i in range(0, len(samples), settings.micro_batch):
        part = samples[i : i + settings.micro_batch]
        ref = None if reference is None else torch.cat(reference[i : i + settings.micro_batch])
        states = _states_with_grad(student, part)
        targets = torch.tensor([t for s in part for t in s.targets], device=states.device)
        nll, kl = divergence.nll_and_kl(states, targets, student.lm.logits, ref, settings.barrier)
        fit = nll.sum() / tokens
        barrier = fit.new_zeros(())
        if kl is not None:
            d = torch.stack([divergence.aggregate(k, settings.aggregate) for k in kl.split([len(s.targets) for s in part])])
            barrier = lam * (d - settings.tau).relu().sum() / len(samples)
            row["D"] += d.tolist()
        row["nll"] += fit.item()
        row["loss"] += (fit + barrier).item()
        if measure and kl is not None:
            for total, term in zip(terms, (fit, barrier)):
                gradient = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
                dense = [torch.zeros_like(p) if g is None else g for g, p in zip(gradient, parameters)]
                total[:] = dense if not total else [a + b for a, b in zip(total, dense)]
        else:
            (fit + barrier).backward()
    if terms[0]:
        norms = [float(torch.stack([g.norm() for g in total]).norm()) for total in terms]
        row |= dict(nll_gradient=norms[0], barrier_gradient=norms[1], pressure=norms[1] / max(norms[0], 1e-12))
        for p, a, b in zip(parameters, *terms):
            p.grad = a + b
    if settings.spectral_lam:
        penalty = settings.spectral_lam * spectral_norm(parameters)
        penalty.backward()
        row["spectral"] = penalty.item()
    return row


def spectral_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Mean over modules of sigma_max(alpha/r BA), from the list [A, B, A, B, ...] with alpha/r = 2.

    The singular vectors come from the r x r core without gradient; u'BAv then has the exact gradient of sigma_max and
    none of the infinities of a differentiated QR at B = 0.
    """
    total = []
    for a, b in zip(parameters[::2], parameters[1::2]):
        with torch.no_grad():
            qb, rb = torch.linalg.qr(b)
            qa, ra = torch.linalg.qr(a.T)
            u, _, v = torch.linalg.svd(rb @ ra.T)
            left, right = qb @ u[:, 0], qa @ v[0]
        total.append(2.0 * (left @ b) @ (a @ right))
    return torch.stack(total).mean()


def _states_with_grad(student: Student, samples: list[Sample]) -> Tensor:
    """Final hidden states at the positions that predict the samples' targets, sample after sample: [n, d]."""
    width = max(len(s.inputs) for s in samples)
    device = student.lm.device
    ids = torch.tensor([s.inputs + [0] * (width - len(s.inputs)) for s in samples], device=device)
    states = student.lm.decoder(input_ids=ids, use_cache=False).last_hidden_state
    return torch.cat([states[i, len(s.prompt) - 1 : len(s.inputs)] for i, s in enumerate(samples)])


def _reference_states(student: Student, samples: list[Sample], ref: str) -> list[Tensor]:
    """The reference's final states at the same positions, one [len(targets), d] per sample."""
    out: list[Tensor] = [torch.empty(0)] * len(samples)

    def fill() -> None:
        for i, states in hidden_states(student.lm, [s.inputs for s in samples], [len(s.prompt) - 1 for s in samples]):
            out[i] = states.clone()

    if ref == "base":
        with student.base():
            fill()
    else:
        fill()
    return out


def _validation_nll(student: Student, samples: list[Sample]) -> float:
    """Mean nats per token over held-out completions."""
    logps = token_logps(student.lm, [s.prompt for s in samples], [s.targets for s in samples])
    return -float(torch.cat(logps).mean())


def _cosine(step: int, steps: int, warmup: float = 0.1) -> float:
    rise = max(round(warmup * steps), 1)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def _permutation(n: int, run_seed: int, round_index: int, purpose: str) -> list[int]:
    generator = torch.Generator().manual_seed(seed_of(run_seed, "heal", round_index, purpose, 0))
    return torch.randperm(n, generator=generator).tolist()
