import json

import numpy as np
import pytest
import torch
from made_search import write_search

from analysis import folders, versus
from steerheal.evaluation.readings import Reading
from steerheal.personas import FOUNDATIONS
from steerheal.stages import Result, Store

BASELINES = dict(base=(0.0, 1.0), prompted=(0.02, 0.999), steered=(0.3, 0.9))


def stored(store, name, shift):
    """A readout in the store whose conduct lies `shift` nats above base's, item noise aside; the column `stages` of it."""
    g, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(len(name))
    logp = torch.randn(14, 2, 20, generator=g).log_softmax(-1)[:, :, :7]
    acts = torch.randn(24, generator=g) + shift + 0.05 * torch.randn(24, generator=noise)
    made = dict(foundations=Result(dict(foundations=[FOUNDATIONS[i % 7] for i in range(14)]),
                                   dict(logp=logp, prefill_nll=torch.rand(14, 2, generator=g))),
                conduct=Result({}, dict(conduct=acts, control=torch.randn(5, generator=g))))
    return {kind: store.stage(kind, dict(name=name), lambda r=result: r).digest for kind, result in made.items()}


@pytest.fixture
def search(tmp_path):
    store, folder = Store(tmp_path / ".stages"), tmp_path / "s"
    gains = {}

    def change(row):
        name = f"round {row['round']}"
        gains[name] = row["trait_gain"] = 0.1 * (1 + row["round"])
        row |= dict(coherence_kept=1 - 0.04 * row["round"], deliverable=True, stages=stored(store, name, row["trait_gain"]))
        return row

    study = write_search(folder, trials=2, change=change, settings={"evaluate.trait": "conduct"})
    study.set_user_attr("baselines", [
        dict(label=label, edge_doses=0.5 * (label == "steered"), trait_gain=gain, coherence_kept=kept, fluency_kept=1.0,
             coherence=0.9 * kept, stages=json.dumps(stored(store, label, gain)))
        for label, (gain, kept) in BASELINES.items()])
    folders.ledger.write(study, folder)
    return folders.read(folder)


def conduct(search, stages):
    reading = folders.reading(versus.store_beside(search.folder), stages)
    assert isinstance(reading, Reading)
    return np.asarray(reading.conduct, float)


def test_the_best_round_of_no_less_coherence_stands_against_each_baseline_paired_over_items(search):
    rows = versus.table(search).set_index("label")
    assert list(rows.index) == ["prompted", "steered"] and list(rows["round"]) == [0, 2] and list(rows["rivals"]) == [2, 6]
    for label, row in rows.iterrows():
        theirs = search.baselines.set_index("label").loc[label, "stages"]
        ours = search.rounds.set_index(["trial", "round"]).loc[(row["trial"], row["round"]), "stages"]
        d = conduct(search, ours) - conduct(search, theirs)
        assert row["difference"] == pytest.approx(d.mean())
        half = 2.069 * d.std(ddof=1) / len(d) ** 0.5  # t(0.975, 23) of a printed table
        assert row["difference_high"] - row["difference_low"] == pytest.approx(2 * half, rel=0.15)


def test_the_words_say_which_way_and_that_vectors_differ(search):
    rows = versus.table(search)
    first, second = versus.sentences(rows, ["heal.tau"])
    assert "round 0" in first and "beats the persona as a system prompt" in first
    assert "round 2" in second and "raw steering at 0.5 x edge" in second
    assert "differ in steer.method" in versus.sentences(rows, ["heal.tau", "steer.method"])[-1]


def test_a_baseline_that_no_round_can_match_and_one_whose_stages_are_gone(search):
    search.table["coherence_kept"] = 0.95
    assert "No deliverable round keeps as much coherence as the persona" in versus.sentences(versus.table(search), [])[0]
    search.baselines.loc[search.baselines["label"] == "steered", "stages"] = json.dumps(dict(foundations="0" * 64))
    assert list(versus.table(search)["label"]) == ["prompted"]
