"""Can it learn at all? Overfit one batch of replies that enact the trait, and look at both ends.

    NLL of the replies falls         the adapter (heal.r, heal.band, heal.lr) can express the trait
    the trait readout then rises     the readout can see it, on dilemmas whose replies were not learned

What fails names the fault: capacity where the NLL stays up, the instrument where it falls and the readout stays, and the
data (doses, filter) where both are fine and a search still does not move. The replies are the persona's own, written
to enact the trait, so nothing depends on steering here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from steerheal import chat, objectives
from steerheal.errors import UserError
from steerheal.evaluation.readings import Estimate
from steerheal.healing import Sample
from steerheal.loop import HealLoop
from steerheal.models import LM
from steerheal.settings import Settings
from steerheal.stages import Store

N_LEARNED, STEPS = 6, 40
EXPRESSED = 0.5  # of the NLL at the start: a batch this small can be learned by heart


@dataclass
class Diagnosis:
    """What was measured: nats per token of the learned replies before and after, and the readout's movement."""

    nll_first: float
    nll_last: float
    metric: str
    gain: Estimate
    control: Estimate  # movement of the trait-neutral control pairs

    @property
    def fault(self) -> str:
        """capacity, instrument or data: where to look when a search does not move."""
        if self.nll_last > EXPRESSED * self.nll_first:
            return "capacity"
        return "data" if self.gain.low > 0 else "instrument"

    def words(self) -> str:
        able, sees = self.fault != "capacity", self.gain.low > 0
        advice = {
            "capacity": "Capacity: the adapter cannot express the trait as it is set. Raise heal.lr first, then heal.r, or "
                        "widen heal.band.",
            "instrument": f"The instrument: what was learned does not show in {self.metric}. Choose another readout "
                          f"(evaluate.trait), more items (evaluate.n_conduct, evaluate.n_items), or another model.",
            "data": "Adapter and readout work. If a search still does not move the trait, its data carry too little of it: "
                    "raise steer.alpha, look at what the filter drops, or raise heal.tau where the barrier holds it back.",
        }[self.fault]
        return (f"The adapter {'can' if able else 'cannot'} express it: the NLL of {N_LEARNED} replies that enact the trait "
                f"went from {self.nll_first:.2f} to {self.nll_last:.2f} nats per token in {STEPS} steps.\n"
                f"The readout {'sees' if sees else 'does not see'} it: {self.metric} moved by {self.gain} in the wanted "
                f"direction on other dilemmas, the control pairs by {self.control}.\n{advice}")


def diagnose(settings: Settings, lm: LM, store: Store) -> Diagnosis:
    """Overfit and measure, through the stage store.

    Raises:
        UserError: the persona has no replies beside those that the readout asks.
    """
    heal = dataclasses.replace(settings.heal, barrier="nll", epochs=STEPS, batch=N_LEARNED, early_stop=0)
    loop = HealLoop(dataclasses.replace(settings, heal=heal), lm, store)
    others = loop.persona.conduct[settings.evaluate.n_conduct :][: N_LEARNED + 1]  # one of them is held out by healing
    if len(others) <= N_LEARNED:
        raise UserError(f"--diagnose learns replies to {N_LEARNED + 1} dilemmas that the readout does not ask, and persona "
                        f"{loop.persona.name} has {len(loop.persona.conduct)} in all: set evaluate.n_conduct to "
                        f"{max(len(loop.persona.conduct) - N_LEARNED - 1, 2)} or less (now {settings.evaluate.n_conduct}).")
    which = 0 if loop.persona.conduct_direction > 0 else 1
    samples = [Sample(chat.prompt(lm.tokenizer, d.prompt), chat.plain(lm.tokenizer, d.pairs[0][which])) for d in others]
    base = loop.bench.reading((), None)
    trait, _ = objectives.choose_trait(loop.persona, settings.evaluate.trait, base)
    healed = loop.bench.heal(0, (), samples)
    after = loop.bench.reading((healed.digest,), None)
    nll = healed.record["train_nll"]
    return Diagnosis(nll[0], nll[-1], trait.metric, trait.gain(after, base), after.difference(base, "control_nats"))
