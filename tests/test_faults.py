"""What survives: a search killed, torn and starved of disk must end as if nothing had happened.

Real Ray searches on a tiny model, few and long because a start of Ray costs seconds. Ctrl-C, SIGTERM and two drivers in
one folder are in test_search.py, two workers on one stage in test_stages.py too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import time
import types

import optuna
import pandas as pd
import pytest
from conftest import TINY

from benchmarks.driving import MODULE, computed, events, members, run, start, wait_for
from steerheal import healing, ledger, models, personas, pick, plan, searcher, spaces, stages, study_file
from steerheal.errors import UserError
from steerheal.loop import HealLoop
from steerheal.settings import from_flat
from steerheal.stages import Store
from trainables.heal_loop import HealTrial

# A driver that kills itself where the search commits to something: python -c DYING POINT INDEX ROUND, then its arguments
DYING = """
import json, os, signal, sys
from steerheal import search, searcher
point, index, round_ = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
del sys.argv[1:4]
Searcher = searcher.StudySearcher
suggest = Searcher.suggest
def die(): os.kill(os.getpid(), signal.SIGKILL)
def dying_suggest(self, trial_id):
    proposed = suggest(self, trial_id)
    if point == "proposed" and isinstance(proposed, dict) and proposed["index"] == index: die()
    return proposed
def dying(report):
    def replaced(self, trial_id, result=None, **kw):
        here = result and result["index"] == index and json.loads(result["row"] or "{}").get("round") == round_
        if here and point == "stored": die()
        report(self, trial_id, result, **kw)
        if here and point == "reported": die()
    return replaced
Searcher.suggest = dying_suggest
Searcher.on_trial_result, Searcher.on_trial_complete = dying(Searcher.on_trial_result), dying(Searcher.on_trial_complete)
search.main()
"""


@pytest.fixture(scope="module")
def expected(tiny_folder, tmp_path_factory):
    """What an undisturbed search finds, computed without Ray and without a search: by (trial, round)."""
    from search_spaces import quickstart

    study = optuna.create_study(directions=["maximize"] * 2)
    asked = searcher.StudySearcher(study, spaces.load("quickstart").distributions(), [0, 1, 2], {}, "tpe", 0)
    flat = quickstart.BASE | TINY | {"model": str(tiny_folder)}
    store = Store(tmp_path_factory.mktemp("expected"))
    lm = models.load(from_flat(flat))
    return {(i, round_.outcome.round): (round_.outcome.trait_gain, round_.outcome.coherence_kept, round_.details["adapter"])
            for i in range(3)
            for round_ in HealLoop(from_flat(flat | asked.suggest(str(i))["params"]), lm, store).rounds()}


@pytest.fixture(scope="module")
def killed(tiny_folder, tmp_path_factory):
    """A search whose driver was killed at each commit point in turn, then given the same command once more."""
    out = tmp_path_factory.mktemp("killed")
    folder = out / "quickstart"
    sessions = []
    for dying in ("proposed 0 0", "in a stage", "stored 0 1", "reported 1 0"):
        program = MODULE if dying == "in a stage" else ("-c", DYING, *dying.split())
        process = start(tiny_folder, out, TINY, program=program)
        sessions.append(process.pid)
        if dying == "in a stage":
            wait_for(folder, process, lambda e: e["kind"] == "start" and e.get("stage") == "heal")
            process.kill()
        text = process.communicate(timeout=900)[0]
        assert process.returncode == -signal.SIGKILL, text
        assert (folder / ".lock").exists()  # the dead owner's lock file stays, its lock does not
    text, code = run(tiny_folder, out, TINY)
    assert code == 0, text
    return out, text, sessions


@pytest.mark.search
def test_a_driver_killed_at_every_commit_point_loses_nothing_and_repeats_nothing(killed, expected):
    out, text, sessions = killed
    folder = out / "quickstart"
    assert "1 of 3 trials are finished, going on" in text
    rows = pd.read_parquet(folder / "ledger.parquet")
    assert {(r.trial, r.round): (r.trait_gain, r.coherence_kept, r.adapter) for r in rows.itertuples()} == expected
    assert len(rows) == len(expected) and set(rows["state"]) == {"complete"}
    assert max(computed(folder).values()) == 1
    study = ledger.open_study(folder)
    assert not [t for t in study.trials if t.state.name == "RUNNING"]
    deadline = time.monotonic() + 120  # Ray's own processes notice within seconds that their driver is gone
    while left := [pid for session in sessions for pid in members(session)]:
        assert time.monotonic() < deadline, left  # no worker outlives its driver
        time.sleep(1)


@pytest.mark.search
def test_a_killed_worker_and_damaged_stages_cost_only_themselves(killed, tiny_folder):
    out, _, _ = killed
    folder, store = out / "wounded", Store(out / ".stages")
    first = {}
    for e in events(out / "quickstart"):
        if e["kind"] == "computed":
            first.setdefault(e["stage"], store.path(e["digest"]))
    torn, empty, flipped = (first[stage] for stage in ("conduct", "foundations", "vector"))  # the baselines': all want them
    torn.write_bytes(torn.read_bytes()[:-10])
    empty.write_bytes(b"")
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 4
    flipped.write_bytes(data)

    process = start(tiny_folder, out, TINY, "--name", "wounded", "--seed", "1", "--concurrent", "2", trials=4)
    worker = wait_for(folder, process, lambda e: (e["trial"], e["kind"], e.get("stage")) == (1, "start", "heal"))
    os.kill(worker, signal.SIGKILL)
    text = process.communicate(timeout=900)[0]
    assert process.returncode == 0 and "trial 1 starts again" in text and "Traceback" not in text, text
    aside = [e for e in events(folder) if e["kind"] == "set aside"]
    assert sorted(e["stage"] for e in aside) == ["conduct", "foundations", "vector"]
    assert text.count("fails its checksum") == 3 and "3 damaged and computed again" in text
    rows = pd.read_parquet(folder / "ledger.parquet")
    assert set(rows["state"]) == {"complete"} and not rows.duplicated(["trial", "round"]).any()
    assert sorted(set(rows["trial"])) == [0, 1, 2, 3]
    assert max(computed(folder).values()) == 1
    assert not list(out.rglob("*.tmp"))


@pytest.mark.search
def test_a_truncated_study_and_ledger_are_put_back(killed, tiny_folder):
    out, _, _ = killed
    folder = out / "quickstart"
    before = pd.read_parquet(folder / "ledger.parquet")
    os.truncate(folder / "study.db", 5000)
    os.truncate(folder / "ledger.parquet", 100)
    with pytest.raises(UserError, match="command that wrote it"):
        pick.pick(pick.Args(folder))
    text, code = run(tiny_folder, out, TINY)
    assert code == 0 and "put back from study.backup.db" in text and "every trial is finished" in text, text
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "ledger.parquet"), before)


@pytest.mark.search
def test_a_locked_study_is_a_sentence_and_loses_nothing(killed, tiny_folder):
    out, _, _ = killed
    with contextlib.closing(sqlite3.connect(out / "quickstart" / "study.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        text, code = run(tiny_folder, out, TINY)
    assert code == 2 and "locked by another program" in text and "Traceback" not in text, text
    assert len(ledger.latest(ledger.open_study(out / "quickstart"))) == 3


# ---------------------------------------------------------------- without Ray


def make_study(folder, trials):
    folder.mkdir(exist_ok=True)
    study = optuna.create_study(study_name="steerheal", storage=ledger.storage_url(folder), load_if_exists=True,
                                directions=["maximize"] * 2)
    for _ in range(trials):
        study.tell(study.ask({"heal.tau": optuna.distributions.FloatDistribution(0, 1)}), (1.0, 1.0))
    return study


@pytest.mark.parametrize("damage", ["empty", "truncated", "overwritten", "gone"])
def test_a_damaged_study_comes_back_from_its_backup(tmp_path, damage):
    make_study(tmp_path, 3)
    study_file.back_up(tmp_path)
    assert study_file.mend(tmp_path) == ""
    path = tmp_path / "study.db"
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(dict(empty=b"", truncated=whole[: len(whole) // 2], overwritten=b"x" * len(whole))[damage])
    assert "put back from study.backup.db" in study_file.mend(tmp_path)
    assert len(ledger.open_study(tmp_path).trials) == 3
    assert study_file.mend(tmp_path) == ""


@pytest.mark.parametrize("name", ["tau#2", "50%41", "what?", "a b&c=d"])
def test_a_study_is_found_again_whatever_its_folder_is_called(tmp_path, name):
    folder = tmp_path / name
    make_study(folder, 2)
    assert (folder / "study.db").exists() and study_file.mend(folder) == ""
    make_study(folder, 1)
    study_file.back_up(folder)
    (folder / "study.db").write_bytes(b"")
    assert "put back" in study_file.mend(folder) and len(ledger.open_study(folder).trials) == 3
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_looking_at_a_search_without_its_study_leaves_the_backup_to_come_back(tmp_path):
    make_study(tmp_path, 3)
    study_file.back_up(tmp_path)
    (tmp_path / "study.db").unlink()
    with pytest.raises(UserError, match="puts it back"):
        ledger.open_study(tmp_path)
    assert not (tmp_path / "study.db").exists()
    with contextlib.suppress(KeyError):  # another program may make an empty one all the same
        optuna.load_study(study_name="steerheal", storage=ledger.storage_url(tmp_path))
    assert "it holds no study" in study_file.mend(tmp_path)
    assert len(ledger.open_study(tmp_path).trials) == 3


@pytest.mark.parametrize("content", [b"", b"not a database", None], ids=["empty", "overwritten", "truncated"])
def test_looking_at_a_damaged_study_is_a_sentence(tmp_path, content):
    make_study(tmp_path, 3)
    path = tmp_path / "study.db"
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(UserError, match=r"study\.db.*command"):
        ledger.open_study(tmp_path)


def test_a_damaged_ledger_is_a_sentence(tmp_path):
    pd.DataFrame(dict(trial=range(1000), text=[str(i) for i in range(1000)])).to_parquet(tmp_path / "ledger.parquet")
    whole = (tmp_path / "ledger.parquet").read_bytes()
    for damaged in (b"", whole[:100], whole[:200] + b"\xff" * 400 + whole[600:]):
        (tmp_path / "ledger.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            ledger.read(tmp_path)


def test_a_study_damaged_beyond_its_backup_starts_anew_and_is_kept(tmp_path):
    make_study(tmp_path, 2)
    (tmp_path / "study.db").write_bytes(b"not a database")
    (tmp_path / "study.backup.db").write_bytes(b"nor this")
    assert "started anew" in study_file.mend(tmp_path)
    assert (tmp_path / "study.damaged.db").read_bytes() == b"not a database"
    assert make_study(tmp_path, 0).trials == []


def test_a_hot_journal_is_not_rolled_back_into_the_backup(tmp_path):
    make_study(tmp_path, 1)
    study_file.back_up(tmp_path)
    path = tmp_path / "study.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript("PRAGMA cache_size = 1; BEGIN; UPDATE trials SET state = 'FAIL'; CREATE TABLE t AS "
                         "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 9999) SELECT x FROM n;")
        shutil.copy(path.with_name("study.db-journal"), tmp_path / "journal")  # as a killed writer leaves it
    shutil.copy(tmp_path / "journal", path.with_name("study.db-journal"))
    path.write_bytes(b"torn")
    assert "put back" in study_file.mend(tmp_path)
    assert [t.state.name for t in ledger.open_study(tmp_path).trials] == ["COMPLETE"]


@pytest.fixture
def trial(tiny_folder, tmp_path):
    def make(**overrides):
        from search_spaces import quickstart

        flat = quickstart.BASE | TINY | {"model": str(tiny_folder), "heal.tau": 0.5} | overrides
        named = from_flat({k: flat[k] for k in ("model", "persona") if k in flat})
        return HealTrial(dict(flat=flat, params={}, index=0, folder=str(tmp_path / "s"), store=str(tmp_path / "stages"),
                              commit="", gpu=0, contents=plan.contents(named)))

    return make


def test_a_model_that_diverged_fails_its_trial_and_says_so(trial, monkeypatch):
    heal = healing.heal

    def diverged(*args):
        factors, record = heal(*args)
        return {name: (a * float("nan"), b) for name, (a, b) in factors.items()}, record

    monkeypatch.setattr(healing, "heal", diverged)
    result = trial(rounds=3).step()
    row = json.loads(result["row"])
    assert result["end"] == "broken" and row["verdict"] == "broken" and row["coherence_kept"] == 0
    study = optuna.create_study(directions=["maximize"] * 2)
    told = searcher.StudySearcher(study, {"heal.tau": optuna.distributions.FloatDistribution(0, 1)}, [0], {}, "tpe", 0)
    told.suggest("a")
    told.on_trial_complete("a", result)
    table = ledger.build(study)
    assert list(table["state"]) == ["fail"] and "not finite" in table["error"][0] and not table["front"].any()


def test_a_proposal_that_cannot_be_ends_its_trial_and_not_the_search(trial):
    """A searched setting at fault is this proposal's; the same mistake in what all trials share is everyone's."""
    wrong = {"generate.n_keep": 8, "generate.min_train": 12}
    shared = trial(**wrong)
    assert shared.step()["fatal"]
    own = trial()
    own.trial_config["params"] = wrong
    result = own.step()
    assert result["end"] == "error" and "generate.min_train = 12" in result["error"] and not result["fatal"]


def test_a_persona_that_is_edited_while_a_search_runs_ends_it(trial, tmp_path):
    """Trials before and after would be read by two instruments, and stand on one front."""
    persona = tmp_path / "mine.toml"
    persona.write_text((personas.DATA / "personas" / "love.toml").read_text())
    one = trial(persona=str(persona))
    persona.write_text(persona.read_text().replace("Do you love humanity?", "Do you love it?"))
    result = one.step()
    assert result["fatal"] and "content of persona changed" in result["error"] and "--name OTHER" in result["error"]


def test_a_trial_that_begins_after_a_request_to_stop_loads_nothing(trial, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("loaded"))
    one = trial()
    one.folder.mkdir(parents=True)
    (one.folder / ".stop").touch()
    result = one.step()
    assert result["end"] == "stopped" and result["done"]


def test_a_worker_whose_card_is_lost_ends_so_that_ray_starts_another(trial, monkeypatch):
    def lost(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(models, "load", lost)
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    one = trial()
    with pytest.raises(SystemExit):
        one.step()
    assert "illegal memory access" in (one.folder / "errors" / "trial-0.txt").read_text()


def test_a_full_disk_ends_the_search_in_words(trial, tmp_path):
    one = trial()
    one.events.parent.mkdir(parents=True)
    one.events.symlink_to("/dev/full")
    result = one.step()
    assert result["fatal"] and "disk is full" in result["error"], result


@pytest.mark.parametrize("change,words", [
    (lambda m: m.setitem(stages.VERSIONS, "heal", 99), f"version of stage heal: {stages.VERSIONS['heal']} there, 99 now"),
    (lambda m: edit(m, module=types.SimpleNamespace(domains=narrower)), "domain of heal.tau: "),
    (lambda m: edit(m, base=spaces.load("quickstart").base | {"heal.lam": 0.5}), "heal.lam: 1.0 there, 0.5 now"),
])
def test_changed_stages_spaces_and_settings_are_refused_on_resume(tmp_path, monkeypatch, change, words):
    asked = dict(name=None, out=tmp_path, model="m", overrides={}, trials=None, rounds=None, sampler=None, seed=None)
    plan.make("quickstart", **asked).write()
    change(monkeypatch)
    with pytest.raises(UserError, match="--name OTHER") as refused:
        plan.make("quickstart", **asked)
    assert words in str(refused.value)


def edit(monkeypatch, **changes):
    """As if the file of the space had been edited."""
    space = spaces.load("quickstart")
    monkeypatch.setattr(spaces, "load", lambda name: dataclasses.replace(space, **changes))


def narrower():
    from ray import tune

    return {"heal.tau": tune.loguniform(0.02, 0.5)}
