"""The steer-heal loop, one round at a time:

    extract -> dose -> generate -> filter -> heal -> fold -> evaluate

Every arrow goes through the stage store (`workbench.py`); this file says in which order, and what a round reports.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from steerheal import calibration, chat, dosing, filtering, healing, objectives, personas, steering
from steerheal.errors import Starved, UserError
from steerheal.evaluation.readings import Reading, mean
from steerheal.models import LM
from steerheal.settings import Settings
from steerheal.stages import Store, seed_of
from steerheal.steering import Steers
from steerheal.workbench import Chain, Steering, Workbench

N_PROBE = 8  # completions of one walk-C probe
N_GATE = 48  # unsteered completions behind the default gates of perplexity and soup
EDGE_KEPT, EDGE_BISECTIONS = 0.85, 4


@dataclass
class Baselines:
    """What every trial is compared with, measured once per search."""

    base: Reading
    prompted: Reading  # the persona as a system prompt
    ladder: list[tuple[float, Reading]]  # (dose in edge units, raw steering)
    trait: objectives.Trait
    trait_reason: str
    edge: float  # raw dose at which steering brings coherence_kept to 0.85
    dose_unit: float  # raw dose that alpha = 1 stands for
    gate: filtering.Gates  # of perplexity and soup
    diary: str  # digest of base's diary

    def rows(self) -> list[dict[str, Any]]:
        """Reference points of the pictures: label, trait gain with interval, coherence_kept, fluency_kept."""
        named = [("base", 0.0, self.base), ("prompted", 0.0, self.prompted)]
        named += [("steered", dose, reading) for dose, reading in self.ladder]
        out = []
        for label, dose, reading in named:
            gain = self.trait.gain(reading, self.base)
            out.append(dict(label=label, edge_doses=dose, trait_gain=gain.value, trait_gain_low=gain.low,
                            trait_gain_high=gain.high, coherence_kept=reading.ratio(self.base, "coherence").value,
                            fluency_kept=reading.ratio(self.base, "fluency").value, edge=self.edge, diary=self.diary,
                            stages=json.dumps(reading.stages), **reading.columns()))
        return out


@dataclass
class Round:
    """A finished round: its outcome, and everything else worth a column in the ledger."""

    outcome: objectives.Outcome
    chain: Chain  # the student that this round delivers
    details: dict[str, Any]

    def row(self) -> dict[str, Any]:
        return self.outcome.row() | self.details | dict(chain=list(self.chain))


@dataclass
class Kept:
    """A completion that survived the filter, and the raw dose it was drawn at."""

    sample: healing.Sample
    dose: float


@dataclass
class Collected:
    """One round's completions: what walk-C made of them, and where all of them are stored."""

    harvest: dosing.Harvest[Kept]
    draws: list[dict[str, Any]]  # kind, kappa, completions and scores (digests), reasons of each completion
    survival_by_share: dict[str, float]  # dose as a share of the top dose at the chosen kappa -> share kept


class HealLoop:
    """One run of the loop on one model, through one store."""

    def __init__(self, settings: Settings, lm: LM, store: Store):
        self.settings = settings
        self.bench = Workbench(settings, lm, store)
        self.persona = self.bench.persona
        self.where = "baselines"  # what is going on, in words, for the display
        self.end: str | None = None
        self.why = ""  # a sentence, where it ended for want of completions,
        self.starved: dict[str, Any] = {}  # and that round's columns of the ledger: what was drawn, and the gates
        self._baselines: Baselines | None = None

    # ------------------------------------------------------------ the loop

    def rounds(self) -> Iterator[Round]:
        """Yield each round as it ends. Afterwards `end` names why the loop ended."""
        baselines = self.baselines()
        incoming = baselines.base
        chain: Chain = ()
        outcomes: list[objectives.Outcome] = []
        while self.end is None:
            try:
                done = self._round(len(outcomes), chain, incoming, baselines)
            except Starved as error:
                self.end, self.why, self.starved = "starved", str(error), error.record
                return
            round_, incoming = done
            chain = round_.chain
            outcomes.append(round_.outcome)
            self.end = objectives.finished(outcomes, self.settings.rounds)
            yield round_

    def _round(self, r: int, chain: Chain, incoming: Reading, baselines: Baselines) -> tuple[Round, Reading]:
        s, bench = self.settings, self.bench
        self.where = f"round {r}"
        vector, vector_digest = bench.vector(chain)
        first, _ = bench.vector(())
        top = s.steer.alpha * baselines.dose_unit
        collected = self._collect(r, chain, vector, vector_digest, top, baselines.gate)
        harvest = collected.harvest
        dropped = [reason for draw in (*harvest.probes, *harvest.batches) for reason in draw.dropped]
        drops = {name: dropped.count(name) for name in sorted(set(dropped))}
        drawn = dict(edge=baselines.edge, ppl_gate=baselines.gate.perplexity, soup_gate=baselines.gate.soup,
                     draws=collected.draws)
        if len(harvest.kept) < s.generate.min_train:
            why = ", ".join(f"{name} {n}" for name, n in drops.items())
            raise Starved(f"round {r}: {len(harvest.kept)} completions survived the filter (dropped for {why}), "
                          f"generate.min_train is {s.generate.min_train}", dict(round=r) | drawn)
        samples = [k.sample for k in harvest.kept]
        self.where = f"round {r}, kept completions under the steered student"
        log_ratio = mean(bench.log_ratio(chain, vector, vector_digest, samples, [k.dose for k in harvest.kept]))
        self.where = f"round {r}, healing on {len(samples)} completions"
        healed = bench.heal(r, chain, samples)
        after_chain = (*chain, healed.digest)
        self.where = f"round {r}, steered student"
        at_top = Steering(vector, vector_digest, top * harvest.kappa)
        steered = bench.reading(chain, None, steering=at_top)
        steered_diary = bench.diary(chain, at_top)
        self.where = f"round {r}, healed student"
        after = bench.reading(after_chain, baselines.gate)
        healed_diary = bench.diary(after_chain)
        outcome = objectives.judge(r, self.persona, baselines.trait, baselines.base, incoming, steered, after,
                                   healed.record["duty"] if s.heal.barrier != "nll" else 1.0)
        learned = bench.learned(after_chain)
        val = healed.record["val_nll"]
        epochs = val.index(min(val[1:]), 1) if s.heal.early_stop else len(val) - 1  # those that made the adapter that is kept
        details = dict(
            top_dose=top * harvest.kappa, kappa=harvest.kappa, survival=harvest.survival,
            kappa_trace=harvest.trace, survival_by_share=collected.survival_by_share, n_kept=len(harvest.kept),
            drops=drops, **drawn, log_ratio=log_ratio.value, log_ratio_low=log_ratio.low, log_ratio_high=log_ratio.high,
            cos_v0=steering.cosine(vector, first), vector_norm=float(vector.direction().norm()),
            cos_student=steering.cosine(learned, vector), lam_r=s.lam_schedule[r],
            micro_batch=healed.record["micro_batch"],
            duty=healed.record["duty"], warning=healed.record["warning"] or "", val_nll_first=healed.record["val_nll"][0],
            val_nll_last=healed.record["val_nll"][epochs], train_nll=healed.record["train_nll"][epochs - 1],
            pressure=_mean([row["pressure"] for row in healed.record["steps"] if "pressure" in row]),
            **after.columns(), **{f"steered_{k}": v for k, v in steered.columns().items()},
            adapter=personas.texts_digest(bench.identity(after_chain)),
            stages=after.stages, diary_steered=steered_diary, diary_healed=healed_diary)
        return Round(outcome, after_chain, details), after

    # ------------------------------------------------------------ baselines

    def baselines(self) -> Baselines:
        """Measured on the first call."""
        if self._baselines is None:
            self._baselines = self._measure_baselines()
        return self._baselines

    def _measure_baselines(self) -> Baselines:
        s, bench = self.settings, self.bench
        gate = self._gates()
        self.where = "base"
        base = bench.reading((), gate)
        coherence = base.value("coherence")
        if not coherence >= objectives.BASE_COHERENCE_FLOOR:  # nor is NaN
            way = "" if s.evaluate.shots == 14 else f"--set evaluate.shots=14 (now {s.evaluate.shots}), or "
            raise UserError(
                f"model {bench.lm.name}: base coherence is {coherence:.2f}, under {objectives.BASE_COHERENCE_FLOOR}: it "
                f"cannot answer the forced choice, so nothing could be measured on it. Try {way}another model.")
        trait, reason = objectives.choose_trait(self.persona, s.evaluate.trait, base)
        diary = bench.diary(())
        self.where = "persona as a prompt"
        prompted = bench.reading((), gate, system=self.persona.systems[0])
        vector, digest = bench.vector(())
        edge = self._edge(base, vector, digest)
        unit = {"edge": edge, "raw": 1.0, "kl": 0.0}[s.steer.unit] or self._kl_dose(vector, digest)
        ladder = []
        for share in s.evaluate.ladder:
            self.where = f"raw steering, {share:g} x edge"
            ladder.append((share, bench.reading((), gate, steering=Steering(vector, digest, share * edge))))
        return Baselines(base, prompted, ladder, trait, reason, edge, unit, gate, diary)

    def _unsteered(self) -> tuple[list[Any], str, list[int]]:
        """Base's own completions, their digest and the dilemmas they answer."""
        n = min(N_GATE, len(self.persona.dilemmas))
        # seeded apart from the run seed: what is made of them is an instrument, the same for every seed of a model
        completions, digest = self.bench.completions((), None, "", list(range(n)), [0.0] * n,
                                                     [seed_of("gate", i) for i in range(n)])
        return completions, digest, list(range(n))

    def _gates(self) -> filtering.Gates:
        self.where = "gates of the filter"
        return filtering.gates(lambda: self.bench.scores(*self._unsteered())[0], self.settings.filter)

    def _kl_dose(self, vector: Steers, vector_digest: str) -> float:
        self.where = f"dose at which KL reaches {self.settings.steer.target_kl:g} nats"
        return self.bench.kl_dose(vector, vector_digest, *self._unsteered())

    def _edge(self, base: Reading, vector: Steers, digest: str) -> float:
        """The highest measured raw dose with coherence_kept >= 0.85."""
        def sane(dose: float) -> bool:
            self.where = f"edge dose, trying {dose:.3g}"
            found = self.bench.foundations((), Steering(vector, digest, dose))
            return float(found.tensors["logp"].double().exp().sum(2).mean()) / base.value("coherence") >= EDGE_KEPT

        try:
            return calibration.last_dose(sane, EDGE_BISECTIONS)
        except calibration.NoBracket as error:
            s = self.settings.steer
            band = (f"Check steer.band = {list(s.band)}, steer.method = {s.method}, steer.contexts = {s.contexts}, "
                    f"steer.normalise = {str(s.normalise).lower()}")
            raise UserError(
                f"steering: at {calibration.LIMIT:g} x the vector coherence still holds, so the vector does not act on "
                f"{self.bench.lm.name}. {band}." if error.held else
                f"steering: {1 / calibration.LIMIT:g} x the vector already breaks {self.bench.lm.name}. {band}, or set "
                f"steer.normalise=true.") from None

    # ------------------------------------------------------------ steered data

    def _collect(self, r: int, chain: Chain, vector: Steers, vector_digest: str, top: float,
                 gate: filtering.Gates) -> Collected:
        """Walk-C over steered completions of this round."""
        g, bench = self.settings.generate, self.bench
        draws: list[dict[str, Any]] = []
        by_share: dict[tuple[float, str], list[bool]] = defaultdict(list)  # (kappa, share) -> kept?

        def draw(purpose: str, index: int, kappa: float, rows: list[int], shares: list[float]) -> dosing.Draw:
            self.where = f"round {r}, {purpose} {index} at kappa {kappa:.2f}"
            seeds = [seed_of(self.settings.seed, "completions", r, purpose, [index, i]) for i in range(len(rows))]
            doses = [top * kappa * share for share in shares]
            completions, digest = bench.completions(chain, vector, vector_digest, rows, doses, seeds)
            scores, scores_digest = bench.scores(completions, digest, rows)
            why = [filtering.reasons(score, self.settings.filter, gate) for score in scores]
            survivors = [Kept(healing.Sample(chat.prompt(bench.lm.tokenizer, self.persona.dilemmas[row]), c.targets), dose)
                         for row, c, dose, w in zip(rows, completions, doses, why) if not w]
            for share, w in zip(shares, why):
                by_share[kappa, f"{share:g}"].append(not w)
            draws.append(dict(kind=purpose, kappa=kappa, completions=digest, scores=scores_digest,
                              reasons=[" ".join(w) for w in why]))
            return dosing.Draw(kappa, len(rows), survivors, [reason for w in why for reason in w])

        n = len(self.persona.dilemmas)

        def probe(index: int, kappa: float) -> dosing.Draw:
            rows = [(N_PROBE * index + i) % n for i in range(N_PROBE)]
            return draw("probe", index, kappa, rows, [g.doses[i % len(g.doses)] for i in range(N_PROBE)])

        def batch(index: int, kappa: float) -> dosing.Draw:
            rows = [(g.prompts * index + i) % n for i in range(g.prompts) for _ in g.doses]
            return draw("batch", index, kappa, rows, list(g.doses) * g.prompts)

        harvest = dosing.walk(probe, batch, pass_target=g.pass_target, kappa_min=g.kappa_min, n_keep=g.n_keep,
                              max_batches=g.max_batches)
        survival = {share: sum(kept) / len(kept) for (kappa, share), kept in by_share.items() if kappa == harvest.kappa}
        return Collected(harvest, draws, survival)


def _mean(numbers: Sequence[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None
