"""How heavy a barrier, and should it weigh less or more from round to round?"""

HYPOTHESIS = ("A barrier that grows lighter over the rounds (lam_round_pow below 0) lets the trait go on moving after the "
              "round at which a constant one stops it; one that grows heavier holds coherence and stops it sooner.")
BASE = {"heal.tau": 0.1}
TRIALS = 24
COST = ("several minutes a trial on 2 CPU cores with the embedded model; lam_round_pow acts from round 1 on, so it is "
        "worth searching with --rounds 4 or more; not timed on a GPU yet")


def domains():
    from ray import tune

    # 0.01 is nll but for the noise, 30 holds every completion at tau
    return {"heal.lam": tune.loguniform(0.01, 30.0), "heal.lam_round_pow": tune.uniform(-2.0, 2.0)}
