"""How hard to steer, and with how wide a mixture of doses?"""

HYPOTHESIS = ("Steering near the edge dose gives the most trait per round; past it the filter starves or the text that is "
              "left carries the damage. Mixing in smaller doses buys survivors and costs trait.")
BASE = {"heal.lam": 1.0, "heal.tau": 0.3}
TRIALS = 24
COST = ("several minutes a trial on 2 CPU cores with the embedded model, and little is shared: every dose samples its own "
        "completions; not timed on a GPU yet")


def domains():
    from ray import tune

    return {
        "steer.alpha": tune.uniform(0.1, 2.0),  # edge doses: 0.1 moves nothing, 2 breaks the model outright
        "generate.doses": tune.choice([(1.0,), (0.5, 1.0), (0.5, 0.75, 1.0), (0.25, 0.5, 0.75, 1.0)]),
    }
