"""Dose and barrier together: the front that a single dial cannot reach."""

HYPOTHESIS = ("A hard dose behind a tight barrier and a soft dose behind a loose one are different models at equal trait; "
              "searched together they give a front that dominates those of pareto_tau, pareto_lam and pareto_alpha.")
BASE = {}
TRIALS = 64
COST = ("several minutes a trial on 2 CPU cores with the embedded model, so most of a day; only baselines and the first "
        "vector are shared by all trials; not timed on a GPU yet")


def domains():
    from ray import tune

    return {
        "steer.alpha": tune.uniform(0.2, 1.6),
        "heal.lam": tune.loguniform(0.02, 20.0),
        "heal.tau": tune.loguniform(0.01, 5.0),
        "heal.aggregate": tune.choice(["mean", "rmse", "p95", "max"]),
        "heal.lam_round_pow": tune.uniform(-1.5, 1.5),
        "heal.ref": tune.choice(["base", "prev"]),
    }
