"""Which number of a completion's per-token KL should the barrier watch?"""

HYPOTHESIS = ("What watches the tail (rmse, p95, max) catches token loops that the mean averages away; each has its own "
              "scale of tau, the mean's being the smallest, so every aggregate gets the whole range.")
BASE = {"heal.lam": 1.0}
TRIALS = 32
COST = ("several minutes a trial on 2 CPU cores with the embedded model; round 0 up to healing is shared by all trials; "
        "not timed on a GPU yet")


def domains():
    from ray import tune

    return {"heal.aggregate": tune.choice(["mean", "rmse", "p95", "max"]), "heal.tau": tune.loguniform(0.005, 10.0)}
