"""Real Ray Tune searches on a tiny model: what is promised about interruption, extension and refusal."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import TINY

from benchmarks import driving
from steerheal import halving, ledger, searcher
from steerheal import run as one_run
from steerheal.errors import UserError
from steerheal.stages import locked

pytestmark = pytest.mark.search

ROOT = Path(__file__).parent.parent


def command(model, out, *extra, trials=3, rounds=2, **settings):
    chosen = TINY | {name.replace("__", "."): value for name, value in settings.items()}
    overrides = [f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in chosen.items() if k != "rounds"]
    return [sys.executable, "-m", "steerheal.search", "quickstart", "--model", str(model), "--out", str(out), "--trials",
            str(trials), "--rounds", str(rounds), *extra, "--set", *overrides]


def start(*args, **kw):
    return subprocess.Popen(command(*args, **kw), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True)


def run(*args, **kw):
    process = start(*args, **kw)
    return process.communicate(timeout=300)[0], process.returncode


def table(out, name="quickstart"):
    return pd.read_parquet(out / name / "ledger.parquet").drop(columns=["state"])


def events(out):
    return [json.loads(line) for path in (out / "quickstart" / "events").glob("*.jsonl")
            for line in path.read_text().splitlines()]


def computed(out):
    return collections.Counter(e["digest"] for e in events(out) if e["kind"] == "computed")


def wait_for(out, condition, process):
    for _ in range(6000):
        if process.poll() is not None:
            pytest.fail(f"the search ended too early:\n{process.stdout.read()}")
        if condition(events(out)):
            return
        time.sleep(0.05)
    pytest.fail("waited five minutes for nothing")


@pytest.fixture(scope="module")
def undisturbed(tiny_folder, tmp_path_factory):
    """A search of three trials, begun anew over a torn folder with one and then extended."""
    out = tmp_path_factory.mktemp("undisturbed")
    (out / "quickstart").mkdir()
    (out / "quickstart" / "search.json").write_text("{torn")
    for trials, extra in ((1, ["--restart"]), (3, [])):
        text, code = run(tiny_folder, out, *extra, trials=trials)
        assert code == 0, text
    return out, text


def test_a_search_leaves_everything_it_promises(undisturbed):
    out, text = undisturbed
    folder = out / "quickstart"
    for name in ("study.db", "ledger.parquet", "ledger.csv", "front.csv", "baselines.csv", "pareto.png", "report.html",
                 "search.json"):
        assert (folder / name).stat().st_size > 0, name
    rows = table(out)
    assert sorted(set(rows["trial"])) == [0, 1, 2] and len(rows) == 6
    front = rows[rows["front"]]
    assert len(front) and "Pareto front" in text and "trait readout: conduct_nats as asked" in text
    adapters = {p.parent.relative_to(folder / "adapters") for p in (folder / "adapters").rglob("adapter_config.json")}
    assert adapters == {Path(str(t)) / f"r{r}" for t, r in zip(front["trial"], front["round"])}
    assert max(computed(out).values()) == 1
    assert [path.read_text() for path in out.glob("quickstart.*/search.json")] == ["{torn"]  # moved aside by --restart
    assert "1 of 3 trials are finished, going on" in text


def test_a_stage_is_computed_by_one_trial_and_read_by_the_others(undisturbed):
    out, _ = undisturbed
    by_trial = collections.defaultdict(set)
    for e in events(out):
        if e["kind"] == "computed":
            by_trial[e["trial"]].add(e["stage"])
    assert "vector" in by_trial[0] and "completions" in by_trial[0]
    later = [e for e in events(out) if e["kind"] == "computed" and e["trial"] > 0]
    assert not any(e["where"] in ("base", "persona as a prompt") for e in later)


def test_the_same_command_again_computes_nothing(undisturbed, tiny_folder):
    out, _ = undisturbed
    before, rows = computed(out), table(out)
    text, code = run(tiny_folder, out)
    assert code == 0 and "every trial is finished" in text
    assert computed(out) == before
    pd.testing.assert_frame_equal(table(out), rows)


def test_ctrl_c_waits_for_the_stage_however_long_it_lasts_and_the_same_command_goes_on(undisturbed, tiny_folder, tmp_path):
    process, folder = start(tiny_folder, tmp_path), tmp_path / "quickstart"
    worker = driving.wait_for(folder, process, lambda e: e["kind"] == "start" and e.get("stage") == "heal")
    os.kill(worker, signal.SIGSTOP)  # from now on the stage takes as long as we like
    running = driving.events(folder)[-1]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the job
    stopped = time.monotonic()
    text, code = run(tiny_folder, tmp_path)  # as an impatient user does
    assert code == 2 and "in use by another" in text
    time.sleep(max(0, stopped + 15 - time.monotonic()))  # Ray kills a worker ten seconds after it has told it to stop
    assert process.poll() is None
    os.kill(worker, signal.SIGCONT)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 75, text
    assert "the same command goes on" in text and "Traceback" not in text
    last = [e for e in driving.events(folder) if e["kind"] in ("computed", "replayed")][-1]
    assert (last["pid"], last["digest"]) == (worker, running["digest"])
    (trial,) = ledger.open_study(folder).trials
    assert trial.state.name == "FAIL" and trial.user_attrs["end"] == "stopped"
    text, code = run(tiny_folder, tmp_path)
    assert code == 0, text
    assert max(computed(tmp_path).values()) == 1
    pd.testing.assert_frame_equal(table(tmp_path), table(undisturbed[0]))  # which was extended, where this was not


def test_a_resume_that_differs_is_refused_field_by_field(undisturbed, tiny_folder):
    out, _ = undisturbed
    text, code = run(tiny_folder, out, "--seed", "5", "--sampler", "random")
    assert code == 2 and "--seed: 0 there, 5 now" in text and "sampler: 'tpe' there, 'random' now" in text
    assert "--name" in text and "--restart" in text and "Traceback" not in text


def test_sigterm_stops_a_search_as_ctrl_c_does(tiny_folder, tmp_path):
    process = start(tiny_folder, tmp_path)
    wait_for(tmp_path, lambda es: bool(es), process)
    os.kill(process.pid, signal.SIGTERM)
    stopped = process.communicate(timeout=300)[0]
    assert process.returncode == 75 and "the same command goes on" in stopped, stopped


def test_a_spent_wall_budget_ends_in_words_and_halving_saves_the_rounds_it_says(tiny_folder, tmp_path):
    binding = dict(heal__lr=0.02, heal__lam=1.0)  # so that one tau is worse than another
    text, code = run(tiny_folder, tmp_path, "--halving", "--hours", "0.0002", trials=3, rounds=3, **binding)
    assert code == 0 and "The wall budget is spent. 0 of 3 trials are finished; the same command goes on" in text
    text, code = run(tiny_folder, tmp_path, trials=3, rounds=3, **binding)  # --halving is remembered
    assert code == 0, text
    assert set(computed(tmp_path).values()) == {1}  # whatever the first run finished is read by the second
    rows = table(tmp_path)
    ran = ledger.finished_rounds(ledger.open_study(tmp_path / "quickstart"))
    assert rows[rows["round"] >= 0].groupby("trial").size().to_dict() == {trial: len(own) for trial, own in ran.items()}
    for trial, own in ran.items():  # one at a time, so each meets those before it
        rivals = [ran[before][1] for before in range(trial)]
        assert len(own) == (2 if halving.halved(own[1], rivals) else 3)
    assert sorted(ran) == [0, 1, 2] and {len(own) for own in ran.values()} == {2, 3}


def test_what_interrupted_runs_leave_open_is_closed(tmp_path):
    import optuna

    study = optuna.create_study(study_name="steerheal", storage=ledger.storage_url(tmp_path),
                                directions=["maximize", "maximize"])
    space = {"heal.tau": optuna.distributions.FloatDistribution(0.1, 1.0)}
    s = searcher.StudySearcher(study, space, [0, 1, 2], {}, "tpe", 0)
    asked = [s.suggest(f"t{i}") for i in range(3)]
    assert s.suggest("more") == searcher.StudySearcher.FINISHED
    row = dict(round=0, trait_gain=0.5, coherence_kept=0.9, violation=-0.05)
    s.on_trial_complete("t0", dict(end="rounds", row=json.dumps(row)))
    s.on_trial_complete("t1", dict(end="rounds", row=json.dumps(row | dict(trait_gain=float("nan")))))
    retries = searcher.recover(study)
    assert searcher.missing(study, 4) == [1, 2, 3]
    assert retries == {1: asked[1]["params"], 2: asked[2]["params"]}
    again = searcher.StudySearcher(study, space, [1, 2, 3], retries, "tpe", 0)
    assert again.suggest("a") == asked[1] and again.suggest("b") == asked[2]
    fresh = searcher.StudySearcher(optuna.create_study(directions=["maximize"] * 2), space, [0, 1, 2], {}, "tpe", 0)
    assert [fresh.suggest(str(i)) for i in range(3)] == asked


def test_picking_from_the_front(undisturbed, tmp_path):
    folder = str(undisturbed[0] / "quickstart")
    done = subprocess.run([sys.executable, "-m", "steerheal.pick", folder, "--min-coherence", "0.5", "--export",
                           str(tmp_path / "mine")], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "mine" / "adapter_config.json").exists(), done.stdout + done.stderr


def test_one_loop_without_a_search_gives_the_searchs_numbers(undisturbed, tiny_folder, tmp_path):
    out, _ = undisturbed
    first = table(out).iloc[0]
    from search_spaces import quickstart

    flat = quickstart.BASE | TINY | {"model": str(tiny_folder), "heal.tau": float(first["heal.tau"])}
    overrides = [f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in flat.items()]
    command = [sys.executable, "-m", "steerheal.run", "--out", str(out), "--set", *overrides]
    export = ["--export", str(tmp_path / "a")]
    done = subprocess.run([*command, *export], cwd=ROOT, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"trait gain {first['trait_gain']:+.3f}" in done.stdout
    assert not re.search(r"^  \S.* s$", done.stdout, re.MULTILINE)  # nothing was computed
    assert (tmp_path / "a" / "adapter_config.json").exists()
    args = one_run.Args(out=out, set=tuple(overrides))
    with pytest.raises(UserError, match="exists already; name a new folder"):
        one_run.run(dataclasses.replace(args, export=tmp_path / "a"))
    folder, = out.glob("run-*")
    with locked(folder / ".lock"), pytest.raises(UserError, match="another process is at this very run"):
        one_run.run(args)
