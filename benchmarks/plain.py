"""The stages of a round the way a first script writes them, as the other side of the benchmarks.

One context, one completion, one perplexity at a time; training with batch 1 and gradient accumulation, whole log-softmaxes
and the reference run again at each step; the readout in padded batches of 8, thinking by `model.generate`. Everything else
(model, prompts, objective, precision) is as on our side, so that only the way of computing differs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steerheal import chat, divergence, healing, personas, steering
from steerheal.evaluation import foundations
from steerheal.healing import Sample
from steerheal.history import Student
from steerheal.models import LM
from steerheal.personas import FOUNDATIONS
from steerheal.settings import HealSettings
from steerheal.steering import Steers, Vector

BATCH = 8  # prompts of the readout that run together


@torch.no_grad()
def extract(lm: LM, systems: tuple[str, str], contexts: Sequence[str], layers: Sequence[int]) -> Vector:
    """The mean-difference vector from one whole forward pass per persona and context."""
    total = {i: torch.zeros(lm.embedding.shape[1], dtype=torch.float64) for i in layers}
    for sign, system in zip((1, -1), systems):
        for context in contexts:
            ids = torch.tensor([chat.prompt(lm.tokenizer, context, system)], device=lm.device)
            states = lm.model(ids, output_hidden_states=True, use_cache=False).hidden_states
            for i in layers:
                total[i] += sign * states[i + 1][0, -1].double().cpu()
    return Vector({i: (t / len(contexts)).float() for i, t in total.items()})


@torch.no_grad()
def generate(lm: LM, prompts: Sequence[list[int]], vector: Steers | None, doses: Sequence[float], tokens: int,
             never: Sequence[int] = ()) -> list[list[int]]:
    """One `model.generate` per prompt, each of exactly `tokens` tokens; `never` are ids that are not drawn."""
    out = []
    for prompt, dose in zip(prompts, doses):
        ids = torch.tensor([prompt], device=lm.device)
        with steering.steered(lm, vector, dose):
            out.append(lm.model.generate(ids, **sampling(ids, tokens, never))[0, len(prompt):].tolist())
    return out


def sampling(ids: Tensor, tokens: int, never: Sequence[int]) -> dict:
    """Arguments of `model.generate` for the loop's own way of drawing."""
    return dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, temperature=1.0, top_p=0.95, top_k=64,
                suppress_tokens=sorted(never), pad_token_id=0, attention_mask=torch.ones_like(ids))


@torch.no_grad()
def token_nll(lm: LM, prompt: list[int], reply: list[int]) -> Tensor:
    """Nats of each reply token, from the logits of the whole text. [len(reply)]"""
    ids = torch.tensor([prompt + reply], device=lm.device)
    logp = lm.model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return -logp.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0].cpu()


def heal(student: Student, samples: Sequence[Sample], held_out: Sequence[Sample], batches: Sequence[Sequence[Sequence[int]]],
         settings: HealSettings, lam: float) -> list[float]:
    """Train a fresh adapter on `samples` and take it out again. Validation NLL at the start and after each epoch.

    Args:
        batches: by epoch, the indices of each effective batch.
    """
    parameters = student.start_round(student.targets(*settings.band), settings.r, 0, 0)
    optimiser = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay)
    steps = sum(map(len, batches))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: healing._cosine(s, steps))

    def validate() -> float:
        return float(torch.cat([token_nll(student.lm, s.prompt, s.targets) for s in held_out]).mean())

    nll = [validate()]
    for epoch in batches:
        for batch in epoch:
            heal_step(student, [samples[i] for i in batch], parameters, settings, lam)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
        nll.append(validate())
    student.finish_round()
    return nll


def heal_step(student: Student, samples: Sequence[Sample], parameters: list[nn.Parameter], settings: HealSettings,
              lam: float) -> None:
    """Accumulate the gradient of one effective batch, one completion at a time, under kl_rev to base."""
    lm = student.lm
    tokens = sum(len(s.targets) for s in samples)
    for s in samples:
        ids = torch.tensor([s.inputs], device=lm.device)
        targets = torch.tensor([*s.inputs[1:], s.targets[-1]], device=lm.device)
        with torch.no_grad(), student.base():
            reference = lm.model(ids, use_cache=False).logits[0].float()
        student._activate(["round"])
        for p in parameters:
            p.requires_grad_(True)
        nll, kl = nll_and_kl(lm.model(ids, use_cache=False).logits[0].float(), reference, targets)
        at = slice(len(s.prompt) - 1, None)
        d = divergence.aggregate(kl[at], settings.aggregate)
        (nll[at].sum() / tokens + lam * (d - settings.tau).relu() / len(samples)).backward()


def nll_and_kl(student: Tensor, reference: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """nll and kl_rev at every position from whole float32 logits [n, vocabulary]."""
    s, r = student.log_softmax(-1), reference.log_softmax(-1)
    return -s.gather(1, targets[:, None])[:, 0], (s.exp() * (s - r)).sum(-1)


@torch.no_grad()
def read(lm: LM, items: list[personas.Vignette], n_shots: int, think_tokens: int) -> Tensor:
    """Log-probabilities of the seven answers to the foundations readout, [items, 2, 7]."""
    out = torch.empty(len(items), 2, 7)
    prefill = chat.plain(lm.tokenizer, foundations.PREFILL)
    answers = foundations.answer_ids(lm, FOUNDATIONS)
    suffix = chat.plain(lm.tokenizer, foundations.THINK_CLOSE + foundations.OURS.interruption(lm)) + prefill
    for frame, order in enumerate((FOUNDATIONS, FOUNDATIONS[::-1])):
        prompts = [foundations._prompt(lm, v, order, n_shots, chat.NEUTRAL, foundations.OURS) for v in items]
        tail = chat.plain(lm.tokenizer, foundations.THINK_OPEN) if think_tokens else prefill
        for i in range(0, len(items), BATCH):
            ids, mask = padded([p + tail for p in prompts[i : i + BATCH]], lm.device)
            if think_tokens:
                thought = lm.model.generate(ids, attention_mask=mask, max_new_tokens=think_tokens, do_sample=False,
                                            min_new_tokens=think_tokens, suppress_tokens=sorted(lm.eos_ids),
                                            return_dict_in_generate=True, pad_token_id=0)
                last = torch.cat([thought.sequences[:, -1:], torch.tensor([suffix] * len(ids), device=lm.device)], 1)
                mask = torch.cat([mask, mask.new_ones(len(ids), think_tokens + len(suffix))], 1)
                position = (mask.cumsum(1) - 1)[:, -last.shape[1] :]
                logits = lm.model(last, attention_mask=mask, position_ids=position, logits_to_keep=1,
                                  past_key_values=thought.past_key_values).logits
            else:
                position = (mask.cumsum(1) - 1).clamp(min=0)
                logits = lm.model(ids, attention_mask=mask, position_ids=position, logits_to_keep=1).logits
            out[i : i + len(ids), frame] = logits[:, -1].float().log_softmax(-1)[:, answers].cpu()
    return out


def padded(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, attention mask) of rows padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=device)
    return ids, torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
