"""The steer-heal loop, one round at a time:

    extract -> dose -> generate -> filter -> heal -> fold -> evaluate

Every arrow goes through the stage store. What a stage reads is named in its inputs, as effective values: lam_r and
never lam, raw doses and never alpha, the chain of folded adapters and never a path. The model's weights are touched
only by stages that are not in the store yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from steerheal import chat, dosing, filtering, healing, objectives, personas, steering
from steerheal.errors import Starved, UserError
from steerheal.evaluation import conduct, fluency, foundations
from steerheal.evaluation.readings import Reading
from steerheal.generation import Completion, Sampling, generate
from steerheal.history import Student, from_tensors, to_tensors
from steerheal.models import LM
from steerheal.settings import Settings
from steerheal.stages import Result, Store, seed_of
from steerheal.steering import Vector

Chain = tuple[str, ...]  # digests of the folded heal stages: the student

N_PROBE = 8  # completions of one walk-C probe
N_GATE = 48  # unsteered completions behind the default perplexity gate
EDGE_KEPT, EDGE_BISECTIONS, EDGE_LIMIT = 0.85, 4, 1024.0


@dataclass
class Baselines:
    """What every trial is compared with, measured once per search."""

    base: Reading
    prompted: Reading  # the persona as a system prompt
    ladder: list[tuple[float, Reading]]  # (dose in edge units, raw steering)
    trait: objectives.Trait
    trait_reason: str
    edge: float  # raw dose at which steering brings coherence_kept to 0.85
    gate: float  # perplexity gate

    def rows(self) -> list[dict[str, Any]]:
        """Reference points of the pictures: label, trait gain with interval, coherence_kept, fluency_kept."""
        named = [("base", 0.0, self.base), ("prompted", 0.0, self.prompted)]
        named += [("steered", dose, reading) for dose, reading in self.ladder]
        out = []
        for label, dose, reading in named:
            gain = self.trait.gain(reading, self.base)
            out.append(dict(label=label, edge_doses=dose, trait_gain=gain.value, trait_gain_low=gain.low,
                            trait_gain_high=gain.high, coherence_kept=reading.ratio(self.base, "coherence"),
                            fluency_kept=reading.ratio(self.base, "fluency"), **values(reading)))
        return out


@dataclass
class Round:
    """A finished round: its outcome, and everything else worth a column in the ledger."""

    outcome: objectives.Outcome
    chain: Chain  # the student that this round delivers
    details: dict[str, Any]

    def row(self) -> dict[str, Any]:
        return self.outcome.row() | self.details | dict(adapter=self.chain[-1], chain=list(self.chain))


def values(reading: Reading) -> dict[str, float]:
    """The plain readouts of a state, for the ledger."""
    names = [f"{f}_nats" for f in personas.FOUNDATIONS] + ["conduct_nats", "control_nats", "top1", "ppx_json"]
    return {name: reading.value(name) for name in names}


class HealLoop:
    """One run of the loop on one model, through one store."""

    def __init__(self, settings: Settings, lm: LM, store: Store):
        self.settings, self.lm, self.store = settings, lm, store
        self.persona = personas.load(settings.persona)
        self.student = Student(lm)
        self._loaded: Chain = ()
        self.where = "baselines"  # what is going on, in words, for the display
        self.end: str | None = None
        self._baselines: Baselines | None = None
        self._vectors: dict[Chain, tuple[Vector, str]] = {}
        evaluate = settings.evaluate
        self.vignettes = personas.vignettes(evaluate.items, evaluate.n_items)
        self.conduct = self.persona.conduct[: evaluate.n_conduct]
        self.controls = personas.controls(evaluate.n_conduct)

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
            except Starved:
                self.end = "starved"
                return
            round_, incoming = done
            chain = round_.chain
            outcomes.append(round_.outcome)
            self.end = objectives.finished(outcomes, self.settings.rounds)
            yield round_

    def _round(self, r: int, chain: Chain, incoming: Reading, baselines: Baselines) -> tuple[Round, Reading]:
        s = self.settings
        self.where = f"round {r}"
        vector, vector_digest = self.vector(chain)
        first, _ = self.vector(())
        top = s.steer.alpha * (baselines.edge if s.steer.unit == "edge" else 1.0)
        harvest = self._harvest(r, chain, vector, vector_digest, top, baselines.gate)
        if len(harvest.kept) < s.generate.min_train:
            raise Starved(f"round {r}: {len(harvest.kept)} completions survived, generate.min_train is "
                          f"{s.generate.min_train}")
        healed = self._heal(r, chain, harvest.kept)
        self.where = f"round {r}, steered student"
        dose = top * harvest.kappa
        steered = self.reading(chain, vector=vector, vector_digest=vector_digest, dose=dose, with_fluency=False)
        self.where = f"round {r}, healed student"
        after = self.reading((*chain, healed.digest))
        outcome = objectives.judge(r, self.persona, baselines.trait, baselines.base, incoming, steered, after,
                                   healed.record["duty"] if s.heal.barrier != "nll" else 1.0)
        dropped = [reason for draw in (*harvest.probes, *harvest.batches) for reason in draw.dropped]
        details = dict(
            edge=baselines.edge, top_dose=dose, kappa=harvest.kappa, survival=harvest.survival,
            kappa_trace=harvest.trace, n_kept=len(harvest.kept), drops={n: dropped.count(n) for n in sorted(set(dropped))},
            ppl_gate=baselines.gate, cos_v0=vector.cosine(first), vector_norm=vector.norm, lam_r=s.lam_schedule[r],
            duty=healed.record["duty"], val_nll_first=healed.record["val_nll"][0],
            val_nll_last=healed.record["val_nll"][-1], train_nll=healed.record["train_nll"][-1],
            pressure=_mean([row["pressure"] for row in healed.record["steps"] if "pressure" in row]),
            **values(after))
        return Round(outcome, (*chain, healed.digest), details), after

    # ------------------------------------------------------------ baselines

    def baselines(self) -> Baselines:
        """Measured on the first call."""
        if self._baselines is None:
            self._baselines = self._measure_baselines()
        return self._baselines

    def _measure_baselines(self) -> Baselines:
        s = self.settings
        gate = s.filter.ppl_gate or self._default_gate()
        self._gate = gate
        self.where = "base"
        base = self.reading(())
        coherence = base.value("coherence")
        if coherence < objectives.BASE_COHERENCE_FLOOR:
            raise UserError(
                f"model {self.lm.name}: base coherence is {coherence:.2f}, under {objectives.BASE_COHERENCE_FLOOR}: it "
                f"cannot answer the forced choice, so nothing could be measured on it. Try "
                f"--set evaluate.shots=14 (now {s.evaluate.shots}), or another model.")
        trait, reason = objectives.choose_trait(self.persona, s.evaluate.trait, base)
        self.where = "persona as a prompt"
        prompted = self.reading((), system=self.persona.systems[0])
        vector, digest = self.vector(())
        edge = self._edge(base, vector, digest)
        ladder = []
        for share in s.evaluate.ladder:
            self.where = f"raw steering, {share:g} x edge"
            ladder.append((share, self.reading((), vector=vector, vector_digest=digest, dose=share * edge)))
        return Baselines(base, prompted, ladder, trait, reason, edge, gate)

    def _default_gate(self) -> float:
        self.where = "perplexity gate"
        n = min(N_GATE, len(self.persona.dilemmas))
        # seeded apart from the run seed: the gate is an instrument, the same for every seed of a model
        seeds = [seed_of("gate", i) for i in range(n)]
        completions, digest = self._completions((), None, "", list(range(n)), [0.0] * n, seeds)
        scores = self._scores(completions, digest, list(range(n)))
        return filtering.default_gate([s.perplexity for s in scores if s.tokens >= filtering.MIN_TOKENS])

    def _edge(self, base: Reading, vector: Vector, digest: str) -> float:
        """The highest measured raw dose with coherence_kept >= 0.85: doubled or halved into a bracket, then bisected."""
        def sane(dose: float) -> bool:
            self.where = f"edge dose, trying {dose:.3g}"
            found = self._foundations((), vector, digest, dose, chat.NEUTRAL)
            return float(found.tensors["logp"].double().exp().sum(2).mean()) / base.value("coherence") >= EDGE_KEPT

        low = 1.0
        if sane(low):
            while sane(high := low * 2):
                low = high
                if low >= EDGE_LIMIT:
                    raise UserError(f"steering: at {low:g} x the vector coherence still holds, so the vector does not "
                                    f"act on {self.lm.name}. Check steer.band = {list(self.settings.steer.band)}.")
        else:
            while not sane(low := low / 2):
                if low <= 1 / EDGE_LIMIT:
                    raise UserError(f"steering: {low:g} x the vector already breaks {self.lm.name}. Check steer.band = "
                                    f"{list(self.settings.steer.band)}, or set steer.normalise=true.")
            high = low * 2
        for _ in range(EDGE_BISECTIONS):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if sane(middle) else (low, middle)
        return low

    # ------------------------------------------------------------ stages

    def _be(self, chain: Chain) -> None:
        """Make the model the student of this chain; called only where a stage must be computed."""
        if chain != self._loaded:
            self.student.load_history([from_tensors(self.stored(d).tensors) for d in chain])
            self._loaded = chain

    def stored(self, digest: str) -> Result:
        found = self.store.load(digest)
        if found is None:
            raise UserError(f"the stage store {self.store.root} lost {digest}: give the same command again to recompute "
                            f"it.")
        return found

    def _stage(self, stage: str, chain: Chain, inputs: dict[str, Any], compute: Callable[[], Result]) -> Result:
        def run() -> Result:
            self._be(chain)
            return compute()

        return self.store.stage(stage, dict(model=self.lm.digest, student=list(chain), **inputs), run)

    def vector(self, chain: Chain) -> tuple[Vector, str]:
        """The student's own vector, and its digest."""
        if chain in self._vectors:
            return self._vectors[chain]
        s = self.settings.steer
        texts, layers = personas.contexts(s.contexts), self.lm.band(*s.band)
        inputs = dict(systems=list(self.persona.systems), contexts=personas.texts_digest(texts), layers=layers,
                      method=s.method, normalise=s.normalise)

        def compute() -> Result:
            vector = steering.extract(self.lm, *self.persona.systems, texts, layers)
            return Result({}, (vector.normalised() if s.normalise else vector).tensors())

        found = self._stage("vector", chain, inputs, compute)
        self._vectors[chain] = Vector.from_tensors(found.tensors), found.digest
        return self._vectors[chain]

    def _completions(self, chain: Chain, vector: Vector | None, vector_digest: str, rows: Sequence[int],
                     doses: Sequence[float], seeds: Sequence[int]) -> tuple[list[Completion], str]:
        """One sampled completion per row; `rows` index the persona's dilemmas."""
        g = self.settings.generate
        sampling = Sampling(g.max_new_tokens, g.temperature, g.top_p, g.top_k)
        prompts = [self.persona.dilemmas[i] for i in rows]
        inputs = dict(vector=vector_digest, prompts=personas.texts_digest(prompts), system=chat.NEUTRAL,
                      doses=list(doses), seeds=list(seeds), sampling=asdict(sampling))

        def compute() -> Result:
            ids = [chat.prompt(self.lm.tokenizer, p) for p in prompts]
            with self.student.merged():
                drawn = generate(self.lm, ids, sampling, seeds, vector, doses)
            record = dict(lengths=[len(c.ids) for c in drawn], ends=[c.end for c in drawn], doses=list(doses),
                          texts=[self.lm.text(c.ids) for c in drawn])
            return Result(record, dict(ids=torch.tensor([i for c in drawn for i in c.ids], dtype=torch.int32)))

        found = self._stage("completions", chain, inputs, compute)
        pieces = found.tensors["ids"].split(found.record["lengths"])
        return [Completion(p.tolist(), end) for p, end in zip(pieces, found.record["ends"])], found.digest

    def _scores(self, completions: Sequence[Completion], digest: str, rows: Sequence[int]) -> list[filtering.Score]:
        patterns = [[p.pattern for p in kind] for kind in (self.persona.narration, self.persona.refusal)]

        def compute() -> Result:
            prompts = [chat.prompt(self.lm.tokenizer, self.persona.dilemmas[i]) for i in rows]
            scores = filtering.score(self.student, self.persona, prompts, completions)
            return Result(dict(scores=[asdict(s) for s in scores]))

        found = self._stage("scores", (), dict(completions=digest, patterns=patterns), compute)
        return [filtering.Score(**s) for s in found.record["scores"]]

    def _harvest(self, r: int, chain: Chain, vector: Vector, vector_digest: str, top: float,
                 gate: float) -> dosing.Harvest[healing.Sample]:
        g = self.settings.generate

        def draw(purpose: str, index: int, kappa: float, rows: list[int], shares: list[float]) -> dosing.Draw:
            self.where = f"round {r}, {purpose} {index} at kappa {kappa:.2f}"
            seeds = [seed_of(self.settings.seed, "completions", r, purpose, [index, i]) for i in range(len(rows))]
            completions, digest = self._completions(chain, vector, vector_digest, rows,
                                                    [top * kappa * share for share in shares], seeds)
            survivors, dropped = [], []
            for row, c, score in zip(rows, completions, self._scores(completions, digest, rows)):
                if why := filtering.reasons(score, self.settings.filter, gate):
                    dropped += why
                else:
                    prompt = chat.prompt(self.lm.tokenizer, self.persona.dilemmas[row])
                    survivors.append(healing.Sample(prompt, c.targets))
            return dosing.Draw(kappa, len(rows), survivors, dropped)

        n = len(self.persona.dilemmas)

        def probe(index: int, kappa: float) -> dosing.Draw:
            rows = [(N_PROBE * index + i) % n for i in range(N_PROBE)]
            return draw("probe", index, kappa, rows, [g.doses[i % len(g.doses)] for i in range(N_PROBE)])

        def batch(index: int, kappa: float) -> dosing.Draw:
            rows = [(g.prompts * index + i) % n for i in range(g.prompts) for _ in g.doses]
            return draw("batch", index, kappa, rows, list(g.doses) * g.prompts)

        return dosing.walk(probe, batch, pass_target=g.pass_target, kappa_min=g.kappa_min, n_keep=g.n_keep,
                           max_batches=g.max_batches)

    def _heal(self, r: int, chain: Chain, samples: Sequence[healing.Sample]) -> Result:
        h = self.settings.heal
        lam = self.settings.lam_schedule[r]
        self.where = f"round {r}, healing on {len(samples)} completions"
        inputs = dict(samples=personas.texts_digest([[s.prompt, s.targets] for s in samples]), round=r,
                      seed=self.settings.seed, barrier=h.barrier, r=h.r, band=list(h.band), lr=h.lr, epochs=h.epochs,
                      batch=h.batch, weight_decay=h.weight_decay, spectral_lam=h.spectral_lam, early_stop=h.early_stop)
        if h.barrier != "nll":  # without a barrier these are read by nothing
            inputs |= dict(lam=lam, tau=h.tau, aggregate=h.aggregate, ref=list(chain) if h.ref == "prev" else [])

        def compute() -> Result:
            factors, record = healing.heal(self.student, samples, h, lam, self.settings.seed, r)
            return Result(record, to_tensors(factors))

        return self._stage("heal", chain, inputs, compute)

    # ------------------------------------------------------------ readouts

    def reading(self, chain: Chain, *, system: str = chat.NEUTRAL, vector: Vector | None = None,
                vector_digest: str = "", dose: float = 0.0, with_fluency: bool = True) -> Reading:
        """All readouts of a student, under a system prompt, steered or not."""
        state = dict(vector=vector_digest, dose=dose, system=system)
        pairs = [[d.prompt, [list(p) for p in d.pairs]] for d in (*self.conduct, *self.controls)]
        e = self.settings.evaluate
        found = self._foundations(chain, vector, vector_digest, dose, system)
        acts = self._stage("conduct", chain, state | dict(pairs=personas.texts_digest(pairs)), lambda: conduct.evaluate(
            self.lm, self.conduct, self.controls, system=system, vector=vector, dose=dose))
        fluent = None
        if with_fluency:
            prompts = personas.fluency_prompts(e.n_fluency)
            inputs = state | dict(prompts=personas.texts_digest(prompts), tokens=e.fluency_tokens, gate=self._gate,
                                  repetition_gate=self.settings.filter.repetition_gate)
            fluent = self._stage("fluency", chain, inputs, lambda: fluency.evaluate(
                self.student, e.n_fluency, e.fluency_tokens, self.settings.filter.repetition_gate, self._gate,
                system=system, vector=vector, dose=dose))
        return Reading.of(found, acts, fluent)

    def _foundations(self, chain: Chain, vector: Vector | None, vector_digest: str, dose: float, system: str) -> Result:
        e = self.settings.evaluate
        items = personas.texts_digest([[v.id, v.foundation, v.text] for v in self.vignettes])
        inputs = dict(vector=vector_digest, dose=dose, system=system, items=items, shots=e.shots, think=e.think_tokens)
        return self._stage("foundations", chain, inputs, lambda: foundations.evaluate(
            self.lm, self.vignettes, n_shots=e.shots, think_tokens=e.think_tokens, system=system, vector=vector,
            dose=dose))


def _mean(numbers: Sequence[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None
