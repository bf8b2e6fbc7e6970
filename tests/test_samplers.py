"""What a sampler proposes must not depend on whether the search was interrupted."""

import importlib.util
import json
import warnings

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from steerheal import ledger, searcher
from steerheal.errors import UserError

SPACE = {"heal.tau": FloatDistribution(0.01, 1.0, log=True), "heal.aggregate": CategoricalDistribution(["mean", "rmse"])}
HAS_SCIPY = importlib.util.find_spec("scipy") is not None


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")


def study(folder):
    folder.mkdir(exist_ok=True)
    return optuna.create_study(study_name="steerheal", storage=ledger.storage_url(folder), load_if_exists=True,
                               directions=["maximize", "maximize"])


def drive(folder, sampler, indices, fixed=None, cut=None, **kw):
    """Run trials whose outcome follows from their parameters; stop without a word inside trial `cut`."""
    search = searcher.StudySearcher(study(folder), SPACE, indices, fixed or {}, sampler, 3, **kw)
    seen = {}
    for _ in indices:
        asked = search.suggest("t")
        seen[asked["index"]] = asked["params"]
        if asked["index"] == cut:
            return seen
        tau = asked["params"]["heal.tau"]
        row = dict(round=0, trait_gain=tau, coherence_kept=1 - 0.3 * tau, violation=0.3 * tau - 0.15)
        search.on_trial_complete("t", dict(end="rounds", row=json.dumps(row)))
    return seen


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsgaii", pytest.param(
    "gp", marks=pytest.mark.skipif(not HAS_SCIPY, reason="the extra gp is not installed"))])
def test_a_resumed_search_proposes_what_an_undisturbed_one_would(sampler, tmp_path):
    n, cut = (12, 9) if sampler == "gp" else (22, 12)
    whole = drive(tmp_path / "whole", sampler, list(range(n)))
    drive(tmp_path / "cut", sampler, list(range(n)), cut=cut)
    again = study(tmp_path / "cut")
    fixed = searcher.recover(again)
    assert list(fixed) == [cut]
    resumed = drive(tmp_path / "cut", sampler, searcher.missing(again, n), fixed)
    assert resumed == {i: whole[i] for i in range(cut, n)}
    assert len({json.dumps(p, sort_keys=True) for p in whole.values()}) > n // 2


def test_the_generations_of_nsgaii_survive_an_interruption(tmp_path):
    drive(tmp_path, "nsgaii", list(range(20)), cut=12)
    fixed = searcher.recover(study(tmp_path))
    drive(tmp_path, "nsgaii", list(range(12, 20)), fixed)
    generations = [t.system_attrs["NSGAIISampler:generation"] for t in ledger.latest(study(tmp_path)).values()]
    assert generations == [i // searcher.STARTUP_TRIALS for i in range(20)]


def test_gp_without_scipy_names_the_way_out(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scipy"):
        searcher.make_sampler("gp", 0)


def test_a_grids_points_are_proposed_as_they_are(tmp_path):
    points = [{"heal.tau": tau, "heal.aggregate": a} for tau in (0.1, 0.5) for a in ("mean", "rmse")]
    assert drive(tmp_path, "grid", list(range(4)), dict(enumerate(points))) == dict(enumerate(points))


def reporting(search, name, gains, ends_with="rounds"):
    """Report the rounds of one trial as Ray does, until halving or the last ends it."""
    search.suggest(name)
    for r, gain in enumerate(gains):
        row = dict(round=r, trait_gain=gain, coherence_kept=0.9 + gain / 100, violation=-0.05)
        result = dict(end=ends_with if r == len(gains) - 1 else "", row=json.dumps(row))
        if search.stops(name, result) or result["end"]:
            search.on_trial_complete(name, result)
            return
        search.on_trial_result(name, result)


def test_halving_ends_a_dominated_trial_at_a_rung_as_complete(tmp_path):
    search = searcher.StudySearcher(study(tmp_path), SPACE, [0, 1], {}, "random", 0, halve=True)
    reporting(search, "good", [1.0] * 4)
    reporting(search, "bad", [0.1] * 4)
    ends = [(t.state.name, t.user_attrs["end"], len(t.user_attrs["rounds"])) for t in study(tmp_path).trials]
    assert ends == [("COMPLETE", "rounds", 4), ("COMPLETE", "halved", 2)]
    assert study(tmp_path).trials[1].values == [0.1, 0.901]


def test_halving_takes_nothing_back_from_a_trial_that_runs_again(tmp_path):
    """It passed the rung, went on and was interrupted; rivals that came later must not cost it what it finished."""
    gains = [0.1, 0.2, 0.9, 1.0]
    search = searcher.StudySearcher(study(tmp_path), SPACE, [0, 1], {}, "random", 0, halve=True)
    reporting(search, "early", gains[:3], "stopped")
    reporting(search, "rival", [0.5, 0.5, 0.5, 0.5])
    again = study(tmp_path)
    fixed = searcher.recover(again)
    search = searcher.StudySearcher(again, SPACE, searcher.missing(again, 2), fixed, "random", 0, halve=True)
    reporting(search, "early", gains)
    assert [row["trait_gain"] for row in ledger.latest(study(tmp_path))[0].user_attrs["rounds"]] == gains


def test_a_second_interruption_takes_no_round_out_of_the_ledger(tmp_path):
    search = searcher.StudySearcher(study(tmp_path), SPACE, [0], {}, "random", 0)
    reporting(search, "first", [0.1, 0.2, 0.3], "stopped")
    for done in (0, 1):  # while it loads the model, and after one round
        again = study(tmp_path)
        search = searcher.StudySearcher(again, SPACE, searcher.missing(again, 1), searcher.recover(again), "random", 0)
        search.suggest("t")
        if done:
            row = dict(round=0, trait_gain=0.1, coherence_kept=0.9, violation=-0.05)
            search.on_trial_result("t", dict(end="", row=json.dumps(row)))
        table = ledger.build(study(tmp_path))
        assert list(table["trait_gain"]) == [0.1, 0.2, 0.3] and set(table["state"]) == {"running"}
    reporting(search := searcher.StudySearcher(again, SPACE, [0], {}, "random", 0), "t", [0.1, 0.2])
    assert list(ledger.build(study(tmp_path))["trait_gain"]) == [0.1, 0.2]  # what is finished counts


def test_the_first_trials_baselines_are_the_searchs(tmp_path):
    search = searcher.StudySearcher(study(tmp_path), SPACE, [0, 1], {}, "random", 0)
    for name in ("first", "second"):
        search.suggest(name)
        search.on_trial_result(name, dict(end="", row="", baselines=json.dumps([dict(label=name)]), trait=name))
    assert study(tmp_path).user_attrs["baselines"] == [dict(label="first")] and study(tmp_path).user_attrs["trait"] == "first"


def test_a_trial_that_starves_at_once_leaves_its_baselines_and_what_was_drawn(tmp_path):
    search = searcher.StudySearcher(study(tmp_path), SPACE, [0], {}, "random", 0)
    search.suggest("t")
    search.on_trial_complete("t", dict(end="starved", error="round 0: 1 survived", row="", trait="conduct_nats",
                                       baselines=json.dumps([dict(label="base")]),
                                       starved=json.dumps(dict(round=0, draws=[1]))))
    assert study(tmp_path).user_attrs["baselines"] == [dict(label="base")]
    assert ledger.starved(tmp_path) == [dict(trial=0, round=0, draws="[1]")]


def test_the_study_holds_what_optunas_own_tools_read(tmp_path):
    drive(tmp_path, "random", [0])
    trial = study(tmp_path).trials[0]
    constraint = pytest.approx(0.3 * trial.params["heal.tau"] - 0.15)
    assert trial.constraints["deliverable"] == constraint and trial.system_attrs["constraints"] == [constraint]
    assert trial.user_attrs["rounds"][0]["trait_gain"] == trial.values[0]


def test_a_study_that_is_locked_for_one_write_loses_no_round(tmp_path, monkeypatch):
    search = searcher.StudySearcher(study(tmp_path / "s"), SPACE, [0], {}, "random", 3)
    search.suggest("t")
    rows = [dict(round=r, trait_gain=0.1 * r, coherence_kept=0.9, violation=-0.05) for r in range(3)]
    first = dict(row=json.dumps(rows[0]), baselines=json.dumps([{}]), trait="conduct")
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "set_user_attr", lambda *a: 1 / 0)
        search.on_trial_result("t", first)
    for row in rows[1:]:
        search.on_trial_result("t", dict(row=json.dumps(row)))
    search.on_trial_complete("t", dict(row="null", end="rounds"))
    [trial] = search.study.get_trials()
    assert trial.user_attrs["rounds"] == rows and trial.state.name == "COMPLETE" and "error" not in trial.user_attrs
