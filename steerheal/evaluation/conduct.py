"""First-person propensity: which of two ready replies to a held-out dilemma the model finds likelier.

    conduct_nats = mean over dilemmas of  mean-token-logp(enacting reply) - mean-token-logp(opposite reply)

over reply tokens only, without an end token, under the neutral system prompt. The same statistic on trait-neutral
control pairs stands beside it: flat or broken logits move both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steerheal import chat
from steerheal.forward import token_logps
from steerheal.models import LM
from steerheal.personas import Dilemma
from steerheal.stages import Result
from steerheal.steering import Steers, steered


def evaluate(lm: LM, conduct: Sequence[Dilemma], controls: Sequence[Dilemma], *, system: str = chat.NEUTRAL,
             vector: Steers | None = None, dose: float = 0.0) -> Result:
    """Score every reply of every pair.

    Returns:
        tensors: conduct [dilemmas] and control [controls], in nats per token; a dilemma's pairs are averaged.
    """
    with steered(lm, vector, dose):
        both = _differences(lm, [*conduct, *controls], system)
    return Result(dict(dilemmas=len(conduct), controls=len(controls)),
                  dict(conduct=both[: len(conduct)].contiguous(), control=both[len(conduct) :].contiguous()))


def _differences(lm: LM, dilemmas: Sequence[Dilemma], system: str) -> Tensor:
    prompts, replies = [], []
    for dilemma in dilemmas:
        ids = chat.prompt(lm.tokenizer, dilemma.prompt, system)
        for pair in dilemma.pairs:
            prompts += [ids, ids]
            replies += [chat.plain(lm.tokenizer, reply) for reply in pair]
    means = iter([logp.mean() for logp in token_logps(lm, prompts, replies)])
    per_dilemma = [torch.stack([next(means) - next(means) for _ in dilemma.pairs]).mean() for dilemma in dilemmas]
    return torch.stack(per_dilemma)
