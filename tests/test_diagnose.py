import pytest
from conftest import TINY, make_lm

from steerheal import run
from steerheal.diagnose import Diagnosis, diagnose
from steerheal.errors import UserError
from steerheal.evaluation.readings import Estimate
from steerheal.settings import from_flat
from steerheal.stages import Store

UP, FLAT = Estimate(0.5, 0.2, 0.8), Estimate(0.1, -0.2, 0.4)
SETTINGS = TINY | {"heal.lr": 0.1, "heal.r": 16, "evaluate.n_conduct": 8}


@pytest.mark.parametrize("first,last,gain,fault,words", [
    (3.0, 2.5, UP, "capacity", ["cannot express", "heal.lr"]),
    (3.0, 2.5, FLAT, "capacity", ["cannot express", "does not see"]),
    (3.0, 0.3, FLAT, "instrument", ["can express", "does not see", "evaluate.trait"]),
    (3.0, 0.3, UP, "data", ["can express", "sees it", "steer.alpha"]),
])
def test_the_fault_is_named_in_words(first, last, gain, fault, words):
    found = Diagnosis(first, last, "conduct_nats", gain, FLAT)
    assert found.fault == fault
    assert all(word in found.words() for word in words)


def test_an_adapter_that_can_learn_and_one_that_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr("steerheal.diagnose.EXPRESSED", 0.75)  # a random model's frozen head keeps its floor high
    lm = make_lm()
    able = diagnose(from_flat(SETTINGS), lm, Store(tmp_path))
    unable = diagnose(from_flat(SETTINGS | {"heal.lr": 1e-9}), lm, Store(tmp_path))
    assert able.nll_last < 0.75 * able.nll_first and able.fault != "capacity"
    assert unable.nll_last == pytest.approx(unable.nll_first, rel=1e-3) and unable.fault == "capacity"
    assert unable.gain.value == pytest.approx(0, abs=1e-3)


def test_too_few_dilemmas_name_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"evaluate.n_conduct to 41 or less \(now 44\)"):
        diagnose(from_flat(SETTINGS | {"evaluate.n_conduct": 44}), make_lm(), Store(tmp_path))


def test_the_command_line_diagnoses(tiny_folder, tmp_path, capsys):
    flat = {k: str(v).lower() if isinstance(v, bool) else v for k, v in (SETTINGS | {"evaluate.n_conduct": 2}).items()}
    assert run.run(run.Args(model=str(tiny_folder), out=tmp_path, diagnose=True,
                            set=tuple(f"{k}={v}" for k, v in flat.items()))) == 0
    said = capsys.readouterr().out
    assert "express it" in said and "The readout" in said
