from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution

from steerheal import search, spaces
from steerheal.errors import UserError
from steerheal.settings import from_flat

HEAD = 'HYPOTHESIS = "h"\nBASE = {}\nTRIALS = 3\nCOST = "c"\n'


def write(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return str(path)


def domains(body):
    return HEAD + f"def domains():\n    from ray import tune\n\n    return {body}\n"


@pytest.mark.parametrize("name", spaces.names())
def test_every_space_can_be_searched(name):
    space = spaces.load(name)
    found = space.distributions()
    assert found and space.trials >= 1
    for dist in found.values():  # whatever may be proposed is a valid setting beside the base
        values = dist.choices if isinstance(dist, CategoricalDistribution) else (dist.low, dist.high)
        for value in values:
            from_flat(space.base | {next(k for k, d in found.items() if d is dist): spaces.decoded(value)})


def test_the_regularisers_are_a_complete_grid_over_seeds():
    points = spaces.load("reg").points()
    assert len(points) == spaces.load("reg").trials == 21
    arms = [{k: v for k, v in p.items() if k != "seed"} for p in points]
    for seed in range(3):
        assert arms[7 * seed : 7 * seed + 7] == arms[:7] and {p["seed"] for p in points[7 * seed : 7 * seed + 7]} == {seed}
    assert all(arms[:7].count(arm) == 1 for arm in arms)
    without_filter = [a["heal.barrier"] for a in arms[:7] if not a["filter.coherence"]]
    assert without_filter == ["kl_rev", "nll"]


def test_a_product_of_choices_is_a_grid_and_lists_survive(tmp_path):
    path = write(tmp_path, domains('{"generate.doses": tune.choice([(1.0,), [0.5, 1.0]]), "rounds": tune.choice([1, 2])}'))
    points = spaces.load(path).points()
    assert [{k: spaces.decoded(v) for k, v in p.items()} for p in points] == [
        {"generate.doses": [1.0], "rounds": 1}, {"generate.doses": [1.0], "rounds": 2},
        {"generate.doses": [0.5, 1.0], "rounds": 1}, {"generate.doses": [0.5, 1.0], "rounds": 2}]


@pytest.mark.parametrize("text,words", [
    ('HYPOTHESIS = "h"\nBASE = {"heal.tua": 1,\n        "heal.lam": -1}\nTRIALS = "many"\ndef domains(): ...\n',
     ["line 4: TRIALS = 'many': must be int", "COST is missing", "line 2: BASE: heal.tua: no such setting",
      "did you mean heal.tau", "line 3: BASE: heal.lam = -1.0: must be at least 0"]),
    ("x = (\n", ["line 1", "SyntaxError"]),
    (HEAD + "y = 1\nz = nothing\n", ["line 6", "NameError", "nothing"]),
    (HEAD, ["domains() is missing"]),
    (HEAD + 'SAMPLER = "magic"\ndef domains(): ...\n', ["line 5: SAMPLER = 'magic'", "tpe"]),
    (domains('{"heal.tau": tune.uniform(-1, 2),\n            "heal.aggregat": tune.choice(["mean"])}'),
     ["line 8: heal.tau = -1.0: must be at least 0", "line 9: heal.aggregat: no such setting"]),
    (domains('{"heal.aggregate": tune.choice(["mean", "avg"])}'), ["heal.aggregate = 'avg': allowed: mean"]),
    (domains('{"heal.tau": 0.07,\n            "heal.aggregate": ["mean", "rmse"], "heal.lam": tune.uniform(0.1, 1)}'),
     ["line 8: heal.tau = 0.07 is no domain", "line 9: heal.aggregate = ['mean', 'rmse'] is no domain", "tune.choice"]),
    (domains('{"generate.n_keep": tune.choice([8, 48])}'), ["line 8: generate.n_keep = 8: generate.min_train = 12"]),
    (domains('{"evaluate.shots": tune.choice([0, 14]),\n            "quantise": tune.choice(["none", "nf4"])}'),
     ["line 8: evaluate.shots belongs to how", "line 9: quantise belongs", "--set quantise=VALUE --name OTHER"]),
    (domains('{"generate.max_new_tokens": tune.randint(32, 256)}'), ["line 8: generate.max_new_tokens belongs to how"]),
    (domains('{"heal.tau": tune.grid_search([1, 2])}'), ["line 5: domains()", "tune.choice"]),
    (domains('{"heal.tau": tune.unifrom(0, 1)}'), ["line 8", "AttributeError"]),
    (HEAD + "def domains():\n    {}\n", ["line 5: domains() must return a dict of domains"]),
    (HEAD + 'def points():\n    return [{"seed": {"a": 1}}]\n', ["line 6: seed = {'a': 1}: must be a value"]),
    (HEAD + "def domains():\n    return {3: 4}\n", ["line 5: domains() must return a dict", "by the names of settings"]),
    (HEAD + "import sys; sys.exit(3)\n", ["line 5", "SystemExit"]),
    (HEAD.replace("TRIALS = 3", "TRIALS = 0") + "def domains(): ...\n", ["TRIALS = 0: must be at least 1"]),
    (HEAD + "def points():\n    return [3]\n", ["line 5: points() must return a list of dicts"]),
    (HEAD + 'def points():\n    return [{"seed": 1}, {"rounds": 2}]\n', ["line 5: points()", "the same settings"]),
])
def test_a_broken_file_names_line_and_field(text, words, tmp_path):
    with pytest.raises(UserError) as caught:
        spaces.load(write(tmp_path, text)).distributions()
    for word in ["mine", *words]:
        assert word in str(caught.value)


def test_a_relative_path_has_lines_too(tmp_path, monkeypatch):
    write(tmp_path, HEAD + "y = 1\nz = nothing\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="line 6: NameError"):
        spaces.load("mine.py")


def test_a_domain_is_judged_beside_its_base(tmp_path):
    text = domains('{"generate.min_train": tune.choice([30, 60])}').replace("BASE = {}", 'BASE = {"generate.n_keep": 96}')
    assert spaces.load(write(tmp_path, text)).distributions()
    both = domains('{"generate.n_keep": tune.choice([8, 48]), "generate.min_train": tune.choice([4, 24])}')
    assert len(spaces.load(write(tmp_path, both)).distributions()) == 2  # some pairs are good; a bad one fails as a trial


def test_a_broken_file_does_not_hide_the_others(tmp_path, monkeypatch, capsys):
    (tmp_path / "good.py").write_text(domains("{}"))
    (tmp_path / "bad.py").write_text("HYPOTHESIS = 1\n")
    monkeypatch.setattr(spaces, "_folder", lambda: Path(tmp_path))
    assert search.listing() == 0
    out = capsys.readouterr().out
    assert "good: 3 trials" in out and "BROKEN" in out and "line 1: HYPOTHESIS = 1: must be str" in out
