"""Heal: distil one round's steered completions into a LoRA under a KL barrier.

    loss = token-mean cross-entropy + lam_r * mean_i relu(D_i - tau) [+ spectral_lam * mean sigma_max(BA)]

over an effective batch, D_i from `divergence`. The reference's final states are computed once and serve every epoch.
AdamW with betas (0.9, 0.95), cosine schedule with a tenth of warm-up, gradients clipped to norm 1, and a held-out
eighth of the completions for validation.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steerheal import cpu, divergence
from steerheal.errors import ran_out
from steerheal.forward import attention_by_rows, hidden_states, token_logps, training_states
from steerheal.history import Factors, Student
from steerheal.models import LM
from steerheal.settings import HealSettings
from steerheal.stages import seed_of

PRESSURE_EVERY, PRESSURE_FROM = 8, 4  # steps between measurements of the two terms' gradient norms, and the first: at the
# start, where the adapter is zero, the barrier has no gradient
DOMINATES = 2  # pressure above which, throughout, the barrier is said to have outweighed the data
POOL = 4  # batches that are sorted by length together: padding goes, and batches still differ from epoch to epoch


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
    """Train one round's adapter on top of the student's history. Afterwards the student is what it was, whatever happens.

    Args:
        lam: the barrier's weight in this round, lam_r.

    Returns:
        (factors, record): record holds per-step nll, D and gradient norms, validation NLL per epoch, the duty cycle,
        the micro-batch that fitted, and `warning`: a sentence on a barrier that does nothing or everything, else None.

    Raises:
        FloatingPointError: a loss or gradient that is not finite; the message names step and samples.
        torch.OutOfMemoryError: not even a micro-batch of one fits.
    """
    order = _permutation(len(samples), run_seed, round_index, "split")
    n_val = max(len(samples) // 8, 1)
    train = sorted(order[n_val:])
    reference = {}
    if settings.barrier != "nll":
        with training(student.lm):
            reference = dict(zip(train, _reference_states(student, [samples[i] for i in train], settings.ref)))
    parameters = student.start_round(student.targets(*settings.band), settings.r, run_seed, round_index)
    try:
        with training(student.lm):
            record = _train(student, parameters, samples, train, order[:n_val], reference, settings, lam,
                            (run_seed, round_index))
    finally:
        factors = student.finish_round()
    return factors, record


@contextlib.contextmanager
def training(lm: LM) -> Iterator[None]:
    """What a step runs under. The float32 adapters multiply in the base's bfloat16: a fifth faster, and the reference's linear
    layers see the same rounding. Without cache_enabled=False autocast would go on using the bfloat16 copies of the first
    step's weights. PEFT would make float32 of an adapter's input before autocast takes it in bfloat16, anew for each linear
    layer: the layers that are there pass it on as it is."""
    short = lm.model.dtype == torch.bfloat16
    autocast = torch.autocast(lm.device.type, torch.bfloat16, cache_enabled=False, enabled=short)
    with cpu.products(lm), attention_by_rows(), autocast, disable_input_dtype_casting(lm.model, active=short):
        yield


def _train(student: Student, parameters: list[nn.Parameter], samples: Sequence[Sample], train: list[int],
           val: list[int], reference: dict[int, Tensor], settings: HealSettings, lam: float,
           seed: tuple[int, int]) -> dict[str, Any]:
    """Optimise `parameters` in place. Samples go by their index in the round."""
    optimiser = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay)
    steps = math.ceil(len(train) / settings.batch) * settings.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: _cosine(s, steps))
    held_out = [samples[i] for i in val]
    rows: list[dict[str, Any]] = []
    train_nll: list[float] = []
    val_nll = [_validation_nll(student, held_out)]
    best = 0
    kept: list[Tensor] = []  # the adapter of the best epoch, where there is an early stop
    micro_batch = settings.micro_batch
    for epoch in range(settings.epochs):
        for batch in batches({i: len(samples[i].inputs) for i in train}, settings.batch, *seed, epoch):
            measure = len(rows) % PRESSURE_EVERY == PRESSURE_FROM
            row, micro_batch = _step_that_fits(student, parameters, [samples[i] for i in batch],
                                               [reference[i] for i in batch] if reference else None, settings, lam,
                                               measure, micro_batch)
            row["gradient_norm"] = float(nn.utils.clip_grad_norm_(parameters, 1.0))
            if not math.isfinite(row["loss"] + row["gradient_norm"]):
                wrong = [i for i, *seen in zip(batch, row["sample_nll"], row["D"] or row["sample_nll"])
                         if not math.isfinite(sum(seen))]
                raise FloatingPointError(
                    f"healing: the loss is {row['loss']} and its gradient {row['gradient_norm']} at step {len(rows)} of "
                    f"{steps}, sample {', '.join(map(str, wrong or batch))}. A smaller heal.lr (now {settings.lr:g}) is "
                    f"the usual way out.")
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
            rows.append(row | dict(samples=batch))
        epoch_rows = rows[-math.ceil(len(train) / settings.batch) :]
        train_nll.append(sum(row["nll"] for row in epoch_rows) / len(epoch_rows))
        val_nll.append(_validation_nll(student, held_out))
        if not math.isfinite(val_nll[-1]):
            raise FloatingPointError(f"healing: the validation loss after epoch {epoch} is {val_nll[-1]}. A smaller heal.lr "
                                     f"(now {settings.lr:g}) is the usual way out.")
        if settings.early_stop:
            if epoch == 0 or val_nll[-1] < val_nll[best]:
                best, kept = epoch + 1, [p.detach().clone() for p in parameters]
            elif epoch + 1 - best >= settings.early_stop:
                break
    for p, value in zip(parameters, kept):
        p.data = value
    over = [d > settings.tau for row in rows for d in row["D"]]
    duty = sum(over) / len(over) if over else 0.0
    return dict(n_train=len(train), n_val=len(val), steps=rows, train_nll=train_nll, val_nll=val_nll, duty=duty,
                micro_batch=micro_batch, warning=_warning(rows, duty, settings, lam) if reference else None)


def _warning(rows: list[dict[str, Any]], duty: float, settings: HealSettings, lam: float) -> str | None:
    """One sentence where the barrier had no say, or all of it."""
    if duty == 0:
        top = max(d for row in rows for d in row["D"])
        return (f"the barrier never fired: no completion came over heal.tau = {settings.tau:g} (the largest "
                f"{settings.aggregate} of KL was {top:.2g} nats), so this round is plain nll; lower heal.tau.")
    pressure = [row["pressure"] for row in rows if "pressure" in row]
    if pressure and min(pressure) > DOMINATES:
        return (f"the barrier outweighed the data at every measurement (its gradient was at least {min(pressure):.2g} times "
                f"as large), so this round kept to its reference more than it learned the trait; raise heal.tau = "
                f"{settings.tau:g}, or lower heal.lam (now {lam:g}).")
    return None


def batches(lengths: dict[int, int], size: int, run_seed: int, round_index: int, epoch: int) -> list[list[int]]:
    """An epoch's batches: samples of similar length together, in random order, drawn by seed, round and epoch alone.

    Args:
        lengths: tokens of each sample, by its index.
    """
    items = sorted(lengths)
    shuffled = [items[i] for i in _permutation(len(items), run_seed, round_index, f"order {epoch}")]
    pool = POOL * size
    grouped = [i for k in range(0, len(items), pool) for i in sorted(shuffled[k : k + pool], key=lengths.__getitem__)]
    out = [grouped[k : k + size] for k in range(0, len(items), size)]
    return [out[i] for i in _permutation(len(out), run_seed, round_index, f"batches {epoch}")]


def _step_that_fits(student: Student, parameters: list[nn.Parameter], samples: list[Sample],
                    reference: list[Tensor] | None, settings: HealSettings, lam: float, measure: bool,
                    micro_batch: int) -> tuple[dict[str, Any], int]:
    """`_step` with the largest of micro_batch, micro_batch / 2, ... 1 that memory holds; and which one that was."""
    while True:
        try:
            with _checkpointing(student.lm) if settings.gradient_checkpointing else contextlib.nullcontext():
                return _step(student, parameters, samples, reference, settings, lam, measure, micro_batch), micro_batch
        except RuntimeError as error:
            if micro_batch == 1 or not ran_out(error):
                raise
        # out here, because inside the except block the traceback keeps the failed attempt's tensors alive
        micro_batch //= 2
        for p in parameters:
            p.grad = None
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _checkpointing(lm: LM) -> Iterator[None]:
    """Blocks keep only their inputs. They alone are set to training mode, which nothing inside them sees. The switch is
    the blocks' own, as transformers' GradientCheckpointingLayer describes it: the model's is renamed from 5.23 on."""
    recompute = partial(checkpoint, use_reentrant=False)
    for block in lm.blocks:
        vars(block).update(training=True, gradient_checkpointing=True, _gradient_checkpointing_func=recompute)
    try:
        yield
    finally:
        for block in lm.blocks:
            vars(block).update(training=False, gradient_checkpointing=False)


def _step(student: Student, parameters: list[nn.Parameter], samples: list[Sample], reference: list[Tensor] | None,
          settings: HealSettings, lam: float, measure: bool, micro_batch: int) -> dict[str, Any]:
    """Accumulate the gradient of one effective batch in `parameters`; what was seen, as numbers."""
    tokens = sum(len(s.targets) for s in samples)
    row: dict[str, Any] = dict(nll=0.0, loss=0.0, sample_nll=[], D=[])
    terms: list[list[Tensor]] = [[], []]  # gradients of the two terms, summed over micro-batches
    for i in range(0, len(samples), micro_batch):
        part = samples[i : i + micro_batch]
        lengths = [len(s.targets) for s in part]
        ref = None if reference is None else torch.cat(reference[i : i + micro_batch])
        states = _states_with_grad(student, part)
        targets = torch.tensor([t for s in part for t in s.targets], device=states.device)
        nll, kl = divergence.nll_and_kl(states, targets, student.lm.logits, student.lm.embedding.shape[0], ref,
                                        settings.barrier)
        fit = nll.sum() / tokens
        barrier = fit.new_zeros(())
        if kl is not None:
            d = torch.stack([divergence.aggregate(k, settings.aggregate) for k in kl.split(lengths)])
            barrier = lam * (d - settings.tau).relu().sum() / len(samples)
            row["D"] += d.tolist()
        row["sample_nll"] += torch.stack([n.mean() for n in nll.split(lengths)]).tolist()
        row["nll"] += fit.item()
        row["loss"] += (fit + barrier).item()
        if measure and kl is not None:
            for total, term in zip(terms, (fit, barrier)):
                # the second pass frees what was saved; kept, it would stay alive beside the next micro-batch's
                gradient = torch.autograd.grad(term, parameters, retain_graph=term is fit, allow_unused=True)
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
    with torch.autocast(parameters[0].device.type, enabled=False):  # there is no singular value decomposition in bfloat16
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
    return training_states(student.lm, [s.inputs for s in samples], [len(s.prompt) - 1 for s in samples])


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
