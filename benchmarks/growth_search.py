"""The search's own part of benchmarks/growth.py: made-up searches in which no trial takes time, so what is left is the
searcher, the study, its views and the stage store.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from analysis import report
from benchmarks.curves import Curve
from benchmarks.timing import forget_peak, resident_peak
from steerheal import ledger, objectives, searcher, stages, status, study_file
from steerheal.follower import Follower
from steerheal.searcher import StudySearcher
from steerheal.settings import Settings, to_flat

SPACE: dict[str, BaseDistribution] = {
    "heal.tau": FloatDistribution(0.02, 4.0, log=True), "heal.lam": FloatDistribution(0.03, 3.0, log=True),
    "heal.aggregate": CategoricalDistribution(["mean", "rmse", "p95", "max"])}
ROUNDS = 4  # of each trial
EVENTS = 12  # stages of a round
TOLD = 4  # trials that are asked for and told in one run
BASELINES = [dict(label=label, edge_doses=dose, trait_gain=gain, trait_gain_low=gain - 0.1, trait_gain_high=gain + 0.1,
                  coherence=0.9 * kept, coherence_kept=kept, fluency_kept=1.0, stages="{}")
             for label, dose, gain, kept in (("base", 0, 0.0, 1.0), ("prompted", 0, 0.1, 1.0), ("steered", 1.0, 0.3, 0.9))]


def a_round(index: int, rng: np.random.Generator) -> dict[str, Any]:
    """A row about as wide and as long as a real one: 130 columns, 6 kB of JSON."""
    gain, kept = float(rng.normal(0.1 * index, 0.2)), min(1.0, float(rng.normal(0.97 - 0.03 * index, 0.03)))
    numbers = rng.normal(size=91).tolist()
    row = objectives.Outcome(index, "conduct_nats", gain, gain - 0.1, gain + 0.1, *numbers[:9], kept, 0.9, 1.0,
                             0.85 - kept, "heal" if kept >= 0.85 else "broken", "", 0.5, 0.1).row()
    digests = {name: rng.bytes(32).hex() for name in ("adapter", "diary_steered", "diary_healed")}
    draws = [dict(kind="batch", kappa=1.0, completions=rng.bytes(32).hex(), scores=rng.bytes(32).hex(), reasons=[""] * 48)] * 3
    return row | digests | {f"readout_{i}": x for i, x in enumerate(numbers)} | dict(
        draws=draws, chain=[rng.bytes(32).hex()] * (index + 1), warning="the barrier never fired " * 6, edge=4.0, duty=0.2,
        survival=0.9, survival_by_share={"0.5": 1.0, "1": 0.8}, log_ratio=0.2, log_ratio_low=0.1, log_ratio_high=0.3,
        cos_v0=0.9)


@cache
def where() -> Path:
    """A folder that goes when the program ends."""
    root = Path(tempfile.mkdtemp(prefix="growth-"))
    atexit.register(shutil.rmtree, root)
    return root


@cache
def folders(sizes: tuple[int, ...]) -> dict[int, Path]:
    """Folders of finished searches by the rows of their ledgers; a smaller one is the beginning of a larger."""
    rng = np.random.default_rng(0)
    flat = to_flat(Settings(model="smollm2-135m-instruct"))
    search = dict(name="made", space="quickstart", model=flat["model"], overrides={}, sampler="tpe", seed=0, trials=sizes[-1],
                  identity=flat, settings=flat, created="today", versions={}, machine={})
    grown = where() / "grown"
    (grown / "events").mkdir(parents=True)
    (grown / "search.json").write_text(json.dumps(search))
    study = ledger.create_study(grown)
    study.set_user_attr("baselines", BASELINES)
    out: dict[int, Path] = {}
    trial = 0
    with (grown / "events" / "w-1.jsonl").open("w") as events:
        for size in sizes:
            while trial * ROUNDS < size:
                _add(study, trial, rng)
                for i in range(EVENTS * ROUNDS):
                    at = dict(time=1e6 + 100 * trial + i, trial=trial, where="round 0", stage="heal", seconds=1.0)
                    for kind in ("start", "computed"):
                        events.write(json.dumps(at | dict(kind=kind, digest=f"{trial}-{i}")) + "\n")
                trial += 1
            events.flush()
            out[size] = Path(shutil.copytree(grown, where() / str(size)))
            ledger.write(ledger.create_study(out[size]), out[size])
    return out


def _add(study: optuna.Study, index: int, rng: np.random.Generator) -> None:
    rows = [a_round(r, rng) for r in range(ROUNDS)]
    best = objectives.best(rows)
    assert best is not None
    params = {"heal.tau": float(rng.uniform(0.02, 4)), "heal.lam": float(rng.uniform(0.03, 3)), "heal.aggregate": "rmse"}
    trial = optuna.trial.create_trial(values=[best["trait_gain"], best["coherence_kept"]], params=params, distributions=SPACE,
                                      user_attrs=dict(index=index, rounds=rows, end="rounds"),
                                      constraints=dict(deliverable=best["violation"]))
    trial.datetime_start = datetime.datetime(2026, 1, 1) + datetime.timedelta(hours=index)
    trial.datetime_complete = trial.datetime_start + datetime.timedelta(minutes=50)
    study.add_trial(trial)


def tell(search: StudySearcher, trials: int) -> None:
    """Ask for trials and tell their rounds, as Ray does."""
    rng = np.random.default_rng(1)
    for _ in range(trials):
        search.suggest("t")
        for r in range(ROUNDS):
            result = dict(row=json.dumps(a_round(r, rng)), end="rounds" if r == ROUNDS - 1 else "")
            search.on_trial_result("t", result)
            search.idle()
        search.on_trial_complete("t", result)


# ---------------------------------------------------------------- parts


def trials(small: bool) -> Iterator[Curve]:
    """Four trials asked for and told in a study of so many, and whole searches of so many."""
    sizes = _sizes(small)
    counts = tuple(size // ROUNDS for size in sizes)
    copies = [Path(shutil.copytree(folders(sizes)[size], where() / f"asked-{size}")) for size in sizes]
    studies = {count: ledger.create_study(copy) for count, copy in zip(counts, copies)}
    fresh = iter(range(10**6, 10**9))
    for sampler in ("random", "tpe"):
        def ask(count: int, sampler: str = sampler) -> None:
            indices = [next(fresh) for _ in range(TOLD)]
            tell(StudySearcher(studies[count], SPACE, indices, {}, sampler, 0), TOLD)

        yield Curve(f"ask and tell {sampler}", ask, counts)

    def search(count: int) -> None:
        """As the driver does it."""
        folder = Path(tempfile.mkdtemp(dir=where())) / "made"
        shutil.copytree(folders(sizes)[sizes[0]], folder, ignore=shutil.ignore_patterns("study*", "events"))
        study = ledger.create_study(folder)
        study.set_user_attr("baselines", BASELINES)
        views = Follower(folder, study, lambda table: None)
        found = StudySearcher(study, SPACE, range(count), {}, "random", 0, lambda index, row: views.change(),
                              on_idle=views.catch_up)
        tell(found, count)
        views.catch_up(now=True)

    yield Curve("whole search", search, (4, 8) if small else (15, 30, 60, 120))


def ledger_rows(small: bool) -> Iterator[Curve]:
    """What is rebuilt from, or read of, a study of so many rows."""
    sizes = _sizes(small)
    made = folders(sizes)
    studies = {size: ledger.create_study(made[size]) for size in sizes}
    tables = {size: ledger.build(studies[size]) for size in sizes}

    def page(size: int) -> None:
        assert report.refresh(made[size])

    def show(size: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            status.show(made[size])

    yield Curve("open", lambda size: searcher.missing(ledger.create_study(made[size]), size), sizes)
    yield Curve("rebuild", lambda size: ledger.write(studies[size], made[size]), sizes, memory=lambda size: _peak(made[size]))
    yield Curve("front", lambda size: ledger.front(tables[size]), sizes)
    yield Curve("hypervolume.csv", lambda size: ledger.progress(studies[size], tables[size]), sizes)
    yield Curve("backup", lambda size: study_file.back_up(made[size]), sizes)
    yield Curve("report", page, sizes)
    yield Curve("status", show, sizes)


def _sizes(small: bool) -> tuple[int, ...]:
    return (40, 80, 160) if small else (625, 2500, 10_000)


def _peak(folder: Path) -> float:
    """MiB by which the process grows while it opens the study and rebuilds the ledger."""
    before = forget_peak()
    ledger.write(ledger.create_study(folder), folder)
    return 1024 * (resident_peak() - before)


def store(small: bool) -> Iterator[Curve]:
    """A hundred results read, and twenty new ones written, in a store that holds so many."""
    sizes = (100, 200) if small else (1000, 8000, 64_000)
    roots = {size: Path(tempfile.mkdtemp(dir=where())) for size in sizes}
    digests = {}
    for size, root in roots.items():
        rng, kept = np.random.default_rng(0), stages.Store(root)
        digests[size] = [kept.stage("heal", {"x": i}, lambda: stages.Result({})).digest for i in range(100)]
        for _ in range(size - 100):
            path = kept.path(rng.bytes(32).hex())
            path.parent.mkdir(exist_ok=True)
            path.touch()

    def read(size: int) -> None:
        for digest in digests[size]:
            assert stages.Store(roots[size]).load(digest)

    new = iter(range(1000, 10**9))

    def write(size: int) -> None:
        for _ in range(20):
            stages.Store(roots[size]).stage("heal", {"x": next(new)}, lambda: stages.Result({}))

    yield Curve("look up 100", read, sizes)
    yield Curve("compute 20", write, sizes)
