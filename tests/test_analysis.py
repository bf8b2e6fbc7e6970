"""Figures, drawn from searches made up here: what they compute is checked, and that odd searches draw, in words."""

from __future__ import annotations

import datetime
import json
import math
import sys

import matplotlib.pyplot as plt
import numpy as np
import optuna
import pandas as pd
import pytest
from made_search import SPACE, START, make_samples, write_search

from analysis import filter, folders, knobs, noise, pareto, progress, trajectory
from steerheal import ledger, records
from steerheal.errors import UserError


@pytest.fixture
def make_search(tmp_path, monkeypatch):
    """A function that leaves a search's folder as steerheal.search does. The studies stay in memory: SQLite is slow."""
    monkeypatch.setitem(plt.rcParams, "savefig.dpi", 40)
    studies = {}
    monkeypatch.setattr(knobs, "open_study", studies.get)

    def make(name="made", **how):
        folder = tmp_path / name
        studies[folder] = write_search(folder, **how)
        return folder

    return make


@pytest.fixture
def samples(monkeypatch):
    """Lets a test say which completions a search made."""
    def set_to(table):
        monkeypatch.setattr(records, "samples", lambda folder: table.copy())

    set_to(make_samples())
    return set_to


# ---------------------------------------------------------------- what is computed


def test_what_pareto_shows_is_the_ledgers_front(make_search):
    d = pareto.data(make_search())
    able = d.points[d.points["deliverable"]]
    dominated = [((able["trait_gain"] >= a["trait_gain"]) & (able["coherence_kept"] >= a["coherence_kept"]) &
                  ((able["trait_gain"] > a["trait_gain"]) | (able["coherence_kept"] > a["coherence_kept"]))).any()
                 for _, a in able.iterrows()]
    assert len(d.points) == 36 and list(able["front"]) == [not x for x in dominated]
    one = d.points.iloc[5]
    assert one["coherence_kept_low"] == pytest.approx(one["coherence_kept"] - 0.006 / 0.93)  # the interval, as a share of base


def test_searches_that_measure_alike_share_one_axis(make_search):
    a, b = make_search("a"), make_search("b", trials=5, seed=1)
    d = pareto.data(a, b)
    assert d.points.groupby("search").size().to_dict() == {"a": 36, "b": 15} and set(d.hypervolume) == {"a", "b"}
    assert len(d.baselines) == 5  # drawn once
    assert pareto.compare((a, b)) == a / "pareto_vs_b" and (a / "pareto_vs_b.svg").exists()
    table = ledger.view(b / "baselines.csv")
    table.loc[table["label"] == "steered", "trait_gain"] += 0.1  # another vector, whose ladder is another
    table.to_csv(b / "baselines.csv", index=False)
    d = pareto.data(a, b)
    assert d.baselines["label"].value_counts().to_dict() == {"steered": 6, "base": 1, "prompted": 1} and pareto.draw(d)


@pytest.mark.parametrize("settings, words", [
    ({"model": "other"}, "model: 'tiny' in .*a, 'other' in"),
    ({"filter.soup_gate": 9.0}, "filter.soup_gate: .* 9.0 in"), ({"evaluate.shots": 7}, "evaluate.shots: 0 in .*, 7 in"),
    ({"evaluate.trait": "+conduct"}, "evaluate.trait: 'of the persona' in .*, '\\+conduct' in")])
def test_searches_that_measure_differently_are_refused(make_search, settings, words):
    with pytest.raises(UserError, match=words):
        pareto.data(make_search("a", trials=1), make_search("b", trials=1, settings=settings))


@pytest.mark.parametrize("field", ["content of persona", "version of stage conduct"])
def test_other_code_or_another_file_behind_the_same_settings_is_refused(make_search, field):
    with pytest.raises(UserError, match=rf"{field}: 1 in .*, 2 in"):
        pareto.data(*(make_search(name, trials=1, identity={field: n}) for n, name in ((1, "a"), (2, "b"))))


def test_a_search_is_compared_with_others_and_not_with_itself(make_search):
    folder = make_search(trials=1)
    with pytest.raises(UserError, match="named twice"):
        pareto.data(folder, folder.parent / "." / folder.name)


def test_another_readout_is_refused(make_search):
    other = make_search("b", trials=1, change=lambda row: row | {"trait": "authority_nats"})
    with pytest.raises(UserError, match=r"trait readout: 'conduct_nats' in .*, 'authority_nats' in"):
        pareto.data(make_search("a", trials=1), other)


def test_more_searches_than_colours_are_drawn(make_search):
    pareto.draw(pareto.data(*(make_search(f"s{i}", trials=1, rounds=1, seed=i) for i in range(7))))


def test_color_takes_a_column_of_the_ledger(make_search):
    folder = make_search()
    for color in ("heal.tau", "heal.aggregate"):
        assert pareto.compare((folder,), color).name == f"pareto_by_{color}"
    with pytest.raises(UserError, match=r"did you mean heal\.tau"):
        pareto.data(folder, color="heal.tua")
    with pytest.raises(UserError, match="one search"):
        pareto.data(folder, make_search("another", trials=1), color="heal.tau")


def test_a_key_of_long_names_is_broken_into_lines_under_the_title(make_search):
    names = ["[1.0]", "[0.5, 1.0]", "[0.5, 0.75, 1.0]", "[0.25, 0.5, 0.75, 1.0]", "[0.125, 0.25, 0.5, 0.75, 1.0]"]
    folder = make_search(change=lambda row: row | {"doses": names[row["round"]]})
    figure = pareto.draw(pareto.data(folder, color="doses"))
    title = figure.axes[0].title if figure.axes[0].title.get_text() else figure.axes[0]._left_title
    keys = [t.get_window_extent() for t in figure.axes[0].texts if t.get_text() in names]
    boxes = [*keys, title.get_window_extent()]
    assert len(keys) == 3 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_more_categories_than_colours_are_refused(make_search):
    with pytest.raises(UserError, match="36 different values, more than the 6 colours"):
        pareto.data(make_search(), color="adapter")


def test_an_nll_round_is_no_inert_barrier(make_search):
    rounds = knobs.data(make_search(change=lambda row: row | {"duty": 0.0, "flags": "inert" if row["round"] else ""})).rounds
    assert list(knobs._inert(rounds)) == [bool(r) for r in rounds["round"]]


def test_labels_cover_neither_points_nor_each_other(make_search):
    figure = pareto.draw(pareto.data(make_search()))
    axes = figure.axes[0]
    boxes = [t.get_window_extent() for t in axes.texts if t.get_text()]
    assert len(boxes) > 5
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_trajectory_walks_from_base_over_steered_to_healed(make_search):
    folder = make_search()
    d = trajectory.data(folder, trial=3)
    rows = folders.read(folder).rounds.query("trial == 3")
    assert list(d.states["state"]) == ["base", *["steered", "healed"] * 3]
    assert list(d.states["step"]) == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    healed = d.states[d.states["state"] == "healed"]
    assert list(healed["trait_gain"]) == list(rows["trait_gain"])
    assert list(healed["incoherence"]) == pytest.approx(list(1 - rows["coherence"]))
    assert d.floor == pytest.approx(1 - 0.85 * 0.93) and d.wanted == {"authority": -1}
    signed = make_search("signed", trials=1, settings={"evaluate.trait": "+care"})
    assert trajectory.data(signed).wanted == {"care": 1}
    with pytest.raises(UserError, match="--trial 99"):
        trajectory.data(folder, trial=99)


def test_trajectory_of_the_front_starts_with_what_gains_most(make_search):
    folder = make_search()
    rounds = folders.read(folder).rounds
    want = rounds[rounds["front"]].groupby("trial")["trait_gain"].max().sort_values(ascending=False).index[:4]
    assert list(trajectory.data(folder).states["trial"].unique()) == list(want)


def test_the_setting_that_matters_is_ranked_first(make_search):
    def only_tau(row):  # the aggregate decides nothing: both objectives follow tau alone
        tau = float(row["adapter"].removesuffix(str(row["round"])).removesuffix("mean").removesuffix("rmse"))
        return row | dict(trait_gain=tau, coherence_kept=1 - 0.03 * tau, violation=-0.1, deliverable=True)

    importance = knobs.data(make_search(trials=40, rounds=1, change=only_tau)).importance
    assert (importance.loc["heal.tau"] > 0.8).all() and importance.sum().tolist() == pytest.approx([1, 1])


def test_broken_trials_are_among_the_worst_whatever_they_gain(make_search):
    def ranked(name, gain_of_broken):
        def change(row):
            if float(row["adapter"][:4]) <= 1.0:
                return row | dict(violation=-0.1, deliverable=True)
            return row | dict(trait_gain=gain_of_broken, violation=0.2, deliverable=False)

        return knobs.data(make_search(name, trials=40, rounds=1, change=change)).importance["trait_gain"].to_dict()

    assert ranked("far", 22.0) == ranked("near", 0.1) == ranked("back", -22.0)


def test_where_all_trials_are_alike_nothing_is_ranked(make_search):
    d = knobs.data(make_search(rounds=1, change=lambda row: row | dict(coherence_kept=1.0, violation=-0.1, deliverable=True)))
    assert d.importance["coherence_kept"].isna().all() and d.importance["trait_gain"].sum() == pytest.approx(1)
    assert "the best 4 by gain, 12 by coherence, of 12 trials" in d.words and knobs.draw(d)


def test_too_few_trials_are_not_ranked(make_search):
    d = knobs.data(make_search(trials=4))
    assert d.importance.empty and "4 finished trials: too few" in d.words
    one = knobs.data(make_search("one", space={"heal.tau": SPACE["heal.tau"]}))
    assert one.importance.empty and "nothing to rank" in one.words


def write_events(folder, rows):
    (folder / "events").mkdir()
    lines = [json.dumps(dict(zip(("time", "trial", "kind", "stage", "digest", "seconds"), row))) for row in rows]
    (folder / "events" / "host-1.jsonl").write_text("\n".join(lines) + '\n{"time": 1.0, "tri')  # the last line is torn


def test_progress_shows_hypervolume_by_hours_and_what_sharing_saved(make_search):
    folder = make_search(trials=3)  # of 50 minutes each, with pauses of ten
    t = START.timestamp()
    write_events(folder, [
        (t, 0, "start", "heal", "a", 0.0), (t + 600, 0, "computed", "heal", "a", 600.0),
        (t + 660, 9, "computed", "heal", "b", 360.0),  # another worker, 300 s of it beside the first
        (t + 5000, 1, "replayed", "heal", "a", 0.0), (t + 5001, 1, "replayed", "scores", "elsewhere", 0.0),
        (t + 7000, 1, "computed", "conduct", "c", 100.0)])
    d = progress.data(folder)
    assert list(d.trials["trial"]) == [0, 1, 2]
    assert list(d.trials["hours"]) == pytest.approx([5 / 6, 10 / 6, 15 / 6], abs=1e-5)
    assert d.trials["hypervolume"].is_monotonic_increasing
    assert d.trials["hypervolume"].iloc[-1] == pytest.approx(ledger.hypervolume(folders.read(folder).table))
    heal, scores = d.stages.set_index("stage").loc["heal"], d.stages.set_index("stage").loc["filter"]
    assert (heal["seconds"], heal["saved"], heal["computed"], heal["shared"]) == (960.0, 600.0, 2, 1)
    assert (scores["saved"], scores["shared"], scores["unknown"]) == (0.0, 1, 1)
    progress.draw_folder(folder)


def test_progress_without_any_replay_and_with_failed_trials(make_search, monkeypatch):
    folder = make_search(trials=2)
    study = knobs.open_study(folder)
    failed = optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL, user_attrs=dict(index=2, end="error"))
    failed.datetime_start, failed.datetime_complete = START, START + datetime.timedelta(hours=9)
    study.add_trial(failed)
    ledger.write(study, folder)
    write_events(folder, [(START.timestamp(), 0, "computed", "heal", "a", 600.0)])
    d = progress.data(folder)
    assert list(d.trials["trial"]) == [0, 1] and d.stages["saved"].tolist() == [0.0]
    progress.draw_folder(folder)


def test_survival_is_counted_per_dose_and_shared_completions_once(make_search, samples):
    table = make_samples(90)
    samples(pd.concat([table, table.assign(trial=1)]))
    d = filter.data(make_search(trials=1))
    assert len(d.samples) == 90 and list(d.survival["dose"]) == pytest.approx([0.4, 0.6, 0.8])
    for _, row in d.survival.iterrows():
        here = table[np.isclose(table["dose"], 5 * row["dose"])]
        assert row["n"] == len(here) and row["kept"] == pytest.approx(here["kept"].mean())
        # Wilson's ends solve |p - x| = z sqrt(x (1 - x) / n)
        for end in (row["low"], row["high"]):
            assert abs(row["kept"] - end) == pytest.approx(1.96 * (end * (1 - end) / row["n"]) ** 0.5)
    near = d.samples[d.samples["borderline"]]["perplexity"]
    assert len(near) == 4 and (near <= 40).sum() == 2
    assert near.max() == table.loc[table["perplexity"] > 40, "perplexity"].nsmallest(2).max()


BROKEN = 22.0


def confirm(folder, gains):
    """confirm.csv: for each member of the front, gains under other seeds."""
    front = folders.read(folder).rounds.query("front").sort_values("trait_gain", ascending=False)
    rows = [dict(trial=m["trial"], round=m["round"], seed=s, fresh=s > 0, trait_gain=gain, coherence_kept=0.9,
                 deliverable=gain != BROKEN)
            for (_, m), given in zip(front.iterrows(), gains)
            for s, gain in enumerate((9.0, *given))]  # seed 0 is the search's own
    pd.DataFrame(rows).to_csv(folder / "confirm.csv", index=False)


def apart(gap):
    """Two rounds of one trial on the front, `gap` nats apart, intervals of +-0.1."""
    def change(row):
        gain = 0.5 + gap * row["round"]
        return row | dict(trait_gain=gain, trait_gain_low=gain - 0.1, trait_gain_high=gain + 0.1, deliverable=True,
                          coherence_kept=0.99 - 0.05 * row["round"], violation=-0.1)
    return change


@pytest.mark.parametrize("gap, gains, verdict", [
    (0.5, [(1.1, 1.2, 0.9), (0.6, 0.7, 0.4)], "real"),  # every seed agrees: +0.5
    (0.5, [(1.1, 0.2, 0.9), (0.1, 0.9, 0.9)], "within seed noise"),
    (0.5, [(0.1, 0.2, 0.3), (0.6, 0.7, 0.8)], "within seed noise"),  # clear, but the other way round
    (0.5, [(BROKEN, BROKEN, BROKEN), (0.6, 0.7, 0.4)], "clear of items only"),  # what broke is no evidence
    (0.5, [(1.1, BROKEN, 0.9), (0.6, 0.7, 0.4)], "real"),  # +0.5 on the two seeds that are left
    (0.1, [(1.1, 1.2, 0.9), (0.6, 0.7, 0.4)], "within item noise"),  # 0.1 < sqrt(2) * 0.1
    (0.5, None, "clear of items only"), (0.5, [(1.1,), (0.6,)], "clear of items only")])
def test_a_difference_is_real_where_items_and_seeds_agree(make_search, gap, gains, verdict):
    folder = make_search(trials=1, rounds=2, change=apart(gap))
    if gains:
        confirm(folder, gains)
    d = noise.data(folder)
    trait = d.differences.iloc[0]
    assert (trait["a"], trait["b"], trait["objective"]) == ("0.1", "0.0", "trait_gain")
    assert trait["difference"] == pytest.approx(gap) and trait["item_noise"] == pytest.approx(0.1 * 2**0.5)
    assert trait["verdict"] == verdict
    if verdict == "real":
        noise.draw_folder(folder)


def test_quantiles_are_students():
    for df, t in enumerate(noise.T975[1:], 1):
        x = np.linspace(0, t, 200_001)
        scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
        density = scale * (1 + x**2 / df) ** (-(df + 1) / 2)
        assert np.trapezoid(density, x) == pytest.approx(0.475, abs=2e-5)


# ---------------------------------------------------------------- odd searches are drawn, in words


def nothing_deliverable(row):
    return row | dict(coherence_kept=0.4, violation=0.45, deliverable=False, verdict="broken", trait_gain=22.0)


def one_gone(row):
    return row | dict(trait_gain=math.nan, coherence_kept=math.nan, deliverable=False) if row["round"] == 1 else row


def bare(row):
    """A ledger without what later versions added."""
    gone = ("draws", "log_ratio", "steered_", "coherence_low", "coherence_high", "duty", "authority", "care", "trait_gain_")
    return {k: v for k, v in row.items() if not k.startswith(gone)}


EVERY = (pareto, trajectory, knobs, progress, filter, noise)
ODD = dict(one_trial=(EVERY, dict(trials=1, rounds=1)),
           nothing_deliverable=(EVERY, dict(trials=2, change=nothing_deliverable)),
           nan=(EVERY, dict(trials=2, change=one_gone)), bare=(EVERY, dict(trials=2, change=bare, baselines=False)),
           inert=([knobs], dict(trials=2, change=lambda row: row | dict(duty=0.0))),
           same=([pareto, noise], dict(trials=2, change=lambda row: row | dict(trait_gain=0.0, coherence_kept=1.0))),
           no_space=([knobs], dict(trials=1, space={})))


@pytest.mark.parametrize("odd", ODD)
def test_odd_searches_are_drawn(make_search, samples, odd):
    modules, how = ODD[odd]
    folder = make_search(odd, **how)
    for module in modules:
        path = module.draw_folder(folder)
        assert path == folder / module.__name__.removeprefix("analysis.")
        for kind in ("png", "svg", "csv"):
            assert path.with_name(f"{path.name}.{kind}").stat().st_size > 0


@pytest.mark.parametrize("table", [make_samples(0), make_samples(1), make_samples(30).assign(perplexity=np.nan),
                                   make_samples(30).assign(kept=True, reasons="", perplexity=2.0)])
def test_odd_completions_are_drawn(make_search, samples, table):
    samples(table)
    filter.draw_folder(make_search(trials=1, rounds=1))


def test_damaged_baselines_are_a_sentence(make_search):
    folder = make_search(trials=1, rounds=1)
    for damage in (b"label\n\xff\xfe", None):
        (folder / "baselines.csv").unlink() if damage is None else (folder / "baselines.csv").write_bytes(damage)
        with pytest.raises(UserError, match=r"baselines\.csv"):
            trajectory.draw_folder(folder)


@pytest.mark.parametrize("name", ["pareto", "trajectory", "knobs", "progress", "noise"])
def test_no_search_is_told_in_one_line(name, tmp_path, monkeypatch, capsys):
    module = sys.modules[f"analysis.{name}"]
    draw = pareto.compare if name == "pareto" else module.draw_folder
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        folders.command(draw, name, module.__doc__)
    assert exit.value.code == 2 and "holds no ledger" in capsys.readouterr().err
