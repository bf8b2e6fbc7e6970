"""From per-item records to numbers with intervals.

Every metric is a function of bootstrap weights over items (Efron 1979): weights 1/n give the measured value, resampled
counts give its interval, and the same counts on two readings give the interval of their paired difference. The
intervals cover items only; the noise between run seeds is separate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
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

    @classmethod
    def of(cls, foundations: Result, conduct: Result, fluency: Result | None = None) -> Reading:
        logp = foundations.tensors["logp"].double().numpy()
        score = logp.mean(1)
        p = np.exp(score - score.max(1, keepdims=True))
        return cls(p / p.sum(1, keepdims=True), np.exp(logp).sum(2).mean(1),
                   foundations.tensors["prefill_nll"].double().numpy().mean(1),
                   np.array([FOUNDATIONS.index(f) for f in foundations.record["foundations"]]),
                   conduct.tensors["conduct"].double().numpy(), conduct.tensors["control"].double().numpy(),
                   fluency.tensors["passes"].double().numpy() if fluency else np.empty(0))

    def resampled(self, metric: str) -> Array:
        """The metric on every bootstrap resample, the measured value first: [1 + RESAMPLES].

        metric: care_nats .. social_nats, coherence, conduct_nats, control_nats, fluency, top1, ppx_json.
        """
        name = metric.removesuffix("_nats")
        if name in FOUNDATIONS:
            return np.log(_weights(len(self.p)) @ self.p[:, FOUNDATIONS.index(name)])
        items = {"coherence": self.mass, "conduct": self.conduct, "control": self.control, "fluency": self.fluent,
                 "top1": (self.p.argmax(1) == self.labels).astype(float), "ppx_json": self.prefill_nll}[name]
        mean = _weights(len(items)) @ items
        return np.exp(mean) if name == "ppx_json" else mean

    def value(self, metric: str) -> float:
        return float(self.resampled(metric)[0])

    def estimate(self, metric: str) -> Estimate:
        return _interval(self.resampled(metric))

    def difference(self, other: Reading, metric: str, sign: int = 1) -> Estimate:
        """sign * (self - other), paired over items."""
        return _interval(sign * (self.resampled(metric) - other.resampled(metric)))

    def ratio(self, base: Reading, metric: str) -> float:
        """min(1, self / base): the share that is kept. NaN, a model that diverged, keeps nothing."""
        return float(np.nan_to_num(np.minimum(1.0, self.value(metric) / max(base.value(metric), 1e-12)), nan=0.0))

    def auc(self, foundation: str) -> Estimate:
        """Probability that p[foundation] is larger on one of its own vignettes than on another (ties half)."""
        k = FOUNDATIONS.index(foundation)
        own, rest = self.p[self.labels == k, k], self.p[self.labels != k, k]
        wins = (own[:, None] > rest[None]) + 0.5 * (own[:, None] == rest[None])
        a, b = _weights(len(own)), _weights(len(rest), stream=1)
        return _interval(np.einsum("bi,ij,bj->b", a, wins, b, optimize=True))


def _interval(resampled: Array) -> Estimate:
    low, high = np.percentile(resampled[1:], [2.5, 97.5])
    return Estimate(float(resampled[0]), float(low), float(high))


@cache
def _weights(n: int, stream: int = 0) -> Array:
    """[1 + RESAMPLES, n]: first the plain mean, then resampling counts / n. The same for every reading of n items."""
    counts = np.random.default_rng([n, stream]).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.vstack([np.full(n, 1 / n), counts / n])
