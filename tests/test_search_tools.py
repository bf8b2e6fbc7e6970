"""What stands around a search: grids from a file, dry run, status, confirm, TensorBoard. Real Ray, a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import TINY

from steerheal import ledger

pytestmark = pytest.mark.search

ROOT = Path(__file__).parent.parent
SPACE = '''
HYPOTHESIS = "a grid"
BASE = {BASE}
TRIALS = 4
COST = "nothing"
SAMPLER = "grid"


def domains():
    from ray import tune

    return {{"heal.tau": tune.choice([0.01, 5.0]), "generate.doses": tune.choice([(1.0,), (0.5, 1.0)])}}
'''


def run(out, *args, module="steerheal.search"):
    done = subprocess.run([sys.executable, "-m", module, *map(str, args), "--out", str(out)], cwd=ROOT, text=True,
                          capture_output=True, timeout=500)
    return done.stdout + done.stderr, done.returncode


@pytest.fixture(scope="module")
def space(tmp_path_factory, tiny_folder):
    path = tmp_path_factory.mktemp("spaces") / "mine.py"
    path.write_text(SPACE.format(BASE=repr(TINY | {"rounds": 2, "model": str(tiny_folder)})))
    return path


@pytest.fixture(scope="module")
def searched(space, tmp_path_factory):
    """A search over a grid from a file of one's own."""
    out = tmp_path_factory.mktemp("out")
    texts = {"dry": run(out, "--space", space, "--dry-run")}
    assert not (out / "mine").exists()
    texts["search"] = run(out, "--space", space)
    return out, texts


def table(out):
    return pd.read_parquet(out / "mine" / "ledger.parquet")


def test_a_dry_run_names_the_trials_and_admits_what_it_cannot_know(searched):
    text, code = searched[1]["dry"]
    assert code == 0 and "4 to run" in text, text
    assert "trial 0  heal.tau=0.01 generate.doses=[1.0]" in text and "trial 3  heal.tau=5 generate.doses=[0.5, 1.0]" in text
    assert "0 stages are in the store" in text and "unknown" in text


def test_a_grid_runs_every_combination_once(searched):
    text, code = searched[1]["search"]
    assert code == 0, text
    rows = table(searched[0])
    found = rows.drop_duplicates("trial")[["heal.tau", "generate.doses"]].values.tolist()
    assert found == [[0.01, "[1.0]"], [0.01, "[0.5, 1.0]"], [5.0, "[1.0]"], [5.0, "[0.5, 1.0]"]]


def test_hypervolume_is_recorded_after_each_trial(searched):
    out, _ = searched
    progress = pd.read_csv(out / "mine" / "hypervolume.csv")
    assert list(progress["finished"]) == [1, 2, 3, 4] and progress["hypervolume"].is_monotonic_increasing
    assert progress["hypervolume"].iloc[-1] == pytest.approx(ledger.hypervolume(table(out)))
    assert progress["hours"].iloc[-1] > 0


def test_status_from_another_terminal(searched):
    out, _ = searched
    text, code = run(out, "mine", "--status")
    assert code == 0 and "4 of 4 trials of 2 rounds, finished" in text and "without sharing" in text, text
    assert f"hypervolume {ledger.hypervolume(table(out)):.4f}" in text
    text, code = run(out, "other", "--status")
    assert code == 2 and "holds no search" in text and "mine" in text and "Traceback" not in text


def test_tensorboard_has_each_round_once(searched):
    from tensorboardX.proto import event_pb2

    out, _ = searched
    rows = table(out).dropna(subset=["round"])
    for trial, own in rows.groupby("trial"):
        steps = []
        for path in sorted((out / "mine" / "tensorboard" / f"trial-{trial}").glob("events.*")):
            data = path.read_bytes()
            while data:
                size = int.from_bytes(data[:8], "little")
                event = event_pb2.Event.FromString(data[12 : 12 + size])
                steps += [(event.step, v.simple_value) for v in event.summary.value if v.tag == "trait_gain"]
                data = data[12 + size + 4 :]
        expected = {int(r): g for r, g in own[["round", "trait_gain"]].values}
        assert len(steps) == len(expected) and dict(steps) == pytest.approx(expected)


def test_rounds_that_are_replayed_within_a_second_each_stay(tmp_path):
    from steerheal.tensorboard import Scalars

    for r in range(3):
        Scalars(tmp_path).add(0, dict(round=r, trait_gain=0.1))
    assert len(list((tmp_path / "tensorboard" / "trial-0").glob("events.*"))) == 3


def test_confirm_runs_the_front_on_fresh_seeds_and_resumes(searched, space):
    out, _ = searched
    front = table(out)
    front = front[front["front"]]
    text, code = run(out, "--space", space, "--confirm", "1")
    assert code == 0 and pd.read_csv(out / "mine" / "confirm.csv")["seed"].max() == 1, text
    text, code = run(out, "--space", space, "--confirm", "2")
    assert code == 0, text
    found = pd.read_csv(out / "mine" / "confirm.csv")
    assert list(found.columns) == ["trial", "round", "seed", "fresh", "trait_gain", "coherence_kept", "deliverable"]
    members = set(zip(front["trial"], front["round"]))
    assert set(zip(found["trial"], found["round"])) == members
    for _, group in found.groupby(["trial", "round"]):
        assert list(group["seed"]) == [0, 1, 2] and list(group["fresh"]) == [False, True, True]
        assert group["trait_gain"].nunique() > 1  # another seed is another number
    assert "seed noise" in text and "on the front on" in text
    pd.testing.assert_frame_equal(table(out)[table(out)["front"]], front)  # the search itself is untouched


def test_a_dry_run_of_a_second_search_finds_the_stages_of_the_first(searched, space):
    out, _ = searched
    text, code = run(out, "--space", space, "--name", "again", "--dry-run")
    assert code == 0 and "of its 2 rounds are in the store" in text, text
    assert "about" in text and f"rounds in {out / 'mine'}" in text and "same settings" in text
    assert not (out / "again").exists()


def test_the_study_opens_in_optunas_own_tools(searched):
    study = ledger.open_study(searched[0] / "mine")
    assert study.metric_names == ["trait_gain", "coherence_kept"]
    for trial in study.trials:
        if trial.state.name == "COMPLETE":
            rounds = trial.user_attrs["rounds"]
            assert json.dumps(rounds) and "deliverable" in trial.constraints
    feasible = [t.number for t in study.best_trials]
    assert all(study.trials[n].constraints["deliverable"] <= 0 for n in feasible)
