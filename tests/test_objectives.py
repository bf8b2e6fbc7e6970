import dataclasses

import numpy as np
import pytest

from steerheal import objectives, personas
from steerheal.evaluation.readings import Reading
from steerheal.objectives import Trait, judge

RNG = np.random.default_rng(0)
ITEMS = RNG.normal(0, 0.05, 40)
JITTER = np.tile([0.02, -0.02], 20)  # so that differences have intervals


def reading(conduct=0.0, coherence=0.9, fluency=1.0, control=0.0, authority=0.2, care=0.1):
    p = np.tile(np.array([care, 0.1, 0.1, authority, 0.1, 0.1, 0.0]), (70, 1))
    p[:, 6] = 1 - p.sum(1)
    fluent = np.zeros(50)
    fluent[: round(50 * fluency)] = 1
    return Reading(p, np.full(70, coherence), np.zeros(70), np.arange(70) % 7, conduct + ITEMS,
                   control + np.zeros(20), fluent)


PERSONA = personas.load("authority")
TRAIT = Trait("conduct_nats", 1)
BASE = reading()


def verdict(steered=0.5, healed=0.3, duty=0.5, **healed_state):
    s, h = reading(steered), reading(healed, **healed_state)
    s.conduct = s.conduct + JITTER
    h.conduct = h.conduct - JITTER
    return judge(0, PERSONA, TRAIT, BASE, BASE, s, h, duty)


def test_verdicts_look_at_the_floor_first():
    assert verdict().verdict == "heal"
    assert verdict(coherence=0.9 * 0.93).verdict == "degraded"
    assert verdict(coherence=0.9 * 0.84).verdict == "broken"
    assert verdict(healed=9.0, coherence=0.1).verdict == "broken"  # however far the trait went
    assert verdict(fluency=0.7).verdict == "broken"
    assert verdict(steered=0.0).verdict == "no-steer"
    assert verdict(steered=-0.5).verdict == "no-steer"
    assert verdict(healed=0.0).verdict == "undo"
    assert verdict(healed=-0.3).verdict == "undo"


def test_a_trait_that_is_no_number_is_not_delivered():
    s, h = reading(0.5), reading(0.3)
    h.conduct = h.conduct + np.nan
    o = judge(0, PERSONA, TRAIT, BASE, BASE, s, h, 0.5)
    assert (o.verdict, o.deliverable) == ("broken", False)
    o = judge(0, PERSONA, TRAIT, BASE, BASE, h, s, 0.5)  # of the steered student alone: nothing says that it moved
    assert (o.verdict, o.deliverable) == ("no-steer", True)


def test_flags():
    assert verdict(duty=0.0).flags == "inert"
    assert verdict(control=0.5).flags == "control"
    assert verdict().flags == ""
    healed = reading(authority=0.18, care=0.3)
    o = judge(0, PERSONA, Trait("authority_nats", -1), BASE, BASE, reading(authority=0.1), healed, 1.0)
    assert "broad" in o.flags


def test_numbers_of_an_outcome():
    o = verdict(steered=0.5, healed=0.25, coherence=0.81)
    assert o.trait_gain == pytest.approx(0.25, abs=0.02) and o.trait_gain_low < o.trait_gain < o.trait_gain_high
    assert o.coherence_kept == pytest.approx(0.9) and o.violation == pytest.approx(-0.05)
    assert o.retain == pytest.approx(0.5, abs=0.05)
    assert o.coh_cost == pytest.approx(0.09 / o.trait_gain, rel=1e-6)
    assert verdict(steered=0.0).retain is None


def test_authority_gains_are_positive_when_nats_fall():
    o = judge(0, PERSONA, Trait("authority_nats", -1), BASE, BASE, reading(authority=0.1), reading(authority=0.1), 1.0)
    assert o.trait_gain == pytest.approx(np.log(2))


def test_the_foundation_is_only_taken_where_it_can_be_read():
    labels = np.arange(70) % 7
    good = reading()
    good.p = np.full((70, 7), 0.05)
    good.p[np.arange(70), labels] = 0.7
    assert objectives.choose_trait(PERSONA, "auto", good)[0].metric == "authority_nats"
    assert objectives.choose_trait(PERSONA, "auto", reading())[0].metric == "conduct_nats"
    # ranks authority items right, but answers sanctity to everything: the seeds would call this noise
    lazy = reading()
    lazy.p = np.full((70, 7), 0.01)
    lazy.p[:, 4] = 0.9
    lazy.p[labels == 3, 3] = 0.02
    trait, reason = objectives.choose_trait(PERSONA, "auto", lazy)
    assert trait.metric == "conduct_nats" and "AUC" in reason
    assert objectives.choose_trait(PERSONA, "foundation", lazy)[0] == Trait("authority_nats", -1)


def test_a_trait_may_ask_for_conduct():
    good = reading()
    good.p = np.full((70, 7), 0.05)
    good.p[np.arange(70), np.arange(70) % 7] = 0.7
    love = personas.load("love")
    assert objectives.choose_trait(love, "auto", good)[0] == Trait("conduct_nats", 1)
    assert objectives.choose_trait(love, "foundation", good)[0] == Trait("care_nats", 1)


def test_agreement_is_held_against_the_commonest_label():
    """Always the commonest answer: right on half of these items, which says nothing."""
    labels = np.repeat(np.arange(7), [35, 5, 5, 10, 5, 5, 5])
    lazy = reading()
    lazy.labels, lazy.p = labels, np.full((70, 7), 0.01)
    lazy.p[:, 0] = 0.9
    lazy.p[labels == 3, 3] = 0.02
    trait, reason = objectives.choose_trait(PERSONA, "auto", lazy)
    assert trait.metric == "conduct_nats" and "chance 0.50" in reason


def test_items_without_the_traits_foundation_leave_conduct():
    some = reading()
    some.labels = np.zeros(70, dtype=int)
    assert np.isnan(some.auc("authority")).all() and np.isnan(some.auc("care")).all()
    assert objectives.choose_trait(PERSONA, "auto", some)[0].metric == "conduct_nats"
    assert objectives.choose_trait(PERSONA, "conduct", some)[0].metric == "conduct_nats"


def row(gain, kept, violation=None):
    return dict(trait_gain=gain, coherence_kept=kept, violation=0.85 - kept if violation is None else violation)


def test_a_trial_is_worth_its_best_deliverable_round():
    rounds = [row(0.2, 0.99), row(0.5, 0.95), row(0.9, 0.86), row(3.0, 0.5)]
    assert objectives.best(rounds) is rounds[1]
    assert objectives.best([row(-0.5, 0.99), row(-0.1, 0.9)])["trait_gain"] == -0.1  # ties at zero go by gain
    assert objectives.best([row(3.0, 0.5), row(1.0, 0.8)])["coherence_kept"] == 0.8  # none: the least bad
    assert objectives.best([]) is None


def test_what_the_study_is_told():
    rounds = [row(0.2, 0.99), row(0.5, 0.95)]
    assert objectives.worth("rounds", rounds) == ((0.5, 0.95), pytest.approx(-0.10))
    assert objectives.worth("starved", rounds) == ((0.5, 0.95), 1.0)
    assert objectives.worth("starved", []) == ((0.0, 1.0), 1.0)
    assert objectives.worth("starved", [row(0.5, 0.95), row(float("nan"), 0.0)]) == ((0.5, 0.95), 1.0)
    assert objectives.worth("broken", [row(3.0, 0.5)]) == ((3.0, 0.5), pytest.approx(0.35))
    assert objectives.worth("error", rounds) is None and objectives.worth("stopped", rounds) is None
    assert objectives.worth("rounds", [row(float("nan"), 0.9)]) is None and objectives.worth("rounds", []) is None


def test_ends():
    good, flat, bad = verdict(), verdict(healed=0.0), verdict(coherence=0.1)
    assert objectives.finished([good], 3) is None
    assert objectives.finished([good, dataclasses.replace(good, trait_gain=float("nan"))], 3) == "broken"
    assert objectives.finished([good] * 3, 3) == "rounds"
    assert objectives.finished([good, bad, bad], 8) == "broken"
    assert objectives.finished([bad, good, bad], 8) is None
    assert objectives.finished([good, flat, flat, flat], 8) == "plateau"
    assert objectives.finished([flat, flat, good], 8) is None
