import random

import numpy as np
import optuna
import pytest
from optuna._hypervolume import compute_hypervolume

from steerheal import pareto


@pytest.mark.parametrize("seed", range(10))
def test_front_and_hypervolume_against_optuna(seed):
    rng = random.Random(seed)
    points = [(round(rng.uniform(-1, 2), 1), round(rng.uniform(0.7, 1), 2)) for _ in range(30)]
    study = optuna.create_study(directions=["maximize"] * 2)
    for p in points:
        study.add_trial(optuna.trial.create_trial(values=list(p)))
    assert sorted(pareto.front(points)) == sorted(t.number for t in study.best_trials)
    above = np.array([p for p in points if p[0] > 0 and p[1] > 0.85])
    want = compute_hypervolume(-above, np.array([0.0, -0.85])) if len(above) else 0.0
    assert pareto.hypervolume(points, (0.0, 0.85)) == pytest.approx(want)


def test_the_front_is_what_nothing_dominates():
    points = [(1.0, 0.9), (0.5, 0.95), (0.5, 0.9), (1.0, 0.9), (0.2, 1.0)]
    by_definition = [i for i, p in enumerate(points) if not any(pareto.dominates(q, p) for q in points)]
    assert sorted(pareto.front(points)) == by_definition == [0, 1, 3, 4]
    assert pareto.front([]) == [] and pareto.hypervolume([], (0, 0)) == 0


@pytest.mark.parametrize("seed", range(10))
def test_growth_is_the_hypervolume_of_every_beginning(seed):
    rng = random.Random(seed)
    groups = [[(round(rng.uniform(-1, 2), 1), round(rng.uniform(0.7, 1), 2)) for _ in range(rng.randrange(4))]
              for _ in range(20)]
    want = [pareto.hypervolume([p for group in groups[: n + 1] for p in group], (0.0, 0.85)) for n in range(20)]
    assert pareto.growth(groups, (0.0, 0.85)) == pytest.approx(want)


def test_growth_carries_nothing_along_but_the_front(monkeypatch):
    front, seen = pareto.front, []
    monkeypatch.setattr(pareto, "front", lambda points: seen.append(len(points)) or front(points))
    groups = [[(1.0, 0.99), (0.5, 0.9), (0.5, 1.0), (0.4, 0.9)]] * 100  # two on the front, in every trial
    assert len(pareto.growth(groups, (0.0, 0.85))) == 100 and max(seen) <= 6
