import math
import types

import optuna
import pandas as pd
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from steerheal import confirm

FRONT = pd.DataFrame([dict(trial=3, round=1, trait_gain=1.0, coherence_kept=0.9, deliverable=True, **{"heal.tau": 0.5}),
                      dict(trial=3, round=0, trait_gain=0.6, coherence_kept=0.95, deliverable=True, **{"heal.tau": 0.5}),
                      dict(trial=1, round=0, trait_gain=0.2, coherence_kept=1.0, deliverable=True, **{"heal.tau": 0.1})])
DISTRIBUTIONS = {"heal.tau": FloatDistribution(0, 1), "rounds": IntDistribution(0, 9), "seed": IntDistribution(0, 99)}


def study(*runs):
    """A study of runs (params, [(gain, kept)] of the rounds)."""
    out = optuna.create_study(directions=["maximize", "maximize"])
    for index, (params, rounds) in enumerate(runs):
        rows = [dict(round=i, trait_gain=g, coherence_kept=k, deliverable=k >= 0.85) for i, (g, k) in enumerate(rounds)]
        out.add_trial(optuna.trial.create_trial(params=params, distributions=DISTRIBUTIONS, values=[0, 1],
                                                user_attrs=dict(index=index, rounds=rows)))
    return out


def test_each_trial_on_the_front_runs_once_per_seed_up_to_its_last_member():
    assert confirm.proposals(FRONT, ["heal.tau"], [1, 2]) == [
        {"heal.tau": 0.1, "rounds": 1, "seed": 1}, {"heal.tau": 0.1, "rounds": 1, "seed": 2},
        {"heal.tau": 0.5, "rounds": 2, "seed": 1}, {"heal.tau": 0.5, "rounds": 2, "seed": 2}]


def test_runs_tried_before_keep_their_index():
    wanted = confirm.proposals(FRONT, ["heal.tau"], [1, 2])
    before = study((wanted[2], [(1, 1)]), (wanted[0], [(1, 1)]))
    assert confirm._indexed(before, wanted) == {0: wanted[2], 1: wanted[0], 2: wanted[1], 3: wanted[3]}


def test_a_space_that_searches_rounds_finds_its_runs():
    front = FRONT.assign(rounds=4)
    wanted = confirm.proposals(front, ["heal.tau", "rounds"], [1])
    runs = study((wanted[0], [(0.3, 1.0)]), (wanted[1], [(0.5, 0.95), (0.9, 0.92)]))
    found = confirm.results(front, ["heal.tau", "rounds"], 0, runs)
    assert confirm.stays(found)["n"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("searched,last", [
    ({}, 3), ({"seed": CategoricalDistribution([0, 7, 2])}, 7), ({"seed": IntDistribution(0, 9)}, 9)])
def test_fresh_seeds_are_those_that_the_search_will_not_use_either(searched, last):
    assert confirm._last_seed(types.SimpleNamespace(settings=types.SimpleNamespace(seed=3)), searched) == last


def test_who_stays_and_how_much_seeds_move():
    wanted = confirm.proposals(FRONT, ["heal.tau"], [1, 2])
    runs = study((wanted[0], [(0.3, 1.0)]), (wanted[1], [(0.7, 0.99)]), (wanted[2], [(0.5, 0.95), (0.9, 0.92)]),
                 (wanted[3], [(0.6, 0.95)]))  # on seed 2 trial 3 ended before its round 1
    found = confirm.results(FRONT, ["heal.tau"], 0, runs)
    assert list(found["seed"]) == [0, 1, 2] * 3 and list(found["fresh"]) == [False, True, True] * 3
    lost = found[(found["trial"] == 3) & (found["round"] == 1) & (found["seed"] == 2)].iloc[0]
    assert math.isnan(lost["trait_gain"]) and not lost["deliverable"]
    table = confirm.stays(found).set_index(["trial", "round"])
    assert table["on_front"].to_dict() == {(3, 1): 1, (3, 0): 1, (1, 0): 2}  # on seed 2 (0.7, 0.99) beats (0.6, 0.95)
    assert table["deliverable"].to_dict() == {(3, 1): 1, (3, 0): 2, (1, 0): 2}
    assert table.loc[(1, 0), "mean_gain"] == pytest.approx(0.5) and table.loc[(1, 0), "gain"] == 0.2
    # variances of (0.5, 0.6) and (0.3, 0.7), a single 0.9 has none: sqrt of their mean
    assert confirm.seed_noise(found, "trait_gain") == pytest.approx(((0.005 + 0.08) / 2) ** 0.5)
