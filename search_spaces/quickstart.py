"""A first search that ends while you watch."""

HYPOTHESIS = ("The barrier's threshold tau trades trait for coherence: near 0 healing undoes the steering, far above the "
              "operating KL the barrier is inert.")
BASE = {
    "model": "smollm2-135m-instruct",  # on a large card, too: a first search ends while you watch
    "rounds": 2,
    "steer.contexts": 48,
    "generate.prompts": 8,
    "generate.n_keep": 24,
    "generate.min_train": 12,
    "heal.epochs": 2,
    "heal.lr": 5e-4,  # few steps, so larger ones: at the default rate no tau in the domain would bind
    "heal.lam": 1.0,
    "evaluate.n_items": 35,
    "evaluate.ladder": [0.5, 1.0],
    "evaluate.fluency_tokens": 32,
}
TRIALS = 4
COST = "about 6 minutes on 2 CPU cores with the embedded model (6:07 measured)"


def domains():
    from ray import tune

    return {"heal.tau": tune.loguniform(0.02, 1.5)}
