"""python -m benchmarks.wording [MODEL] [--small]: does it matter where the list of foundations stands?

Without worked examples the readout asks: question, vignette, list with glosses. With the list before the vignette, all
vignettes of a frame would begin alike, and nearly the whole prompt would be computed once. Each form is read on 70
vignettes: how much of the answer's mass it keeps, how often it agrees with the labels, and how well the share of a
foundation tells its own vignettes from the others. Beside them the form with worked examples, where the list does come first.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import tyro

from benchmarks.command import command
from benchmarks.ladder import UNASKED
from benchmarks.timing import environment
from steerheal import models, personas
from steerheal.evaluation import foundations
from steerheal.evaluation.foundations import OURS, QUESTION
from steerheal.evaluation.readings import Reading
from steerheal.personas import FOUNDATIONS
from steerheal.settings import from_flat


def _bare(order: Sequence[str]) -> str:
    return 'Answer with JSON, {"violation": FOUNDATION}, where FOUNDATION is one of ' + ", ".join(f'"{f}"' for f in order)


FORMS = {
    "vignette, list": (0, OURS.user),
    "vignette, bare names": (0, lambda text, order: f"{QUESTION}\n\n> {text}\n\n{_bare(order)}"),
    "list, vignette": (0, lambda text, order: f"{QUESTION} {foundations._schema(order)}\n\n> {text}"),
    "list, vignette, question": (0, lambda text, order: f"{foundations._schema(order)}\n\n> {text}\n\n{QUESTION}"),
    "list, vignette, bare names": (
        0, lambda text, order: f"{QUESTION} {foundations._schema(order)}\n\n> {text}\n\n{_bare(order)}"),
    "list, 7 examples, vignette": (7, OURS.user),
    "list, 14 examples, vignette": (14, OURS.user),
}


def measure(model: tyro.conf.Positional[str] = "qwen2.5-coder-1.5b-instruct", small: bool = False) -> int:
    lm = models.load(from_flat({"model": model}))
    items = personas.vignettes("builtin", 14 if small else 70)
    print(f"foundations on {len(items)} vignettes x 2 frames, no thinking, {lm.name}, {environment()}")
    result = {}
    for form, (shots, user) in FORMS.items():
        started = time.perf_counter()
        found = foundations.evaluate(lm, items, n_shots=shots, think_tokens=0, wording=dataclasses.replace(OURS, user=user))
        took = time.perf_counter() - started
        reading = Reading.of(found, UNASKED)
        mean_auc = sum(reading.auc(f).value for f in FOUNDATIONS) / len(FOUNDATIONS)
        print(f"{form:28} {took:6.1f} s   coherence {reading.value('coherence'):.3f}   agreement {reading.estimate('top1')}   "
              f"AUC authority {reading.auc('authority')}, mean of seven {mean_auc:.3f}", flush=True)
        result["agreement_" + form.replace(", ", "_").replace(" ", "_")] = reading.value("top1")
    print("RESULT " + " ".join(f"{name}={value:.3f}" for name, value in result.items()))
    return 0


if __name__ == "__main__":
    command(measure)
