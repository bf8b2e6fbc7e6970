"""How much is one dose? Two units in which alpha carries over between vectors and models.

    edge    the highest raw dose at which raw steering keeps 0.85 of base's coherence
    kl      the raw dose at which the 95th percentile of per-token KL(steered || base) is `steer.target_kl`

Both look for the last dose at which something still holds: doubled or halved from 1 into a bracket that may reach
LIMIT or 1 / LIMIT, then bisected on a log scale. A search that ends at the limit is a failure, never an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from steerheal.forward import hidden_states
from steerheal.models import LM
from steerheal.steering import Steers, steered

LIMIT = 1024.0
KL_PERCENTILE = 0.95
KL_ROWS = 256  # positions whose vocabulary-wide logits exist at once


class NoBracket(Exception):
    """It still held at LIMIT (`held`), or already failed at 1 / LIMIT."""

    def __init__(self, held: bool):
        self.held = held
        super().__init__(held)


def last_dose(holds: Callable[[float], bool], bisections: int) -> float:
    """The largest tried dose at which `holds`, within a factor of 2 ** (1 / 2 ** bisections) of the true one.

    Raises:
        NoBracket: no interior solution.
    """
    low = 1.0
    if holds(low):
        while holds(high := low * 2):
            low = high
            if low >= LIMIT:
                raise NoBracket(held=True)
    else:
        while not holds(low := low / 2):
            if low <= 1 / LIMIT:
                raise NoBracket(held=False)
        high = low * 2
    for _ in range(bisections):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@torch.no_grad()
def kl_percentile(lm: LM, vector: Steers, dose: float, prompts: Sequence[list[int]],
                  replies: Sequence[list[int]]) -> float:
    """95th percentile over all reply tokens of KL(steered || base), in nats."""
    sequences = [p + r[:-1] for p, r in zip(prompts, replies)]
    first = [len(p) - 1 for p in prompts]
    base = dict((i, states.clone()) for i, states in hidden_states(lm, sequences, first))
    found = []
    with steered(lm, vector, dose):
        for i, states in hidden_states(lm, sequences, first):
            for s, b in zip(states.split(KL_ROWS), base[i].split(KL_ROWS)):
                moved, plain = lm.logits(s).log_softmax(-1), lm.logits(b).log_softmax(-1)
                found.append((moved.exp() * (moved - plain)).sum(-1))
    return float(torch.cat(found).quantile(KL_PERCENTILE))
