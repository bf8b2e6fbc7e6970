"""Batched sampling: one bare loop over a key-value cache, one top-k draw per step.

Rows of a batch may differ in prompt and in steering dose. A row that ends leaves the batch, so no token is spent on
it. Each completion's draws come from its own seed by inverse transform, so they do not depend on the batch it ran in
(up to the rounding of the model's matrix products). No repetition penalty: repetition must stay visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from steerheal.models import LM
from steerheal.steering import Vector, steered

COMPACT = 0.8  # rebuild the batch when fewer than this share of its rows still run


@dataclass(frozen=True)
class Sampling:
    """How to draw. temperature 0 is greedy and reads no seed."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 64




@dataclass
class Completion:
    """Sampled token ids without the end token, and the end token where one was drawn."""

    ids: list[int]
    end: int | None

    @property
    def targets(self) -> list[int]:
        """What was drawn, end token included."""
        return self.ids if self.end is None else [*self.ids, self.end]


@torch.no_grad()
def generate(lm: LM, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None,
             vector: Vector | None = None, doses: Sequence[float] | None = None) -> list[Completion]:
    """One completion per prompt; a row ends at its first end token.

    Args:
        prompts: token ids of each row, up to the assistant tag.
        seeds: one per row; required unless greedy.
        vector, doses: steering, one dose per row.
    """
    rows = len(prompts)
    ids, mask, position = _left_padded(lm, prompts)
    uniforms = _uniforms(seeds, rows, sampling.max_new_tokens) if sampling.temperature > 0 else None
    ends = torch.tensor(sorted(lm.eos_ids), device=lm.device)
    cache = DynamicCache(config=lm.model.config.get_text_config())
    drawn = torch.zeros(rows, sampling.max_new_tokens, dtype=torch.long, device=lm.device)
    length = torch.full((rows,), sampling.max_new_tokens, device=lm.device)
    alive = torch.arange(rows, device=lm.device)  # rows of the batch -> rows of the result
    running = torch.ones(rows, dtype=torch.bool, device=lm.device)

    dose = torch.tensor(list(doses), dtype=torch.float32) if doses is not None else torch.zeros(rows)
    with steered(lm, vector, dose) as dial:
        for step in range(sampling.max_new_tokens):
            out = lm.decoder(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache,
                             use_cache=True)
            logits = lm.logits(out.last_hidden_state[:, -1])
            logits[:, lm.banned] = -torch.inf
            token = _draw(logits, sampling, None if uniforms is None else uniforms[alive.cpu(), step].to(lm.device))
            drawn[alive, step] = token
            ended = torch.isin(token, ends) & running
            length[alive[ended]] = step
            running &= ~ended
            left = int(running.sum())
            if left == 0:
                break
            if left <= COMPACT * len(alive):
                keep = running.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                alive, mask, position, token = alive[keep], mask[keep], position[keep], token[keep]
                running = running[keep]
                dial.dose = dial.dose[keep]
            ids = token[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            position = position[:, -1:] + 1
    return [Completion(row[:n], row[n] if n < len(row) else None) for row, n in zip(drawn.tolist(), length.tolist())]


@dataclass
class Thoughts:
    """What `think` saw. Thoughts are ids [rows][budget]; log-probabilities are float32, over the whole vocabulary."""

    ids: list[list[int]]
    logp: Tensor  # [rows, budget] of each thought
    watched: Tensor  # [rows, budget, watched] of the watched ids at each thought's place
    states: Tensor  # [rows, len(suffix) + 1, d]: state i predicts suffix[i], the last one what follows the suffix


@torch.no_grad()
def think(lm: LM, prompts: Sequence[list[int]], budget: int, suffix: list[int], watch: Sequence[int],
          never: Sequence[int] = (), vector: Vector | None = None, dose: float = 0.0) -> Thoughts:
    """`budget` greedy tokens per prompt, none of them an end token, and then `suffix`, read behind the same cache.

    Args:
        suffix: ids that follow every row's thoughts.
        watch: ids whose log-probability is recorded at every step.
        never: further ids that are not drawn, such as the end of a thinking block.
    """
    ids, mask, position = _left_padded(lm, prompts)
    unwanted = torch.tensor(sorted({*lm.eos_ids, *never, *lm.banned.tolist()}), device=lm.device)
    cache = DynamicCache(config=lm.model.config.get_text_config())
    drawn, logp, watched = [], [], []

    def run(ids: Tensor, fresh: int) -> Tensor:
        """States of `ids`; mask and positions then make room for `fresh` further tokens."""
        nonlocal mask, position
        states = lm.decoder(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache,
                            use_cache=True).last_hidden_state
        mask = torch.cat([mask, mask.new_ones(len(mask), fresh)], dim=1)
        position = position[:, -1:] + torch.arange(1, fresh + 1, device=lm.device)
        return states

    with steered(lm, vector, dose):
        for step in range(budget):
            logps = lm.logits(run(ids, 1 if step < budget - 1 else 1 + len(suffix))[:, -1]).log_softmax(-1)
            ids = logps.index_fill(1, unwanted, -torch.inf).argmax(-1)[:, None]
            drawn.append(ids)
            logp.append(logps.gather(1, ids)[:, 0])
            watched.append(logps[:, list(watch)])
        tail = torch.tensor([suffix] * len(prompts), device=lm.device)
        states = run(torch.cat([ids, tail], dim=1), 0)
    return Thoughts(torch.cat(drawn, dim=1).tolist(), torch.stack(logp, 1).cpu(), torch.stack(watched, 1).cpu(), states)


def _left_padded(lm: LM, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention mask, positions), each [rows, longest]; padding sees nothing and is not seen."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=lm.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=lm.device)
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def _draw(logits: Tensor, sampling: Sampling, uniform: Tensor | None) -> Tensor:
    """Next token of each row: float32 logits [rows, vocabulary] -> [rows].

    Top-k, then temperature, then the smallest set that holds top_p of what is left, then inverse transform.
    """
    if uniform is None:
        return logits.argmax(-1)
    values, index = logits.topk(sampling.top_k, dim=-1)
    p = (values / sampling.temperature).softmax(-1)
    before = p.cumsum(-1) - p
    p = p.masked_fill(before >= sampling.top_p, 0.0)
    cumulative = p.cumsum(-1)
    choice = (cumulative < uniform[:, None] * cumulative[:, -1:]).sum(-1)
    return index.gather(1, choice[:, None])[:, 0]


def _uniforms(seeds: Sequence[int] | None, rows: int, steps: int) -> Tensor:
    """[rows, steps] numbers in [0, 1), a row's from its own seed."""
    if seeds is None or len(seeds) != rows:
        raise ValueError(f"sampling needs one seed per row: {rows} rows, {0 if seeds is None else len(seeds)} seeds")
    return torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(s)) for s in seeds])


def greedy(max_new_tokens: int) -> Sampling:
    """Always the likeliest token."""
    return Sampling(max_new_tokens, temperature=0.0, top_p=1.0, top_k=1)
