import json
import time

import optuna
import pytest

from steerheal import ledger, status
from steerheal.stages import locked

DISTRIBUTIONS = {"heal.tau": optuna.distributions.FloatDistribution(0, 1)}


@pytest.fixture
def folder(tmp_path):
    """A search of three trials: one finished, one running, one to come."""
    study = ledger.create_study(tmp_path)
    row = dict(round=0, trait="conduct_nats", trait_gain=0.5, trait_gain_low=0.4, trait_gain_high=0.6, coherence_kept=0.95,
               fluency_kept=1.0, verdict="heal", flags="", deliverable=True, adapter="a", violation=-0.1)
    for index, end in ((0, "rounds"), (1, "")):
        trial = study.ask(DISTRIBUTIONS)
        trial.set_user_attr("index", index)
        if end:
            trial.set_user_attr("rounds", [row])
            trial.set_user_attr("end", end)
            study.tell(trial, (0.5, 0.95))
    ledger.write(study, tmp_path)
    (tmp_path / "search.json").write_text(json.dumps(dict(name="mine", trials=3, settings=dict(rounds=2))))
    (tmp_path / "events").mkdir()
    event = dict(time=time.time() - 100, trial=1, where="round 0, healing", kind="start", stage="heal", digest="d")
    (tmp_path / "events" / "w.jsonl").write_text(json.dumps(event) + "\n")
    return tmp_path


def test_a_running_search_shows_its_stage_and_front(folder, capsys):
    with locked(folder / ".lock"):
        assert status.show(folder) == 0
    out = capsys.readouterr().out
    assert "mine: 1 of 3 trials of 2 rounds, running" in out and "trial 1  round 0, healing  heal  0:01:4" in out
    assert "hypervolume 0.0500" in out and "left at this pace" in out and "+0.500 [+0.400, +0.600]" in out


def test_a_trial_that_ended_or_died_with_its_driver_is_not_running(folder, capsys):
    study = ledger.open_study(folder)
    trial = study.ask(DISTRIBUTIONS)
    trial.set_user_attr("index", 2)
    trial.set_user_attr("end", "starved")
    trial.set_user_attr("error", "round 0: 3 completions survived")
    study.tell(trial, (0.0, 1.0))
    ledger.write(study, folder)
    now = time.time()
    with (folder / "events" / "w.jsonl").open("a") as file:  # trial 1's start is of a driver before
        file.write(json.dumps(dict(time=now, trial=2, where="round 0", kind="start", stage="heal", digest="e")) + "\n")
    (folder / "sessions.jsonl").write_text(json.dumps(dict(kind="start", time=now - 50, concurrent=1)) + "\n")
    with locked(folder / ".lock"):
        status.show(folder)
    out = capsys.readouterr().out
    assert "  trial 1" not in out and "  trial 2" not in out
    assert "Trial 2 starved in round 0: 3 completions survived." in out


def test_a_search_that_nobody_runs_says_how_to_go_on(folder, capsys):
    status.show(folder)
    out = capsys.readouterr().out
    assert "not running; the same command without --status goes on" in out and "round 0, healing" not in out


def test_the_searched_settings_are_the_columns_before_the_rounds(folder):
    assert ledger.searched(ledger.read(folder)) == ["heal.tau"]
