"""python -m benchmarks.samplers GRID.csv [--repeats 50] [--trials 32] [--samplers tpe nsgaii gp random]: who searches well?

Replays each sampler over a complete categorical grid whose outcomes are known (`python -m benchmarks.grid`): the
hypervolume of what it has found against the number of trials, over repeats that differ in the seed alone. A point that is
proposed again counts as a trial, though the store would answer it at once. Writes samplers.png, .svg and .csv beside the
grid. A sampler replaces TPE as the default only if its band excludes TPE's.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import optuna
import pandas as pd
import tyro

from steerheal import pareto
from steerheal.cli import run_main
from steerheal.errors import UserError
from steerheal.ledger import searched
from steerheal.objectives import REFERENCE_POINT
from steerheal.searcher import make_sampler
from steerheal.stages import seed_of

OUTCOMES = ["trait_gain", "coherence_kept", "deliverable"]


@dataclasses.dataclass
class Args:
    """Replay samplers over a complete grid: hypervolume against the number of trials, with bands."""

    grid: Annotated[Path, tyro.conf.Positional]
    """one row per combination: parameters, trait_gain, coherence_kept, deliverable; or the ledger of benchmarks.grid"""
    repeats: int = 50
    """replays of each sampler"""
    trials: int = 32
    """trials of each replay"""
    samplers: tuple[str, ...] = ("tpe", "nsgaii", "gp", "random")


def main() -> None:
    args = tyro.cli(Args, prog="python -m benchmarks.samplers")
    run_main(lambda: report(args))


@dataclasses.dataclass
class Grid:
    """space: choices by parameter. outcomes: (trait_gain, coherence_kept, constraint) by the tuple of choices."""

    space: dict[str, optuna.distributions.CategoricalDistribution]
    outcomes: dict[tuple[Any, ...], tuple[float, float, float]]

    def best(self) -> float:
        """Hypervolume of the whole grid."""
        return pareto.hypervolume([(g, k) for g, k, c in self.outcomes.values() if c <= 0], REFERENCE_POINT)


def load(path: Path) -> Grid:
    """Read a grid.

    Raises:
        UserError: no such file, columns missing, or combinations missing or doubled.
    """
    try:
        table = pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `python -m benchmarks.grid` makes one.") from None
    lacking = [c for c in OUTCOMES if c not in table]
    if lacking:
        raise UserError(f"{path}: columns missing: {', '.join(lacking)}")
    params = searched(table) if "error" in table else [c for c in table if c not in (*OUTCOMES, "violation")]
    keys = [tuple(v.item() if hasattr(v, "item") else v for v in row)
            for row in table[params].astype(object).itertuples(index=False)]
    space = {p: optuna.distributions.CategoricalDistribution(list(dict.fromkeys(k[i] for k in keys)))
             for i, p in enumerate(params)}
    cells = int(np.prod([len(d.choices) for d in space.values()]))
    unfinished = int(table["state"].ne("complete").sum()) if "state" in table else 0
    if len(set(keys)) != cells or len(keys) != cells or unfinished:
        raise UserError(f"{path}: {len(set(keys)) - unfinished} different finished rows of {len(keys)} for a grid of {cells}; "
                        f"it must be complete.")
    violation = table["violation"] if "violation" in table else table["deliverable"].map({True: -1.0, False: 1.0})
    violation = violation.where(table["trait_gain"].notna(), 1.0)  # starved: nothing moved
    gains, kept = table["trait_gain"].fillna(0.0), table["coherence_kept"].fillna(1.0)
    return Grid(space, dict(zip(keys, zip(gains.astype(float), kept.astype(float), violation.astype(float)))))


def replay(grid: Grid, sampler: str, repeat: int, trials: int) -> list[float]:
    """Hypervolume after each trial of one search over the grid, as `steerheal.searcher` would run it."""
    study = optuna.create_study(directions=["maximize", "maximize"])
    found, out = [], []
    for n in range(trials):
        study.sampler = make_sampler(sampler, seed_of(repeat, "ask", n) % 2**32)
        trial = study.ask(dict(grid.space))
        gain, kept, constraint = grid.outcomes[tuple(trial.params[p] for p in grid.space)]
        trial.set_constraint("deliverable", constraint)
        study.tell(trial, (gain, kept))
        found += [(gain, kept)] if constraint <= 0 else []
        out.append(pareto.hypervolume(found, REFERENCE_POINT))
    return out


def curves(grid: Grid, samplers: tuple[str, ...], repeats: int, trials: int) -> pd.DataFrame:
    """One row per sampler, repeat and trial: hypervolume as a share of the whole grid's."""
    whole = grid.best()
    rows = []
    for sampler in samplers:
        started = time.perf_counter()
        for repeat in range(repeats):
            rows += [dict(sampler=sampler, repeat=repeat, trial=n, share=hv / whole)
                     for n, hv in enumerate(replay(grid, sampler, repeat, trials), 1)]
        print(f"{sampler}: {(time.perf_counter() - started) / repeats / trials:.3f} s a trial", flush=True)
    return pd.DataFrame(rows)


def bands(found: pd.DataFrame) -> pd.DataFrame:
    """Mean share and its 95% interval over repeats (normal), by sampler and trial; and the 10th and 90th percentile."""
    group = found.groupby(["sampler", "trial"], sort=False)["share"]
    half = 1.96 * group.std(ddof=1) / np.sqrt(group.count())
    return pd.DataFrame(dict(mean=group.mean(), low=group.mean() - half, high=group.mean() + half,
                             p10=group.quantile(0.1), p90=group.quantile(0.9))).reset_index()


def draw(table: pd.DataFrame, name: str, repeats: int) -> Any:
    """The picture: mean share of the hypervolume against trials, with the interval of the mean as a band."""
    import matplotlib.pyplot as plt

    from analysis import style

    figure, axes = plt.subplots(figsize=(8, 5))
    colours = dict(zip(table["sampler"].unique(), (style.ORANGE, style.BLUE, style.GREEN, style.BLACK)))
    ends = sorted((rows["mean"].iloc[-1], sampler) for sampler, rows in table.groupby("sampler"))
    for place, (_, sampler) in enumerate(ends):
        rows, colour = table[table["sampler"] == sampler], colours[sampler]
        axes.plot(rows["trial"], rows["mean"], color=colour, linewidth=1.8)
        axes.fill_between(rows["trial"], rows["low"], rows["high"], color=colour, alpha=0.2, linewidth=0)
        # labels stand in the order of the curves, a line's height apart: their ends may lie on one another
        axes.annotate(sampler, (1.01, 0.97 - 0.06 * (len(ends) - 1 - place)), xycoords="axes fraction", color=colour,
                      va="center")
    axes.set_xlabel("trials")
    axes.set_ylabel("hypervolume found, share of the grid's   (better ↑)")
    axes.set_title(f"{name}: samplers replayed over the complete grid")
    axes.text(0.99, 0.02, f"mean of {repeats} replays, band: its 95% interval", transform=axes.transAxes, ha="right",
              va="bottom", fontsize=9, color="#555555")
    return figure


def report(args: Args) -> int:
    from analysis import style

    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    samplers = args.samplers
    if "gp" in samplers and importlib.util.find_spec("scipy") is None:
        raise UserError("--samplers gp: needs scipy: pip install scipy, or leave gp out.")
    grid = load(args.grid)
    if not grid.best():
        raise UserError(f"{args.grid}: no combination is deliverable with a trait gain above 0; there is nothing to find.")
    print(f"{args.grid}: {len(grid.outcomes)} combinations, hypervolume {grid.best():.4f}, {args.repeats} replays of "
          f"{args.trials} trials")
    table = bands(curves(grid, samplers, args.repeats, args.trials))
    marks = [n for n in (8, 16, 24, 32, 48, 64) if n <= args.trials] or [args.trials]
    print(f"{'sampler':10}" + "".join(f"{f'after {n}':>24}" for n in marks))
    for sampler, rows in table.groupby("sampler", sort=False):
        at = rows.set_index("trial")
        print(f"{sampler:10}" + "".join(f"{at['mean'][n]:10.3f} [{at['low'][n]:.3f}, {at['high'][n]:.3f}]" for n in marks))
    style.save(draw(table, args.grid.parent.name or args.grid.stem, args.repeats), table, args.grid.parent / "samplers")
    last = table[table["trial"] == marks[-1]].set_index("sampler")
    print("RESULT trials=" + str(marks[-1]) + "".join(f" {s}={last['mean'][s]:.4f} {s}_low={last['low'][s]:.4f} "
                                                     f"{s}_high={last['high'][s]:.4f}" for s in samplers))
    return 0


if __name__ == "__main__":
    main()
