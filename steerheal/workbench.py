"""Everything a round computes, each behind the stage store.

A workbench holds one model and makes it the student that a stage asks for, but only where that stage is not in the
store yet. What a stage reads is named in its inputs as effective values: raw doses and never alpha, lam_r and never lam,
the folded adapters by their bits and never by the settings that trained them. So two trials whose healing came to the same
adapter (a tau that never binds, or that binds the same completions) share everything from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from steerheal import calibration, chat, filtering, healing, personas, steering, upstream
from steerheal.errors import UserError
from steerheal.evaluation import conduct, fluency, foundations
from steerheal.evaluation.readings import Reading
from steerheal.forward import token_logps
from steerheal.generation import Completion, Sampling, generate, greedy
from steerheal.history import Student, bits, from_tensors, to_tensors
from steerheal.models import LM
from steerheal.settings import Settings
from steerheal.stages import Result, Store
from steerheal.steering import Steers, Vector, steered

Chain = tuple[str, ...]  # digests of the folded heal stages: the student

N_FREE = 14  # vignettes that are answered freely, to see whether the JSON is valid
N_CALIBRATION = 16  # unsteered completions on which target_kl is calibrated
KL_BISECTIONS = 8
DIARY_TOKENS = 128


@dataclass(frozen=True)
class Steering:
    """A vector at one raw dose."""

    vector: Steers
    digest: str  # of the vector
    dose: float


class Workbench:
    """One model, one student at a time, one store."""

    def __init__(self, settings: Settings, lm: LM, store: Store):
        self.settings, self.lm, self.store = settings, lm, store
        self.persona = personas.load(settings.persona)
        self.student = Student(lm)
        self.loaded: Chain = ()
        self._vectors: dict[Chain, tuple[Steers, str]] = {}
        self._bits: dict[str, str] = {}  # digest of a heal stage -> hash of its factors
        evaluate = settings.evaluate
        self.vignettes = personas.vignettes(evaluate.items, evaluate.n_items)
        self.conduct = self.persona.conduct[: evaluate.n_conduct]
        self.controls = personas.controls(evaluate.n_conduct)
        if settings.steer.method.startswith(upstream.PREFIX):
            upstream.check(settings.steer.method, lm.quantised)

    def _be(self, chain: Chain) -> None:
        """Make the model the student of this chain; called only where a stage must be computed."""
        if chain != self.loaded:
            self.student.load_history([from_tensors(self.stored(d).tensors) for d in chain])
            self.loaded = chain

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

        return self.store.stage(stage, dict(model=self.lm.digest, student=self.identity(chain), **inputs), run)

    def identity(self, chain: Chain) -> list[str]:
        """The hash of each folded adapter's factors: equal for equal students."""
        for digest in chain:
            if digest not in self._bits:
                self._bits[digest] = self.stored(digest).record["bits"]
        return [self._bits[digest] for digest in chain]

    # ------------------------------------------------------------ vectors and doses

    def vector(self, chain: Chain) -> tuple[Steers, str]:
        """The student's own vector, and its digest."""
        if chain in self._vectors:
            return self._vectors[chain]
        s = self.settings.steer
        texts, layers = personas.contexts(s.contexts), self.lm.band(*s.band)
        lite = s.method.startswith(upstream.PREFIX)
        inputs = dict(systems=list(self.persona.systems), contexts=personas.texts_digest(texts), layers=layers,
                      # the gate is applied with the vector, not stored in it
                      method=s.method if lite else "mean_diff", normalise=s.normalise)

        def compute() -> Result:
            if lite:
                with self.student.plain():
                    return Result({}, upstream.extract(self.lm, *self.persona.systems, texts, layers, s.method).tensors())
            vector = steering.extract(self.lm, *self.persona.systems, texts, layers)
            return Result({}, (vector.normalised() if s.normalise else vector).tensors())

        found = self._stage("vector", chain, inputs, compute)
        kind = upstream.LiteVector if lite else Vector
        named = found.digest if s.method != "cosine_gated" else f"{found.digest} cosine_gated"
        self._vectors[chain] = kind.from_tensors(found.tensors, s.method), named
        return self._vectors[chain]

    def learned(self, chain: Chain) -> Vector:
        """What the student's states have moved by, without any persona: mean over contexts, in the steered layers."""
        texts, layers = personas.contexts(self.settings.steer.contexts), self.lm.band(*self.settings.steer.band)
        inputs = dict(system=chat.NEUTRAL, contexts=personas.texts_digest(texts), layers=layers)

        def states(of: Chain) -> Vector:
            found = self._stage("states", of, inputs, lambda: Result({}, Vector(
                {i: h.float() for i, h in steering.mean_states(self.lm, chat.NEUTRAL, texts, layers).items()}).tensors()))
            return Vector.from_tensors(found.tensors)

        base, student = states(()), states(chain)
        return Vector({i: student.layers[i] - base.layers[i] for i in layers})

    def kl_dose(self, vector: Steers, vector_digest: str, completions: Sequence[Completion], digest: str,
                rows: Sequence[int]) -> float:
        """The raw dose at which p95 of per-token KL(steered || base) is steer.target_kl, on unsteered completions."""
        target = self.settings.steer.target_kl
        prompts = [chat.prompt(self.lm.tokenizer, self.persona.dilemmas[i]) for i in rows][:N_CALIBRATION]
        replies = [c.ids for c in completions][:N_CALIBRATION]

        def compute() -> Result:
            try:
                dose = calibration.last_dose(
                    lambda d: calibration.kl_percentile(self.lm, vector, d, prompts, replies) <= target, KL_BISECTIONS)
            except calibration.NoBracket as error:
                limit = calibration.LIMIT if error.held else 1 / calibration.LIMIT
                raise UserError(
                    f"steer.target_kl = {target:g}: at {limit:g} x the vector the 95th percentile of KL(steered || base) is "
                    f"still {'below' if error.held else 'above'} it, so no dose meets it. Set another steer.target_kl, or "
                    f"check steer.unit = kl and steer.band = {list(self.settings.steer.band)}.") from None
            return Result(dict(dose=dose))

        inputs = dict(vector=vector_digest, completions=digest, n=len(replies), target=target, bisections=KL_BISECTIONS)
        return float(self._stage("kl_dose", (), inputs, compute).record["dose"])

    # ------------------------------------------------------------ completions

    def completions(self, chain: Chain, vector: Steers | None, vector_digest: str, rows: Sequence[int],
                    doses: Sequence[float], seeds: Sequence[int]) -> tuple[list[Completion], str]:
        """One sampled completion per row; `rows` index the persona's dilemmas."""
        g = self.settings.generate
        sampling = Sampling(g.max_new_tokens, g.temperature, g.top_p, g.top_k)
        prompts = [self.persona.dilemmas[i] for i in rows]
        half_life = self.settings.steer.half_life if vector else 0.0
        inputs = dict(vector=vector_digest, prompts=personas.texts_digest(prompts), system=chat.NEUTRAL,
                      doses=list(doses), seeds=list(seeds), sampling=asdict(sampling), half_life=half_life)

        def compute() -> Result:
            ids = [chat.prompt(self.lm.tokenizer, p) for p in prompts]
            with self.student.merged():
                drawn = generate(self.lm, ids, sampling, seeds, vector, doses, half_life)
            record = dict(lengths=[len(c.ids) for c in drawn], ends=[c.end for c in drawn], doses=list(doses),
                          prompts=prompts, texts=[self.lm.text(c.ids) for c in drawn])
            return Result(record, dict(ids=torch.tensor([i for c in drawn for i in c.ids], dtype=torch.int32)))

        found = self._stage("completions", chain, inputs, compute)
        pieces = found.tensors["ids"].split(found.record["lengths"])
        return [Completion(p.tolist(), end) for p, end in zip(pieces, found.record["ends"])], found.digest

    def scores(self, completions: Sequence[Completion], digest: str,
               rows: Sequence[int]) -> tuple[list[filtering.Score], str]:
        """What the filter measured on each completion, and the digest of that."""
        patterns = [[p.pattern for p in kind] for kind in (self.persona.narration, self.persona.refusal)]

        def compute() -> Result:
            prompts = [chat.prompt(self.lm.tokenizer, self.persona.dilemmas[i]) for i in rows]
            scores = filtering.score(self.student, self.persona, prompts, completions)
            return Result(dict(scores=[asdict(s) for s in scores]))

        # taken under base, which every student holds: whatever history is loaded may stay
        inputs = dict(model=self.lm.digest, student=[], completions=digest, patterns=patterns)
        found = self.store.stage("scores", inputs, compute)
        return [filtering.Score(**s) for s in found.record["scores"]], found.digest

    def log_ratio(self, chain: Chain, vector: Steers, vector_digest: str, samples: Sequence[healing.Sample],
                  doses: Sequence[float]) -> list[float]:
        """Per completion: mean over tokens of log p under the steered student at its own dose, minus under base. The dose is
        the full one at every token, whatever steer.half_life."""
        prompts, targets = [s.prompt for s in samples], [s.targets for s in samples]
        inputs = dict(vector=vector_digest, samples=personas.texts_digest([prompts, targets]), doses=list(doses))

        def compute() -> Result:
            with self.student.base():
                base = [float(logp.mean()) for logp in token_logps(self.lm, prompts, targets)]
            found = [0.0] * len(samples)
            for dose in sorted(set(doses)):
                rows = [i for i, d in enumerate(doses) if d == dose]
                with steered(self.lm, vector, dose):
                    logps = token_logps(self.lm, [prompts[i] for i in rows], [targets[i] for i in rows])
                for i, logp in zip(rows, logps):
                    found[i] = float(logp.mean()) - base[i]
            return Result(dict(log_ratio=found))

        return list(self._stage("log_ratio", chain, inputs, compute).record["log_ratio"])

    def diary(self, chain: Chain, steering: Steering | None = None) -> str:
        """Greedy answers to the persona's headline prompts, for people to read; the stage's digest."""
        tokens = min(self.settings.generate.max_new_tokens, DIARY_TOKENS)
        prompts = list(self.persona.headline)
        inputs = _named(steering) | dict(prompts=prompts, system=chat.NEUTRAL, tokens=tokens)

        def compute() -> Result:
            ids = [chat.prompt(self.lm.tokenizer, p) for p in prompts]
            vector, dose = (steering.vector, steering.dose) if steering else (None, 0.0)
            with self.student.merged():
                drawn = generate(self.lm, ids, greedy(tokens), vector=vector, doses=[dose] * len(ids))
            return Result(dict(prompts=prompts, texts=[self.lm.text(c.ids) for c in drawn]))

        return self._stage("diary", chain, inputs, compute).digest

    # ------------------------------------------------------------ healing

    def heal(self, r: int, chain: Chain, samples: Sequence[healing.Sample]) -> Result:
        """Train round r's adapter on top of the chain."""
        h = self.settings.heal
        lam = self.settings.lam_schedule[r]
        inputs = dict(samples=personas.texts_digest([[s.prompt, s.targets] for s in samples]), round=r,
                      seed=self.settings.seed, barrier=h.barrier, r=h.r, band=self.lm.band(*h.band), lr=h.lr, epochs=h.epochs,
                      batch=h.batch, weight_decay=h.weight_decay, spectral_lam=h.spectral_lam,
                      early_stop=h.early_stop)
        if h.barrier != "nll":  # without a barrier these are read by nothing
            inputs |= dict(lam=lam, tau=h.tau, aggregate=h.aggregate, ref=self.identity(chain) if h.ref == "prev" else [])

        def compute() -> Result:
            factors, record = healing.heal(self.student, samples, h, lam, self.settings.seed, r)
            return Result(record | dict(bits=bits(factors)), to_tensors(factors))

        found = self._stage("heal", chain, inputs, compute)
        self._bits[found.digest] = found.record["bits"]
        return found

    # ------------------------------------------------------------ readouts

    def reading(self, chain: Chain, gates: filtering.Gates | None, *, system: str = chat.NEUTRAL,
                steering: Steering | None = None) -> Reading:
        """All readouts of a student, under a system prompt, steered or not.

        Args:
            gates: of the filter, by which free generations are judged; None leaves those out (fluency, valid JSON).
        """
        e, how = self.settings.evaluate, _how(steering, system)
        state = _named(steering) | dict(system=system)
        pairs = [[d.prompt, [list(p) for p in d.pairs]] for d in (*self.conduct, *self.controls)]
        found = self.foundations(chain, steering, system)
        acts = self._stage("conduct", chain, state | dict(pairs=personas.texts_digest(pairs)),
                           lambda: conduct.evaluate(self.lm, self.conduct, self.controls, **how))
        if gates is None:
            return Reading.of(found, acts)
        prompts = personas.fluency_prompts(e.n_fluency)
        inputs = state | dict(prompts=personas.texts_digest(prompts), tokens=e.fluency_tokens, gates=asdict(gates),
                              repetition_gate=self.settings.filter.repetition_gate)
        fluent = self._stage("fluency", chain, inputs, lambda: fluency.evaluate(
            self.student, e.n_fluency, e.fluency_tokens, self.settings.filter.repetition_gate, gates, **how))
        items = personas.vignettes(e.items, N_FREE)
        inputs = state | dict(items=_identify(items), shots=e.shots, think=e.think_tokens)

        def answer() -> Result:
            with self.student.merged():
                return foundations.free_answers(self.lm, items, n_shots=e.shots, think_tokens=e.think_tokens, **how)

        answers = self._stage("free_answers", chain, inputs, answer)
        return Reading.of(found, acts, fluent, answers)

    def foundations(self, chain: Chain, steering: Steering | None, system: str = chat.NEUTRAL) -> Result:
        e = self.settings.evaluate
        inputs = _named(steering) | dict(system=system, items=_identify(self.vignettes), shots=e.shots, think=e.think_tokens)
        return self._stage("foundations", chain, inputs, lambda: foundations.evaluate(
            self.lm, self.vignettes, n_shots=e.shots, think_tokens=e.think_tokens, **_how(steering, system)))


def _named(steering: Steering | None) -> dict[str, Any]:
    """Steering as the inputs of a stage."""
    return dict(vector=steering.digest, dose=steering.dose) if steering else dict(vector="", dose=0.0)


def _how(steering: Steering | None, system: str) -> dict[str, Any]:
    """Steering and system prompt as the arguments of a readout."""
    return dict(system=system) | (dict(vector=steering.vector, dose=steering.dose) if steering else {})


def _identify(items: Sequence[personas.Vignette]) -> str:
    return personas.texts_digest([[v.id, v.foundation, v.text] for v in items])
