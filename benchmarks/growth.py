"""python -m benchmarks.growth [--small] [--part NAME]: how time and memory grow, each curve with its exponent.

completions, length, rounds and vocabulary run SmolLM2 (random history: growth does not depend on what was learned); trials,
ledger and store are benchmarks/growth_search.py. The last line has the exponents of processor time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks import growth_search
from benchmarks.curves import Curve, measure
from benchmarks.memory import Live, Measured
from benchmarks.timing import environment
from steerheal import chat, divergence, filtering, healing, history, models, personas
from steerheal.cli import run_main
from steerheal.evaluation import conduct
from steerheal.generation import Completion, Sampling, generate
from steerheal.history import Factors, Student
from steerheal.settings import HealSettings, from_flat

ROWS = 12  # completions where something else grows
TOKENS = 32


@dataclass
class Args:
    """How time and memory grow with the size of rounds, models and searches."""

    small: bool = False
    """small sizes, each timed once"""
    part: Literal["all", "completions", "length", "rounds", "vocabulary", "trials", "ledger", "store"] = "all"
    """what grows"""


@cache
def resident() -> Student:
    """SmolLM2, whose rows never end, so that every completion has the length asked for."""
    lm = models.load(from_flat({"model": "smollm2-135m-instruct", "device": "cpu"}))
    lm.__dict__["eos_ids"] = frozenset()
    return Student(lm)


def prompts(rows: int) -> list[list[int]]:
    """Three to a dilemma, as in a round."""
    dilemmas = personas.load("authority").dilemmas
    return [chat.prompt(resident().lm.tokenizer, dilemmas[i // 3 % len(dilemmas)]) for i in range(rows)]


@cache
def drawn(rows: int, tokens: int) -> list[Completion]:
    return generate(resident().lm, prompts(rows), Sampling(tokens), range(rows))


def peak(action: Callable[[int], object]) -> Callable[[int], float]:
    """MiB that the tensors of an action take at most, beside the model."""
    def run(size: int) -> float:
        with Measured(resident().lm) as found:
            action(size)
        return found.bytes / 2**20

    return run


# ---------------------------------------------------------------- parts


def completions(small: bool) -> Iterator[Curve]:
    return _round(lambda size: (size, TOKENS), (3, 6) if small else (6, 12, 24, 48))


def length(small: bool) -> Iterator[Curve]:
    return _round(lambda size: (ROWS // 2 if small else ROWS, size), (8, 16) if small else (16, 32, 64, 128))


def _round(shape: Callable[[int], tuple[int, int]], sizes: tuple[int, ...]) -> Iterator[Curve]:
    """Generation, scores and healing of a round of (completions, tokens)."""
    persona, settings = personas.load("authority"), HealSettings(epochs=1)

    def draw(size: int) -> None:
        rows, tokens = shape(size)
        generate(resident().lm, prompts(rows), Sampling(tokens), range(rows))

    def score(size: int) -> None:
        filtering.score(resident(), persona, prompts(shape(size)[0]), drawn(*shape(size)))

    def heal(size: int) -> None:
        samples = [healing.Sample(p, c.targets) for p, c in zip(prompts(shape(size)[0]), drawn(*shape(size)))]
        healing.heal(resident(), samples, settings, settings.lam, 0, 0)

    for size in sizes:
        drawn(*shape(size))
    for name, action in (("generate", draw), ("filter", score), ("heal", heal)):
        yield Curve(name, action, sizes, memory=peak(action))


def rounds(small: bool) -> Iterator[Curve]:
    student, trait = resident(), personas.load("authority")
    settings, sizes = HealSettings(), (1, 2) if small else (1, 2, 4, 8)
    folded = [_random_round(student, settings, i) for i in range(sizes[-1])]

    def become(size: int) -> None:
        student.load_history(folded[:size])

    def draw(size: int) -> None:
        with student.merged():
            generate(student.lm, prompts(ROWS), Sampling(TOKENS), range(ROWS))

    def evaluate(size: int) -> None:
        conduct.evaluate(student.lm, trait.conduct[:4], ())

    def export(size: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            history.export(history.fold(folded[:size]), Path(folder) / "adapter", "smollm2")

    become(1)
    draw(1)
    yield Curve("generate merged", draw, sizes, become, peak(draw))
    yield Curve("evaluate factored", evaluate, sizes, become, peak(evaluate))
    yield Curve("load history", become, sizes)
    yield Curve("export", export, sizes)
    student.load_history([])


def _random_round(student: Student, settings: HealSettings, index: int) -> Factors:
    parameters = student.start_round(student.targets(*settings.band), settings.r, 0, index)
    for p in parameters[1::2]:
        torch.nn.init.normal_(p, std=1e-4, generator=torch.Generator().manual_seed(index))
    return student.finish_round()


def vocabulary(small: bool) -> Iterator[Curve]:
    """The healing loss of 512 positions and its gradient; states of SmolLM2's width."""
    sizes = (4096, 8192) if small else (16_384, 32_768, 65_536, 131_072)
    heads = {size: torch.nn.Linear(576, size, bias=False, dtype=torch.bfloat16).requires_grad_(False) for size in sizes}
    hidden, reference = (torch.randn(512, 576).bfloat16() for _ in range(2))

    def loss(size: int) -> None:
        states = hidden.clone().requires_grad_()
        nll, kl = divergence.nll_and_kl(states, torch.arange(512), lambda h: (h @ heads[size].weight.T).float(), size,
                                        reference, "kl_rev")
        assert kl is not None
        (nll.mean() + kl.square().mean().sqrt()).backward()

    def memory(size: int) -> float:
        with Live(heads[size]) as live:
            loss(size)
        return live.peak / 2**20

    yield Curve("loss", loss, sizes, memory=memory)


PARTS: dict[str, Callable[[bool], Iterator[Curve]]] = dict(
    completions=completions, length=length, rounds=rounds, vocabulary=vocabulary, trials=growth_search.trials,
    ledger=growth_search.ledger_rows, store=growth_search.store)


def main() -> None:
    args = tyro.cli(Args, prog="python -m benchmarks.growth", config=(tyro.conf.FlagCreatePairsOff,))
    run_main(lambda: report(args))


def report(args: Args) -> int:
    print(environment())
    found = {}
    names: list[str] = [*PARTS] if args.part == "all" else [args.part]
    for name in names:
        print(f"\n{name}")
        for curve in PARTS[name](args.small):
            found[f"{name}_{curve.name.replace(' ', '_')}"] = measure(curve, 1 if args.small else 3)
    print("RESULT " + " ".join(f"{name}={value:.2f}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    main()
