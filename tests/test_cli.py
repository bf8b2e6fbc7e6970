"""What a user meets at the command line before anything heavy runs."""

import contextlib
import io
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from torch import OutOfMemoryError

from steerheal import personas, plan, spaces, weights
from steerheal import run as one_run
from steerheal.cli import merged_flags, setting_flags
from steerheal.errors import UserError

ROOT = Path(__file__).parent.parent


def run(*args, module="steerheal.search"):
    """Exit code and output of `python -m MODULE ARGS`, in this process: it has loaded already what takes seconds."""
    with (pytest.MonkeyPatch.context() as patch, io.StringIO() as out, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(out), warnings.catch_warnings(action="ignore", category=RuntimeWarning)):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [module, *args])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        return end.value.code or 0, out.getvalue()


def test_list_shows_every_space():
    code, text = run("--list")
    assert code == 0
    for name in spaces.names():
        assert name in text and spaces.load(name).hypothesis in text


@pytest.mark.parametrize("flag", ["--list", "--help"])
def test_listing_and_help_load_nothing_heavy(flag):
    check = ("import atexit, sys; sys.argv = ['search', sys.argv[1]]; "
             "atexit.register(lambda: print('HEAVY', [m for m in ('torch', 'ray', 'optuna', 'transformers', 'pandas', "
             "'matplotlib', 'numpy') if m in sys.modules])); "
             "from steerheal import search; search.main()")
    done = subprocess.run([sys.executable, "-c", check, flag], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize("args,words", [
    (["pareto_tua"], ["no such space", "did you mean pareto_tau"]),
    (["quickstart", "--set", "heal.lamda=1"], ["heal.lamda", "did you mean heal.lam"]),
    (["pareto_tau", "--set", "heal.tau=-1"], ["heal.tau", "at least 0"]),
    (["quickstart", "--set", "heal.tau=0.5"], ["searches this setting"]),
    (["quickstart", "--set", "heal.r=0", "generate.top_k=0", "rounds=-1"],
     ["heal.r", "generate.top_k", "rounds", "3 problems"]),
    (["quickstart", "--trials", "0", "--sampler", "magic"], ["--trials 0", "tpe, nsgaii, gp, random, grid"]),
    (["quickstart", "--hours", "-1", "--confirm", "0", "--gpus-per-trial", "-1"],
     ["--hours -1: must be above 0", "--confirm 0: must be at least 1", "--gpus-per-trial -1: must be at least 0"]),
    (["quickstart", "--confirm", "2", "--restart"], ["--confirm goes with neither --dry-run, --restart nor --trials"]),
    (["quickstart", "--confirm", "2"], ["holds no search", "without --confirm"]),
    (["quickstart", "--name", ".stages"], ["--name .stages: must be a name"]),
    (["quickstart", "--model", "", "--hours", "1e7"], ["--model: names nothing", "--hours 1e+07"]),
    (["quickstart", "--gpus-per-trial", "1.5"], ["--gpus-per-trial 1.5", "whole number"]),
    (["quickstart", "--set", 'model=["a"]'], ["model = ['a']: must be text"]),
    (["quickstart", "--sampler", "grid"], ["heal.tau of space quickstart is a range", "tune.choice"]),
    (["reg", "--trials", "22"], ["the grid of reg has 21 points"]),
    (["--space", "nowhere.py"], ["nowhere.py: no such file"]),
    (["quickstart", "--space", "a.py"], ["name one search space"]),
    (["quickstart", "--name", "july/tau"], ["--name july/tau: must be a name", "--out"]),
    (["quickstart", "--status"], ["holds no search"]),
    (["quickstart", "--model", "no/such-model"], ["no/such-model", "smollm2-135m-instruct"]),
])
def test_bad_input_is_a_sentence_with_a_way_out(args, words, tmp_path):
    code, text = run(*args, "--out", str(tmp_path))
    assert code == 2, text
    assert "Traceback" not in text
    for word in words:
        assert word in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_sentence(tmp_path):
    tmp_path.chmod(0o500)
    code, text = run("quickstart", "--out", str(tmp_path / "x"))
    assert code == 2 and "cannot write" in text and "Traceback" not in text


def test_a_file_where_the_folder_should_be_is_a_sentence(tmp_path):
    (tmp_path / "x").write_text("")
    code, text = run("quickstart", "--out", str(tmp_path / "x"))
    assert code == 2 and "cannot write" in text and "--out" in text and "Traceback" not in text


def test_a_typo_with_restart_moves_nothing(tmp_path):
    make(tmp_path).write()
    code, text = run("quickstart", "--out", str(tmp_path), "--restart", "--set", "heal.lamda=1")
    assert code == 2 and "did you mean heal.lam" in text
    assert [p.name for p in tmp_path.iterdir()] == ["quickstart"]


def test_repeated_set_flags_add_up():
    assert merged_flags(["a", "--set", "x=1", "y=2", "--name", "n", "--set", "z=3", "--set=w=4"], "--set") == [
        "a", "--name", "n", "--set", "x=1", "y=2", "z=3", "w=4"]
    assert merged_flags(["a"], "--set") == ["a"]


def test_every_setting_is_a_flag_of_run():
    given = ["--heal.tau", "0.1", "--model", "m", "--rounds=2", "--set", "seed=1", "--heal.tua", "3"]
    assert setting_flags(given, own=("model",)) == [
        "--set", "heal.tau=0.1", "--model", "m", "--set", "rounds=2", "--set", "seed=1", "--heal.tua", "3"]
    code, text = run("--heal.tau", "-1", "--rounds", "x", module="steerheal.run")
    assert code == 2 and "heal.tau = -1" in text and "rounds = 'x'" in text and "Traceback" not in text


@pytest.mark.parametrize("error,words", [(FloatingPointError("the loss is nan. A smaller heal.lr"), "A smaller heal.lr"),
                                         (OutOfMemoryError("CUDA out of memory"), "steerheal.doctor --model"),
                                         (RuntimeError("CUDA error: launch failure"), "the card failed .*the same command")])
def test_a_single_run_that_cannot_go_on_says_why(error, words, tiny_folder, tmp_path, monkeypatch):
    def fails(*args):
        raise error

    monkeypatch.setattr("steerheal.models.load", fails)
    with pytest.raises(UserError, match=words):
        one_run.run(one_run.Args(model=str(tiny_folder), out=tmp_path))


def make(tmp_path, **kw):
    given = dict(name=None, out=tmp_path, model="m", overrides={}, trials=None, rounds=None, sampler=None, seed=None) | kw
    return plan.make("quickstart", **given)


def test_overrides_are_remembered_and_changes_are_refused(tmp_path):
    make(tmp_path, overrides={"heal.lam": 0.7}).write()
    again = make(tmp_path)
    assert again.settings.heal.lam == 0.7 and again.resumed
    with pytest.raises(UserError, match=r"heal.lam: 0.7 there, 0.2 now"):
        make(tmp_path, overrides={"heal.lam": 0.2})
    with pytest.raises(UserError, match=r"model: 'm' there, 'other' now"):
        make(tmp_path, model="other")
    with pytest.raises(UserError, match=r"rounds: 2 there, 5 now"):
        make(tmp_path, rounds=5)
    with pytest.raises(UserError, match=r"--halving: None there, True now"):
        make(tmp_path, halving=True)
    assert make(tmp_path, overrides={"heal.micro_batch": 1}).settings.heal.micro_batch == 1  # speed may change
    assert make(tmp_path, trials=50).trials == 50
    make(tmp_path, trials=2).write()
    assert make(tmp_path).trials == 2  # and remembered, so that looking at a front does not lengthen its search


def test_an_edited_file_is_another_search(tmp_path):
    items = tmp_path / "mine.jsonl"
    items.write_text("one")
    given = {"evaluate.items": str(items)}
    make(tmp_path, overrides=given).write()
    make(tmp_path)
    items.write_text("two")
    with pytest.raises(UserError, match=r"content of evaluate\.items"):
        make(tmp_path)


def test_so_is_an_edited_trait_however_it_is_named_and_a_missing_one_is_told(tmp_path, monkeypatch):
    for data in (personas.DATA / "personas").iterdir():
        (tmp_path / "data" / "personas").mkdir(parents=True, exist_ok=True)
        shutil.copy(data, tmp_path / "data" / "personas")
    shutil.copy(personas.DATA / "vignettes.jsonl", tmp_path / "data")
    monkeypatch.setattr(personas, "DATA", tmp_path / "data")
    make(tmp_path, overrides={"persona": "love"}).write()
    make(tmp_path)
    with (tmp_path / "data" / "personas" / "love.toml").open("a") as file:
        file.write("# edited")
    with pytest.raises(UserError, match="content of persona"):
        make(tmp_path)
    with pytest.raises(UserError, match=rf"no such trait.*\.toml file, seen from {Path.cwd()}"):
        make(tmp_path, name="other", overrides={"persona": "gone.toml"}).identity()


def test_a_search_json_that_is_not_whole_is_not_gone_on_with(tmp_path):
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "search.json").write_text("{}")
    with pytest.raises(UserError, match=r"not whole.*--restart"):
        make(tmp_path)


def test_domains_must_agree_with_what_is_set_beside_them(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text('HYPOTHESIS = COST = "h"\nBASE = {}\nTRIALS = 2\ndef domains():\n    from ray import tune\n'
                    '    return {"generate.n_keep": tune.randint(16, 31)}\n')
    given = dict(name=None, out=tmp_path, model="m", trials=None, rounds=None, sampler=None, seed=None)
    assert plan.make(str(path), overrides={}, **given).trials == 2
    with pytest.raises(UserError, match=r"generate\.n_keep = 16: generate\.min_train = 20"):
        plan.make(str(path), overrides={"generate.min_train": 20}, **given).identity()


def test_other_weights_in_the_same_folder_are_another_search(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("STEERHEAL_CACHE", str(tmp_path / "cache"))
    mine = tmp_path / "mine"
    shutil.copytree(tiny_folder, mine)
    make(tmp_path, model=str(mine)).write()
    make(tmp_path, model=str(mine))
    data = bytearray((mine / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (mine / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(UserError, match="content of model"):
        make(tmp_path, model=str(mine))


def test_a_torn_search_json_says_how_to_go_on(tmp_path):
    make(tmp_path).write()
    (tmp_path / "quickstart" / "search.json").write_text('{"identity":')
    with pytest.raises(UserError, match="--restart"):
        make(tmp_path)


def test_presets_of_the_big_model():
    s = plan.make("pareto_tau", name=None, out=Path("/nonexistent"), model="google/gemma-3-4b-it", overrides={}, trials=None,
                  rounds=None, sampler=None, seed=None).settings
    assert (s.rounds, s.generate.max_new_tokens, s.evaluate.items, s.steer.contexts) == (8, 512, "tinymfv:classic", 256)


def test_on_a_large_card_every_space_starts_and_first_searches_stay_small(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "cuda_memory_gb", lambda: 24.0)
    for name in spaces.names():
        for model in (None, weights.GEMMA):
            made = plan.make(name, name=None, out=tmp_path, model=model, overrides={}, trials=None, rounds=None, sampler=None,
                             seed=None)
            small = name in ("quickstart", "smoke") and model is None
            assert made.settings.model == (weights.EMBEDDED if small else weights.GEMMA)


@pytest.mark.parametrize("module", ["steerheal.run", "steerheal.pick", "steerheal.doctor", "steerheal.clean",
                                    "analysis.pareto", "analysis.waste", "benchmarks.halving", "benchmarks.samplers",
                                    "benchmarks.grid", "analysis.report", "analysis.diary"])
def test_every_command_has_help(module):
    code, text = run("--help", module=module)
    assert code == 0 and len(text) > 50


def test_what_reads_a_search_refuses_folders_that_are_no_search(tmp_path):
    for module in ("steerheal.pick", "analysis.pareto", "analysis.report", "analysis.diary"):
        code, text = run(str(tmp_path), module=module)
        assert code == 2 and "holds no ledger" in text and "Traceback" not in text
