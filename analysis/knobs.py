"""python -m analysis.knobs results/SEARCH: what each searched setting does.

One row per setting: trait gain, coherence kept, and the duty cycle of the barrier against it, every round a point (darker
rounds are later ones; grey rounds are not deliverable). Crosses mark inert barriers, which never fired: such a round
is plain fine-tuning. Below, how much each setting matters for either objective.

Importance is PED-ANOVA's (Watanabe et al. 2023, arXiv:2304.10255): how far the settings of the best third of the trials
differ from those of all, as shares that sum to 1. A trial that is not deliverable is among the worst, whatever its numbers;
ties with the last of the best third are among the best.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import optuna
import pandas as pd

from analysis import style
from analysis.folders import Search, command, count, read
from steerheal.ledger import latest, open_study
from steerheal.objectives import COHERENCE_FLOOR

PANELS = {"trait_gain": "trait gain (better ↑)\nnats from base", "coherence_kept": "coherence kept (better ↑)\nshare of base",
          "duty": "duty cycle\nshare over tau"}
BEST = 1 / 3  # of the trials, whose settings are compared with all
WORST = 1e9  # loss of a trial that is not deliverable
FEWEST, FEW = 10, 15  # trials below which importances are not computed, and below which they are only a hint
CROWDED = 26  # characters of category names that stand side by side under one panel
SHADES = ("#9CC9E8", "#4A9AD4", "#0072B2", "#004D7A", "#002A44")  # rounds, light to dark


@dataclass
class Data:
    """What the picture shows. rounds: one row per round. importance: one row per setting, one column per objective; empty
    where `words` says why."""

    name: str
    trait: str
    params: list[str]
    rounds: pd.DataFrame
    importance: pd.DataFrame
    words: str


def data(folder: Path) -> Data:
    """Read the ledger and the study of a search.

    Raises:
        UserError: no finished round.
    """
    search = read(folder)
    importance, words = _importance(search)
    return Data(search.name, search.trait, search.params, search.rounds, importance, words)


def _importance(search: Search) -> tuple[pd.DataFrame, str]:
    if len(search.params) < 2:
        return pd.DataFrame(), "one setting was searched: there is nothing to rank" if search.params else ""
    trials = [t for t in latest(open_study(search.folder)).values() if t.state == optuna.trial.TrialState.COMPLETE]
    if len(trials) < FEWEST:
        return pd.DataFrame(), f"{count(len(trials), 'finished trial')}: too few to rank the settings; from {FEWEST} on"
    study = optuna.create_study(directions=["maximize", "maximize"])
    study.add_trials(trials)  # the attempts that count, and none that was interrupted
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BEST)
    columns, best = {}, {}
    for i, objective in enumerate(("trait_gain", "coherence_kept")):
        def loss(trial: optuna.trial.FrozenTrial, i: int = i) -> float:
            return -trial.values[i] if trial.constraints.get("deliverable", 0.0) <= 0 else WORST

        losses = sorted(map(loss, trials))
        best[objective] = sum(x <= losses[math.ceil(BEST * len(losses)) - 1] for x in losses)
        if best[objective] == len(trials):  # all alike: nothing to learn
            columns[objective] = dict.fromkeys(search.params, math.nan)
            continue
        with warnings.catch_warnings():  # PED-ANOVA takes low for good, and says so each time
            warnings.simplefilter("ignore")
            columns[objective] = optuna.importance.get_param_importances(study, evaluator=evaluator, target=loss)
    gain, kept = best.values()
    hint = "; few trials, so only a hint" if len(trials) < FEW else ""
    among = f"the best {gain} of" if gain == kept else f"the best {gain} by gain, {kept} by coherence, of"
    return pd.DataFrame(columns).reindex(search.params), f"{among} {len(trials)} trials against all{hint}"


def draw(d: Data) -> plt.Figure:
    """One row of panels per searched setting, and one for the importances."""
    if not d.params:
        figure, axes = plt.subplots(figsize=(style.WIDTH, 2))
        style.say(axes, f"{d.name}: no setting was searched")
        return figure
    heights = [2.1] * len(d.params) + [0.7 + 0.35 * len(d.importance)]
    figure = plt.figure(figsize=(style.WIDTH, 0.8 + sum(heights)), layout="constrained")
    grey = "" if d.rounds["deliverable"].all() else "; grey: not deliverable"
    inert = "; ×: inert barrier" if _inert(d.rounds).any() else ""
    figure.suptitle(f"{d.name}: each searched setting\nevery round a point; darker: later round{inert}{grey}",
                    fontweight="bold", fontsize=11.5, ha="left", x=0.02)
    grid = figure.add_gridspec(len(heights), 3, height_ratios=heights)
    for row, param in enumerate(d.params):
        for column, (value, label) in enumerate(PANELS.items()):
            axes = figure.add_subplot(grid[row, column])
            _draw_panel(axes, d, param, value)
            axes.set_xlabel(param)
            axes.tick_params(labelsize=style.SMALL)
            axes.set_title(label, fontsize=style.SMALL, fontweight="normal")
    _draw_importance(figure.add_subplot(grid[-1, :]), d)
    return figure


def _draw_panel(axes: plt.Axes, d: Data, param: str, value: str) -> None:
    rounds = d.rounds.dropna(subset=[param])
    if rounds[value].isna().all():
        style.say(axes, f"{value} is not\nin this ledger")
        return
    x = _positions(axes, rounds[param], rounds["round"])
    able = rounds["deliverable"] if rounds["deliverable"].any() else rounds["deliverable"] | True
    if value == "coherence_kept":
        axes.axhline(COHERENCE_FLOOR, color=style.GREY, linewidth=1, linestyle="--")
    shown = rounds.loc[able, value]
    span = max(shown.max() - shown.min(), 0.02)
    axes.set_ylim((-0.06, 1.06) if value == "duty" else (shown.min() - 0.15 * span, shown.max() + 0.15 * span))
    inert = _inert(rounds)
    for index in sorted(rounds["round"].unique()):
        here = (rounds["round"] == index) & rounds["deliverable"] & ~inert
        style.scatter(axes, x[here], rounds.loc[here, value], color=SHADES[min(index, len(SHADES) - 1)], s=24, zorder=3)
    for marker, colour, rows in (("o", style.GREY, ~rounds["deliverable"] & ~inert),
                                 ("x", style.ORANGE, rounds["deliverable"] & inert),
                                 ("x", style.GREY, ~rounds["deliverable"] & inert)):
        style.scatter(axes, x[rows], rounds.loc[rows, value], color=colour, marker=marker, s=24, zorder=4)


def _inert(rounds: pd.DataFrame) -> pd.Series:
    """Rounds whose barrier never fired; nll, which has none, is not meant."""
    return rounds["flags"].fillna("").str.contains("inert")


def _positions(axes: plt.Axes, values: pd.Series, rounds: pd.Series) -> np.ndarray:
    """Where the values lie on the x axis, which is set up for them: linear, logarithmic, or one place per category and
    within it later rounds to the right."""
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        x = values.to_numpy(float)
        if style.is_wide(x):
            style.log_scale(axes, "x")
            if x.max() > 50 * x.min():
                style.plain_numbers(axes.xaxis, (1,))
            axes.set_xlim(x.min() / 1.3, x.max() * 1.3)
        else:
            pad = max(0.08 * (x.max() - x.min()), 0.02 * abs(x.max()), 1e-9)
            axes.set_xlim(x.min() - pad, x.max() + pad)
            axes.locator_params(axis="x", nbins=4)
        return x
    names = sorted(values.map(str).unique())
    crowded = len(names) * max(map(len, names)) > CROWDED
    axes.set_xticks(range(len(names)), names, **dict(rotation=25, ha="right") if crowded else {})
    axes.set_xlim(-0.5, len(names) - 0.5)
    within = (rounds + 0.5) / (rounds.max() + 1) - 0.5
    return values.map(str).map(names.index).to_numpy(float) + 0.5 * within.to_numpy(float)


def _draw_importance(axes: plt.Axes, d: Data) -> None:
    if d.importance.empty:
        style.say(axes, d.words)
        return
    y = np.arange(len(d.importance))[::-1]
    for offset, (objective, colour) in zip((0.2, -0.2), (("trait_gain", style.BLUE), ("coherence_kept", style.ORANGE))):
        axes.barh(y + offset, d.importance[objective], height=0.36, color=colour)
        for at, share in zip(y + offset, d.importance[objective]):
            if math.isnan(share):
                share, said = 0.0, "all trials alike:"
            else:
                said = f"{share:.2f}"
            axes.text(share + 0.01, at, f"{said} " + objective.replace("_", " "), va="center", fontsize=style.SMALL,
                      color=colour)
    axes.set_yticks(y, d.importance.index)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.25)
    axes.set_xticks(np.linspace(0, 1, 5))
    axes.set_xlabel(f"importance, share ({d.words})")


def draw_folder(folder: Path) -> Path:
    """Write knobs.png, .svg and .csv into a search's folder.

    Args:
        folder: a search's folder, such as results/quickstart
    """
    d = data(folder)
    drawn = d.rounds[["trial", "round", *d.params, *PANELS, "deliverable"]]
    for objective in d.importance:
        for param, share in d.importance[objective].items():
            drawn = drawn.assign(**{f"importance of {param} for {objective}": share})
    return style.save(draw(d), drawn, folder / "knobs")


if __name__ == "__main__":
    command(draw_folder, "knobs", __doc__)
