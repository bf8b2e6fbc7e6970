"""Is the front real? Its members again, on fresh run seeds.

The front was picked as the best of many noisy points, so some of it is luck. Each trial with a member on the front runs
again on K run seeds that the search never used, up to its last round on the front. Members that share a seed share its
draws, so the front of each seed is a paired comparison. The runs are a study of their own in SEARCH/confirm, through the
same store; the same command resumes it, and a larger K adds seeds.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd

from steerheal import driver, ledger, pareto, searcher
from steerheal.display import make_console, say_failures
from steerheal.errors import UserError
from steerheal.export import plain
from steerheal.plan import Plan
from steerheal.stages import make_folder


def confirm(plan: Plan, study: Any, k: int, machine: driver.Machine) -> int:
    """Run what is missing, write confirm.csv and print who stays. Returns the exit code.

    Raises:
        UserError: the search has no front yet.
    """
    table = ledger.build(study)
    front = ledger.front(table)
    if front.empty:
        raise UserError(f"{plan.folder}: no round is on the front yet, so there is nothing to confirm. Run the search first.")
    space = plan.space.distributions()
    wanted = proposals(front, list(space), [_last_seed(plan, space) + 1 + i for i in range(k)])
    own = dataclasses.replace(plan, name=f"{plan.name}, confirming", folder=plan.folder / "confirm", sampler="grid",
                              halving=False, settings=dataclasses.replace(plan.settings, rounds=int(front["round"].max()) + 1))
    make_folder(own.folder)
    again = ledger.create_study(own.folder)
    searcher.recover(again)
    fixed = _indexed(again, wanted)
    todo = [i for i in searcher.missing(again, len(fixed)) if fixed[i] in wanted]
    if todo:
        done = len(fixed) - len(searcher.missing(again, len(fixed)))  # of an earlier front, too
        ended = driver.run(own, again, _distributions(space, fixed), todo, fixed, machine, done)
    else:
        ended = driver.Ended("", "nothing to compute: every seed has run")
    found = results(front, list(space), plan.settings.seed, again)
    ledger.write_csv(plan.folder / "confirm.csv", found)
    left = [i for i in searcher.missing(again, len(fixed)) if fixed[i] in wanted]
    return _report(plan.folder, found, ledger.build(again), left, ended)


def _last_seed(plan: Plan, space: dict[str, Any]) -> int:
    """The largest run seed that the search has used or may yet use."""
    searched: Any = space.get("seed")
    return max([plan.settings.seed, *getattr(searched, "choices", ()), getattr(searched, "high", 0)])


def proposals(front: pd.DataFrame, params: list[str], seeds: list[int]) -> list[dict[str, Any]]:
    """What to run: the parameters of every trial with a member on the front, its rounds, and each of the seeds."""
    out: list[dict[str, Any]] = []
    for _, rows in front.groupby("trial"):
        row = rows.loc[rows["round"].astype(int).idxmax()]
        member = {name: plain(row[name]) for name in params}
        out += [member | {"rounds": int(row["round"]) + 1, "seed": seed} for seed in seeds]
    return out


def results(front: pd.DataFrame, params: list[str], run_seed: int, study: Any) -> pd.DataFrame:
    """Every member of the front on every seed: trial, round, seed, fresh, trait_gain, coherence_kept, deliverable.

    The search's own seed comes first (fresh is false). A run that ended before the round has no numbers and was not
    deliverable.
    """
    runs = [t for t in ledger.latest(study).values() if t.state.name == "COMPLETE"]
    rows = []
    for _, member in front.sort_values("trait_gain", ascending=False).iterrows():
        head = dict(trial=int(member["trial"]), round=int(member["round"]))
        own_seed = int(member["seed"]) if "seed" in front else run_seed
        rows.append(head | dict(seed=own_seed, fresh=False, **_numbers(member)))
        for run in runs:
            if all(run.params[p] == plain(member[p]) for p in params if p not in ("seed", "rounds")):
                rounds = run.user_attrs.get("rounds", [])
                if run.params["rounds"] > head["round"]:
                    found = rounds[head["round"]] if len(rounds) > head["round"] else None
                    rows.append(head | dict(seed=run.params["seed"], fresh=True, **_numbers(found)))
    return pd.DataFrame(rows).drop_duplicates(["trial", "round", "seed"])


def stays(found: pd.DataFrame) -> pd.DataFrame:
    """One row per member: trial, round, gain on the search's seed; of fresh seeds their number n, how many were deliverable,
    and on_front, on how many of them no other member dominates it; over the deliverable ones mean_gain, sd_gain and mean_kept,
    because a broken model's gain goes anywhere."""
    fresh = found[found["fresh"]]
    wins: dict[tuple[int, int], int] = {}
    for _, group in fresh.groupby("seed"):
        able = group[group["deliverable"].astype(bool)].reset_index(drop=True)
        for i in pareto.front(list(zip(able["trait_gain"], able["coherence_kept"]))):
            key = int(able["trial"][i]), int(able["round"][i])
            wins[key] = wins.get(key, 0) + 1
    rows = []
    for (trial, round_), group in found.groupby(["trial", "round"], sort=False):
        again = group[group["fresh"]]
        able = again[again["deliverable"].astype(bool)]
        rows.append(dict(trial=trial, round=round_, gain=group[~group["fresh"]]["trait_gain"].iloc[0], n=len(again),
                         mean_gain=able["trait_gain"].mean(), sd_gain=able["trait_gain"].std(ddof=1),
                         mean_kept=able["coherence_kept"].mean(), deliverable=len(able),
                         on_front=wins.get((trial, round_), 0)))
    return pd.DataFrame(rows)


def seed_noise(found: pd.DataFrame, column: str) -> float:
    """Standard deviation between run seeds, pooled over members: the root of the mean variance over the fresh seeds on which
    they are deliverable."""
    able = found[found["fresh"] & found["deliverable"].astype(bool)]
    return float(able.groupby(["trial", "round"])[column].var(ddof=1).mean() ** 0.5)


def _report(folder: Path, found: pd.DataFrame, table: pd.DataFrame, left: list[int], ended: driver.Ended) -> int:
    console = make_console()
    console.print("Front members on fresh run seeds (gain in nats)")
    for row in stays(found).to_dict("records"):
        if not row["n"]:
            console.print(f"  {row['trial']}.{row['round']}: gain {row['gain']:+.3f} in the search, not run yet",
                          soft_wrap=True)
            continue
        of = f"deliverable on {row['deliverable']} of {row['n']} fresh seeds"
        if row["deliverable"]:
            spread = f" ± {row['sd_gain']:.3f}" if row["sd_gain"] == row["sd_gain"] else ""
            of += (f": there gain {row['mean_gain']:+.3f}{spread}, coherence kept {row['mean_kept']:.3f}, on the front on "
                   f"{row['on_front']}")
        console.print(f"  {row['trial']}.{row['round']}: gain {row['gain']:+.3f} in the search, {of}", soft_wrap=True)
    noise = [seed_noise(found, c) for c in ("trait_gain", "coherence_kept")]
    if all(n == n for n in noise):
        console.print(f"seed noise, one standard deviation: {noise[0]:.3f} nats of trait gain, {noise[1]:.3f} of "
                      f"coherence kept")
    console.print(ended.summary)
    console.print(f"{folder / 'confirm.csv'}", soft_wrap=True)
    if not left:
        return 0
    say_failures(console, table, left)
    console.print(f"{len(left)} runs are missing; the same command goes on where this left off.")
    return ended.exit_code


def _indexed(study: Any, wanted: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Parameters by logical index: those tried before keep theirs, new ones are appended."""
    out = {index: dict(trial.params) for index, trial in ledger.latest(study).items()}
    for params in wanted:
        if params not in out.values():
            out[max(out, default=-1) + 1] = params
    return out


def _distributions(space: dict[str, Any], fixed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The search's own domains, with rounds and the run seed beside them."""
    from optuna.distributions import IntDistribution

    out = {name: dist for name, dist in space.items() if name != "seed"}
    for name in ("rounds", "seed"):  # one domain for all runs to come: Optuna refuses a choice that grows
        out[name] = IntDistribution(0, 2**31 - 1)
    return {name: out[name] for name in next(iter(fixed.values()))}


def _numbers(row: Any) -> dict[str, Any]:
    if row is None:
        return dict(trait_gain=float("nan"), coherence_kept=float("nan"), deliverable=False)
    return dict(trait_gain=float(row["trait_gain"]), coherence_kept=float(row["coherence_kept"]),
                deliverable=bool(row["deliverable"]))
