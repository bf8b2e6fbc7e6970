"""Successive halving over rounds, by non-dominated rank: stop a trial early that half of its rivals dominate.

At the rungs, 2, 4, 8, ... finished rounds, a trial is compared with every trial that reached the same rung before it.
Ranks come from peeling fronts (Deb et al. 2002, NSGA-II): rank 0 is the front, rank 1 the front of what is left. A trial
is halved where at least half of the field, itself included, has a better rank. Rounds that are not deliverable rank
behind all that are. The rule is asynchronous (Li et al. 2020, ASHA): nobody waits for a rung to fill.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steerheal import pareto
from steerheal.objectives import REFERENCE_POINT

GRACE = 2  # rounds that every trial may run

Row = dict[str, Any]  # of one round: trait_gain, coherence_kept, violation


def is_rung(finished: int) -> bool:
    """Whether trials are compared after this many rounds: GRACE times a power of two."""
    return finished % GRACE == 0 and (finished // GRACE).bit_count() == 1


def ranks(rows: Sequence[Row]) -> list[int]:
    """Non-dominated rank of each row, 0 the best. Undeliverable rows rank behind, by their violation."""
    out = [0] * len(rows)
    left = [i for i, row in enumerate(rows) if row["violation"] <= 0]
    rank = 0
    while left:
        members = {left[j] for j in pareto.front([(rows[i]["trait_gain"], rows[i]["coherence_kept"]) for i in left])}
        for i in members:
            out[i] = rank
        left = [i for i in left if i not in members]
        rank += 1
    for i in sorted((i for i, row in enumerate(rows) if row["violation"] > 0), key=lambda i: rows[i]["violation"]):
        out[i], rank = rank, rank + 1
    return out


def halved(own: Row, others: Sequence[Row]) -> bool:
    """Whether a trial stops, given its row at a rung and those of the trials that reached the rung before."""
    found = ranks([own, *others])
    return 2 * sum(rank < found[0] for rank in found[1:]) >= len(found)


@dataclass
class Replay:
    """What halving would have done to a finished search."""

    rounds: int  # that the search ran
    saved: int  # of these, not run with halving
    stopped: int  # trials
    regret: float  # share of the hypervolume lost


def replay(trials: Sequence[Sequence[Row]], seed: int | None = None) -> Replay:
    """Run recorded trials (rows of their rounds, in order) one after the other under the rule.

    The proposals stay those of the record, though a search that halves would have proposed others.

    Args:
        seed: of a random order of the trials; None keeps the given one.
    """
    order = list(range(len(trials)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    kept: list[Sequence[Row]] = []
    for i in order:
        rows = trials[i]
        last = len(rows)
        for n in filter(is_rung, range(1, len(rows))):  # after the last round there is nothing to save
            if halved(rows[n - 1], [other[n - 1] for other in kept if len(other) >= n]):
                last = n
                break
        kept.append(rows[:last])
    total, run = sum(map(len, trials)), sum(map(len, kept))
    whole = _hypervolume(trials)
    return Replay(total, total - run, sum(len(a) < len(trials[i]) for a, i in zip(kept, order)),
                  1 - _hypervolume(kept) / whole if whole else 0.0)


def _hypervolume(trials: Sequence[Sequence[Row]]) -> float:
    return pareto.hypervolume([(r["trait_gain"], r["coherence_kept"]) for rows in trials for r in rows
                               if r["violation"] <= 0], REFERENCE_POINT)
