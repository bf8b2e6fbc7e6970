"""python -m analysis.pareto results/SEARCH: every round of every trial, the front, and what it must beat.

Right is more trait, up is more coherence. Grey points are not deliverable: under the line, or not fluent; triangles at the
edge lie outside. Hollow marks are the baselines: the model as loaded, the persona as a system prompt, and raw steering at a
ladder of doses. Several folders are drawn on one axis where they measure the same thing on the same model.
"""

from __future__ import annotations

import difflib
import itertools
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm, Normalize

from analysis import style
from analysis.folders import Search, command, count, read
from steerheal import plan
from steerheal.errors import UserError
from steerheal.ledger import hypervolume
from steerheal.objectives import COHERENCE_FLOOR
from steerheal.spaces import INSTRUMENT

LOWEST = 0.70  # rounds with less coherence kept are marked at the edge: how badly they are broken tells nothing
READOUTS = tuple(f"version of stage {name}" for name in ("foundations", "conduct", "fluency", "scores"))
MARKERS = ("o", "P", "X", "v", "p", "h")


@dataclass
class Data:
    """What the picture shows.

    points: one row per round, with `search`. baselines: search, label, edge_doses, trait_gain, coherence_kept, each once.
    hypervolume: by search. color: a column of points, or none.
    """

    trait: str
    points: pd.DataFrame
    baselines: pd.DataFrame
    hypervolume: dict[str, float]
    color: str | None = None


def data(*folders: Path, color: str | None = None) -> Data:
    """Read the ledgers of one search or several.

    Raises:
        UserError: a folder holds no finished round; the searches differ in model or readout; no such column.
    """
    if not folders:
        raise UserError("name at least one search's folder, such as results/quickstart.")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a search is named twice: each needs to be named once.")
    searches = [read(folder) for folder in folders]
    _refuse_unlike(searches)
    names = [s.name for s in searches]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    points = pd.concat([_points(s, name) for s, name in zip(searches, names)], ignore_index=True)
    if color is not None:
        _check_color(color, points, searches)
    baselines = pd.concat([s.baselines.assign(search=name) for s, name in zip(searches, names)])
    baselines = baselines.drop_duplicates(["label", "edge_doses", "trait_gain", "coherence_kept"])  # two vectors, two ladders
    return Data(searches[0].trait, points, baselines, {n: hypervolume(s.rounds) for n, s in zip(names, searches)}, color)


def _points(search: Search, name: str) -> pd.DataFrame:
    """The rounds with what the picture needs; long texts stay in the ledger."""
    rows = search.rounds
    wide = [c for c in rows if rows[c].map(lambda v: isinstance(v, str) and len(v) > 200).any()]
    return rows.drop(columns=wide).assign(search=name)


def _refuse_unlike(searches: list[Search]) -> None:
    """One axis needs one model and one way to measure it."""
    def measured(search: Search) -> dict[str, object]:
        same = {k: v for k, v in search.settings.items()
                if k.startswith("evaluate.") and k not in ("evaluate.ladder", "evaluate.trait")}
        asked = search.settings.get("evaluate.trait", "auto")
        same["evaluate.trait"] = asked if asked[0] in "+-" else "of the persona"  # a sign asked for turns the axis round
        same |= {k: search.settings.get(k) for k in INSTRUMENT
                 if not k.startswith(("device", "evaluate.", "generate."))}  # how it generates bears on neither axis
        same |= {k: v for k, v in plan.read(search.folder).get("identity", {}).items()
                 if k.startswith(("content of", *READOUTS))}
        return same | {"trait readout": search.trait}

    if len(searches) == 1:
        return
    first = measured(searches[0])
    lines = [f"  - {k}: {first.get(k)!r} in {searches[0].folder}, {other.get(k)!r} in {s.folder}"
             for s, other in ((s, measured(s)) for s in searches[1:])
             for k in sorted(first.keys() | other.keys()) if first.get(k) != other.get(k)]
    if lines:
        raise UserError("these searches cannot share one axis, because their nats are not of one kind:\n"
                        + "\n".join(lines) + "\nDraw each alone, or run one again with the other's settings.")


def _check_color(color: str, points: pd.DataFrame, searches: list[Search]) -> None:
    if len(searches) > 1:
        raise UserError("--color colours the rounds of one search; with several, colour tells them apart.")
    if color not in points:
        near = difflib.get_close_matches(color, points.columns, n=1)
        raise UserError(f"--color {color}: the ledger has no such column" + (f"; did you mean {near[0]}?" if near else ".")
                        + f" Searched: {', '.join(searches[0].params) or 'nothing'}; other columns of ledger.csv work too.")
    if points[color].isna().all():
        raise UserError(f"--color {color}: the ledger holds no value of it.")
    if len(categories := _categories(points, color)) > len(style.PALETTE):
        raise UserError(f"--color {color}: {len(categories)} different values, more than the {len(style.PALETTE)} colours "
                        f"that can be told apart.")


def draw(d: Data) -> plt.Figure:
    """The picture of one search or several."""
    figure, axes = plt.subplots(figsize=(style.WIDTH, 5.2), layout="constrained")
    set_window(axes, d.points, d.baselines)
    axes.axhline(COHERENCE_FLOOR, color=style.GREY, linewidth=1, linestyle="--")
    grey = d.points[~d.points["deliverable"]]
    outside = style.scatter(axes, grey["trait_gain"], grey["coherence_kept"], color=style.GREY, s=26, zorder=2)
    looks = {s: (style.BLUE, style.ORANGE) for s in d.hypervolume} if len(d.hypervolume) == 1 else \
        {s: (c, c) for s, c in zip(d.hypervolume, itertools.cycle(style.PALETTE))}
    for (search, colours), marker in zip(looks.items(), itertools.cycle(MARKERS)):
        _draw_search(axes, d, d.points[d.points["search"] == search], colours, marker)
    for (label, _), rows in d.baselines.groupby(["label", "search"], sort=False):
        marker = {"base": "s", "prompted": "D", "steered": "^"}[label]
        axes.plot(rows["trait_gain"], rows["coherence_kept"], marker=marker, markersize=7, markerfacecolor="none",
                  markeredgecolor=style.BLACK, color=style.BLACK, linewidth=0.8, linestyle=":", zorder=5)
    keys = {name: colour for name, (_, colour) in looks.items()} if len(looks) > 1 else \
        _categories(d.points, d.color) if d.color else {}
    lines = style.key(axes, keys) if keys else 0
    axes.set_xlabel(f"trait gain: {d.trait.removesuffix('_nats')} readout, nats from base   (better →)")
    axes.set_ylabel("coherence kept, share of base   (better ↑)")
    front = d.points[d.points["front"]]
    trials = len(d.points.drop_duplicates(["search", "trial"]))
    axes.set_title(f"{' and '.join(looks)}: {count(len(d.points), 'round')} of {count(trials, 'trial')}, "
                   + (f"{len(front)} on the front{'s' * (len(looks) > 1)}" if len(front) else "none deliverable"),
                   pad=6 + 14 * lines)
    volumes = [f"hypervolume {v:.4f}" + (f" {name}" if len(looks) > 1 else "") for name, v in d.hypervolume.items()]
    words = [*volumes, "95% intervals over items only"]
    bottom, top = axes.get_ylim()
    words += [f"{count(outside, 'broken round')} outside"] * bool(outside) + [
        "deliverable above the line" + ", but for grey" * bool((grey["coherence_kept"] >= COHERENCE_FLOOR).any())]
    style.note(axes, "\n".join(words), _empty_corner(axes, pd.concat([d.points, d.baselines])),
               (COHERENCE_FLOOR - bottom) / (top - bottom))
    labels = [(row["trait_gain"], row["coherence_kept"], f"{row['trial']}.{row['round']}",
               style.BLACK if d.color else looks[row["search"]][1]) for _, row in front.iterrows()]
    several = d.baselines.groupby("label")["search"].nunique()
    for _, row in d.baselines.iterrows():
        name = f"steered {row['edge_doses']:g}× edge" if row["label"] == "steered" else row["label"]
        labels.append((row["trait_gain"], row["coherence_kept"],
                       f"{name}, {row['search']}" if several[row["label"]] > 1 else name, style.BLACK))
    style.settle(figure)
    style.place_labels(axes, labels, list(zip(d.points["trait_gain"], d.points["coherence_kept"])))
    return figure


def _empty_corner(axes: plt.Axes, points: pd.DataFrame) -> str:
    """The side whose bottom corner holds fewer points."""
    shares = axes.transAxes.inverted().transform(axes.transData.transform(points[["trait_gain", "coherence_kept"]]))
    low = shares[(shares[:, 1] > 0) & (shares[:, 1] < 0.3), 0]
    return "left" if (low < 0.4).sum() <= (low > 0.6).sum() else "right"


def set_window(axes: plt.Axes, points: pd.DataFrame, baselines: pd.DataFrame) -> None:
    """Limits that show whatever is deliverable; what broke may lie outside, for a broken model's nats go anywhere."""
    able, inside = points[points["deliverable"]], baselines[baselines["coherence_kept"] >= COHERENCE_FLOOR]
    wanted = pd.concat([able["trait_gain"], able["trait_gain_low"], able["trait_gain_high"], inside["trait_gain"]])
    wanted = wanted if wanted.notna().any() else points["trait_gain"]
    low, high = wanted.min(), wanted.max()
    span = max(high - low, 0.02)
    everything = pd.concat([points["trait_gain"], baselines["trait_gain"]])
    if np.isfinite(span):
        axes.set_xlim(max(min(everything.min(), low), low - 0.3 * span) - 0.05 * span,
                      min(max(everything.max(), high), high + 0.3 * span) + 0.05 * span)
    kept = points["coherence_kept"]
    bottom = min(COHERENCE_FLOOR - 0.01, kept[kept >= LOWEST].min())
    axes.set_ylim(bottom - 0.06 * (1 - bottom), 1 + 0.12 * (1 - bottom))


def _draw_search(axes: plt.Axes, d: Data, points: pd.DataFrame, colours: tuple[str, str], marker: str) -> None:
    able, front = points[points["deliverable"]], points[points["front"]].sort_values("trait_gain")
    axes.plot(front["trait_gain"], front["coherence_kept"], color=style.GREY if d.color else colours[1], linewidth=1.5,
              zorder=3)
    for rows, colour, strength in ((able[~able["front"]], colours[0], 0.35), (front, colours[1], 0.9)):
        axes.errorbar(rows["trait_gain"], rows["coherence_kept"], xerr=_arms(rows, "trait_gain"),
                      yerr=_arms(rows, "coherence_kept"), fmt="none", ecolor=style.GREY if d.color else colour,
                      elinewidth=0.8, alpha=strength, zorder=2)
        if not d.color:
            axes.scatter(rows["trait_gain"], rows["coherence_kept"], s=40, color=colour, marker=marker, zorder=4,
                         edgecolor="white", linewidth=0.5)
    if d.color:
        _draw_coloured(axes, able, d.color, _categories(d.points, d.color))


def _arms(rows: pd.DataFrame, value: str) -> np.ndarray:
    """[2, rows]: from a value down to the low end of its interval and up to the high end; 0 where there is none."""
    low, high = rows[value] - rows[f"{value}_low"], rows[f"{value}_high"] - rows[value]
    return np.stack([low.fillna(0).clip(lower=0), high.fillna(0).clip(lower=0)]).astype(float)


def _draw_coloured(axes: plt.Axes, able: pd.DataFrame, color: str, colours: dict[str, str]) -> None:
    """Deliverable rounds in the colours of a column; those on the front have a thick edge."""
    x, y, values = able["trait_gain"], able["coherence_kept"], able[color]
    look = dict(s=46, edgecolor=style.BLACK, linewidth=np.where(able["front"], 1.6, 0.4), zorder=4)
    if not colours:
        values = values.astype(float)
        norm = LogNorm() if style.is_wide(values) else Normalize()
        drawn = axes.scatter(x, y, c=values, cmap="viridis", norm=norm, **look)
        bar = axes.figure.colorbar(drawn, ax=axes, label=color, pad=0.01, aspect=35)
        bar.outline.set_visible(False)
        if style.is_wide(values):
            style.plain_numbers(bar.ax.yaxis)
    else:
        axes.scatter(x, y, color=values.map(str).map(colours), **look)


def _categories(points: pd.DataFrame, color: str) -> dict[str, str]:
    """A colour for each value of a column; empty where it holds numbers."""
    values = points[color]
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return {}
    names = sorted(values.map(str).unique())
    return dict(zip(names, (*style.PALETTE, *[style.BLACK] * len(names))))


def draw_folder(folder: Path) -> Path:
    """Write pareto.png, pareto.svg and pareto.csv into a search's folder."""
    d = data(folder)
    return style.save(draw(d), d.points, folder / "pareto")


def compare(folders: tuple[Path, ...], color: str | None = None) -> Path:
    """Draw one search into its folder, or several into the first one's.

    Args:
        folders: searches' folders, such as results/quickstart
        color: colour the rounds by this column of the ledger, such as heal.tau
    """
    d = data(*folders, color=color)
    names = ["pareto", *(f"vs_{folder.absolute().name}" for folder in folders[1:]), *([f"by_{color}"] if color else [])]
    return style.save(draw(d), d.points, folders[0] / "_".join(names))


if __name__ == "__main__":
    command(compare, "pareto", __doc__)
