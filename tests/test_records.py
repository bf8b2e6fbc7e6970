import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import TINY, make_lm

from analysis import filter as filter_figure
from steerheal import filtering, ledger, records
from steerheal.errors import UserError
from steerheal.evaluation.readings import FOUNDATIONS
from steerheal.loop import HealLoop
from steerheal.settings import from_flat
from steerheal.stages import Store


@pytest.fixture(scope="module")
def search(first, tmp_path_factory):
    """A folder as a search leaves it, for one trial of two rounds, with the filter on."""
    out = tmp_path_factory.mktemp("results")
    shutil.copytree(first[0], out / ".stages")  # which has what no filter changes
    settings = from_flat(TINY | {"filter.coherence": True, "filter.ppl_gate": 300.0, "filter.soup_gate": 6.0})
    loop = HealLoop(settings, make_lm(), Store(out / ".stages"))
    rounds = list(loop.rounds())
    folder = out / "one"
    folder.mkdir()
    table = pd.DataFrame([dict(trial=0, **ledger._plain(r.row())) for r in rounds])
    table.to_parquet(folder / "ledger.parquet")
    pd.DataFrame(loop.baselines().rows()).to_csv(folder / "baselines.csv", index=False)
    return folder, loop, rounds


def test_every_completion_is_on_record_with_its_reasons(search):
    folder, loop, rounds = search
    table = records.samples(folder)
    assert set(table["round"]) == {r.outcome.round for r in rounds} and {"probe", "batch"} >= set(table["kind"])
    for _, row in table.iterrows():
        gates = filtering.Gates(row["gate"], row["soup_gate"])
        score = filtering.Score(**{f: row[f] for f in filtering.Score.__dataclass_fields__})
        assert row["reasons"].split() == filtering.reasons(score, loop.settings.filter, gates)
        assert row["kept"] == (not row["reasons"]) and row["prompt"] in loop.persona.dilemmas
    for r in rounds:
        mine = table[table["round"] == r.outcome.round]
        drops = [reason for text in mine["reasons"] for reason in text.split()]
        assert {n: drops.count(n) for n in set(drops)} == r.details["drops"]


def test_so_are_those_of_a_round_that_starved(first, tmp_path):
    shutil.copytree(first[0], tmp_path / ".stages")
    settings = from_flat(TINY | {"filter.coherence": True, "filter.ppl_gate": 1e-3, "filter.soup_gate": 6.0})
    loop = HealLoop(settings, make_lm(), Store(tmp_path / ".stages"))
    assert list(loop.rounds()) == [] and loop.end == "starved"
    folder = tmp_path / "one"
    folder.mkdir()
    study = ledger.create_study(folder)
    trial = study.ask()
    trial.set_user_attr("index", 0)
    ledger.conclude(study, trial, [], loop.end, loop.why, loop.starved)
    ledger.write(study, folder)
    table = records.samples(folder)
    assert len(table) == sum(len(d["reasons"]) for d in loop.starved["draws"]) > 0
    assert set(table["round"]) == {0} and not table["kept"].any() and table["reasons"].str.contains("perplexity").all()
    drawn = filter_figure.data(folder)
    assert drawn.survival["kept"].eq(0).all() and drawn.survival["n"].sum() == len(table) and drawn.log_ratio.empty


def test_the_diary_has_base_steered_and_healed(search):
    folder, loop, rounds = search
    table = records.diary(folder)
    assert len(table) == len(loop.persona.headline) * (1 + 2 * len(rounds))
    assert list(table["state"].unique()) == ["base", "steered", "healed"]
    assert set(table["prompt"]) == set(loop.persona.headline)


def test_items_average_to_the_ledger(search):
    folder, _, rounds = search
    table = records.items(folder).groupby(["round", "readout"])["value"].mean()
    for r in rounds:
        mine = table[r.outcome.round]
        for f in FOUNDATIONS:
            assert np.log(mine[f"p[{f}]"]) == pytest.approx(r.details[f"{f}_nats"])
        assert mine["coherence"] == pytest.approx(r.details["coherence"])
        assert mine["conduct"] == pytest.approx(r.details["conduct_nats"])
        assert mine["fluency"] == pytest.approx(r.details["fluency"])
    base = pd.read_csv(folder / "baselines.csv").iloc[0]
    assert table[-1]["conduct"] == pytest.approx(base["conduct_nats"]) and json.loads(base["stages"])["conduct"]


def test_before_the_first_round_there_is_a_sentence(tmp_path):
    pd.DataFrame(dict(trial=[0], round=pd.array([pd.NA], "Int64"))).to_parquet(tmp_path / "ledger.parquet")
    (tmp_path / "baselines.csv").write_text("\n")
    with pytest.raises(UserError, match="no round is finished yet"):
        records.diary(tmp_path)


def test_a_folder_without_a_ledger_is_told(tmp_path):
    with pytest.raises(UserError, match="holds no ledger"):
        records.samples(tmp_path)
