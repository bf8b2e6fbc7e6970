"""A search's folder made up in memory, for what reads one: rounds, baselines, completions."""

import datetime
import json
import math

import numpy as np
import optuna
import pandas as pd

from steerheal import ledger, objectives

START = datetime.datetime(2026, 1, 1)
SPACE = {"heal.tau": optuna.distributions.FloatDistribution(0.02, 4.0, log=True),
         "heal.aggregate": optuna.distributions.CategoricalDistribution(["mean", "rmse"])}


def make_row(r, tau, aggregate, rng, noise=0.02):
    """A round whose gain and incoherence grow with tau and with the round; tau 4 breaks the third one."""
    push = math.log1p(tau) * (1.3 if aggregate == "mean" else 1.0)
    gain = 0.16 * (r + 1) * push + float(rng.normal(0, noise))
    kept = min(1.0, 1 - 0.012 * (r + 1) ** 1.6 * push**2 - abs(float(rng.normal(0, 0.002))))
    steered_kept = kept - 0.06 - 0.02 * r
    wide = 0.05 + 0.1 * gain
    state = dict(coherence=0.93 * kept, coherence_low=0.93 * kept - 0.006, coherence_high=0.93 * kept + 0.005,
                 authority_nats=-2.1 - gain, care_nats=-2.4 + 0.3 * gain, conduct_nats=gain)
    steered = dict(steered_gain=gain + 0.18, steered_gain_low=gain + 0.1, steered_gain_high=gain + 0.27,
                   steered_coherence=0.93 * steered_kept, steered_authority_nats=-2.4 - gain,
                   steered_care_nats=-2.5 + 0.2 * gain)
    violation = max(0.85 - kept, -0.15)
    return dict(round=r, trait="conduct_nats", trait_gain=gain, trait_gain_low=gain - wide, trait_gain_high=gain + wide,
                coherence_kept=kept, fluency_kept=1.0, violation=violation, verdict="heal" if violation <= 0 else "broken",
                flags="", deliverable=violation <= 0, duty=max(0.0, 0.9 - 0.4 * tau), kappa=0.8, n_kept=24,
                adapter=f"{tau}{aggregate}{r}", chain=[f"{tau}{aggregate}{i}" for i in range(r + 1)], draws=[],
                log_ratio=0.2 + gain, **state, **steered)


def write_search(folder, trials=12, rounds=3, change=lambda row: row, space=SPACE, baselines=True, seed=0, settings=(),
                 storage=None, identity=None):
    """`change` edits each row before it is stored."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    study = optuna.create_study(study_name="steerheal", storage=storage, directions=["maximize"] * 2)
    for i in range(trials):
        params = {"heal.tau": float(np.exp(rng.uniform(np.log(0.02), np.log(4)))), "heal.aggregate": ["mean", "rmse"][i % 2]}
        rows = [change(make_row(r, params["heal.tau"], params["heal.aggregate"], rng)) for r in range(rounds)]
        best = objectives.best(rows)
        trial = optuna.trial.create_trial(
            values=[best["trait_gain"], best["coherence_kept"]], params={k: params[k] for k in space}, distributions=space,
            user_attrs=dict(index=i, rounds=rows, end="rounds"))
        trial.set_constraint("deliverable", best["violation"])
        trial.datetime_start = START + datetime.timedelta(hours=i)
        trial.datetime_complete = trial.datetime_start + datetime.timedelta(minutes=50)
        study.add_trial(trial)
    if baselines:
        ladder = [("base", 0, 0.0, 1.0), ("prompted", 0, 0.06, 0.995), ("steered", 0.5, 0.2, 0.985),
                  ("steered", 1.0, 0.42, 0.88), ("steered", 1.25, 0.5, 0.6)]
        study.set_user_attr("baselines", [dict(
            label=label, edge_doses=dose, trait_gain=gain, coherence_kept=kept, coherence=0.93 * kept,
            authority_nats=-2.1 - gain, care_nats=-2.4) for label, dose, gain, kept in ladder])
    made = {"model": "tiny", "persona": "authority", "dtype": "float32", "evaluate.shots": 0, "evaluate.trait": "auto"}
    made |= dict(settings)
    (folder / "search.json").write_text(json.dumps(dict(settings=made, identity=identity or {})))
    ledger.write(study, folder)
    return study


def make_samples(n=400, seed=0):
    """Completions whose perplexity grows with the dose; the gate is 40."""
    rng = np.random.default_rng(seed)
    share = rng.choice([0.4, 0.6, 0.8], n)
    perplexity = np.exp(1.5 + 3 * share + rng.normal(0, 0.8, n))
    loops = rng.random(n) < 0.1
    reasons = [" ".join(["perplexity"] * int(p > 40) + ["repetition"] * int(loop)) for p, loop in zip(perplexity, loops)]
    return pd.DataFrame(dict(
        trial=0, round=rng.integers(0, 3, n), kind=rng.choice(["probe", "batch"], n), kappa=1.0, dose=5 * share,
        edge_dose=share, prompt="Do you?", text=[f"$I$ would {i} \u4f60\x07\n not_ \\ do $ that " * 8 for i in range(n)],
        perplexity=perplexity, repetition=0.1, narrates=False, refuses=False, reasons=reasons,
        kept=[not r for r in reasons], gate=40.0))
