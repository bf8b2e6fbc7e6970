"""python -m benchmarks.generation [--small]: steered completions, ours against one `model.generate` call each.

24 rows of 64 tokens at raw doses 1, 2, 3, same prompts, doses and lengths on both sides; nothing ends early. The steps
between, batched `generate` and a bare loop, tell where the gain comes from.
"""

from __future__ import annotations

import time

import torch

from benchmarks import plain
from benchmarks.command import command
from benchmarks.timing import environment, in_turn
from steerheal import chat, models, personas, steering
from steerheal.generation import Sampling, generate
from steerheal.settings import from_flat

DOSES = (1.0, 2.0, 3.0)


def measure(small: bool = False) -> int:
    lm = models.load(from_flat({"model": "smollm2-135m-instruct"}))
    trait = personas.load("authority")
    rows, tokens = (6, 16) if small else (24, 64)
    vector = steering.extract(lm, *trait.systems, personas.contexts(16), lm.band(0.45, 0.55))
    prompts = [chat.prompt(lm.tokenizer, d) for d in trait.dilemmas[: rows // 3] for _ in DOSES]
    doses = list(DOSES) * (rows // 3)
    never_end = lm.eos_ids
    lm.__dict__["eos_ids"] = frozenset()  # so that both sides draw the same number of tokens
    sampling = Sampling(tokens)

    def ours() -> None:
        drawn = generate(lm, prompts, sampling, list(range(rows)), vector, doses)
        assert all(len(c.ids) == tokens for c in drawn)

    def one_by_one() -> None:
        plain.generate(lm, prompts, vector, doses, tokens, never_end)

    @torch.no_grad()
    def batched() -> None:
        ids, mask = plain.padded(prompts, lm.device)
        with steering.steered(lm, vector, torch.tensor(doses)):
            lm.model.generate(ids, **plain.sampling(ids, tokens, never_end) | dict(attention_mask=mask))

    print(f"{rows} completions x {tokens} tokens, {lm.name}, {lm.model.dtype}, {environment()}")
    ours()
    seconds = in_turn({"ours": ours, "batched generate": batched, "one at a time": one_by_one}, repeats=1 if small else 3)
    for name, took in seconds.items():
        print(f"{name:17} {took:7.2f} s   {rows * tokens / took:7.1f} tokens/s", flush=True)
    print(f"floor: {_floor(lm, rows, tokens):.2f} s for the matrix products of the decode steps alone")
    print(f"RESULT generate_ratio={seconds['one at a time'] / seconds['ours']:.1f} "
          f"batched_ratio={seconds['batched generate'] / seconds['ours']:.2f}")
    return 0


def _floor(lm: models.LM, rows: int, tokens: int) -> float:
    """Seconds of bare matrix products of the same shapes: one batch per step through every weight."""
    shapes = [tuple(p.shape) for p in lm.model.parameters() if p.ndim == 2]
    weights = [torch.randn(s, dtype=torch.bfloat16) for s in set(shapes)]
    took = 0.0
    with torch.no_grad():
        for w in weights:
            x = torch.randn(rows, w.shape[1], dtype=torch.bfloat16)
            x @ w.T
            started = time.perf_counter()
            for _ in range(20):
                x @ w.T
            took += (time.perf_counter() - started) / 20 * shapes.count(tuple(w.shape))
    return took * tokens


if __name__ == "__main__":
    command(measure)
