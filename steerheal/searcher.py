"""Optuna's study behind Ray Tune's Searcher interface.

Ray's own OptunaSearch, given several objectives, tells only the last result, drops the rounds in between and leaves
failed trials running for ever; this one keeps every round as a user attribute, tells what `objectives.worth` says a
trial is worth, constraint included. Each proposal's sampler is seeded by (study seed, logical index): a resumed
search proposes what an undisturbed one would. The study's SQLite file is the truth about what was tried.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Iterable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from ray.tune.search import Searcher

from steerheal import halving
from steerheal.errors import UserError
from steerheal.ledger import conclude, finished_rounds, latest
from steerheal.spaces import SAMPLERS, decoded
from steerheal.stages import seed_of

log = logging.getLogger(__name__)

STARTUP_TRIALS = 8  # random proposals before a model takes over; NSGA-II's generations are as large


def make_sampler(name: str, seed: int) -> BaseSampler:
    """A fresh sampler by name, for one proposal. What it learns from, NSGA-II's generations included, is in the study.

    Raises:
        UserError: gp without scipy.
    """
    if name == "tpe":
        return TPESampler(multivariate=True, n_startup_trials=STARTUP_TRIALS, seed=seed)
    if name == "nsgaii":
        return NSGAIISampler(population_size=STARTUP_TRIALS, seed=seed)
    if name == "gp":
        if importlib.util.find_spec("scipy") is None:
            raise UserError("--sampler gp needs scipy: pip install scipy (or pip install -e '.[gp]').")
        return GPSampler(n_startup_trials=STARTUP_TRIALS, seed=seed)
    if name in ("random", "grid"):  # a grid's proposals come fixed
        return RandomSampler(seed=seed)
    raise ValueError(f"sampler = {name!r}: allowed: {', '.join(SAMPLERS)}")


def recover(study: optuna.Study) -> dict[int, dict[str, Any]]:
    """Close what an interrupted run left open.

    Trials still RUNNING are told FAIL; their logical indices come back with the parameters they had, so that they run
    again as they were. Only finished trials count, so an index that failed is returned too.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return {index: dict(trial.params) for index, trial in latest(study).items() if trial.state == TrialState.FAIL}


def missing(study: optuna.Study, trials: int) -> list[int]:
    """Logical indices below `trials` without a finished trial."""
    done = {i for i, t in latest(study).items() if t.state == TrialState.COMPLETE}
    return [i for i in range(trials) if i not in done]


class StudySearcher(Searcher):
    """Proposes the wanted logical indices once each. What it records never raises into Ray's event loop."""

    def __init__(self, study: optuna.Study, space: dict[str, BaseDistribution], indices: Iterable[int],
                 fixed: dict[int, dict[str, Any]], sampler: str, seed: int,
                 on_change: Callable[[int, dict[str, Any] | None], None] = lambda index, row: None,
                 halve: bool = False, on_idle: Callable[[], None] = lambda: None):
        """
        Args:
            fixed: parameters that are not up to the sampler, by logical index: a grid's points, interrupted trials.
            on_change: called with the index and a round's row when it is finished, with None when the trial has ended.
            halve: stop trials early by `halving.halved`.
            on_idle: called by `idle`.
        """
        super().__init__()
        self.study, self.space, self.fixed, self.on_change, self.halve = study, space, fixed, on_change, halve
        self.sampler, self.seed, self.on_idle = sampler, seed, on_idle
        self.todo = list(indices)
        self.trials: dict[str, optuna.Trial] = {}  # by Ray's id
        self.rounds: dict[str, list[dict[str, Any]]] = {}
        self.index: dict[str, int] = {}
        self.halved: set[str] = set()
        self.running: set[str] = set()  # Ray's ids of the trials that have a worker

    def suggest(self, trial_id: str) -> Any:
        if not self.todo:
            return Searcher.FINISHED
        index = self.todo.pop(0)
        sampler = make_sampler(self.sampler, seed_of(self.seed, "ask", index) % 2**32)
        if set(self.fixed.get(index, {})) == set(self.space):
            sampler = PartialFixedSampler(self.fixed[index], sampler)
        self.study.sampler = sampler
        trial = self.study.ask(self.space)
        trial.set_user_attr("index", index)
        self.trials[trial_id], self.rounds[trial_id], self.index[trial_id] = trial, [], index
        return dict(index=index, params={name: decoded(value) for name, value in trial.params.items()})

    def stops(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether halving ends this trial with this result. Ray asks its stopper before it tells the searcher."""
        if self.halve and trial_id in self.trials:
            known = len(self.rounds[trial_id])
            self._guard(self._keep, trial_id, result)
            if len(self.rounds[trial_id]) > known and not result.get("end"):  # a restarted trial repeats its rounds
                self._guard(self._judge, trial_id)
        return trial_id in self.halved

    def idle(self) -> None:
        """Ray's event loop went round, ten times a second or so."""
        self._guard(self.on_idle)

    def _judge(self, trial_id: str) -> None:
        own = self.rounds[trial_id]
        n = len(own)
        if not halving.is_rung(n):
            return
        known = finished_rounds(self.study)
        if len(known.pop(self.index[trial_id])) > n:
            return  # an earlier attempt went on from here, and what it finished stays
        if halving.halved(own[n - 1], [other[n - 1] for other in known.values() if len(other) >= n]):
            self.halved.add(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._guard(self._keep, trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id not in self.trials:
            return
        if result:
            self._guard(self._keep, trial_id, result)
        self._guard(self._tell, trial_id, result or {}, error)

    def _keep(self, trial_id: str, result: dict[str, Any]) -> None:
        """Store the round that a result carries, once."""
        trial, rounds = self.trials[trial_id], self.rounds[trial_id]
        row = json.loads(result.get("row") or "null")
        new = row is not None and row["round"] == len(rounds)
        if new:  # before anything is written: a study that is locked for a while must not lose the rounds that follow
            rounds.append(row)
        baselines = result.get("baselines")
        if baselines and "baselines" not in self.study.user_attrs:  # the first trial's, for the whole search
            self.study.set_user_attr("baselines", json.loads(baselines))
            self.study.set_user_attr("trait", result["trait"])
        if new:
            trial.set_user_attr("rounds", rounds)
            self.on_change(self.index[trial_id], row)

    def _tell(self, trial_id: str, result: dict[str, Any], error: bool) -> None:
        self.running.discard(trial_id)
        trial, rounds = self.trials.pop(trial_id), self.rounds.pop(trial_id)
        end = "killed" if error else result.get("end") or ("halved" if trial_id in self.halved else "stopped")
        why = ("its worker died again and again: killed by the system (memory?), by an error of the card (errors/ holds it), "
               "or its machine went away") if error else result.get("error", "")
        conclude(self.study, trial, rounds, end, why, json.loads(result.get("starved") or "{}"))
        self.on_change(self.index[trial_id], None)

    def _guard(self, action: Callable[..., None], *args: Any) -> None:
        try:
            action(*args)
        except Exception as error:  # a raise here would abort the whole search; the study is re-read at the next start
            first = (str(error).splitlines() or [""])[0]
            log.error("could not record a result, the next start will: %s: %s", type(error).__name__, first)

    def __getstate__(self) -> dict[str, Any]:
        """Ray pickles its searcher for a Tuner.restore that is never used here; the study cannot be pickled."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a search is resumed from its study."""
