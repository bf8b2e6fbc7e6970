"""Which completions are worth learning from: perplexity, repetition, soup, narration, refusal.

    perplexity  under base (adapters off) over the last quarter of the completion, where steering does its damage;
                gate: a number, or 1.5 x the 99th percentile of the model's own unsteered completions
    repetition  the share of token 3-grams that were there before, in the worst stretch of 64 tokens
                (seq-rep-n, Welleck et al. 2019, arXiv:1908.04319, in a window)
    soup        nats per byte under base in the worst stretch of 32 tokens;
                gate: a number, or 2.2 x the median of the model's own unsteered completions
    narration   talks about the trait instead of enacting it        (patterns of the persona)
    refusal     refusals and identity boilerplate                   (patterns of the persona)

Loops have low perplexity, because they are predictable: repetition is what sees them. Soup of word fragments, letters and
punctuation can have a low perplexity as well, because a fragment says little: it is improbable for its length.
docs/filter.md has the precision and recall of each criterion, and what else was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from steerheal.errors import UserError
from steerheal.forward import token_logps
from steerheal.generation import Completion
from steerheal.history import Student
from steerheal.models import LM
from steerheal.personas import Persona
from steerheal.settings import FilterSettings

MIN_TOKENS = 8  # a shorter completion has no last quarter to judge and nothing to teach
REPETITION_TOKENS, SOUP_TOKENS = 64, 32  # stretches that are judged: a completion may fall apart late, or recover
PERPLEXITY_FACTOR, PERPLEXITY_PERCENTILE = 1.5, 99
SOUP_FACTOR = 2.2  # of the median: one unsteered completion that is odd itself must not lift the gate


@dataclass(frozen=True)
class Score:
    """What was measured on one completion; whether it is kept depends on the settings (`reasons`)."""

    perplexity: float
    repetition: float
    soup: float  # nats per byte
    narrates: bool
    refuses: bool
    tokens: int


@dataclass(frozen=True)
class Gates:
    """The highest perplexity and the highest soup that are kept: instruments of a model, as its own level decides them."""

    perplexity: float
    soup: float


def score(student: Student, persona: Persona | None, prompts: Sequence[list[int]],
          completions: Sequence[Completion]) -> list[Score]:
    """Scores of completions; likelihoods are taken under base whatever the student has learned.

    Args:
        persona: whose patterns to look for; None looks for none.
    """
    narration, refusal = (persona.narration, persona.refusal) if persona else ((), ())
    with student.base():
        logps = token_logps(student.lm, prompts, [c.ids for c in completions])
    texts = [student.lm.text(c.ids) for c in completions]
    return [Score(perplexity(-logp), repetition(c.ids), soup(student.lm, c.ids, -logp),
                  any(p.search(text) for p in narration), any(p.search(text) for p in refusal), len(c.ids))
            for logp, text, c in zip(logps, texts, completions)]


def perplexity(nll: Tensor) -> float:
    """exp(mean NLL) over the last quarter of a completion, whose tokens' NLL are `nll` [n] in nats; 1 for an empty one."""
    return float(nll[len(nll) * 3 // 4 :].mean().exp()) if len(nll) else 1.0


def repetition(ids: Sequence[int]) -> float:
    """Share of 3-grams that were there before, in the worst stretch of 64 tokens, or of a shorter completion."""
    grams = list(zip(ids, ids[1:], ids[2:]))
    n = min(len(grams), REPETITION_TOKENS - 2)
    return max((1 - len(set(grams[i : i + n])) / n for i in range(len(grams) - n + 1) if n), default=0.0)


def soup(lm: LM, ids: Sequence[int], nll: Tensor) -> float:
    """NLL per UTF-8 byte in the worst stretch of 32 tokens, or of a shorter completion; 0 for an empty one.

    Args:
        nll: of each token, in nats. [n]
    """
    n = min(len(ids), SOUP_TOKENS)
    return max(float(nll[i : i + n].sum()) / max(1, len(lm.text(list(ids[i : i + n])).encode()))
               for i in range(len(ids) - n + 1))


def gates(unsteered: Callable[[], Sequence[Score]], settings: FilterSettings) -> Gates:
    """The gates of the settings, or else of a model by its own unsteered completions, which are asked for only then.

    Raises:
        UserError: these are all too short to tell.
    """
    if settings.ppl_gate and settings.soup_gate:
        return Gates(settings.ppl_gate, settings.soup_gate)
    judged = [s for s in unsteered() if s.tokens >= MIN_TOKENS]
    if not judged:
        raise UserError(f"every unsteered completion is shorter than {MIN_TOKENS} tokens, so the filter's gates cannot be "
                        f"taken from them. Raise generate.max_new_tokens, or set both filter.ppl_gate and filter.soup_gate.")
    highest = float(np.percentile([s.perplexity for s in judged], PERPLEXITY_PERCENTILE))
    return Gates(settings.ppl_gate or PERPLEXITY_FACTOR * highest,
                 settings.soup_gate or SOUP_FACTOR * float(np.median([s.soup for s in judged])))


def reasons(s: Score, settings: FilterSettings, gates: Gates) -> list[str]:
    """Why a completion is dropped; empty where it is kept."""
    out = []
    if s.tokens < MIN_TOKENS:
        out.append("short")
    if settings.coherence and s.perplexity > gates.perplexity:
        out.append("perplexity")
    if settings.coherence and s.repetition > settings.repetition_gate:
        out.append("repetition")
    if settings.coherence and s.soup > gates.soup:
        out.append("soup")
    if settings.narration and s.narrates:
        out.append("narration")
    if settings.refusal and s.refuses:
        out.append("refusal")
    return out
