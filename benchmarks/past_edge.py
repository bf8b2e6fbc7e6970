"""A search space: is it the barrier that separates trait from incoherence, at a dose past the edge and over four rounds?

    python -m steerheal.search --space benchmarks/past_edge.py

The coherence filter is off and walk-C lets every dose through, so that nothing but the barrier stands between the student
and what the broken, steered model wrote.
"""

HYPOTHESIS = ("Past the edge and without the coherence filter, distillation alone loses coherence round by round; under a "
              "reverse-KL barrier the trait comes through and the coherence stays.")
BASE = {
    "model": "smollm2-135m-instruct",
    "rounds": 4,
    "steer.alpha": 1.5,
    "steer.contexts": 48,
    "generate.prompts": 8,
    "generate.n_keep": 24,
    "generate.pass_target": 0.0,
    "filter.coherence": False,
    "heal.epochs": 2,
    "heal.lr": 5e-4,
    "heal.lam": 1.0,
    "evaluate.ladder": [0.5, 0.75, 1.0],
    "evaluate.fluency_tokens": 32,
}
SEEDS = 3
ARMS = [("nll", 0.1), ("kl_rev", 0.5), ("kl_rev", 0.1)]
SAMPLER = "grid"
TRIALS = SEEDS * len(ARMS)
COST = "a complete grid of 3 barriers x 3 run seeds, seed by seed; 6 minutes a trial on 2 CPU cores, and 4 for the baselines"


def points():
    return [{"seed": seed, "heal.barrier": barrier, "heal.tau": tau} for seed in range(SEEDS) for barrier, tau in ARMS]
