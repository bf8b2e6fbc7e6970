import datetime
import json
import random

import optuna
import pytest

from steerheal import events, ledger, waste
from steerheal.events import Session
from steerheal.stages import Result, Store


def event(kind, trial, digest, stage="heal", seconds=0.0, at=0.0):
    return dict(kind=kind, trial=trial, digest=digest, stage=stage, seconds=seconds, time=at, where="round 0")


def test_waste_counts_what_each_trial_would_have_computed_alone():
    found = [event("computed", 0, "v", "vector", 3), event("computed", 0, "a", seconds=10),
             event("replayed", 1, "v", "vector"), event("computed", 1, "b", seconds=20),
             event("replayed", 1, "v", "vector"), event("replayed", 1, "b"),  # trial 1 was interrupted and came back
             event("replayed", 2, "v", "vector"), event("replayed", 2, "other")]  # "other": by another search
    table = waste.count(found, {"other": 5.0}).set_index("stage")
    assert table.loc["vector"].to_dict() == dict(computed=1, seconds=3, shared=2, replayed=1, saved=6, unknown=0)
    assert table.loc["heal"].to_dict() == dict(computed=2, seconds=30, shared=1, replayed=1, saved=5, unknown=0)


def test_overhead_is_the_time_outside_stages():
    found = [event("computed", 0, "a", seconds=30, at=40), event("computed", 0, "b", seconds=50, at=100)]
    assert waste.overhead(found, [Session(0, 100, 1)]) == pytest.approx(0.2)
    assert waste.overhead(found, [Session(0, 100, 2)]) == pytest.approx(0.6)
    assert waste.overhead(found, []) is None


def test_a_killed_session_lasts_to_its_last_event(tmp_path):
    lines = [dict(kind="start", time=0, concurrent=1), dict(kind="start", time=100, concurrent=1),
             dict(kind="end", time=150, concurrent=1), dict(kind="start", time=200, concurrent=2)]
    (tmp_path / "sessions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    found = [event("computed", 0, "a", at=t) for t in (10, 60, 120, 230)]
    assert events.sessions(tmp_path, found) == [Session(0, 60, 1), Session(100, 150, 1), Session(200, 230, 2)]


@pytest.mark.parametrize("seed", range(5))
def test_busy_seconds_are_those_in_which_a_span_runs(seed):
    rng = random.Random(seed)
    spans = [(start, start + rng.randrange(1, 12)) for start in (rng.randrange(100) for _ in range(15))]
    moments = sorted(rng.randrange(120) for _ in range(10))
    want = [sum(any(start <= second < end for start, end in spans) for second in range(moment)) for moment in moments]
    assert events.busy(spans, moments) == want
    assert events.busy([], moments) == [0] * 10


def test_what_is_running_is_what_was_started_and_not_finished():
    found = [event("start", 0, "a"), event("computed", 0, "a"), event("start", 0, "b"), event("start", 1, "c"),
             event("start", 2, "d"), dict(event("error", 2, ""), where="boom")]
    assert {trial: e["digest"] for trial, e in events.running(found).items()} == {0: "b", 1: "c"}
    loading = {k: v for k, v in event("start", 3, "").items() if k != "digest"}
    assert not events.running([loading, event("replayed", 3, "a")])  # all of it came from the store
    assert not events.running(found, since=found[0]["time"] + 1)  # what an earlier driver left


def test_the_table_costs_what_was_only_read_by_the_stores_record(tmp_path):
    digest = Store(tmp_path / ".stages").stage("heal", {"x": 1}, lambda: Result({})).digest
    folder = tmp_path / "s" / "events"
    folder.mkdir(parents=True)
    lines = [event("computed", 0, "a", seconds=8), event("replayed", 0, digest)]
    (folder / "w.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = waste.table(tmp_path / "s").iloc[0]
    stored = Store(tmp_path / ".stages").head(digest)["seconds"]
    assert (row["computed"], row["shared"], row["saved"]) == (1, 1, stored)
    assert "without sharing 8 s" in waste.text(tmp_path / "s")


def test_progress_counts_hours_in_which_a_trial_ran_and_hypervolume_so_far():
    study = optuna.create_study(directions=["maximize", "maximize"])
    day = datetime.datetime(2026, 1, 1)

    def add(index, start, end, gain, state=optuna.trial.TrialState.COMPLETE):
        rows = [dict(round=0, trait_gain=gain, coherence_kept=0.95, deliverable=True, adapter=f"a{index}", violation=-0.1)]
        study.add_trial(optuna.trial.create_trial(state=state, values=[gain, 0.95] if state.name == "COMPLETE" else None,
                                                  user_attrs=dict(index=index, end="rounds", rounds=rows)))
        trial = study._storage._studies[0].trials[-1]  # add_trial stamps its own times
        trial.datetime_start, trial.datetime_complete = (day + datetime.timedelta(hours=h) for h in (start, end))

    add(0, 0, 1, 1.0)
    add(2, 0.5, 2, 2.0)  # beside trial 0
    add(1, 10, 11, 0.5)  # after a night
    table = ledger.progress(study, ledger.build(study))
    assert list(table["trial"]) == [0, 2, 1] and list(table["finished"]) == [1, 2, 3]
    assert list(table["hours"]) == pytest.approx([1, 2, 3])
    assert list(table["hypervolume"]) == pytest.approx([0.1, 0.2, 0.2])
