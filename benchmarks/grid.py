"""python -m benchmarks.grid: a complete grid of one-round trials on the embedded model, for `benchmarks.samplers`.

alpha 4 x lam 2 x tau 4 x aggregate 2 = 64 trials, through the search's own store, so it resumes and repeats for free. The
ledger, results/grid/ledger.csv, is the grid: one row per combination. Flags of `steerheal.search` are passed on
(--trials, --hours, --concurrent, --status, ...). This file is the search space, too.
"""

from __future__ import annotations

import sys

HYPOTHESIS = "None: the whole grid is computed, so that samplers can be replayed on it as often as one likes."
BASE = {
    "model": "smollm2-135m-instruct",
    "rounds": 1,
    "steer.contexts": 48,
    "generate.prompts": 8,
    "generate.n_keep": 24,
    "heal.epochs": 2,
    "heal.lr": 5e-4,
    "evaluate.n_items": 35,
    "evaluate.ladder": [1.0],
    "evaluate.fluency_tokens": 32,
}
SAMPLER = "grid"
TRIALS = 64
COST = "46 minutes of stages on 2 CPU cores: baselines and four doses once, then a heal and an evaluation per trial"


def domains():
    from ray import tune

    return {
        "steer.alpha": tune.choice([0.4, 0.8, 1.2, 1.6]),  # first, so that a dose's completions are made together
        "heal.lam": tune.choice([0.3, 3.0]),
        "heal.tau": tune.choice([0.03, 0.1, 0.3, 1.0]),
        "heal.aggregate": tune.choice(["mean", "rmse"]),
    }


def main() -> None:
    from steerheal import search

    sys.argv[1:1] = ["--space", __file__]
    search.main()


if __name__ == "__main__":
    main()
