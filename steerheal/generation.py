"""Batched sampling: one bare loop over a key-value cache, one top-k draw per step.

Rows of a batch may differ in prompt and in steering dose. A row that ends leaves the batch, so no token is spent on
it. Each completion's draws come from its own seed by inverse transform, so they do not depend on the batch it ran in
(up to the rounding of the model's matrix products). No repetition penalty: repetition must stay visible.

Where a batch does not fit into memory it is halved, and what fitted is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import Cache

from steerheal.cpu import decoding
from steerheal.errors import ran_out
from steerheal.models import LM
from steerheal.prefill import prefill
from steerheal.steering import Steers, steered

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


_fits: dict[tuple[str, str, int], int] = {}  # (what ran, model, length to the next 128) -> rows that fitted when more did not
Row = TypeVar("Row")
Out = TypeVar("Out")


def parts_that_fit(run: Callable[[Sequence[Row]], Out], rows: Sequence[Row], lm: LM,
                   length: int) -> Iterator[tuple[Sequence[Row], Out]]:
    """`run` over all rows, together if they fit into memory; a part that does not is halved, and what fitted is remembered.

    Args:
        run: known by its name, for what is remembered of it.
        length: tokens of the longest row.

    Yields:
        (part of the rows, what `run` made of it)

    Raises:
        torch.OutOfMemoryError, RuntimeError: not even a single row fits.
    """
    key = run.__qualname__, lm.digest, length // 128
    done = 0
    while done < len(rows):
        part = rows[done : done + _fits.get(key, len(rows))]
        out = None
        try:
            out = run(part)
        except RuntimeError as error:
            if len(part) == 1 or not ran_out(error):
                raise
        if out is None:  # out here, where the failed batch is no longer held by the exception
            _fits[key] = (len(part) + 1) // 2
            torch.cuda.empty_cache()
            continue
        yield part, out
        done += len(part)


def generate(lm: LM, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None,
             vector: Steers | None = None, doses: Sequence[float] | None = None,
             half_life: float = 0.0) -> list[Completion]:
    """One completion per prompt; a row ends at its first end token.

    Args:
        prompts: token ids of each row, up to the assistant tag.
        seeds: one per row; required unless greedy.
        vector, doses: steering, one dose per row.
        half_life: completion tokens after which the dose has halved; 0 keeps it.

    Raises:
        torch.OutOfMemoryError, RuntimeError: not even a single row fits.
    """
    rows = len(prompts)
    doses = [0.0] * rows if doses is None else list(doses)
    uniforms = _uniforms(seeds, rows, sampling.max_new_tokens).to(lm.device) if sampling.temperature > 0 else None

    def together(part: Sequence[int]) -> list[Completion]:
        return _generate(lm, [prompts[i] for i in part], sampling, None if uniforms is None else uniforms[list(part)], vector,
                         [doses[i] for i in part], half_life)

    parts = parts_that_fit(together, range(rows), lm, max(map(len, prompts), default=0) + sampling.max_new_tokens)
    return [completion for _, out in parts for completion in out]


@torch.inference_mode()
def _generate(lm: LM, prompts: Sequence[list[int]], sampling: Sampling, uniforms: Tensor | None, vector: Steers | None,
              doses: Sequence[float], half_life: float) -> list[Completion]:
    rows = len(prompts)
    first = torch.tensor(doses, dtype=torch.float32, device=lm.device)
    ends = torch.tensor(sorted(lm.eos_ids), device=lm.device)
    drawn = torch.zeros(rows, sampling.max_new_tokens, dtype=torch.long, device=lm.device)
    length = torch.full((rows,), sampling.max_new_tokens, device=lm.device)
    alive = torch.arange(rows, device=lm.device)  # rows of the batch -> rows of the result
    running = torch.ones(rows, dtype=torch.bool, device=lm.device)
    with decoding(lm, rows), steered(lm, vector) as dial:
        begun = prefill(lm, prompts, sampling.max_new_tokens - 1, dial, doses)
        states, cache, mask = begun.states, begun.cache, begun.mask
        for step in range(1, sampling.max_new_tokens + 1):
            logits = lm.logits(states)
            logits[:, lm.banned] = -torch.inf
            token = _draw(logits, sampling, None if uniforms is None else uniforms[alive, step - 1])
            drawn[alive, step - 1] = token
            ended = torch.isin(token, ends) & running
            length[alive] = torch.where(ended, step - 1, length[alive])
            running &= ~ended
            left = int(running.sum())
            if left == 0 or step == sampling.max_new_tokens:
                break
            if left <= COMPACT * len(alive):
                keep = running.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                alive, mask, token, running = alive[keep], mask[keep], token[keep], running[keep]
            dial.dose = first[alive] * (0.5 ** (step / half_life) if half_life else 1.0)
            states, mask = _go_on(lm, cache, mask, token[:, None])
            states = states[:, -1]
    return [Completion(row[:n], row[n] if n < len(row) else None) for row, n in zip(drawn.tolist(), length.tolist())]


def _go_on(lm: LM, cache: Cache, mask: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(final hidden states [rows, n, d] of the next ids [rows, n], mask with their places)"""
    position = mask.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=lm.device)
    mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    out = lm.decoder(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
    return out.last_hidden_state, mask


@dataclass
class Thoughts:
    """What `think` saw. Thoughts are ids [rows][budget]; log-probabilities are float32, over the whole vocabulary."""

    ids: list[list[int]]
    logp: Tensor  # [rows, budget] of each thought
    watched: Tensor  # [rows, budget, watched] of the watched ids at each thought's place
    states: Tensor  # [rows, len(suffix) + 1, d]: state i predicts suffix[i], the last one what follows the suffix


@torch.no_grad()
def think(lm: LM, prompts: Sequence[list[int]], budget: int, suffix: list[int], watch: Sequence[int],
          never: Sequence[int] = (), vector: Steers | None = None, dose: float = 0.0) -> Thoughts:
    """`budget` greedy tokens per prompt, none of them an end token, and then `suffix`, read behind the same cache.

    Args:
        suffix: ids that follow every row's thoughts.
        watch: ids whose log-probability is recorded at every step.
        never: further ids that are not drawn, such as the end of a thinking block.
    """
    unwanted = torch.tensor(sorted({*lm.eos_ids, *never, *lm.banned.tolist()}), device=lm.device)
    seen = torch.tensor(list(watch), device=lm.device)
    drawn, logp, watched = [], [], []
    with decoding(lm, len(prompts)), steered(lm, vector) as dial:
        begun = prefill(lm, prompts, budget + len(suffix), dial, [dose] * len(prompts))
        states, mask = begun.states, begun.mask
        for step in range(budget):
            logps = lm.logits(states).log_softmax(-1)
            ids = logps.index_fill(1, unwanted, -torch.inf).argmax(-1)[:, None]
            drawn.append(ids)
            logp.append(logps.gather(1, ids)[:, 0])
            watched.append(logps[:, seen])
            if step < budget - 1:
                new, mask = _go_on(lm, begun.cache, mask, ids)
                states = new[:, -1]
        tail = torch.tensor([suffix] * len(prompts), device=lm.device)
        new, _ = _go_on(lm, begun.cache, mask, torch.cat([ids, tail], dim=1))
    return Thoughts(torch.cat(drawn, dim=1).tolist(), torch.stack(logp, 1).cpu(), torch.stack(watched, 1).cpu(), new)


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
