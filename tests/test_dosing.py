import math
import random

import pytest

from steerheal.dosing import MAX_PROBES, Draw, walk


def simulate(survival, n_keep=40, pass_target=0.75, kappa_min=0.2, max_batches=6, exact=True):
    """A walk over a survival curve; completions are (kappa, number) pairs, so that none can be counted twice."""
    rng = random.Random(0)
    calls = []

    def draw(n):
        def run(index, kappa):
            p = survival(kappa)
            kept = round(p * n) if exact else sum(rng.random() < p for _ in range(n))
            calls.append((kappa, n, kept))
            return Draw(kappa, n, [(kappa, len(calls), i) for i in range(kept)])
        return run

    harvest = walk(draw(8), draw(24), pass_target=pass_target, kappa_min=kappa_min, n_keep=n_keep,
                   max_batches=max_batches)
    return harvest, calls


def test_a_full_dose_that_passes_costs_one_probe():
    harvest, _ = simulate(lambda k: 1.0)
    assert harvest.kappa == 1.0 and len(harvest.probes) == 1
    assert harvest.trace == [(1.0, 1.0)]


@pytest.mark.parametrize("edge", [0.25, 0.4, 0.6, 0.9])
def test_a_monotone_curve_is_bisected_to_its_edge(edge):
    harvest, _ = simulate(lambda k: 1.0 if k <= edge else 0.0)
    resolution = math.log(5) / 2 ** (MAX_PROBES - 1)
    assert harvest.kappa <= edge * 1.0001
    assert math.log(edge) - math.log(harvest.kappa) <= resolution * 1.0001
    assert len(harvest.probes) <= MAX_PROBES


def test_where_nothing_passes_the_smallest_dose_is_tried():
    harvest, _calls = simulate(lambda k: 0.25)
    assert harvest.kappa == 0.2 and len(harvest.probes) == MAX_PROBES
    assert len(harvest.kept) == 36  # six batches of 24 at a quarter: the probes were above the chosen dose


def test_on_a_curve_that_is_not_monotone_the_highest_that_passed_wins():
    harvest, _ = simulate(lambda k: 1.0 if 0.4 < k < 0.5 or k < 0.25 else 0.0)
    assert 0.4 < harvest.kappa < 0.5


@pytest.mark.parametrize("seed", range(20))
def test_no_usable_survivor_is_wasted_and_it_always_ends(seed):
    rng = random.Random(seed)
    curve = {}
    harvest, calls = simulate(lambda k: curve.setdefault(k, rng.random()), n_keep=10_000, exact=False)
    assert len(harvest.batches) == 6
    usable = sum(kept for kappa, _, kept in calls if kappa <= harvest.kappa)
    assert len(harvest.kept) == usable == len(set(harvest.kept))
    assert all(kappa <= harvest.kappa for kappa, _, _ in harvest.kept)


def test_it_stops_at_n_keep():
    harvest, _ = simulate(lambda k: 1.0, n_keep=40)
    assert len(harvest.kept) == 40 and len(harvest.batches) == 2
    assert harvest.survival == 1.0


def test_where_probes_are_enough_survival_is_that_of_the_chosen_one():
    shares = {1.0: 0.25, 0.2**0.5: 1.0, 0.2**0.25: 1.0}  # then every dose between is too much
    harvest, _ = simulate(lambda k: next((s for kappa, s in shares.items() if abs(k - kappa) < 1e-9), 0.375), n_keep=12)
    assert not harvest.batches and harvest.kappa == pytest.approx(0.2**0.25) and harvest.survival == 1.0
