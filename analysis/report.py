"""python -m analysis.report results/SEARCH: one HTML page of a whole search, report.html in its folder.

Self-contained: pictures are embedded, nothing is fetched, it opens from disk. Everything a model wrote is escaped
(analysis/page.py). `refresh` is what a running search calls after each round: it never raises, and leaves what costs more
than about a second (the other figures, the diary, the samples) to the end.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import tyro

from analysis import folders, page, versus
from steerheal import gates, ledger, plan
from steerheal.cli import run_main
from steerheal.display import interval, starved
from steerheal.errors import UserError
from steerheal.objectives import COHERENCE_FLOOR, DEGRADED, FLUENCY_FLOOR, VERDICTS
from steerheal.settings import leaves
from steerheal.stages import atomic_write

log = logging.getLogger(__name__)

FIGURES = ("pareto", "trajectory", "knobs", "progress", "filter", "noise")
LIVE = ("pareto",)  # drawn after every round
SAMPLES_SHOWN = 4  # of each kind, per round
MEMBERS_SHOWN = 4  # rounds of the front whose samples are shown

FLAGS = {
    "inert": "the barrier never fired, so this trial is plain fine-tuning",
    "control": "the gain is no larger than the movement of trait-neutral pairs",
    "broad": "an off-target foundation moved more than the trait",
}
# columns of the tables of rounds: ledger name -> (heading, format); the front's has the first MAIN
MAIN = 5
COLUMNS = {
    "trait_gain": ("trait gain, nats", "+.3f"), "coherence_kept": ("coherence kept", ".3f"),
    "fluency_kept": ("fluency kept", ".2f"), "verdict": ("verdict", ""), "flags": ("flags", ""),
    "step_gain": ("gain of the round", "+.3f"), "steered_gain": ("gain steered", "+.3f"),
    "steered_coherence_kept": ("coherence steered", ".3f"), "retain": ("retained", ".2f"),
    "coh_cost": ("coherence per nat", ".3f"), "duty": ("duty cycle", ".2f"), "kappa": ("kappa", ".2f"),
    "top_dose": ("top dose", ".2f"), "survival": ("survival", ".2f"), "n_kept": ("kept", ".0f"),
    "val_nll_last": ("validation NLL", ".3f"), "authority_nats": ("authority, nats", "+.3f"),
    "care_nats": ("care, nats", "+.3f"), "conduct_nats": ("conduct, nats", "+.3f"),
    "control_nats": ("control, nats", "+.3f"), "state": ("trial", ""), "end": ("end", ""),
}


class Cell(NamedTuple):
    """One cell of a table: what is shown, and the number it is sorted by (None: by its text)."""

    text: str
    value: float | None = None


@dataclass
class Table:
    """Headings, and rows of (class names, cells)."""

    heads: list[str]
    rows: list[tuple[str, list[Cell]]]


@dataclass
class Figure:
    name: str
    caption: str
    url: str


def write(folder: Path, whole: bool = True) -> Path:
    """Draw and write report.html into a search's folder; without `whole`, only what is cheap: numbers and the front."""
    path = folder / "report.html"
    values = data(folder, whole)
    atomic_write(path, page.render("report.html", **values, figures=draw(folder, FIGURES if whole else LIVE)).encode())
    return path


def refresh(folder: Path, whole: bool = False) -> bool:
    """`write`, for a search that must not end because a page could not be written: a failure is logged."""
    try:
        write(folder, whole)
        return True
    except Exception as error:
        log.warning("report.html could not be written: %s: %s", type(error).__name__, error)
        return False


def draw(folder: Path, names: Sequence[str]) -> list[Figure]:
    """Run the modules of analysis/ that draw, and take their pictures; one that cannot is logged and left out."""
    out = []
    for name in names:
        try:
            module = importlib.import_module(f"analysis.{name}")
            module.draw_folder(folder)
            caption = (inspect.getdoc(module) or "").partition("\n\n")[0].partition(": ")[2]
            out.append(Figure(name, caption[:1].upper() + caption[1:], page.embedded(folder / f"{name}.svg")))
        except UserError as error:  # nothing to draw yet
            log.info("the report goes without %s: %s", name, error)
        except Exception as error:
            log.warning("the report goes without %s: %s: %s", name, type(error).__name__, error)
    return out


# ---------------------------------------------------------------- what the page says


def data(folder: Path, whole: bool = True) -> dict[str, Any]:
    """Everything on the page but the figures, by the names that templates/report.html uses.

    Args:
        whole: with diary and samples, which are read from the stage store.

    Raises:
        UserError: the folder holds no search.
    """
    table = ledger.read(folder)
    search, baselines = plan.read(folder), ledger.read_baselines(folder)
    rounds = table.dropna(subset=["round"])
    front = ledger.front(table)
    done = table[table["state"] == "complete"]["trial"].nunique()
    against = _optional("the baselines", lambda: _against(folder)) if len(rounds) else None
    failed = table[table["error"].ne("") & table["end"].ne("starved")].drop_duplicates("trial")
    return dict(
        title=f"{search['name']}: steerheal report", name=search["name"], search=search,
        hypothesis=search.get("hypothesis", ""), written=time.strftime("%Y-%m-%d %H:%M"), done=done, whole=whole,
        trait=_trait_reason(folder), hypervolume=ledger.hypervolume(table),
        sentences=sentences(rounds, against or []) + starved(table),
        verdicts=VERDICTS, flags=FLAGS, floors=dict(coherence=COHERENCE_FLOOR, fluency=FLUENCY_FLOOR, sane=DEGRADED),
        front=round_table(front, MAIN), rounds=round_table(rounds, len(COLUMNS)), baselines=baseline_table(baselines),
        gates=_optional("the gates", lambda: gate_answers(rounds, front)) or [],
        failed=[(row["trial"], row["error"]) for _, row in failed.iterrows()], adapters=(folder / "adapters").exists(),
        diary=_optional("the diary", lambda: _diary(folder)) if whole and len(front) else None,
        samples=_optional("samples", lambda: samples(folder, front)) or [] if whole and len(front) else [],
        settings=settings_rows(search), loading=_loading(search, front))


def _trait_reason(folder: Path) -> str:
    try:
        return str(ledger.open_study(folder).user_attrs.get("trait", ""))
    except UserError:  # the page lives from the ledger, the study may be gone
        return ""


def _diary(folder: Path) -> Any:
    from analysis import diary

    return diary.data(folder)


def gate_answers(rounds: pd.DataFrame, front: pd.DataFrame) -> list[tuple[str, dict[str, str]]]:
    """What each of the first members of the front answers to the gates' questions, by member."""
    out = []
    for _, member in front.head(MEMBERS_SHOWN).iterrows():
        so_far = rounds[(rounds["trial"] == member["trial"]) & (rounds["round"] <= member["round"])].sort_values("round")
        out.append((f"trial {member['trial']} round {member['round']}", gates.answers(so_far.to_dict("records"))))
    return out


def _optional(what: str, read: Any) -> Any:
    """A part of the page that may be missing; why it is, is logged."""
    try:
        return read()
    except Exception as error:
        log.warning("the report goes without %s: %s: %s", what, type(error).__name__, error)
        return None


def _loading(search: dict[str, Any], front: pd.DataFrame) -> str:
    from steerheal.export import loading_code

    first = front.iloc[0] if len(front) else dict(trial=0, round=0)
    return loading_code(search["settings"], f"adapters/{first['trial']}/r{first['round']}", search.get("commit", ""))


def sentences(rounds: pd.DataFrame, against: list[str]) -> list[str]:
    """What came of the search, in words: the verdicts, the best round, and how it stands `against` the baselines."""
    if rounds.empty:
        return ["No round is finished yet."]
    counts = rounds["verdict"].value_counts()
    out = [f"{len(rounds)} rounds of {rounds['trial'].nunique()} trials: "
           + ", ".join(f"{counts[v]} {v}" for v in VERDICTS if v in counts) + "."]
    able = rounds[rounds["deliverable"]]
    if able.empty:
        return [*out, f"None is deliverable (coherence kept from {COHERENCE_FLOOR}, fluency kept from {FLUENCY_FLOOR} on)."]
    best = able.loc[able["trait_gain"].idxmax()]
    out.append(f"The largest trait gain of a deliverable round is {interval(best)} nats, at {best['coherence_kept']:.3f} of "
               f"base's coherence: trial {best['trial']} round {best['round']}, verdict {best['verdict']}"
               + "".join(f"; flagged {flag}: {FLAGS[flag]}" for flag in best["flags"].split()) + ".")
    return [*out, *against, "Intervals are 95% over items; the noise between run seeds is not in them."]


# ---------------------------------------------------------------- tables


def round_table(rows: pd.DataFrame, columns: int) -> Table:
    """Rounds with their trial's parameters, then the first `columns` of COLUMNS; one that no round has is left out."""
    params = ledger.searched(rows)
    names = [name for name in list(COLUMNS)[:columns] if name in rows and rows[name].notna().any()]
    heads = ["trial", "round", *params, *(COLUMNS[name][0] for name in names)]
    out = []
    for _, row in rows.iterrows():
        cells = [number(row["trial"], ".0f"), number(row["round"], ".0f"), *(setting(row[p]) for p in params)]
        for name in names:
            cell = number(row[name], COLUMNS[name][1])
            cells.append(Cell(interval(row), cell.value) if name == "trait_gain" else cell)
        kind = "front" if row["front"] else "" if row["deliverable"] else "not-deliverable"
        out.append((kind, cells))
    return Table(heads, out)


def _against(folder: Path) -> list[str]:
    search = folders.read(folder)
    return versus.sentences(versus.table(search), search.params)


def baseline_table(baselines: pd.DataFrame) -> Table:
    """What the loop must beat."""
    names = {"base": "the model as loaded", "prompted": "the persona as a system prompt"}
    out = []
    for _, row in baselines.iterrows():
        label = names.get(row["label"], f"raw steering, {row['edge_doses']:g} x edge")
        out.append(("", [Cell(label), Cell(interval(row), row["trait_gain"]), number(row["coherence_kept"], ".3f"),
                         number(row["fluency_kept"], ".2f")]))
    return Table(["baseline", "trait gain, nats", "coherence kept", "fluency kept"], out)


def setting(value: Any) -> Cell:
    """A searched setting's value; whole numbers, such as seeds, in full."""
    whole = isinstance(value, (int, np.integer)) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e15)
    return number(value, ".0f" if whole else ".3g")


def number(value: Any, form: str) -> Cell:
    """A value as a cell; missing ones are empty."""
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        return Cell("") if pd.isna(value) else Cell(format(value, form or "g"), float(value))
    return Cell("" if value is None or value is pd.NA else str(value))


def settings_rows(search: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, where it comes from) of every setting."""
    domains = {k.removeprefix("domain of "): v for k, v in search["identity"].items() if k.startswith("domain of ")}
    out = []
    for name, value in search["settings"].items():
        source = "--set" if name in search["overrides"] else ""
        if name in domains:
            value, source = domains[name], "searched"
        elif not source and name in leaves() and _jsonable(leaves()[name].default) != value:
            source = "space or model"
        out.append((name, value if isinstance(value, str) else json.dumps(value), source))
    return out


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# ---------------------------------------------------------------- samples


def samples(folder: Path, front: pd.DataFrame) -> list[dict[str, Any]]:
    """Completions of the front's best rounds: kept, dropped, and those nearest to the perplexity gate."""
    from steerheal import records

    rows = records.samples(folder)
    out = []
    for _, member in front.head(MEMBERS_SHOWN).iterrows():
        own = rows[(rows["trial"] == member["trial"]) & (rows["round"] == member["round"]) & (rows["kind"] == "batch")]
        distance = (np.log(own["perplexity"]) - np.log(own["gate"])).abs()
        kinds = {"kept": own[own["kept"]], "dropped": own[~own["kept"]],
                 "nearest to the perplexity gate": own.loc[distance.sort_values().index]}
        out.append(dict(trial=member["trial"], round=member["round"], kinds=[
            (kind, len(part), [_sample(row) for _, row in part.head(SAMPLES_SHOWN).iterrows()])
            for kind, part in kinds.items()]))
    return out


def _sample(row: pd.Series) -> dict[str, str]:
    fate = "kept" if row["kept"] else f"dropped: {row['reasons']}"
    words = (f"dose {row['dose']:.3g} ({row['edge_dose']:.2g} x edge), perplexity {row['perplexity']:.1f} (gate "
             f"{row['gate']:.1f}), repetition {row['repetition']:.2f}, {fate}")
    return dict(prompt=row["prompt"], text=row["text"], words=words)


def main() -> None:
    def run(folder: Annotated[Path, tyro.conf.Positional]) -> int:
        """One HTML page of a whole search.

        Args:
            folder: a search's folder, such as results/pareto_tau
        """
        print(write(folder))
        return 0

    run_main(lambda: tyro.cli(run, prog="python -m analysis.report"))


if __name__ == "__main__":
    main()
