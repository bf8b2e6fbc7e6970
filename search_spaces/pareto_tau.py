"""How tight may the barrier be, and which aggregate should it watch?"""

HYPOTHESIS = ("Below the operating KL, tau is the main dial between trait and coherence; rmse holds coherence where the "
              "mean lets token loops through, at the cost of a shallower trait.")
BASE = {"heal.lam": 1.0}
TRIALS = 16
COST = ("several minutes a trial on 2 CPU cores with the embedded model; round 0 up to healing is shared by all trials; "
        "not timed on a GPU yet")


def domains():
    from ray import tune

    return {"heal.tau": tune.loguniform(0.02, 4.0), "heal.aggregate": tune.choice(["mean", "rmse"])}
