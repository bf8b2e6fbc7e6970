"""python -m benchmarks.tau_sweep [--small] [--store FOLDER]: what does the barrier do as tau goes from tight to inert?

One round on SmolLM2 for every tau and aggregate, on the same completions: the stage store computes everything up to the
healing once, and a folder named by --store is gone on with.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.command import command
from benchmarks.timing import environment
from steerheal import models
from steerheal.loop import HealLoop
from steerheal.settings import from_flat
from steerheal.stages import Store

TAUS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 4.0)
SETTINGS = {"model": "smollm2-135m-instruct", "rounds": 1, "heal.lr": 5e-4, "heal.lam": 1.0, "evaluate.ladder": [1.0]}
SMALL = {"steer.contexts": 16, "generate.prompts": 4, "generate.n_keep": 12, "generate.min_train": 4,
         "generate.max_new_tokens": 24, "heal.epochs": 1, "evaluate.n_items": 7, "evaluate.n_conduct": 8,
         "evaluate.n_fluency": 8, "evaluate.fluency_tokens": 16}


def sweep(small: bool = False, store: Path | None = None) -> int:
    folder = store or Path(tempfile.mkdtemp(prefix="tau_sweep-"))
    base = SETTINGS | (SMALL if small else {})
    lm = models.load(from_flat(base))
    print(f"{lm.name}, {environment()}, stages in {folder}")
    print(f"{'aggregate':9} {'tau':>5} {'duty':>5} {'pressure':>8} {'val nll':>7} {'trait gain':>24} {'kept':>6} "
          f"{'fluent':>6}  verdict")
    rows = []
    for barrier in [{"heal.barrier": "nll"}] + [{"heal.aggregate": how, "heal.tau": tau} for how in ("mean", "rmse")
                                                for tau in (TAUS[:3:2] if small else TAUS)]:
        loop = HealLoop(from_flat(base | barrier), lm, Store(folder))
        round_ = next(loop.rounds(), None)
        if round_ is None:
            print(f"ended: {loop.end}")
            return 1
        o, d = round_.outcome, round_.details
        gain = f"{o.trait_gain:+.3f} [{o.trait_gain_low:+.3f}, {o.trait_gain_high:+.3f}]"
        pressure = "" if d["pressure"] is None else f"{d['pressure']:.2f}"
        tau = f"{barrier['heal.tau']:g}" if "heal.tau" in barrier else ""
        print(f"{barrier.get('heal.aggregate', 'nll'):9} {tau:>5} {d['duty']:5.2f} {pressure:>8} {d['val_nll_last']:7.3f} "
              f"{gain:>24} {o.coherence_kept:6.3f} {o.fluency_kept:6.3f}  {o.verdict} {o.flags}", flush=True)
        rows.append(o)
    print(f"RESULT trials={len(rows)} nll_gain={rows[0].trait_gain:.3f} tightest_gain={rows[1].trait_gain:.3f}")
    return 0


if __name__ == "__main__":
    command(sweep)
