import numpy as np
import pytest
import torch

from steerheal.evaluation.readings import Reading, _weights
from steerheal.personas import FOUNDATIONS
from steerheal.stages import Result


def make(n=20, seed=0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    logp = torch.randn(n, 2, 60, generator=g).log_softmax(-1)[:, :, :7]
    foundations = Result(dict(foundations=[FOUNDATIONS[i % 7] for i in range(n)]),
                         dict(logp=logp, prefill_nll=torch.rand(n, 2, generator=g)))
    conduct = Result({}, dict(conduct=torch.randn(12, generator=g) + shift, control=torch.randn(9, generator=g)))
    fluency = Result({}, dict(passes=(torch.rand(16, generator=g) > 0.3).float()))
    return Reading.of(foundations, conduct, fluency), logp


def test_definitions_against_loops_in_float64():
    r, logp = make()
    profile, mass = np.zeros(7), 0.0
    for item in logp.double().numpy():
        score = [(item[0, k] + item[1, k]) / 2 for k in range(7)]
        e = np.exp(score)
        profile += e / e.sum() / len(logp)
        mass += np.exp(item).sum() / 2 / len(logp)
    for k, f in enumerate(FOUNDATIONS):
        assert r.value(f"{f}_nats") == pytest.approx(np.log(profile[k]))
    assert r.value("coherence") == pytest.approx(mass)
    assert r.value("conduct_nats") == pytest.approx(r.conduct.mean())
    assert r.value("fluency") == pytest.approx(r.fluent.mean())


def test_intervals_against_scipyless_bootstrap_theory():
    r, _ = make(seed=3)
    e = r.estimate("conduct_nats")
    se = r.conduct.std() / len(r.conduct) ** 0.5  # the bootstrap's own standard error of a mean
    assert e.high - e.low == pytest.approx(2 * 1.96 * se, rel=0.1)
    assert e.low < e.value < e.high


def test_differences_are_paired():
    a, _ = make(seed=1)
    b, _ = make(seed=1, shift=0.5)
    d = b.difference(a, "conduct_nats")
    assert (d.value, d.low, d.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-6)
    assert d.clear_of_zero and not a.difference(a, "conduct_nats").clear_of_zero
    assert b.difference(a, "conduct_nats", sign=-1).value == pytest.approx(-0.5, abs=1e-6)


def test_kept_shares_stop_at_one():
    a, _ = make(seed=1)
    assert a.ratio(a, "coherence") == 1.0
    a.mass = a.mass / 2
    b, _ = make(seed=1)
    assert a.ratio(b, "coherence") == pytest.approx(0.5) and b.ratio(a, "coherence") == 1.0


def test_auc_against_counting_pairs():
    r, _ = make(35)
    k = FOUNDATIONS.index("authority")
    wins = [float(x > y) + 0.5 * float(x == y) for x in r.p[r.labels == k, k] for y in r.p[r.labels != k, k]]
    e = r.auc("authority")
    assert e.value == pytest.approx(np.mean(wins)) and e.low <= e.value <= e.high


def test_resampling_weights_are_shared_and_normalised():
    w = _weights(20)
    assert np.allclose(w.sum(1), 1) and w is _weights(20) and np.allclose(w[0], 1 / 20)
