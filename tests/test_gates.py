import json

import pytest
from conftest import TINY, make_lm

from steerheal import gates, ledger
from steerheal.loop import HealLoop
from steerheal.settings import from_flat
from steerheal.stages import Store

ROW = dict(trait="conduct_nats", steered_step=0.4, steered_step_low=0.2, steered_step_high=0.6, steered_coherence_kept=0.93,
           survival=0.75, survival_by_share={"1": 0.5, "0.5": 1.0}, log_ratio=0.31, log_ratio_low=0.2, log_ratio_high=0.4,
           verdict="heal", retain=0.6, coherence_kept=0.97, cos_v0=0.9)


def test_each_answer_follows_its_number():
    good = gates.answers([ROW])
    assert good["G1"].endswith("yes.") and "+0.400 [+0.200, +0.600]" in good["G1"] and good["G3"].endswith("they differ.")
    assert "100% at 0.5 of the top dose, 50% at 1 of the top dose" in good["Q0"] and "60%" in good["Q1"]
    assert good["Q3"].endswith("one direction.") and good["Q2"].endswith("none under the floor.")
    assert "broke" in gates.answers([ROW | dict(steered_coherence_kept=0.5)])["G1"]
    assert gates.answers([ROW | dict(steered_step_low=-0.1)])["G1"].endswith("no, not past its interval.")
    wrong = gates.answers([ROW | dict(steered_step=-0.4, steered_step_low=-0.6, steered_step_high=-0.2)])["G1"]
    assert "-0.400 [-0.600, -0.200] in the wanted direction" in wrong and wrong.endswith("it moved the other way.")
    assert gates.answers([ROW | dict(log_ratio_low=-0.1)])["G3"].endswith("base's own.")
    assert "turned" in gates.answers([ROW | dict(cos_v0=-0.2)])["Q3"]
    assert "no common space" in gates.answers([ROW | dict(cos_v0=None)])["Q3"]
    assert "round 1 fell" in gates.answers([ROW, ROW | dict(coherence_kept=0.6), ROW])["Q2"]


def test_every_round_of_a_loop_answers_all(first):
    loop = HealLoop(from_flat(TINY), make_lm(), Store(first[0]))
    rows = [ledger._plain(r.row()) for r in loop.rounds()]
    for i in range(len(rows)):
        assert set(gates.answers(rows[: i + 1])) == {"G1", "Q0", "G3", "Q1", "Q2", "Q3"}
    shares = json.loads(rows[0]["survival_by_share"])
    assert set(shares) == {"0.5", "0.75", "1"} and rows[0]["cos_v0"] == pytest.approx(1.0)
