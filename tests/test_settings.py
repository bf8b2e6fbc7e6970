import json

import pytest

from steerheal.errors import SettingsError
from steerheal.settings import Settings, from_flat, identity, leaves, parse_assignments, to_flat


def test_flat_round_trip_is_the_identity():
    s = from_flat({"heal.tau": 1, "steer.band": [0.1, 0.2], "filter.coherence": False})
    assert from_flat(to_flat(s)) == s
    assert s.heal.tau == 1.0 and isinstance(s.heal.tau, float)  # 1 and 1.0 must be one stage digest


def test_every_setting_has_help_and_a_class():
    for name, f in leaves().items():
        assert "identity" in f.metadata, name


def test_speed_settings_are_not_identity():
    assert identity(from_flat({"heal.micro_batch": 1, "device": "cpu"})) == identity(Settings())
    assert identity(from_flat({"heal.tau": 0.25})) != identity(Settings())


@pytest.mark.parametrize("name,value,word", [
    ("heal.tau", -1.0, "at least 0"), ("heal.tau", float("nan"), "finite"), ("heal.tau", "much", "finite"),
    ("heal.aggregate", "median", "mean, rmse, p95, max"), ("rounds", 0, "at least 1"), ("rounds", 2.5, "whole"),
    ("rounds", True, "whole"), ("filter.coherence", 1, "true or false"), ("steer.band", [0.5, 0.4], "lo < hi"),
    ("steer.band", [], "list"), ("generate.doses", [0.0, 1.0], "above 0"), ("generate.top_p", 0.0, "above 0"),
    ("generate.doses", [0.25, 0.5], "largest must be 1"),
    ("steer.band", ["a", "b"], "list"), ("generate.n_keep", "all", "whole"), ("generate.doses", ["x"], "list"),
])
def test_bad_values_name_setting_value_and_what_is_allowed(name, value, word):
    with pytest.raises(SettingsError) as error:
        from_flat({name: value})
    assert name in str(error.value) and word in str(error.value)


def test_all_problems_come_at_once():
    with pytest.raises(SettingsError) as error:
        from_flat({"heal.tau": -1.0, "heal.lr": 0.0, "heal.tua": 1.0, "rounds": 0})
    assert len(error.value.problems) == 4
    assert "did you mean heal.tau" in str(error.value)


def test_min_train_above_n_keep_is_refused():
    with pytest.raises(SettingsError, match="starves"):
        from_flat({"generate.min_train": 50, "generate.n_keep": 40})


def test_whole_numbers_are_one_identity_with_floats_in_lists_too():
    whole, same = from_flat({"heal.band": [0, 1], "heal.tau": 1}), from_flat({"heal.band": [0.0, 1.0], "heal.tau": 1.0})
    assert json.dumps(identity(whole)) == json.dumps(identity(same))


def test_methods_that_scale_themselves_take_no_normalising():
    with pytest.raises(SettingsError, match=r"steer\.normalise = True: steering-lite:sspace scales its vectors itself"):
        from_flat({"steer.method": "steering-lite:sspace", "steer.normalise": True})


def test_lam_schedule():
    s = from_flat({"heal.lam": 2.0, "heal.lam_round_pow": -0.5, "rounds": 4})
    assert s.lam_schedule == pytest.approx([2.0, 2 / 2**0.5, 2 / 3**0.5, 1.0])


def test_assignments():
    assert parse_assignments(["heal.tau=1", "persona=love", "filter.coherence=false", "generate.doses=[0.5,1]"]) == {
        "heal.tau": 1, "persona": "love", "filter.coherence": False, "generate.doses": [0.5, 1]}
    with pytest.raises(SettingsError, match="NAME=VALUE"):
        parse_assignments(["heal.tau"])
