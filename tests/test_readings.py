from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from steerheal.evaluation import readings
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


def test_intervals_of_a_mean_are_student_s():
    r, _ = make(seed=3)
    e = r.estimate("conduct_nats")
    t = 2.201  # t(0.975, 11) of a printed table
    assert e.high - e.low == pytest.approx(2 * t * r.conduct.std(ddof=1) / len(r.conduct) ** 0.5, rel=0.1)
    assert e.low < e.value < e.high


def test_differences_are_paired():
    a, _ = make(seed=1)
    b, _ = make(seed=1, shift=0.5)
    d = b.difference(a, "conduct_nats")
    assert (d.value, d.low, d.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-6)
    assert d.clear_of_zero and not a.difference(a, "conduct_nats").clear_of_zero
    assert b.difference(a, "conduct_nats", sign=-1).value == pytest.approx(-0.5, abs=1e-6)
    assert str(a.difference(a, "conduct_nats", sign=-1)) == "+0.000 [+0.000, +0.000]"  # and not -0.000


def test_kept_shares_stop_at_one():
    a, _ = make(seed=1)
    assert a.ratio(a, "coherence") == (1.0, 1.0, 1.0)
    a.mass = a.mass / 2
    b, _ = make(seed=1)
    assert a.ratio(b, "coherence") == pytest.approx((0.5, 0.5, 0.5)) and b.ratio(a, "coherence").value == 1.0
    assert b.ratio_difference(a, b, "coherence") == pytest.approx((0.5, 0.5, 0.5))


def test_kept_shares_are_paired():
    """Against a bootstrap of ten lines: the interval is that of the ratio, not coherence's own."""
    base, _ = make(seed=1)
    healed, _ = make(seed=1)
    rng = np.random.default_rng(5)
    healed.mass = base.mass * rng.uniform(0.85, 0.95, len(base.mass))
    rows = rng.integers(0, len(base.mass), (20_000, len(base.mass)))
    shares = healed.mass[rows].mean(1) / base.mass[rows].mean(1)
    kept, own = healed.ratio(base, "coherence"), healed.estimate("coherence")
    assert kept.high - kept.low == pytest.approx(np.ptp(np.percentile(shares, [2.5, 97.5])), rel=0.2)
    assert kept.high - kept.low < 0.5 * (own.high - own.low) / base.value("coherence")


def test_auc_against_counting_pairs():
    r, _ = make(35)
    k = FOUNDATIONS.index("authority")
    wins = [float(x > y) + 0.5 * float(x == y) for x in r.p[r.labels == k, k] for y in r.p[r.labels != k, k]]
    e = r.auc("authority")
    assert e.value == pytest.approx(np.mean(wins)) and e.low <= e.value <= e.high


def test_resampling_weights_are_shared_and_normalised():
    w = _weights(20)
    assert np.allclose(w.sum(1), 1) and w is _weights(20) and np.allclose(w[0], 1 / 20)


def test_student_levels_against_the_table():
    """Phi(-sqrt(n / (n - 1)) t(0.025, n - 1)), t from a printed table."""
    from statistics import NormalDist

    for n, t in ((8, 2.3646), (24, 2.0687), (70, 1.9949)):
        want = 100 * NormalDist().cdf(-((n / (n - 1)) ** 0.5) * t)
        assert readings._levels(n) == pytest.approx((want, 100 - want), rel=0.03)


def test_intervals_cover_on_real_skewed_items():
    """The items of two real models, raw-steered or not, as populations; samples of the sizes a search uses."""
    table = pd.read_csv(Path(__file__).parent.parent / "benchmarks" / "results" / "items.csv")
    table = table[table["dose"].isin([0, 4])
                  & table["readout"].isin(["p[care]", "p[authority]", "coherence", "conduct", "control"])]
    covered = {}
    for (model, dose, readout), rows in table.groupby(["model", "dose", "readout"]):
        population = rows["value"].to_numpy()
        n = 24 if readout in ("conduct", "control") else 70
        samples = np.random.default_rng(0).choice(population, (4000, n))
        resampled = samples @ _weights(n)[:2001].T
        low, high = np.percentile(resampled[:, 1:], readings._levels(n), axis=1)
        covered[model, dose, readout] = np.mean((low <= population.mean()) & (population.mean() <= high))
        assert readings.mean(samples[0])[1:] == pytest.approx((low[0], high[0]), abs=0.1 * (high[0] - low[0]))
    assert len(covered) == 16 and all(0.92 <= c <= 0.97 for c in covered.values()), covered


def test_intervals_of_paired_differences_cover_a_little_less():
    """Gains are these: of steered over unsteered, of a mean (conduct) or of the log of one (foundations)."""
    table = pd.read_csv(Path(__file__).parent.parent / "benchmarks" / "results" / "items.csv")
    covered = {}
    for (model, readout), rows in table[table["readout"].isin(["p[care]", "p[authority]", "conduct"])].groupby(
            ["model", "readout"]):
        values = rows.pivot(index="item", columns="dose", values="value")
        read = np.log if readout.startswith("p[") else lambda mean: mean
        n = 24 if readout == "conduct" else 70
        for dose in (2, 4):
            steered, base = values[dose].to_numpy(), values[0].to_numpy()
            truth = read(steered.mean()) - read(base.mean())
            drawn = np.random.default_rng(0).integers(0, len(base), (4000, n))
            w = _weights(n)[1:2001].T
            low, high = np.percentile(read(steered[drawn] @ w) - read(base[drawn] @ w), readings._levels(n), axis=1)
            covered[model, readout, dose] = np.mean((low <= truth) & (truth <= high))
    assert len(covered) == 10 and all(0.89 <= c <= 0.97 for c in covered.values()), covered
