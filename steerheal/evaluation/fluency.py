"""Does the model still speak? Greedy free generations on held-out, persona-independent prompts, judged by the filter's
own coherence gates. It sees the token loops that the forced choice is too generous to see."""

from __future__ import annotations

import dataclasses

import torch

from steerheal import chat
from steerheal.filtering import Gates, reasons, score
from steerheal.generation import generate, greedy
from steerheal.history import Student
from steerheal.personas import fluency_prompts
from steerheal.settings import FilterSettings
from steerheal.stages import Result
from steerheal.steering import Steers

SAMPLES_KEPT = 8  # texts stored with the record, for people to read


def evaluate(student: Student, n: int, max_new_tokens: int, repetition_gate: float, gate: Gates, *,
             system: str = chat.NEUTRAL, vector: Steers | None = None, dose: float = 0.0) -> Result:
    """Generate and judge.

    Args:
        gate: of perplexity and soup, under base.

    Returns:
        tensors: passes [n] as float32 0 or 1, perplexity [n], repetition [n], soup [n]. record: the first few texts.
    """
    lm = student.lm
    prompts = [chat.prompt(lm.tokenizer, text, system) for text in fluency_prompts(n)]
    with student.merged():
        completions = generate(lm, prompts, greedy(max_new_tokens), vector=vector, doses=[dose] * len(prompts))
    texts = [lm.text(c.ids) for c in completions]
    neutral = [chat.prompt(lm.tokenizer, text) for text in fluency_prompts(n)]  # judged without the persona
    scores = score(student, None, neutral, completions)
    settings = dataclasses.replace(FilterSettings(), repetition_gate=repetition_gate)
    passes = [s.tokens > 0 and not set(reasons(s, settings, gate)) - {"short"} for s in scores]
    return Result(dict(texts=texts[:SAMPLES_KEPT]), dict(
        passes=torch.tensor(passes, dtype=torch.float32), perplexity=torch.tensor([s.perplexity for s in scores]),
        repetition=torch.tensor([s.repetition for s in scores]), soup=torch.tensor([s.soup for s in scores])))
