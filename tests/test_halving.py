import itertools
import random

import pytest

from steerheal import halving
from steerheal.pareto import dominates


def row(gain, kept, violation=-0.1):
    return dict(trait_gain=gain, coherence_kept=kept, violation=violation)


def test_rungs_are_the_grace_times_powers_of_two():
    assert [n for n in range(1, 20) if halving.is_rung(n)] == [2, 4, 8, 16]


def test_ranks_equal_a_brute_force_peeling():
    draw = random.Random(0)
    for _ in range(50):
        rows = [row(draw.randint(0, 4), draw.randint(0, 4)) for _ in range(9)]
        points = [(r["trait_gain"], r["coherence_kept"]) for r in rows]
        left, expected, rank = set(range(9)), {}, 0
        while left:
            top = {i for i in left if not any(dominates(points[j], points[i]) for j in left)}
            expected |= dict.fromkeys(top, rank)
            left -= top
            rank += 1
        assert halving.ranks(rows) == [expected[i] for i in range(9)]


def test_what_is_not_deliverable_ranks_behind_whatever_its_gain():
    assert halving.ranks([row(9, 0.1, 0.7), row(0.1, 0.9), row(5, 0.5, 0.3)]) == [2, 0, 1]


def test_half_the_field_must_be_better():
    better, worse = row(1.0, 1.0), row(0.1, 0.9)
    assert not halving.halved(worse, [])  # the first at a rung has no rivals
    assert halving.halved(worse, [better])
    assert not halving.halved(worse, [better, worse, worse])
    assert halving.halved(worse, [better, better, worse])
    assert not halving.halved(row(0.1, 1.0), [row(g, 0.9) for g in (1, 2, 3)])  # on the front


def test_a_replay_counts_what_it_saved_and_lost():
    good, bad = [row(1.0, 1.0)] * 4, [row(0.1, 0.9)] * 4
    found = halving.replay([good, bad, [row(0.05, 0.88)] * 4])
    assert (found.rounds, found.saved, found.stopped, found.regret) == (12, 4, 2, 0)
    # the trial that would have won late is stopped at its second round: all it would have added is lost
    late = [row(0.1, 0.9)] * 3 + [row(2.0, 1.0)]
    found = halving.replay([good, late])
    assert (found.saved, found.regret) == (2, pytest.approx(0.5))
    orders = {halving.replay([good, bad, late], seed).saved for seed in range(20)}
    assert len(orders) > 1 and all(0 <= saved <= 12 for saved in orders)
    assert halving.replay([list(itertools.repeat(row(1, 1), 2))] * 3).saved == 0
