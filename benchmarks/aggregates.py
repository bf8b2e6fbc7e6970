"""python -m benchmarks.aggregates [--small] [--seeds 1] [--rounds 4] [--store FOLDER]: does rmse hold what mean lets slip?

Two loops on SmolLM2 that differ in the aggregate of the barrier alone, at a dose past the edge: same weight lam, and for
the mean the tau under which round 0 has the duty cycle of the rmse loop, found by bisection. Everything up to healing is
shared in round 0. A folder named by --store is gone on with.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.timing import environment
from steerheal import models
from steerheal.cli import run_main
from steerheal.loop import HealLoop, Round
from steerheal.settings import from_flat
from steerheal.stages import Store

SETTINGS = {"model": "smollm2-135m-instruct", "steer.contexts": 48, "steer.alpha": 1.2, "generate.prompts": 8,
            "generate.n_keep": 24, "generate.pass_target": 0.0, "heal.epochs": 2, "heal.lr": 5e-4, "heal.lam": 1.0,
            "evaluate.ladder": [1.0], "evaluate.fluency_tokens": 32}
SMALL = {"steer.contexts": 16, "generate.prompts": 4, "generate.n_keep": 12, "generate.min_train": 4,
         "generate.max_new_tokens": 24, "heal.epochs": 1, "evaluate.n_items": 7, "evaluate.n_conduct": 8,
         "evaluate.n_fluency": 8, "evaluate.fluency_tokens": 16}
RMSE_TAU = 0.1
MEAN_TAUS = (0.001, 0.1)  # the mean is never above the rmse, so its tau is the smaller one
BISECTIONS = 4


@dataclass
class Args:
    """Two loops past the edge that differ in the aggregate of the barrier alone, at the same weight and duty cycle."""

    small: bool = False
    """a tenth of the work, to see that it runs"""
    seeds: int = 1
    """run seeds"""
    rounds: int = 4
    """rounds of each loop"""
    store: Path | None = None
    """folder of the stages; one that exists is gone on with"""


def main() -> None:
    args = tyro.cli(Args, prog="python -m benchmarks.aggregates")
    run_main(lambda: compare(args.small, args.seeds, args.rounds, args.store or Path(tempfile.mkdtemp(prefix="aggregates-"))))


def compare(small: bool, seeds: int, rounds: int, folder: Path) -> int:
    base = SETTINGS | (SMALL if small else {})
    lm, store = models.load(from_flat(base)), Store(folder)
    print(f"{lm.name}, {environment()}, stages in {folder}")
    print(f"{'seed':>4} {'aggregate':9} {'tau':>7} {'round':>5} {'duty':>5} {'trait gain':>24} {'kept':>6} {'fluent':>6}  "
          f"verdict")

    def loop(seed: int, aggregate: str, tau: float, rounds: int) -> Iterator[Round]:
        barrier: dict[str, Any] = {"seed": seed, "rounds": rounds, "heal.aggregate": aggregate, "heal.tau": tau}
        return HealLoop(from_flat(base | barrier), lm, store).rounds()

    apart = []
    for seed in range(seeds):
        duty = next(loop(seed, "rmse", RMSE_TAU, 1)).details["duty"]
        low, high = MEAN_TAUS
        for _ in range(1 if small else BISECTIONS):
            tau = (low * high) ** 0.5
            low, high = (tau, high) if next(loop(seed, "mean", tau, 1)).details["duty"] > duty else (low, tau)
        kept = {}
        for aggregate, tau in (("rmse", RMSE_TAU), ("mean", (low * high) ** 0.5)):
            for round_ in loop(seed, aggregate, tau, rounds):
                o = round_.outcome
                gain = f"{o.trait_gain:+.3f} [{o.trait_gain_low:+.3f}, {o.trait_gain_high:+.3f}]"
                print(f"{seed:4} {aggregate:9} {tau:7.4f} {o.round:5} {round_.details['duty']:5.2f} {gain:>24} "
                      f"{o.coherence_kept:6.3f} {o.fluency_kept:6.3f}  {o.verdict} {o.flags}", flush=True)
                kept[aggregate] = o.coherence_kept
        apart.append(kept["rmse"] - kept["mean"])
    print(f"RESULT seeds={seeds} coherence_kept_rmse_minus_mean={sum(apart) / len(apart):+.3f}")
    return 0


if __name__ == "__main__":
    main()
