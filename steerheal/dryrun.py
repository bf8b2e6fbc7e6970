"""What a search would do: `--dry-run`. It loads the model to know its digest, reads the store, and computes nothing."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from steerheal import events, ledger, models, searcher, study_file, weights
from steerheal.errors import UserError
from steerheal.loop import HealLoop
from steerheal.plan import Plan, read
from steerheal.settings import from_flat, to_flat
from steerheal.stages import Result, Store, digest_of


def report(plan: Plan) -> int:
    """Print which trials would run, how much of each the store has, and time and disk from past searches."""
    weights.locate(plan.settings.model, plan.commit)
    study = _copy_in_memory(plan.folder if plan.resumed else None)
    fixed = searcher.recover(study)
    if plan.sampler == "grid":
        fixed |= dict(enumerate(plan.space.points()))
    todo = searcher.missing(study, plan.trials)
    print(f"{plan.name}: {plan.trials} trials of {plan.settings.rounds} rounds on {plan.settings.model}, sampler "
          f"{plan.sampler}, in {plan.folder}")
    print(f"{plan.trials - len(todo)} finished, {len(todo)} to run")
    known = [i for i in todo if i in fixed or i < searcher.STARTUP_TRIALS or plan.sampler == "random" or i == todo[0]]
    search = searcher.StudySearcher(study, plan.space.distributions(), known, fixed, plan.sampler, plan.seed)
    lm = models.load(plan.settings, plan.commit) if known else None
    for index in known:
        params = search.suggest(str(index))["params"]
        loop = HealLoop(from_flat(to_flat(plan.settings) | params), lm, store := ReadOnly(plan.store))  # type: ignore[arg-type]
        print(f"  trial {index}  " + " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                                              for k, v in params.items()))
        print(f"      {_replayed(loop, store)}")
    if len(known) < len(todo):
        print(f"  {len(todo) - len(known)} more, whose settings depend on these results")
    left = len(todo) * plan.settings.rounds
    print(_cost(plan, left) if todo else "nothing to compute: every trial is finished")
    return 0


class Missing(Exception):
    """A stage that the store does not have."""


class ReadOnly(Store):
    """The store, without computing: the first stage it lacks ends the loop."""

    found = 0

    def stage(self, stage: str, inputs: dict[str, Any], compute: Callable[[], Result]) -> Result:
        result = self.load(digest_of(stage, inputs))
        if result is None:
            raise Missing(stage)
        self.found += 1
        return result


def _replayed(loop: HealLoop, store: ReadOnly) -> str:
    """How far the store carries a trial, in words."""
    try:
        rounds = sum(1 for _ in loop.rounds())
    except Missing as missing:
        return f"{store.found} stages are in the store; first to compute: {missing}, {loop.where}"
    except UserError as error:
        return f"would fail: {error}"
    return f"all {store.found} stages of its {rounds} rounds are in the store"


@dataclass
class Past:
    """What a round of an earlier search took, everything included."""

    folder: Path
    rounds: int
    seconds: float  # computing stages, per finished round
    size: float  # bytes stored, per finished round
    differs: list[str]  # settings that are not as in the search to come


def _cost(plan: Plan, rounds: int) -> str:
    past = [p for folder in plan.folder.parent.glob("*/") if (p := _past(folder, plan)) is not None]
    if not past:
        return (f"time and disk: unknown, for no search on {plan.settings.model} has finished a round in "
                f"{plan.folder.parent}. The space says: {plan.space.cost}")
    best = min(past, key=lambda p: (len(p.differs), -p.rounds))
    free = shutil.disk_usage(plan.folder.parent).free / 1e9
    differs = f", where these settings differ: {', '.join(best.differs)}" if best.differs else ", same settings"
    return (f"time: about {rounds * best.seconds / 60:.0f} minutes for at most {rounds} rounds, one trial at a time; disk: "
            f"{rounds * best.size / 1e9:.2f} GB of {free:.0f} GB free\n  (from {best.seconds:.0f} s and "
            f"{best.size / 1e6:.1f} MB a round over {best.rounds} rounds in {best.folder}, sharing included{differs})")


def _past(folder: Path, plan: Plan) -> Past | None:
    try:
        there, study = read(folder), ledger.open_study(folder)
    except (UserError, KeyError):
        return None
    rounds = sum(map(len, ledger.finished_rounds(study).values()))
    own = to_flat(plan.settings)
    if there["model"] != plan.settings.model or not rounds:
        return None
    done = [e for e in events.read(folder) if e["kind"] == "computed"]
    store = Store(plan.store)
    paths = {store.path(e["digest"]) for e in done}
    searched = set(plan.space.distributions())
    differs = [k for k, v in own.items() if k not in searched | {"rounds", "seed"} and there["settings"].get(k) != v]
    return Past(folder, rounds, sum(e["seconds"] for e in done) / rounds,
                sum(p.stat().st_size for p in paths if p.exists()) / rounds, differs)


def _copy_in_memory(folder: Path | None) -> optuna.Study:
    """The study's trials, where there is one to go on with, in a study that nothing is written from."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    copy = optuna.create_study(directions=["maximize", "maximize"])
    if folder and any((folder / name).exists() for name in (study_file.NAME, study_file.BACKUP)):
        for trial in ledger.open_study(folder).get_trials(deepcopy=False):
            if trial.state == optuna.trial.TrialState.RUNNING:  # as `recover` will find it
                trial.state = optuna.trial.TrialState.FAIL
                trial.datetime_complete = trial.datetime_start
            copy.add_trial(trial)
    return copy
