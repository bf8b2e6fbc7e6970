"""python -m analysis.noise results/SEARCH: which differences along the front are real?

Every member of the front with its 95% interval over items (line), the same settings run again under other run seeds (open
dots, from confirm.csv; those that were not deliverable are left out). Green words under a member name the first of those
below it from which on every difference is real: clear of item noise and of seed noise. Without confirm.csv only items are
compared, and the picture says so.

Item noise of a difference: its interval paired over items, from the readouts in the stage store. Where these are gone: the two
members' intervals in quadrature, as if items were drawn anew for each, which is wider. Seed noise: Student's t interval of the
differences under the seeds that both members have, which share their draws.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis import style
from analysis.folders import Search, command, count, read, reading
from steerheal import ledger
from steerheal.evaluation.readings import Estimate, Reading
from steerheal.stages import store_beside

MOST = 14  # members in one picture
OBJECTIVES = {"trait_gain": "trait gain, nats from base (better →)", "coherence_kept": "coherence kept, share (better →)"}
T975 = (np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's, by degrees of freedom


@dataclass
class Data:
    """What the picture shows.

    members: the front by descending trait gain, with low and high of either objective over items.
    seeds: trial, round, seed, trait_gain, coherence_kept, deliverable on seeds the search never used; empty where nothing was
    confirmed.
    differences: of all pairs: a, b (trial.round), objective, difference, item_noise, seeds (how many they share),
    seed_difference, seed_noise, verdict. Noise is the half-width of a 95% interval.
    """

    name: str
    trait: str
    members: pd.DataFrame
    seeds: pd.DataFrame
    differences: pd.DataFrame


def data(folder: Path) -> Data:
    """Read the front, and what confirming it found.

    Raises:
        UserError: no finished round.
    """
    search = read(folder)
    path = folder / "confirm.csv"
    seeds = ledger.view(path) if path.exists() else pd.DataFrame(columns=["trial", "round", "seed", "fresh", "deliverable",
                                                                          *OBJECTIVES])
    seeds = seeds[seeds["fresh"].astype(bool)]  # the search's own seed is what the front was picked on
    members, states = _members(search), _states(search)
    rows = [_difference(a, b, seeds, objective, _paired(states, a["label"], b["label"], objective, search.trait))
            for objective in OBJECTIVES for (_, a), (_, b) in itertools.combinations(members.iterrows(), 2)]
    columns = ["a", "b", "objective", "difference", "item_noise", "seeds", "seed_difference", "seed_noise", "verdict"]
    return Data(search.name, search.trait, members, seeds, pd.DataFrame(rows, columns=columns))


def _members(search: Search) -> pd.DataFrame:
    front = search.rounds[search.rounds["front"]].sort_values("trait_gain", ascending=False, ignore_index=True)
    front["label"] = _labels(front)
    return front[["trial", "round", "label", *(f"{o}{end}" for o in OBJECTIVES for end in ("", "_low", "_high"))]]


def _labels(rows: pd.DataFrame) -> pd.Series:
    return rows["trial"].astype(str) + "." + rows["round"].astype(str)


def _states(search: Search) -> dict[str, Reading | None]:
    """What the front's members and base answered, item by item; None where it is no longer stored."""
    store, front = store_beside(search.folder), search.rounds[search.rounds["front"]]
    stages = dict(zip(_labels(front), front["stages"])) if "stages" in front else {}
    stages["base"] = search.base.get("stages")
    return {label: reading(store, text) if isinstance(text, str) else None for label, text in stages.items()}


def _paired(states: dict[str, Reading | None], a: str, b: str, objective: str, trait: str) -> Estimate | None:
    """The difference paired over items, None where it cannot be known."""
    base, first, second = states["base"], states.get(a), states.get(b)
    if base is None or first is None or second is None:
        return None
    return (first.difference(second, trait) if objective == "trait_gain" else
            first.ratio_difference(second, base, "coherence"))


def _difference(a: pd.Series, b: pd.Series, seeds: pd.DataFrame, objective: str,
                paired: Estimate | None) -> dict[str, object]:
    difference = a[objective] - b[objective]
    # the longer arm, because a share's upper one ends at 1
    halves = [max(m[f"{objective}_high"] - m[objective], m[objective] - m[f"{objective}_low"]) for m in (a, b)]
    items = float(np.hypot(*halves)) if paired is None else (paired.high - paired.low) / 2
    mean, noise, n = seed_noise(*(_by_seed(m, seeds, objective) for m in (a, b)))
    clear_of_items = abs(difference) > items if paired is None else paired.clear_of_zero
    if not np.isfinite(items):
        verdict = "no interval"
    elif not clear_of_items:
        verdict = "within item noise"
    elif n < 2:
        verdict = "clear of items only"
    else:
        verdict = "real" if abs(mean) > noise and mean * difference > 0 else "within seed noise"
    return dict(a=a["label"], b=b["label"], objective=objective, difference=difference, item_noise=items, seeds=n,
                seed_difference=mean, seed_noise=noise, verdict=verdict)


def _by_seed(member: pd.Series, seeds: pd.DataFrame, objective: str) -> pd.Series:
    rows = seeds[(seeds["trial"] == member["trial"]) & (seeds["round"] == member["round"]) & seeds["deliverable"].astype(bool)]
    return rows.set_index("seed")[objective].astype(float).dropna()


def seed_noise(a: pd.Series, b: pd.Series) -> tuple[float, float, int]:
    """Mean of the paired differences a - b, half-width of their 95% t interval, and how many seeds both have. Beyond nine
    degrees of freedom the quantile of nine is kept: a little wide."""
    differences = (a - b).dropna()
    n = len(differences)
    if n < 2:
        return float(differences.mean()), float("nan"), n
    quantile = T975[min(n - 1, len(T975) - 1)]
    return float(differences.mean()), float(quantile * differences.std(ddof=1) / n**0.5), n


def draw(d: Data) -> plt.Figure:
    """A forest plot of the front, one panel per objective."""
    if d.members.empty:
        figure, axes = plt.subplots(figsize=(style.WIDTH, 2))
        style.say(axes, f"{d.name}: no round is deliverable, so there is no front to compare")
        return figure
    shown = d.members.head(MOST)
    figure, panels = plt.subplots(1, 2, figsize=(style.WIDTH, 1.7 + 0.45 * len(shown)), sharey=True, layout="constrained")
    for axes, (objective, label) in zip(panels, OBJECTIVES.items()):
        _draw_objective(axes, d, shown, objective)
        axes.set_xlabel(label)
    panels[0].set_yticks(range(len(shown)), shown["label"])
    panels[0].set_ylim(len(shown) - 0.5, -0.5)
    panels[0].set_ylabel("front, trial.round")
    figure.suptitle(f"{d.name}: {_summary(d)}", fontweight="bold", fontsize=11.5, ha="left", x=0.02)
    return figure


def _draw_objective(axes: plt.Axes, d: Data, shown: pd.DataFrame, objective: str) -> None:
    for y, (_, member) in enumerate(shown.iterrows()):
        axes.plot([member[f"{objective}_low"], member[f"{objective}_high"]], [y, y], color=style.BLUE, linewidth=2,
                  alpha=0.6, solid_capstyle="butt")
        axes.scatter(member[objective], y, color=style.BLUE, s=36, zorder=3)
        again = _by_seed(member, d.seeds, objective)
        axes.scatter(again, [y] * len(again), facecolor="white", edgecolor=style.ORANGE, s=26, zorder=4)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=4)
    if objective == "trait_gain":
        axes.axvline(0, color=style.GREY, linewidth=0.8)
    differences = d.differences[(d.differences["objective"] == objective) & d.differences["b"].isin(shown["label"])]
    clear = "clear of items only" if d.seeds.empty else "real"
    others = [differs_from(differences, label, clear) for label in shown["label"]]
    for y, other in enumerate(others):
        if other:
            axes.annotate(f"differs from {other} and below", (0.99, y + 0.45), xycoords=("axes fraction", "data"),
                          ha="right", va="center", fontsize=style.SMALL, color=style.GREEN, path_effects=style.HALO)
    if len(shown) > 1 and not any(others):
        style.note(axes, "no difference is clear of noise", y=0.01)


def differs_from(differences: pd.DataFrame, label: str, verdict: str) -> str | None:
    """The first member below `label` from which on every difference to it has the verdict; None where there is none."""
    below = differences[differences["a"] == label]
    clear = below["verdict"].eq(verdict)[::-1].cummin()[::-1]
    return below.loc[clear, "b"].iloc[0] if clear.any() else None


def _summary(d: Data) -> str:
    if len(d.members) == 1:
        return "one member on the front: nothing to compare"
    asked = f"which differences of the {len(d.members)} on the front are real?" + (
        f" {MOST} shown." if len(d.members) > MOST else "")
    if d.seeds.empty:
        return f"{asked}\n95% intervals over items only: seed noise is not measured (no confirm.csv)"
    broken, few = int((~d.seeds["deliverable"].astype(bool)).sum()), int(d.differences["seeds"].lt(2).sum()) // len(OBJECTIVES)
    words = f"lines: 95% over items; open dots: the same under {count(d.seeds['seed'].nunique(), 'fresh seed')}"
    words += f"; {broken} broken, left out" * bool(broken)
    return f"{asked}\n{words}" + f"\n{count(few, 'pair')} not tested: fewer than two seeds in common" * bool(few)


def draw_folder(folder: Path) -> Path:
    """Write noise.png, .svg and .csv (the differences of all pairs) into a search's folder.

    Args:
        folder: a search's folder, such as results/quickstart
    """
    d = data(folder)
    return style.save(draw(d), d.differences, folder / "noise")


if __name__ == "__main__":
    command(draw_folder, "noise", __doc__)
