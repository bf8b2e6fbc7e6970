"""python -m benchmarks.readouts [--small]: the foundations readout, ours against the plain way.

Plain (`benchmarks/plain.py`): batches of 8, left padding, no shared prefix, thinking by `model.generate`, whose cache the
interruption reuses. Both sides answer the same prompts; their answers are compared before anything is timed.
"""

from __future__ import annotations

import torch

from benchmarks import plain
from benchmarks.command import command
from benchmarks.timing import environment, in_turn
from steerheal import models, personas
from steerheal.evaluation import foundations
from steerheal.settings import from_flat


def measure(small: bool = False) -> int:
    lm = models.load(from_flat({"model": "smollm2-135m-instruct"}))
    items = personas.vignettes("builtin", 14 if small else 140)
    print(f"foundations on {len(items)} vignettes x 2 frames, {lm.name}, bfloat16, {environment()}")
    ratios = {}
    for name, shots, think_tokens in (("shots", 14, 0), ("think32", 0, 32)):
        def ours(shots: int = shots, think_tokens: int = think_tokens) -> torch.Tensor:
            return foundations.evaluate(lm, items, n_shots=shots, think_tokens=think_tokens).tensors["logp"]

        def theirs(shots: int = shots, think_tokens: int = think_tokens) -> torch.Tensor:
            return plain.read(lm, items, shots, think_tokens)

        apart = (ours().softmax(-1).mean(0) - theirs().softmax(-1).mean(0)).abs().max()
        seconds = in_turn({"ours": ours, "plain": theirs}, repeats=1 if small else 3)
        ratios[name] = seconds["plain"] / seconds["ours"]
        print(f"{name:8} ours {seconds['ours']:6.1f} s   plain {seconds['plain']:6.1f} s   ratio {ratios[name]:.2f}   "
              f"largest difference of a mean answer share {apart:.4f}", flush=True)
    print("RESULT " + " ".join(f"{name}_ratio={ratio:.2f}" for name, ratio in ratios.items()))
    return 0


if __name__ == "__main__":
    command(measure)
