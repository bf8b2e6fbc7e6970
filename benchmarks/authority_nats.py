"""A search space: the authority loop on a model that can do the forced choice, asked without worked examples.

    python -m steerheal.search --space benchmarks/authority_nats.py
"""

HYPOTHESIS = ("Where a model can do the forced choice, the loop lowers authority nats further than a prompt or raw steering "
              "does at equal coherence, and a tighter barrier trades that for coherence.")
BASE = {
    "model": "qwen2.5-coder-1.5b-instruct",
    "rounds": 2,
    "steer.contexts": 48,
    "generate.prompts": 8,
    "generate.n_keep": 24,
    "heal.epochs": 2,
    "heal.lr": 5e-4,
    "heal.lam": 1.0,
    "evaluate.trait": "foundation",
    "evaluate.shots": 0,
    "evaluate.ladder": [0.25, 0.5, 1.0],
    "evaluate.n_fluency": 32,
    "evaluate.fluency_tokens": 32,
}
TRIALS = 4
COST = "a complete grid of 4 barriers; on 2 CPU cores the baselines and two of them took 1.7 hours"
ARMS = [("nll", "rmse", 0.5), ("kl_rev", "rmse", 0.5), ("kl_rev", "mean", 0.1), ("kl_rev", "rmse", 0.1)]


def points():
    return [dict(zip(("heal.barrier", "heal.aggregate", "heal.tau"), arm)) for arm in ARMS]
