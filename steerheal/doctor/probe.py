"""Every stage once, small, on the chosen model: seconds and memory, and what a search would therefore cost.

Counts are cut, never shapes: batches have their real rows, completions in healing their real length. Costs that grow
with a count are scaled by it; of generation two lengths are timed, so that its start and its steps are told apart.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from steerheal import chat, filtering, healing, models, personas, steering
from steerheal.dosing import MAX_PROBES
from steerheal.errors import UserError, ran_out
from steerheal.evaluation import conduct, foundations
from steerheal.generation import Completion, Sampling, generate
from steerheal.history import Student
from steerheal.loop import EDGE_BISECTIONS
from steerheal.settings import Settings

FEW = 4  # items of a readout, contexts of an extraction, completions to score
STEPS = (4, 16)  # new tokens of the two timed generations


@dataclasses.dataclass
class Timed:
    stage: str
    measured: float  # seconds that the probe spent
    whole: float  # seconds of the whole stage at the run's settings
    gib: float  # peak: of the card, or of the process on a CPU


def stages(settings: Settings) -> Iterator[Timed]:
    """Run and time each stage, the model's loading first."""
    s, made = settings, dict[str, models.LM]()
    yield _timed("load", lambda: made.update(lm=models.load(s)), 1.0)
    lm = made["lm"]
    student, persona = Student(lm), personas.load(s.persona)
    contexts = personas.contexts(FEW)
    yield _timed("vector", lambda: steering.extract(lm, *persona.systems, contexts, lm.band(*s.steer.band)),
                 s.steer.contexts / FEW)
    rows = s.generate.prompts * len(s.generate.doses)
    prompts = [chat.prompt(lm.tokenizer, persona.dilemmas[i % len(persona.dilemmas)]) for i in range(rows)]
    short, long = (_timed("generate", partial(generate, lm, prompts, Sampling(n), range(rows)), 1.0) for n in STEPS)
    step = max(long.measured - short.measured, 0.0) / (STEPS[1] - STEPS[0])
    generated = short.measured + step * (s.generate.max_new_tokens - STEPS[0])
    yield Timed("generate", short.measured + long.measured, generated, long.gib)

    torch.manual_seed(0)
    full = torch.randint(0, min(len(lm.tokenizer), 10_000), (13, s.generate.max_new_tokens)).tolist()
    completions = [Completion(ids, None) for ids in full[:FEW]]
    yield _timed("filter", lambda: filtering.score(student, persona, prompts[:FEW], completions), rows / FEW)
    heal = dataclasses.replace(s.heal, epochs=1, batch=6)
    samples = [healing.Sample(prompts[i % rows], ids) for i, ids in enumerate(full)]
    first = _timed("heal", lambda: healing.heal(student, samples[:7], heal, 0.3, 0, 0), 1.0)  # one step
    both = _timed("heal", lambda: healing.heal(student, samples, heal, 0.3, 0, 0), 1.0)  # two
    n_train = s.generate.n_keep - max(s.generate.n_keep // 8, 1)
    per_sample = max(both.measured - first.measured, 0.0) / 6
    yield Timed("heal", first.measured + both.measured, per_sample * n_train * s.heal.epochs, both.gib)

    e = s.evaluate
    items = personas.vignettes(e.items, e.n_items)[: 2 * FEW]
    yield _timed("foundations", lambda: foundations.evaluate(lm, items, n_shots=e.shots, think_tokens=e.think_tokens),
                 e.n_items / len(items))
    yield _timed("conduct", lambda: conduct.evaluate(lm, persona.conduct[:FEW], personas.controls(FEW)), e.n_conduct / FEW)
    yield Timed("fluency", 0.0, short.measured + step * max(e.fluency_tokens - STEPS[0], 0), long.gib)


def _timed(stage: str, run: Callable[[], object], scale: float) -> Timed:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what an earlier stage has left reserved is not this one's
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    try:
        run()
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise UserError(f"the card ran out of memory in '{stage}'. Ways out: --set quantise=nf4, "
                        f"heal.gradient_checkpointing=true, a smaller heal.micro_batch or generate.prompts") from None
    if cuda:
        torch.cuda.synchronize()
    seconds = time.monotonic() - started
    peak = torch.cuda.max_memory_reserved() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Timed(stage, seconds, seconds * scale, peak / 2**30)


def hours(timed: list[Timed], settings: Settings, trials: int) -> tuple[float, float]:
    """(least, most) hours of a search. Least: the full dose passes the first probe, completions all survive, and trials
    share the vector and the completions of round 0. Most: every probe and every batch is needed, and nothing is shared.
    Both count every completion at its full length."""
    t = {row.stage: row.whole for row in timed}
    g = settings.generate
    reading = t["foundations"] + t["conduct"]
    draw = t["generate"] + t["filter"]
    baselines = t["load"] + draw + (2 + len(settings.evaluate.ladder)) * (reading + t["fluency"])
    after = t["heal"] + 2 * reading + t["fluency"]
    batches = math.ceil(g.n_keep / (g.prompts * len(g.doses)))
    cheapest = t["vector"] + (1 + batches) * draw
    dearest = t["vector"] + (MAX_PROBES + g.max_batches) * draw
    least = baselines + (1 + EDGE_BISECTIONS) * t["foundations"] + trials * settings.rounds * after
    least += (1 + trials * (settings.rounds - 1)) * cheapest
    most = baselines + (10 + EDGE_BISECTIONS) * t["foundations"] + trials * settings.rounds * (after + dearest)
    return least / 3600, most / 3600
