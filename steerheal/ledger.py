"""The ledger: one row per trial and round, a view of the study that is rebuilt whenever it is wanted.

Columns: trial, state, end, error, one per searched parameter (`heal.tau`), then everything a round reports. A trial
without a finished round has one row without round. `front` marks the rounds on the Pareto front.
"""

from __future__ import annotations

import io
import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from pyarrow import ArrowInvalid

from steerheal import events, objectives, pareto, study_file
from steerheal.errors import UserError
from steerheal.stages import atomic_write


def open_study(folder: Path) -> optuna.Study:
    """The study of a search's folder, for looking at.

    Raises:
        UserError: there is none (SQLite would make an empty one, which would hide that a backup is to be put back), or it
            is damaged.
    """
    if not (folder / study_file.NAME).exists():
        raise UserError(f"{folder} holds no {study_file.NAME}. The search's command, given again without --dry-run, puts it "
                        f"back from its copy if there is one.")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with study_file.in_words(folder):
            return optuna.load_study(study_name="steerheal", storage=storage_url(folder))
    except KeyError:
        raise UserError(f"{folder / study_file.NAME} holds no study. The search's command, given again without --dry-run, "
                        f"puts it back from its copy if there is one.") from None


def create_study(folder: Path) -> optuna.Study:
    """The study of a search's folder, made where there is none, put back from its backup where it is damaged."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    if mended := study_file.mend(folder):
        print(mended)
    patient = optuna.storages.RDBStorage(storage_url(folder), engine_kwargs=dict(connect_args=dict(timeout=20)))
    study = optuna.create_study(study_name="steerheal", storage=patient, load_if_exists=True,
                                directions=["maximize", "maximize"])
    study.set_metric_names(["trait_gain", "coherence_kept"])
    return study


def conclude(study: optuna.Study, trial: optuna.Trial, rounds: Sequence[dict[str, Any]], end: str, why: str,
             starved: dict[str, Any]) -> None:
    """Close a trial: how it ended, a sentence on why where that was no ordinary end, and what it was worth.

    Args:
        starved: what there is of a round that got too few completions, see `starved`; empty where there is none.
    """
    told = objectives.worth(end, rounds)
    if told is None and end not in objectives.WORTHLESS:
        why = why or "its readouts are not finite: the model diverged"
    trial.set_user_attr("rounds", list(rounds))  # whole, should one of them have met a locked study
    trial.set_user_attr("end", end)
    if why:
        trial.set_user_attr("error", why)
    if starved:
        trial.set_user_attr("starved", starved)
    if told is None:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return
    values, constraint = told
    trial.set_constraint("deliverable", constraint)
    # optuna-dashboard (0.21) reads constraints only where Optuna 4 put them
    trial.storage.set_trial_system_attr(trial._trial_id, "constraints", [constraint])
    study.tell(trial, values)


def storage_url(folder: Path) -> str:
    """Of a search's study, whatever characters its path has."""
    from sqlalchemy import URL

    return URL.create("sqlite", database=str(folder / study_file.NAME)).render_as_string()


def read(folder: Path) -> pd.DataFrame:
    """The ledger as it was last written into a search's folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    return view(folder / "ledger.parquet", pd.read_parquet)


def read_progress(folder: Path) -> pd.DataFrame:
    """hypervolume.csv, see `progress`. Raises as `read` does."""
    return view(folder / "hypervolume.csv", pd.read_csv)


def read_baselines(folder: Path) -> pd.DataFrame:
    """baselines.csv, which holds nothing but a newline until they are measured. Raises as `read` does."""
    path = folder / "baselines.csv"
    empty = path.exists() and not path.read_bytes().strip()
    return pd.DataFrame(columns=["label"]) if empty else view(path)


def view(path: Path, reader: Callable[[Path], pd.DataFrame] = pd.read_csv) -> pd.DataFrame:
    """A table in a search's folder. Raises as `read` does."""
    try:
        return reader(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent} holds no {path.name}; name a folder that this version of `python -m steerheal.search` "
                        f"wrote.") from None
    except (ArrowInvalid, OSError, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}). It is a view: the command that wrote it, given again, writes "
                        f"it anew.") from None


def searched(table: pd.DataFrame) -> list[str]:
    """The columns of a ledger that are searched settings: they stand between `error` and `round`."""
    columns = list(table.columns)
    return columns[columns.index("error") + 1 : columns.index("round")]


def build(study: optuna.Study) -> pd.DataFrame:
    """The ledger of a study, by trial and round. Interrupted attempts that were run again are left out."""
    rows: list[dict[str, Any]] = []
    finished = finished_rounds(study)
    for index, trial in sorted(latest(study).items()):
        head = dict(trial=index, state=trial.state.name.lower(), end=trial.user_attrs.get("end", ""),
                    error=trial.user_attrs.get("error", ""), **trial.params)
        rows += [head | _plain(r) for r in finished[index]] or [head]
    table = pd.DataFrame(rows, columns=None if rows else ["trial", "state", "end", "error"])
    for column, missing in (("round", pd.NA), ("trait_gain", float("nan")), ("coherence_kept", float("nan")),
                            ("deliverable", False), ("adapter", ""), ("verdict", "")):
        if column not in table:
            table[column] = missing
    table["round"] = table["round"].astype("Int64")
    table["deliverable"] = table["deliverable"].eq(True)  # rows without a round count as not deliverable
    table["front"] = table.index.isin(front(table).index)
    return table


def latest(study: optuna.Study) -> dict[int, optuna.trial.FrozenTrial]:
    """The attempt that counts for each logical trial index: the finished one, else the last."""
    chosen: dict[int, optuna.trial.FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        index = trial.user_attrs.get("index")
        finished = index in chosen and chosen[index].state == optuna.trial.TrialState.COMPLETE
        if index is not None and not finished:
            chosen[index] = trial
    return chosen


def finished_rounds(study: optuna.Study) -> dict[int, list[dict[str, Any]]]:
    """The finished rounds of each logical trial index: of its finished attempt, else of the one that got furthest.

    An attempt that was interrupted may have more than the one after it, which first replays them.
    """
    counts = latest(study)
    out = {index: trial.user_attrs.get("rounds", []) for index, trial in counts.items()}
    for trial in study.get_trials(deepcopy=False):
        index, own = trial.user_attrs.get("index"), trial.user_attrs.get("rounds", [])
        if index in out and counts[index].state != optuna.trial.TrialState.COMPLETE and len(own) > len(out[index]):
            out[index] = own
    return out


def starved(folder: Path) -> list[dict[str, Any]]:
    """Rounds that got too few completions and so have no row: trial, round, edge, ppl_gate, soup_gate and draws, as in
    rows."""
    trials = latest(open_study(folder)) if (folder / study_file.NAME).exists() else {}
    return [dict(trial=i) | _plain(t.user_attrs["starved"]) for i, t in sorted(trials.items()) if "starved" in t.user_attrs]


def front(table: pd.DataFrame) -> pd.DataFrame:
    """The non-dominated deliverable rounds, largest trait gain first; one row per distinct adapter."""
    able = table[table["deliverable"]].drop_duplicates("adapter")
    points = list(zip(able["trait_gain"].astype(float), able["coherence_kept"].astype(float)))
    return able.iloc[pareto.front(points)]


def hypervolume(table: pd.DataFrame) -> float:
    """Of the front over rounds, against the fixed reference point (0 nats, 0.85)."""
    able = table[table["deliverable"]]
    points = list(zip(able["trait_gain"].astype(float), able["coherence_kept"].astype(float)))
    return pareto.hypervolume(points, objectives.REFERENCE_POINT)


def volumes(table: pd.DataFrame, order: Iterable[int]) -> list[float]:
    """Hypervolume of the rounds of the first n trials, for each n, the trials in this order."""
    points: dict[int, list[pareto.Point]] = defaultdict(list)
    able = table[table["deliverable"]]
    for trial, gain, kept in zip(able["trial"], able["trait_gain"].astype(float), able["coherence_kept"].astype(float)):
        points[trial].append((gain, kept))
    return pareto.growth((points[trial] for trial in order), objectives.REFERENCE_POINT)


def progress(study: optuna.Study, table: pd.DataFrame) -> pd.DataFrame:
    """How the front grew: finished (trials so far), trial, hours, hypervolume; one row per finished trial, as they ended.

    hours are those in which at least one trial ran; the pauses between two runs of a search do not count, nor do trials
    that a kill cut off, whose end nobody saw.
    """
    spans = [(t.datetime_start.timestamp(), t.datetime_complete.timestamp()) for t in study.get_trials(deepcopy=False)
             if t.datetime_start and t.datetime_complete and "end" in t.user_attrs]
    ends = sorted((t.datetime_complete, index) for index, t in latest(study).items()
                  if t.datetime_complete and t.state == optuna.trial.TrialState.COMPLETE)
    order = [index for _, index in ends]
    hours = [round(seconds / 3600, 5) for seconds in events.busy(spans, [end.timestamp() for end, _ in ends])]
    return pd.DataFrame(dict(finished=range(1, len(ends) + 1), trial=order, hours=hours, hypervolume=volumes(table, order)))


def write(study: optuna.Study, folder: Path) -> pd.DataFrame:
    """Rebuild ledger.parquet, ledger.csv, front.csv, baselines.csv and hypervolume.csv in a search's folder; the ledger."""
    table = build(study)
    baselines = pd.DataFrame(study.user_attrs.get("baselines", []))
    for name, frame in (("ledger", table), ("front", front(table)), ("baselines", baselines),
                        ("hypervolume", progress(study, table))):
        write_csv(folder / f"{name}.csv", frame)
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    atomic_write(folder / "ledger.parquet", buffer.getvalue())  # last: where it is, the others are too
    return table


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write one table; raises as `atomic_write` does."""
    atomic_write(path, table.to_csv(index=False).encode())


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Lists and dicts as JSON text, so that the table has one type per column."""
    return {k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()}
