"""From per-item records to numbers with intervals.

Every metric is a function of bootstrap weights over items (Efron 1979): weights 1/n give the measured value, resampled
counts give its interval, and the same counts on two readings give the interval of their paired difference. The
intervals cover items only; the noise between run seeds is separate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from steerheal.personas import FOUNDATIONS
from steerheal.stages import Result

RESAMPLES = 10_000
Array = np.ndarray


class Estimate(NamedTuple):
    """A number and its 95% interval over items."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def clear_of_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass
class Reading:
    """All readouts of one model state; items of every array in one fixed order, so readings are paired."""

    p: Array  # [vignettes, 7] probabilities over foundations
    mass: Array  # [vignettes] probability mass on the seven answers, mean of the two frames
    prefill_nll: Array  # [vignettes]
    labels: Array  # [vignettes] index of the labelled foundation
    conduct: Array  # [dilemmas]
    control: Array  # [controls]
    fluent: Array  # [prompts] 0 or 1; empty where not measured
    valid: Array = field(default_factory=lambda: np.empty(0))  # [vignettes answered freely] 0 or 1
    stages: dict[str, str] = field(default_factory=dict)  # digests of the stages behind it, by name

    @classmethod
    def of(cls, foundations: Result, conduct: Result, fluency: Result | None = None,
           free_answers: Result | None = None) -> Reading:
        p, mass = answer_shares(foundations)
        named = dict(foundations=foundations, conduct=conduct, fluency=fluency, free_answers=free_answers)
        return cls(p, mass,
                   foundations.tensors["prefill_nll"].double().numpy().mean(1),
                   np.array([FOUNDATIONS.index(f) for f in foundations.record["foundations"]]),
                   conduct.tensors["conduct"].double().numpy(), conduct.tensors["control"].double().numpy(),
                   fluency.tensors["passes"].double().numpy() if fluency else np.empty(0),
                   free_answers.tensors["valid"].double().numpy() if free_answers else np.empty(0),
                   {name: result.digest for name, result in named.items() if result})

    def columns(self) -> dict[str, float]:
        """Every readout with its interval, for the ledger: name, name_low, name_high."""
        names = [f"{f}_nats" for f in FOUNDATIONS] + ["coherence", "conduct_nats", "control_nats", "top1", "ppx_json"]
        names += ["fluency"] * bool(len(self.fluent)) + ["json_is_valid"] * bool(len(self.valid))
        out: dict[str, float] = {}
        for name in names:
            e = self.estimate(name)
            out |= {name: e.value, f"{name}_low": e.low, f"{name}_high": e.high}
        return out

    def resampled(self, metric: str) -> Array:
        """The metric on every bootstrap resample, the measured value first: [1 + RESAMPLES].

        metric: care_nats .. social_nats, coherence, conduct_nats, control_nats, fluency, json_is_valid, top1, ppx_json.
        """
        items = self._items(metric)
        mean = _weights(len(items)) @ items
        if metric.removesuffix("_nats") in FOUNDATIONS:
            return np.log(mean)
        return np.exp(mean) if metric == "ppx_json" else mean

    def _items(self, metric: str) -> Array:
        name = metric.removesuffix("_nats")
        if name in FOUNDATIONS:
            return self.p[:, FOUNDATIONS.index(name)]
        return {"coherence": self.mass, "conduct": self.conduct, "control": self.control, "fluency": self.fluent,
                "json_is_valid": self.valid, "top1": (self.p.argmax(1) == self.labels).astype(float),
                "ppx_json": self.prefill_nll}[name]

    def _n(self, metric: str) -> int:
        return len(self._items(metric))

    def value(self, metric: str) -> float:
        return float(self.resampled(metric)[0])

    def estimate(self, metric: str) -> Estimate:
        return _interval(self.resampled(metric), self._n(metric))

    def difference(self, other: Reading, metric: str, sign: int = 1) -> Estimate:
        """sign * (self - other), paired over items."""
        moved = sign * (self.resampled(metric) - other.resampled(metric))
        return _interval(moved + 0.0, self._n(metric))  # no minus before a zero

    def ratio(self, base: Reading, metric: str) -> Estimate:
        """min(1, self / base), paired over items: the share that is kept. NaN, a model that diverged, keeps nothing."""
        return _interval(self._kept(base, metric), self._n(metric))

    def ratio_difference(self, other: Reading, base: Reading, metric: str) -> Estimate:
        """The share that self keeps less the share that other keeps, paired over items."""
        return _interval(self._kept(base, metric) - other._kept(base, metric), self._n(metric))

    def _kept(self, base: Reading, metric: str) -> Array:
        share = self.resampled(metric) / np.maximum(base.resampled(metric), 1e-12)
        return np.nan_to_num(np.minimum(1.0, share), nan=0.0)

    def auc(self, foundation: str) -> Estimate:
        """Probability that p[foundation] is larger on one of its own vignettes than on another (ties half).
        NaN where the items have none of its own, or nothing else."""
        k = FOUNDATIONS.index(foundation)
        own, rest = self.p[self.labels == k, k], self.p[self.labels != k, k]
        if not (len(own) and len(rest)):
            return Estimate(math.nan, math.nan, math.nan)
        wins = (own[:, None] > rest[None]) + 0.5 * (own[:, None] == rest[None])
        a, b = _weights(len(own)), _weights(len(rest), stream=1)
        return _interval(np.einsum("bi,ij,bj->b", a, wins, b, optimize=True), min(len(own), len(rest)))


def answer_shares(foundations: Result) -> tuple[Array, Array]:
    """(p [vignettes, 7] over foundations, probability mass on the seven answers [vignettes]), frames averaged."""
    logp = foundations.tensors["logp"].double().numpy()
    score = logp.mean(1)
    p = np.exp(score - score.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True), np.exp(logp).sum(2).mean(1)


def mean(items: Sequence[float]) -> Estimate:
    """Mean of any per-item numbers."""
    return _interval(_weights(len(items)) @ np.asarray(items, dtype=float), len(items))


def _interval(resampled: Array, n: int) -> Estimate:
    """From [measured value, *resampled values] of n items. The percentile interval of a mean is too narrow by about
    sqrt((n - 1) / n) and knows nothing of Student's t; its percentiles are moved outwards for both (Hesterberg 2015,
    arXiv:1411.5279). tests/test_readings.py measures the coverage on real items."""
    low, high = np.percentile(resampled[1:], _levels(n))
    return Estimate(float(resampled[0]), float(low), float(high))


def _levels(n: int) -> tuple[float, float]:
    """Percentiles that make a 95% interval of n items: 100 * Phi(-+ sqrt(n / (n - 1)) * t), t by Cornish-Fisher."""
    z, df = 1.959964, max(n - 1, 1)
    t = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    tail = NormalDist().cdf(-((n / df) ** 0.5) * t)
    return 100 * tail, 100 * (1 - tail)


@cache
def _weights(n: int, stream: int = 0) -> Array:
    """[1 + RESAMPLES, n]: first the plain mean, then resampling counts / n. The same for every reading of n items."""
    counts = np.random.default_rng([n, stream]).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.vstack([np.full(n, 1 / n), counts / n])
