"""python -m analysis.trajectory results/SEARCH: what steering and healing did, round by round.

For each trial of the front (or the one that --trial names): above, the trait goes up with each steering and partly down with
each healing; below it, incoherence (1 - coherence) on a logarithmic axis; beside both, the path over the map of the
authority and care foundations.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import style
from analysis.folders import Search, command, read
from steerheal import personas
from steerheal.errors import UserError
from steerheal.objectives import COHERENCE_FLOOR

MOST = 4  # trials in one picture
STATES = {"base": (style.BLACK, "s"), "steered": (style.ORANGE, "^"), "healed": (style.BLUE, "o")}
SMALLEST = 1e-5  # incoherence below this is drawn there


@dataclass
class Data:
    """What the picture shows.

    states: one row per state: trial, round, state (base, steered, healed), step (0, then round + 0.5 and round + 1),
    trait_gain with interval in nats, incoherence with interval, authority_nats, care_nats. wanted: the foundation that the
    trait moves, and its sign. floor: the incoherence from which a round is not deliverable.
    """

    name: str
    trait: str
    states: pd.DataFrame
    wanted: dict[str, int]
    floor: float
    words: str


def data(folder: Path, trial: int | None = None) -> Data:
    """The states of one trial, or of those on the front.

    Raises:
        UserError: no finished round; no such trial.
    """
    search = read(folder)
    rounds = search.rounds
    front = rounds[rounds["front"]].sort_values("trait_gain", ascending=False)["trial"].drop_duplicates().tolist()
    words = ""
    if trial is not None:
        if trial not in set(rounds["trial"]):
            raise UserError(f"--trial {trial}: has no finished round; those that have: "
                            f"{', '.join(map(str, rounds['trial'].unique()))}.")
        shown = [trial]
    elif front:
        shown = front[:MOST]
        if len(front) > MOST:
            words = f"the {MOST} of {len(front)} trials on the front that gain most"
    else:
        shown = [rounds.sort_values("coherence_kept")["trial"].iloc[-1]]
        words = "no round is deliverable; the most coherent trial"
    wanted = {}
    with contextlib.suppress(UserError):  # a trait file of one's own may have stayed on another machine
        persona, asked = personas.load(search.settings["persona"]), search.settings["evaluate.trait"]
        wanted = {asked[1:]: 1 if asked[0] == "+" else -1} if asked[0] in "+-" else {persona.foundation: persona.direction}
    return Data(search.name, search.trait, pd.concat([_states(search, t) for t in shown], ignore_index=True), wanted,
                1 - COHERENCE_FLOOR * search.base["coherence"], words)


def _states(search: Search, trial: int) -> pd.DataFrame:
    base = search.base
    rows = [dict(round=-1, state="base", step=0.0, trait_gain=0.0, incoherence=1 - base["coherence"],
                 authority_nats=base["authority_nats"], care_nats=base["care_nats"])]
    for _, row in search.rounds[search.rounds["trial"] == trial].sort_values("round").iterrows():
        rows.append(dict(
            round=row["round"], state="steered", step=row["round"] + 0.5, trait_gain=row["steered_gain"],
            trait_gain_low=row["steered_gain_low"], trait_gain_high=row["steered_gain_high"],
            incoherence=1 - row["steered_coherence"], incoherence_low=1 - row["steered_coherence_high"],
            incoherence_high=1 - row["steered_coherence_low"], authority_nats=row["steered_authority_nats"],
            care_nats=row["steered_care_nats"]))
        rows.append(dict(
            round=row["round"], state="healed", step=row["round"] + 1.0, trait_gain=row["trait_gain"],
            trait_gain_low=row["trait_gain_low"], trait_gain_high=row["trait_gain_high"],
            incoherence=1 - row["coherence"], incoherence_low=1 - row["coherence_high"],
            incoherence_high=1 - row["coherence_low"], authority_nats=row["authority_nats"], care_nats=row["care_nats"]))
    return pd.DataFrame(rows, columns=["round", "state", "step", "trait_gain", "trait_gain_low", "trait_gain_high",
                                       "incoherence", "incoherence_low", "incoherence_high", "authority_nats",
                                       "care_nats"]).assign(trial=trial)


def draw(d: Data) -> plt.Figure:
    """One block of three panels per trial."""
    trials = d.states["trial"].unique()
    figure = plt.figure(figsize=(style.WIDTH, 0.6 + 4.0 * len(trials)), layout="constrained")
    figure.suptitle(f"{d.name}: base → steered → healed" + f"\n{d.words}" * bool(d.words), fontweight="bold",
                    fontsize=11.5, ha="left", x=0.02)
    blocks = figure.subfigures(len(trials), 1, squeeze=False)[:, 0]
    panels = []
    for block, trial in zip(blocks, trials):
        grid = block.add_gridspec(2, 2, width_ratios=(1.35, 1), height_ratios=(1.5, 1))
        states = d.states[d.states["trial"] == trial]
        trait = block.add_subplot(grid[0, 0])
        _draw_steps(trait, states, "trait_gain")
        trait.axhline(0, color=style.GREY, linewidth=0.8)
        trait.set_title(f"trial {trial}")
        trait.set_ylabel(f"trait gain (better ↑)\n{d.trait.removesuffix('_nats')} readout, nats")
        trait.tick_params(labelbottom=False)
        below = block.add_subplot(grid[1, 0], sharex=trait)
        _draw_incoherence(below, states, d.floor)
        beside = block.add_subplot(grid[:, 1])
        _draw_map(beside, states, d.wanted)
        panels.append((trait, beside, states))
    style.settle(figure)
    for trait, beside, states in panels:
        _name_states(trait, beside, states)
    return figure


def _draw_steps(axes: plt.Axes, states: pd.DataFrame, value: str) -> None:
    """The zigzag: orange where steering moved the student, blue where healing did."""
    known = states.dropna(subset=[value])
    for (_, a), (_, b) in zip(known.iloc[:-1].iterrows(), known.iloc[1:].iterrows()):
        axes.plot([a["step"], b["step"]], [a[value], b[value]], color=STATES[b["state"]][0], linewidth=1.3, zorder=2)
    for state, (colour, marker) in STATES.items():
        rows = known[known["state"] == state]
        axes.vlines(rows["step"], rows[f"{value}_low"], rows[f"{value}_high"], color=colour, linewidth=1, alpha=0.5)
        axes.scatter(rows["step"], rows[value], color=colour, marker=marker, s=34, zorder=3)
    last = int(states["round"].max())
    axes.set_xticks(range(last + 2), ["base", *(f"r{r}" for r in range(last + 1))])
    axes.set_xlim(-0.3, last + 1.4)


def _draw_incoherence(axes: plt.Axes, states: pd.DataFrame, floor: float) -> None:
    columns = ["incoherence", "incoherence_low", "incoherence_high"]
    _draw_steps(axes, states.assign(**states[columns].clip(lower=SMALLEST)), "incoherence")
    style.log_scale(axes, "y")
    axes.set_ylabel("1 − coherence\n(better ↓)")
    unknown = states.loc[states["state"] == "steered", "incoherence"].isna().all()
    axes.set_xlabel("after round" + "\n(steered coherence is not in this ledger)" * bool(unknown))
    if floor == floor:
        axes.axhline(floor, color=style.GREY, linewidth=1, linestyle="--")
        axes.annotate("broken above", (0.01, floor), xycoords=("axes fraction", "data"), xytext=(0, 2),
                      textcoords="offset points", color=style.DARK, fontsize=style.SMALL, path_effects=style.HALO)


def _draw_map(axes: plt.Axes, states: pd.DataFrame, wanted: dict[str, int]) -> None:
    known = states.dropna(subset=["authority_nats", "care_nats"])
    for (_, a), (_, b) in zip(known.iloc[:-1].iterrows(), known.iloc[1:].iterrows()):
        axes.annotate("", (b["authority_nats"], b["care_nats"]), (a["authority_nats"], a["care_nats"]),
                      arrowprops=dict(arrowstyle="->", color=STATES[b["state"]][0], linewidth=1.1, shrinkA=3, shrinkB=3))
    for state, (colour, marker) in STATES.items():
        rows = known[known["state"] == state]
        axes.scatter(rows["authority_nats"], rows["care_nats"], color=colour, marker=marker, s=34, zorder=3)
    axes.margins(0.18)
    axes.locator_params(axis="x", nbins=4)
    better = {("authority", -1): "   (← better)", ("authority", 1): "   (better →)", ("care", -1): "   (better ↓)",
              ("care", 1): "   (better ↑)"}
    marks = {foundation: better.get((foundation, sign), "") for foundation, sign in wanted.items()}
    axes.set_xlabel(f"authority, nats{marks.get('authority', '')}")
    axes.set_ylabel(f"care, nats{marks.get('care', '')}")
    axes.set_title("authority and care")
    if known.empty:
        style.say(axes, "authority and care nats\nare not in this ledger")


def _name_states(trait: plt.Axes, beside: plt.Axes, states: pd.DataFrame) -> None:
    """In the zigzag each state is named where it first occurs, on the map every round."""
    first = states.dropna(subset=["trait_gain"]).drop_duplicates("state")
    style.place_labels(trait, [(row["step"], row["trait_gain"], row["state"], STATES[row["state"]][0])
                               for _, row in first.iterrows()], list(zip(states["step"], states["trait_gain"])))
    known = states.dropna(subset=["authority_nats", "care_nats"])
    style.place_labels(beside, [(row["authority_nats"], row["care_nats"],
                                 "base" if row["state"] == "base" else f"r{row['round']}", STATES[row["state"]][0])
                                for _, row in known[known["state"] != "steered"].iterrows()],
                       list(zip(known["authority_nats"], known["care_nats"])))


def draw_folder(folder: Path, trial: int | None = None) -> Path:
    """Write trajectory.png, .svg and .csv into a search's folder.

    Args:
        folder: a search's folder, such as results/quickstart
        trial: draw this trial instead of the front's
    """
    d = data(folder, trial)
    return style.save(draw(d), d.states, folder / ("trajectory" if trial is None else f"trajectory_{trial}"))


if __name__ == "__main__":
    command(draw_folder, "trajectory", __doc__)
