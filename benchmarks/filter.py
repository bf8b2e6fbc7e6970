"""python -m benchmarks.filter [MODEL]: what the filter catches of 150 labelled texts, and what it drops by mistake.

Four tables: recall and precision of each criterion, on the two thirds that the thresholds were chosen on and on the third
that was held out; the measures that were tried against soup; and what the gates make of completions steered against the
trait, which ends in soup.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import tyro
from torch import Tensor

from benchmarks.command import command
from benchmarks.timing import environment
from steerheal import chat, filtering, models, personas, steering
from steerheal.filtering import Gates, Score, reasons
from steerheal.forward import token_logps
from steerheal.generation import Completion, Sampling, generate
from steerheal.history import Student
from steerheal.loop import HealLoop
from steerheal.settings import FilterSettings, from_flat
from steerheal.stages import Store, seed_of

LABELS = ("coherent", "looping", "soup", "narrating", "refusing")
TARGETS = {"perplexity": ("soup",), "repetition": ("looping",), "soup": ("soup",), "narration": ("narrating",),
           "refusal": ("refusing",), "any": LABELS[1:]}
WINDOW = 32
WRONG_DOSE, WRONG_ROWS = -6.0, 12


@dataclass
class Judged:
    """A labelled text, its score, and why the filter would drop it."""

    row: dict[str, str]
    ids: list[int]
    score: Score
    reasons: list[str]


def measure(model: tyro.conf.Positional[str] = "smollm2-135m-instruct") -> int:
    lm = models.load(from_flat({"model": model}))
    print(f"{model}, {lm.model.dtype}, {environment()}")
    limits = {name: model_gates(lm, name) for name in personas.builtin()}
    for name, gate in limits.items():
        print(f"gates of {name}: perplexity {gate.perplexity:.1f}, soup {gate.soup:.3f} nats per byte")
    judged = judge(lm, limits)
    out = {}
    for split in ("choose", "held_out"):
        print(f"\n{split:11} recall precision   dropped of " + " ".join(f"{label:>9}" for label in LABELS))
        part = [j for j in judged if j.row["split"] == split]
        for criterion in TARGETS:
            recall, precision, dropped = quality(part, criterion)
            print(f"{criterion:11} {recall:6.2f} {precision:9.2f}              "
                  + " ".join(f"{dropped[label]:9.2f}" for label in LABELS), flush=True)
            out |= {f"{split}_{criterion}_recall": recall, f"{split}_{criterion}_precision": precision}
    chosen = {label: [j for j in judged if j.row["label"] == label and j.row["split"] == "choose"] for label in LABELS}
    print(f"\nnats per byte where the factor was chosen: coherent up to {max(j.score.soup for j in chosen['coherent']):.2f}, "
          f"soup from {min(j.score.soup for j in chosen['soup']):.2f}")
    shares = [one_ngram(j.row["text"]) for j in chosen["looping"]]
    print(f"the largest share of one n-gram is over 0.3 in {sum(s > 0.3 for s in shares)} of {len(shares)} loops")
    own = [bool(j.reasons) for j in judged if j.row["label"] == "coherent" and j.row["source"] != "written"]
    print(f"coherent texts of SmolLM2's own: {sum(own)} of {len(own)} dropped")
    candidates(lm, judged)
    wrong_way(lm, limits)
    print("RESULT " + " ".join(f"{k}={v:.3f}" for k, v in out.items()))
    return 0


def model_gates(lm: models.LM, persona: str) -> Gates:
    """The gates that a run of this model and persona would use."""
    with tempfile.TemporaryDirectory() as folder:
        return HealLoop(from_flat({"model": lm.name, "persona": persona}), lm, Store(folder))._gates()


def judge(lm: models.LM, limits: dict[str, Gates]) -> list[Judged]:
    student, out = Student(lm), []
    for name, gate in limits.items():
        rows = [row for row in personas.labelled() if row["persona"] == name]
        ids = [chat.plain(lm.tokenizer, row["text"]) for row in rows]
        scores = filtering.score(student, personas.load(name), [chat.prompt(lm.tokenizer, row["prompt"]) for row in rows],
                                 [Completion(i, None) for i in ids])
        out += [Judged(row, i, s, reasons(s, FilterSettings(), gate)) for row, i, s in zip(rows, ids, scores)]
    return out


def quality(judged: Sequence[Judged], criterion: str) -> tuple[float, float, dict[str, float]]:
    """Recall of the criterion's labels, precision against coherent text, and the share of each label that it drops."""
    hits = {label: [criterion in j.reasons or (criterion == "any" and bool(j.reasons))
                    for j in judged if j.row["label"] == label] for label in LABELS}
    caught = [hit for label in TARGETS[criterion] for hit in hits[label]]
    wrong = sum(hits["coherent"])
    return sum(caught) / len(caught), sum(caught) / max(1, sum(caught) + wrong), {k: sum(v) / len(v) for k, v in hits.items()}


def one_ngram(text: str) -> float:
    """The measure of repetition that was there before: the largest share of one n-gram, words and characters, n = 2, 3, 4."""
    grams = [Counter(tuple(units[i : i + n]) for i in range(len(units) - n + 1))
             for units in (text.lower().split(), text.lower()) for n in (2, 3, 4)]
    return max((c.most_common(1)[0][1] / c.total() for c in grams if c and c.most_common(1)[0][1] > 1), default=0.0)


def candidates(lm: models.LM, judged: Sequence[Judged]) -> None:
    """AUC of soup against other labels, for every measure that was tried."""
    with Student(lm).base():
        nlls = [-logp for logp in token_logps(lm, [chat.prompt(lm.tokenizer, j.row["prompt"]) for j in judged],
                                              [j.ids for j in judged])]
    words = Counter(w for d in personas.load("authority").dilemmas + personas.load("love").dilemmas for w in _words(d))
    words.update(w for text in personas.contexts(256) + personas.fluency_prompts(64) for w in _words(text))

    def windowed(nll: Tensor) -> float:
        return float(nll.unfold(0, min(WINDOW, len(nll)), 1).mean(1).max())

    measures: dict[str, Callable[[Judged, Tensor], float]] = {
        "nats per byte, worst 32 tokens": lambda j, nll: j.score.soup,
        "nats per byte, whole": lambda j, nll: float(nll.sum()) / len(j.row["text"].encode()),
        "nats per token, worst 32 tokens": lambda j, nll: windowed(nll),
        "perplexity of the last quarter": lambda j, nll: j.score.perplexity,
        "90th percentile of token NLL": lambda j, nll: float(nll.quantile(0.9)),
        "spread of token NLL": lambda j, nll: float(nll.std()),
        "tokens per word": lambda j, nll: len(j.ids) / len(j.row["text"].split()),
        "words of more than one token": lambda j, nll: float(np.mean(
            [len(chat.plain(lm.tokenizer, " " + w)) > 1 for w in _words(j.row["text"])] or [1])),
        "words outside the package's texts": lambda j, nll: float(np.mean(
            [w not in words for w in _words(j.row["text"])] or [1])),
        "words with capitals inside": lambda j, nll: float(np.mean(
            [bool(re.search("[a-z][A-Z]|[A-Z]{2}[a-z]", w)) for w in j.row["text"].split()])),
        "repeated tokens": lambda j, nll: 1 - len(set(j.ids)) / len(j.ids),
    }
    print("\nAUC of soup against      coherent            narrating           refusing\n" + " " * 34
          + "choose held_out   " * 3)
    for name, of in measures.items():
        line = f"{name:34}"
        for other in ("coherent", "narrating", "refusing"):
            for split in ("choose", "held_out"):
                values = {label: [of(j, nll) for j, nll in zip(judged, nlls)
                                  if j.row["label"] == label and j.row["split"] == split] for label in ("soup", other)}
                line += f"{_auc(values['soup'], values[other]):6.3f} {'' if split == 'choose' else '    '}"
        print(line, flush=True)


def wrong_way(lm: models.LM, limits: dict[str, Gates]) -> None:
    """Completions steered against the trait, far past what the model bears: what do the gates let through?"""
    print(f"\nat dose {WRONG_DOSE:g} of the vector: dropped by perplexity or repetition, by soup alone, kept")
    for name, gate in limits.items():
        trait = personas.load(name)
        prompts = [chat.prompt(lm.tokenizer, text) for text in trait.dilemmas[:WRONG_ROWS]]
        vector = steering.extract(lm, *trait.systems, personas.contexts(64), lm.band(0.45, 0.55))
        drawn = generate(lm, prompts, Sampling(64), [seed_of("wrong way", i) for i in range(WRONG_ROWS)], vector,
                         [WRONG_DOSE] * WRONG_ROWS)
        found = [reasons(s, FilterSettings(), gate) for s in filtering.score(Student(lm), None, prompts, drawn)]
        alone = [lm.text(c.ids) for c, why in zip(drawn, found) if why == ["soup"]]
        before = sum(bool({"perplexity", "repetition"} & set(why)) for why in found)
        print(f"  {name:9} {before:4d} {len(alone):4d} {sum(not why for why in found):4d}", flush=True)
        for text in alone[:3]:
            print(f"       by soup alone: {text[:80]!r}")


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.lower())


def _auc(a: Sequence[float], b: Sequence[float]) -> float:
    """Chance that one of a is above one of b, ties counted half."""
    x, y = np.array(a)[:, None], np.array(b)[None]
    return float((x > y).mean() + (x == y).mean() / 2)


if __name__ == "__main__":
    command(measure)
