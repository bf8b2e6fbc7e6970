"""Is it the KL barrier, or would any regulariser do?"""

HYPOTHESIS = ("At the same data a reverse-KL barrier keeps more coherence per nat of trait than forward KL, weight decay, a "
              "spectral penalty or nothing; and it can replace the coherence filter, which nll cannot.")
BASE = {"steer.alpha": 1.5, "heal.lam": 1.0, "heal.tau": 0.1}  # past the edge: at a coherent dose there is nothing to heal
SEEDS = 3
NLL = {"heal.barrier": "nll", "heal.weight_decay": 0.0, "heal.spectral_lam": 0.0, "filter.coherence": True}
ARMS = [
    NLL,
    NLL | {"heal.barrier": "kl_rev"},
    NLL | {"heal.barrier": "kl_fwd"},
    NLL | {"heal.weight_decay": 300.0},  # AdamW shrinks by lr * decay a step, and the steps are few: at 0.1 this is nll
    NLL | {"heal.spectral_lam": 30.0},
    NLL | {"heal.barrier": "kl_rev", "filter.coherence": False},
    NLL | {"filter.coherence": False},
]
SAMPLER = "grid"
TRIALS = SEEDS * len(ARMS)
COST = ("a complete grid of 7 arms x 3 run seeds, seed by seed, so that it can be stopped after any of them; several "
        "minutes a trial on 2 CPU cores with the embedded model; not timed on a GPU yet")


def points():
    return [{"seed": seed} | arm for seed in range(SEEDS) for arm in ARMS]
