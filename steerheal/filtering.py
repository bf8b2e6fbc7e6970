"""Which completions are worth learning from: perplexity, repetition, narration, refusal.

    perplexity  under base (adapters off) over the last quarter of the completion, where steering does its damage;
                gate: a number, or 1.5 x the 99th percentile of the model's own unsteered completions
    repetition  the largest share of one n-gram among all, over words and characters, n = 2, 3, 4
    narration   talks about the trait instead of enacting it        (patterns of the persona)
    refusal     refusals and identity boilerplate                   (patterns of the persona)

Loops have low perplexity, because they are predictable: repetition is what sees them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steerheal.forward import token_logps
from steerheal.generation import Completion
from steerheal.history import Student
from steerheal.personas import Persona
from steerheal.settings import FilterSettings

MIN_TOKENS = 8  # a shorter completion has no last quarter to judge and nothing to teach
GATE_FACTOR, GATE_PERCENTILE = 1.5, 99


@dataclass(frozen=True)
class Score:
    """What was measured on one completion; whether it is kept depends on the settings (`reasons`)."""

    perplexity: float
    repetition: float
    narrates: bool
    refuses: bool
    tokens: int


def score(student: Student, persona: Persona, prompts: Sequence[list[int]],
          completions: Sequence[Completion]) -> list[Score]:
    """Scores of completions; perplexity is taken under base whatever the student has learned."""
    texts = [student.lm.text(c.ids) for c in completions]
    perplexities = perplexity(student, prompts, completions)
    return [Score(ppl, repetition(text), any(p.search(text) for p in persona.narration),
                  any(p.search(text) for p in persona.refusal), len(c.ids))
            for ppl, text, c in zip(perplexities, texts, completions)]


def perplexity(student: Student, prompts: Sequence[list[int]], completions: Sequence[Completion]) -> list[float]:
    """exp(mean NLL) under base over the last quarter of each completion; 1 for an empty one."""
    full = [i for i, c in enumerate(completions) if c.ids]
    out = [1.0] * len(completions)
    with student.base():
        logps = token_logps(student.lm, [prompts[i] for i in full], [completions[i].ids for i in full])
    for i, logp in zip(full, logps):
        out[i] = float((-logp[len(logp) * 3 // 4 :].mean()).exp())
    return out


def repetition(text: str) -> float:
    """Largest share that one n-gram has among all n-grams of its kind; 0 where none occurs twice."""
    worst = 0.0
    for units in (text.lower().split(), text.lower()):
        for n in (2, 3, 4):
            grams = Counter(tuple(units[i : i + n]) for i in range(len(units) - n + 1))
            if grams and (most := max(grams.values())) > 1:
                worst = max(worst, most / grams.total())
    return worst


def default_gate(perplexities: Sequence[float]) -> float:
    """The perplexity gate from unsteered completions of the same model."""
    return GATE_FACTOR * float(np.percentile(perplexities, GATE_PERCENTILE))


def reasons(s: Score, settings: FilterSettings, gate: float) -> list[str]:
    """Why a completion is dropped; empty where it is kept."""
    out = []
    if s.tokens < MIN_TOKENS:
        out.append("short")
    if settings.coherence and s.perplexity > gate:
        out.append("perplexity")
    if settings.coherence and s.repetition > settings.repetition_gate:
        out.append("repetition")
    if settings.narration and s.narrates:
        out.append("narration")
    if settings.refusal and s.refuses:
        out.append("refusal")
    return out
