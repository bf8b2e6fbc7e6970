import itertools

import numpy as np
import pandas as pd
import pytest

from benchmarks import samplers
from steerheal.errors import UserError


def grid(**extra):
    rows = [dict(a=a, b=b, trait_gain=a * b, coherence_kept=1 - 0.1 * a * b, deliverable=1 - 0.1 * a * b >= 0.85, **extra)
            for a, b in itertools.product([0.2, 0.5, 1.0], ["1", "2"])
            for b in [int(b)]]
    return pd.DataFrame(rows)


def test_the_replay_of_a_tiny_grid_is_drawn_and_tabled(tmp_path, capsys):
    path = tmp_path / "grid.csv"
    grid().to_csv(path, index=False)
    args = samplers.Args(path, repeats=3, trials=12, samplers=("tpe", "nsgaii", "random"))
    assert samplers.report(args) == 0
    out = capsys.readouterr().out
    assert "6 combinations" in out and "RESULT trials=8 tpe=" in out
    assert all((tmp_path / f"samplers.{kind}").stat().st_size > 1000 for kind in ("png", "svg", "csv"))
    found = samplers.curves(samplers.load(path), ("random",), 3, 12)
    assert len(found) == 36 and (found.groupby("repeat")["share"].diff().dropna() >= 0).all() and found["share"].max() <= 1


def test_the_best_possible_share_is_one_and_comes_with_every_point_seen(tmp_path):
    path = tmp_path / "grid.csv"
    grid().to_csv(path, index=False)
    assert samplers.replay(samplers.load(path), "random", 0, 60)[-1] == pytest.approx(samplers.load(path).best())


def test_bands_are_the_mean_and_its_interval():
    found = pd.DataFrame([dict(sampler="x", repeat=i, trial=1, share=s) for i, s in enumerate([0.1, 0.4, 0.7])])
    row = samplers.bands(found).iloc[0]
    half = 1.96 * np.std([0.1, 0.4, 0.7], ddof=1) / 3**0.5
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((0.4, 0.4 - half, 0.4 + half))


def test_a_ledger_is_a_grid_and_a_starved_trial_is_not_deliverable(tmp_path):
    table = grid()
    head = pd.DataFrame(dict(trial=range(6), state="complete", end="rounds", error=""))
    ledger = pd.concat([head, table[["a", "b"]]], axis=1).assign(round=0).join(table.drop(columns=["a", "b"]))
    ledger.loc[2, ["trait_gain", "coherence_kept", "round"]] = None
    ledger.loc[2, "deliverable"] = False
    ledger.to_csv(tmp_path / "ledger.csv", index=False)
    found = samplers.load(tmp_path / "ledger.csv")
    assert list(found.space) == ["a", "b"] and found.outcomes[0.5, 1] == (0.0, 1.0, 1.0)
    ledger.loc[3, "state"] = "fail"
    ledger.to_csv(tmp_path / "ledger.csv", index=False)
    with pytest.raises(UserError, match="5 different finished rows of 6 for a grid of 6"):
        samplers.load(tmp_path / "ledger.csv")


def test_an_incomplete_grid_is_refused(tmp_path):
    grid().iloc[:-1].to_csv(tmp_path / "g.csv", index=False)
    with pytest.raises(UserError, match="must be complete"):
        samplers.load(tmp_path / "g.csv")
