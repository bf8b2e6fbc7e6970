"""What a round and a trial are worth.

    trait_gain      signed movement of the trait readout from base, in nats, positive in the wanted direction
    coherence_kept  min(1, coherence / base coherence); fluency_kept likewise
    deliverable     coherence_kept >= 0.85 and fluency_kept >= 0.80

A trial's value is (trait_gain, coherence_kept) of its best deliverable round: the one with the largest
max(trait_gain, 0) * (coherence_kept - 0.85), ties by gain. Verdicts look at the floor first, because a collapsed model
sends the trait anywhere and any ratio looks splendid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from steerheal.evaluation.readings import Estimate, Reading
from steerheal.personas import Persona

COHERENCE_FLOOR = 0.85  # below, the model is broken
DEGRADED = 0.95  # below, it is degraded
FLUENCY_FLOOR = 0.80
BASE_COHERENCE_FLOOR = 0.3  # a model below cannot answer the forced choice at all
PLATEAU_ROUNDS = 3
REFERENCE_POINT = (0.0, COHERENCE_FLOOR)  # of the hypervolume
WORTHLESS = ("error", "stopped", "out of memory", "killed")  # ends that tell the study nothing: run again next time

VERDICTS = {
    "broken": "not deliverable: coherence or fluency fell through its floor",
    "no-steer": "the vector did not move the readout the wanted way past its interval",
    "undo": "healing took the movement back: what is left lies within its interval",
    "degraded": "moved, but coherence_kept is under 0.95",
    "heal": "moved, and the model stayed sane",
}


@dataclass(frozen=True)
class Trait:
    """The readout that should move, and the sign of the wanted movement."""

    metric: str  # auth..social _nats, or conduct_nats
    sign: int

    def gain(self, of: Reading, over: Reading) -> Estimate:
        return of.difference(over, self.metric, self.sign)


def choose_trait(persona: Persona, wanted: str, base: Reading) -> tuple[Trait, str]:
    """The trait readout and a sentence on why.

    Args:
        wanted: auto, foundation, conduct, or a foundation with the wanted sign (-care, +sanctity) in place of the
            persona's own. auto takes conduct where the persona's file says so, else its foundation where that is valid
            at base: the AUC of p[foundation] for its own vignettes against the rest has an interval clear of 0.5, and
            agreement with the labels one clear of chance. A model that gives every vignette the same answer can pass the
            first alone; its nats then follow the flatness of its logits and no moral judgement.
    """
    signed = wanted[0] in "+-"
    name, sign = (wanted[1:], 1 if wanted[0] == "+" else -1) if signed else (persona.foundation, persona.direction)
    foundation, conduct = Trait(f"{name}_nats", sign), Trait("conduct_nats", persona.conduct_direction)
    auc, top1 = base.auc(name), base.estimate("top1")
    chance = float(np.bincount(base.labels).max() / len(base.labels))  # of the best answer that is always the same
    valid = auc.low > 0.5 and top1.low > chance
    text = (f"at base AUC of p[{name}] {auc.value:.2f} [{auc.low:.2f}, {auc.high:.2f}], agreement with "
            f"the labels {top1.value:.2f} [{top1.low:.2f}, {top1.high:.2f}], chance {chance:.2f}")
    if wanted == "conduct":
        return conduct, f"conduct_nats as asked; {text}"
    if wanted == "auto" and persona.trait == "conduct":
        return conduct, f"conduct_nats: the readout of {persona.name} by its file; {text}"
    if wanted != "auto":
        return foundation, f"{foundation.metric} as asked; {text}" + ("" if valid else ": not a valid readout here")
    if valid:
        return foundation, f"{foundation.metric}: valid on this model ({text})"
    return conduct, f"conduct_nats: {foundation.metric} is not a valid readout on this model ({text})"


@dataclass
class Outcome:
    """One round, judged. Gains are over base unless said otherwise; the readouts themselves are in `Reading.columns`."""

    round: int
    trait: str
    trait_gain: float
    trait_gain_low: float
    trait_gain_high: float
    steered_gain: float
    steered_gain_low: float
    steered_gain_high: float
    steered_step: float  # steered over the incoming student
    steered_step_low: float
    steered_step_high: float
    step_gain: float  # healed over the incoming student
    step_gain_low: float
    step_gain_high: float
    coherence_kept: float
    coherence_kept_low: float
    coherence_kept_high: float
    steered_coherence_kept: float
    fluency_kept: float
    violation: float  # <= 0: deliverable
    verdict: str
    flags: str
    retain: float | None  # (healed - in) / (steered - in); None where the steered step is within its interval
    coh_cost: float | None  # |coherence change| / |trait change| of the round

    @property
    def deliverable(self) -> bool:
        return self.violation <= 0

    def row(self) -> dict[str, Any]:
        return asdict(self) | dict(deliverable=self.deliverable)


def judge(index: int, persona: Persona, trait: Trait, base: Reading, incoming: Reading, steered: Reading,
          healed: Reading, duty: float) -> Outcome:
    """Turn the readings of a round into numbers, a verdict and flags."""
    gain, steered_step, step = trait.gain(healed, base), trait.gain(steered, incoming), trait.gain(healed, incoming)
    kept, fluency = healed.ratio(base, "coherence"), healed.ratio(base, "fluency").value
    violation = max(COHERENCE_FLOOR - kept.value, FLUENCY_FLOOR - fluency)
    if not math.isfinite(gain.value):  # a trait that is no number is not delivered, whatever its coherence says
        violation = max(violation, COHERENCE_FLOOR)
    moved_coherence = abs(healed.value("coherence") - incoming.value("coherence"))
    if violation > 0:
        verdict = "broken"
    elif not steered_step.low > 0:  # nor is NaN
        verdict = "no-steer"
    elif not step.low > 0:
        verdict = "undo"
    else:
        verdict = "degraded" if kept.value < DEGRADED else "heal"
    return Outcome(
        index, trait.metric, *gain, *trait.gain(steered, base), *steered_step, *step, *kept,
        steered.ratio(base, "coherence").value, fluency, violation, verdict,
        " ".join(_flags(persona, trait, base, healed, gain, duty)),
        step.value / steered_step.value if steered_step.clear_of_zero else None,
        moved_coherence / abs(step.value) if step.value else None)


def _flags(persona: Persona, trait: Trait, base: Reading, healed: Reading, gain: Estimate, duty: float) -> list[str]:
    flags = ["inert"] if duty == 0 else []
    if trait.metric == "conduct_nats":
        if abs(gain.value) <= abs(healed.difference(base, "control_nats").value):
            flags.append("control")
    else:
        off = [abs(healed.difference(base, f"{f}_nats").value) for f in persona.off_target if f"{f}_nats" != trait.metric]
        if max(off, default=0.0) > abs(gain.value):
            flags.append("broad")
    return flags


def best(rounds: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The round a trial is worth: its best deliverable one, else its least bad; None without rounds."""
    deliverable = [r for r in rounds if r["violation"] <= 0]
    if deliverable:
        return max(deliverable, key=lambda r: (max(r["trait_gain"], 0) * (r["coherence_kept"] - COHERENCE_FLOOR),
                                               r["trait_gain"]))
    return min(rounds, key=lambda r: r["violation"], default=None)


def worth(end: str, rounds: Sequence[dict[str, Any]]) -> tuple[tuple[float, float], float] | None:
    """What a finished trial tells the study: ((trait_gain, coherence_kept), constraint), None where it failed."""
    if end in WORTHLESS:
        return None
    if end == "starved":  # the student that went into the starved round; base where none was delivered
        last = ([r for r in rounds if math.isfinite(r["trait_gain"])] or [dict(trait_gain=0.0, coherence_kept=1.0)])[-1]
        gain, kept = last["trait_gain"], last["coherence_kept"]
        constraint = 1.0
    else:
        round_ = best(rounds)
        if round_ is None:
            return None
        gain, kept, constraint = round_["trait_gain"], round_["coherence_kept"], round_["violation"]
    if not all(map(math.isfinite, (gain, kept, constraint))):
        return None
    return (gain, kept), constraint


def finished(outcomes: Sequence[Outcome], rounds: int) -> str | None:
    """The name of the trial's end, None where it goes on."""
    if outcomes and not math.isfinite(outcomes[-1].trait_gain):  # no round can be built on a model that diverged
        return "broken"
    if len(outcomes) >= 2 and not outcomes[-1].deliverable and not outcomes[-2].deliverable:
        return "broken"
    if len(outcomes) >= rounds:
        return "rounds"
    last = outcomes[-PLATEAU_ROUNDS:]
    if len(last) == PLATEAU_ROUNDS and all(o.step_gain_low <= 0 for o in last):
        return "plateau"
    return None
