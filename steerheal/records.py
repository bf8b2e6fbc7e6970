"""What a search stored beside its numbers, as tables: completions with their scores, diaries, readouts item by item.

The ledger names the stages; this reads them. Rows whose stages are no longer in the store are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steerheal import ledger
from steerheal.errors import UserError
from steerheal.evaluation.readings import answer_shares
from steerheal.personas import FOUNDATIONS
from steerheal.stages import Result, Store, store_beside


def samples(folder: Path) -> pd.DataFrame:
    """Every completion of a search, those of starved rounds included: trial, round, kind (probe or batch), kappa, dose (raw),
    edge_dose, prompt, text, what the filter measured, gate (of perplexity), soup_gate, reasons (space-separated) and kept.
    """
    store = store_beside(folder)
    rows = []
    for row in (*_rounds(folder), *ledger.starved(folder)):
        for draw in json.loads(row.get("draws", "[]")):
            drawn, scored = store.load(draw["completions"]), store.load(draw["scores"])
            if drawn is None or scored is None:
                continue
            head = dict(trial=row["trial"], round=row["round"], kind=draw["kind"], kappa=draw["kappa"],
                        gate=row["ppl_gate"], soup_gate=row["soup_gate"])
            for prompt, text, dose, score, why in zip(drawn.record["prompts"], drawn.record["texts"], drawn.record["doses"],
                                                      scored.record["scores"], draw["reasons"]):
                rows.append(head | dict(dose=dose, edge_dose=dose / row["edge"], prompt=prompt, text=text, **score,
                                        reasons=why, kept=not why))
    return pd.DataFrame(rows, columns=None if rows else ["trial", "round", "edge_dose", "kept"])


def diary(folder: Path) -> pd.DataFrame:
    """Greedy answers to the persona's headline prompts: trial, round (-1: base), state, prompt, text."""
    store = store_beside(folder)
    rows: list[dict[str, Any]] = []

    def add(trial: int, round_: int, state: str, digest: str) -> None:
        found = store.load(digest)
        pairs = zip(found.record["prompts"], found.record["texts"]) if found else ()
        rows.extend(dict(trial=trial, round=round_, state=state, prompt=p, text=t) for p, t in pairs)

    base = _baselines(folder)["diary"].iloc[0]
    seen: set[int] = set()
    for row in _rounds(folder):
        if row["trial"] not in seen:
            add(row["trial"], -1, "base", base)
            seen.add(row["trial"])
        for state in ("steered", "healed"):
            add(row["trial"], row["round"], state, row[f"diary_{state}"])
    return pd.DataFrame(rows, columns=["trial", "round", "state", "prompt", "text"])


def items(folder: Path) -> pd.DataFrame:
    """Readouts item by item, of base (round -1) and of each round's healed student: trial, round, readout, item and value.

    readout: p[FOUNDATION] of each vignette, coherence (its probability mass), conduct and control (nats), fluency.
    """
    store = store_beside(folder)
    base = _baselines(folder)
    rows = _per_item(store, -1, -1, json.loads(base["stages"].iloc[0]))
    for row in _rounds(folder):
        rows += _per_item(store, row["trial"], row["round"], json.loads(row["stages"]))
    return pd.DataFrame(rows, columns=["trial", "round", "readout", "item", "value"])


def _per_item(store: Store, trial: int, round_: int, stages: dict[str, str]) -> list[dict[str, Any]]:
    found = {name: result for name, digest in stages.items() if (result := store.load(digest))}
    columns: list[tuple[str, list[str], Any]] = []
    if "foundations" in found:
        p, mass = answer_shares(found["foundations"])
        names = found["foundations"].record["ids"]
        columns += [(f"p[{f}]", names, p[:, k]) for k, f in enumerate(FOUNDATIONS)] + [("coherence", names, mass)]
    if "conduct" in found:
        acts = found["conduct"]
        columns += [(name, _numbers(name, acts), acts.tensors[name]) for name in ("conduct", "control")]
    if "fluency" in found:
        columns += [("fluency", _numbers("prompt", found["fluency"], "passes"), found["fluency"].tensors["passes"])]
    return [dict(trial=trial, round=round_, readout=readout, item=item, value=float(value))
            for readout, names, values in columns for item, value in zip(names, np.asarray(values))]


def _numbers(name: str, result: Result, key: str = "") -> list[str]:
    return [f"{name}-{i}" for i in range(len(result.tensors[key or name]))]


def _rounds(folder: Path) -> Iterator[dict[str, Any]]:
    for _, row in ledger.read(folder).dropna(subset=["round"]).iterrows():
        yield row.to_dict()


def _baselines(folder: Path) -> pd.DataFrame:
    if ledger.read(folder)["round"].isna().all():
        raise UserError(f"{folder}: no round is finished yet.")
    found = ledger.read_baselines(folder)
    if found.empty:
        raise UserError(f"{folder}: baselines.csv is empty. The command that wrote it, given again, writes it anew.")
    return found
