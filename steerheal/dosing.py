"""Walk-C: the largest share of the dose at which enough completions survive the filter.

kappa multiplies alpha. Probes bisect log kappa in [kappa_min, 1] for the highest kappa with survival >= pass_target;
where the curve is not monotone, the highest that passed. Then whole batches are collected until n_keep survive.
Probes at or below the chosen kappa have paid for usable completions: their survivors are kept.

The controller only sees survival counts, so it knows nothing of models, and every call is replayable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_PROBES = 6


@dataclass
class Draw(Generic[T]):
    """One batch of completions at one kappa: how many were drawn and which survived."""

    kappa: float
    drawn: int
    survivors: list[T]
    dropped: list[str] = field(default_factory=list)  # reasons, one entry for each criterion that was not met

    @property
    def survival(self) -> float:
        return len(self.survivors) / self.drawn


@dataclass
class Harvest(Generic[T]):
    kappa: float
    kept: list[T]
    probes: list[Draw[T]] = field(default_factory=list)
    batches: list[Draw[T]] = field(default_factory=list)

    @property
    def trace(self) -> list[tuple[float, float]]:
        """(kappa, survival) of each probe, in order."""
        return [(round(d.kappa, 4), d.survival) for d in self.probes]

    @property
    def survival(self) -> float:
        """Share that survived at the chosen kappa: over all batches, or where probes were enough, over its probe."""
        draws = self.batches or [d for d in self.probes if d.kappa == self.kappa]
        return sum(len(d.survivors) for d in draws) / sum(d.drawn for d in draws)


def walk(probe: Callable[[int, float], Draw[T]], batch: Callable[[int, float], Draw[T]], *, pass_target: float,
         kappa_min: float, n_keep: int, max_batches: int) -> Harvest[T]:
    """Find kappa, then collect.

    Args:
        probe: (index, kappa) -> a small draw spread over prompts and doses.
        batch: (index, kappa) -> a full batch.

    Returns:
        At most n_keep survivors; fewer where max_batches were not enough.
    """
    low, high = math.log(kappa_min), 0.0
    at = high
    probes: list[Draw[T]] = []
    while len(probes) < MAX_PROBES:
        draw = probe(len(probes), math.exp(at))
        probes.append(draw)
        if draw.survival >= pass_target:
            low = at
        else:
            high = at
        if low == high:  # the full dose passed, or there is nothing between kappa_min and it
            break
        at = (low + high) / 2
    passed = [d.kappa for d in probes if d.survival >= pass_target]
    kappa = max(passed, default=kappa_min)
    kept = [s for d in probes if d.kappa <= kappa for s in d.survivors]
    batches: list[Draw[T]] = []
    while len(kept) < n_keep and len(batches) < max_batches:
        batches.append(batch(len(batches), kappa))
        kept += batches[-1].survivors
    return Harvest(kappa, kept[:n_keep], probes, batches)
