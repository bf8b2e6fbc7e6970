"""Does everything work on this machine?"""

HYPOTHESIS = "None: one trial of one short round, to see that model, store, Ray and plots work here."
BASE = {
    "model": "smollm2-135m-instruct",
    "rounds": 1,
    "steer.contexts": 16,
    "generate.prompts": 4,
    "generate.max_new_tokens": 16,
    "generate.n_keep": 8,
    "generate.min_train": 4,
    "heal.epochs": 1,
    "heal.lr": 5e-4,
    "evaluate.n_items": 7,
    "evaluate.shots": 7,
    "evaluate.n_conduct": 4,
    "evaluate.n_fluency": 8,
    "evaluate.fluency_tokens": 16,
    "evaluate.ladder": [1.0],
}
TRIALS = 1
COST = "one to one and a half minutes on 2 CPU cores with the embedded model (74 and 84 s measured); its numbers mean nothing"


def domains():
    from ray import tune

    return {"heal.tau": tune.loguniform(0.02, 1.5)}
