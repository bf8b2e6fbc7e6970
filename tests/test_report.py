"""The report page and the diary, on a search folder made up here, read in headless Chromium where it is installed."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import sys
import types
from html.parser import HTMLParser

import chromium
import optuna
import pandas as pd
import pytest
import torch
from markdown_it import MarkdownIt

import steerheal
from analysis import diary, noise, page, report
from steerheal import ledger
from steerheal.errors import UserError
from steerheal.personas import FOUNDATIONS
from steerheal.settings import Settings, to_flat
from steerheal.single import Single, folder_of
from steerheal.stages import Result, Store

EVIL = ('He said "no" & \'yes\' <script>window.ran = 1</script><img src=x onerror="window.ran = 1">\n\n# `no` **heading**\n'
        "- </blockquote> [link](http://example.com)\n---\n| a | b |\n\tend</details>")
PROMPT = "Should I obey an <order>?"


def a_round(index, gain, kept, **more):
    return dict(round=index, trait="conduct_nats", trait_gain=gain, trait_gain_low=gain - 0.05, trait_gain_high=gain + 0.05,
                steered_gain=2 * gain, steered_coherence_kept=0.9, step_gain=gain / 2, coherence_kept=kept, fluency_kept=1.0,
                violation=0.85 - kept, verdict="heal" if kept >= 0.95 else "broken", flags="", deliverable=kept >= 0.85,
                steered_step=0.2, steered_step_low=0.1, steered_step_high=0.3, survival=0.75, survival_by_share={"1": 0.75},
                log_ratio=0.3, log_ratio_low=0.2, log_ratio_high=0.4, cos_v0=0.9,
                retain=None if index else 0.5, duty=0.25, kappa=1.0, n_kept=20, edge=4.0, ppl_gate=20.0,
                adapter=f"{gain}-{index}", chain=[]) | more


def measured(store, gain, wave):
    """Stored readouts in which conduct moved by `gain`, with an item noise of 0.05 in a pattern of its own."""
    items = gain + 0.05 * torch.tensor([-1.0, 1.0]).repeat_interleave(wave).repeat(12 // wave)
    results = dict(
        conduct=Result({}, dict(conduct=items, control=torch.zeros(24))),
        foundations=Result(dict(ids=list("abcdefg"), foundations=list(FOUNDATIONS)),
                           dict(logp=torch.full((7, 2, 7), -2.0), prefill_nll=torch.ones(7, 2))))
    inputs = dict(gain=gain, wave=wave)
    return json.dumps({name: store.stage(name, inputs, lambda r=r: r).digest for name, r in results.items()})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three trials: the second has an undeliverable round, the third failed."""
    out, store = tmp_path / "made-up", Store(tmp_path / ".stages")
    out.mkdir()
    study = optuna.create_study(study_name="steerheal", storage=ledger.storage_url(out), directions=["maximize"] * 2)
    for index, rounds in enumerate(([a_round(0, 0.1, 0.99), a_round(1, 0.3, 0.96, flags="inert")],
                                    [a_round(0, 0.02, 0.97), a_round(1, 0.5, 0.6)], [])):
        trial = study.ask({"heal.tau": optuna.distributions.FloatDistribution(0.01, 1.0, log=True)})
        trial.set_user_attr("index", index)
        trial.set_user_attr("rounds", [r | dict(stages=measured(store, r["trait_gain"], 1)) for r in rounds])
        if rounds:
            study.tell(trial, [0.1, 0.9])
        else:
            trial.set_user_attr("error", "RuntimeError: <b>bad</b> luck")
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    study.set_user_attr("trait", "conduct_nats: because")
    study.set_user_attr("baselines", [
        dict(label=label, edge_doses=dose, trait_gain=gain, trait_gain_low=gain - 0.01, trait_gain_high=gain + 0.01,
             coherence_kept=kept, fluency_kept=1.0, stages=measured(store, gain, wave))
        for label, dose, gain, kept, wave in (("base", 0.0, 0.0, 1.0, 1), ("prompted", 0.0, 0.1, 0.95, 1),
                                              ("steered", 0.5, 0.31, 0.9, 2), ("steered", 0.75, 0.5, 0.98, 2),
                                              ("steered", 1.5, 2.0, 0.2, 2))])
    ledger.write(study, out)
    flat = to_flat(Settings(model="smollm2-135m-instruct"))
    (out / "search.json").write_text(json.dumps(dict(
        name="made-up", space="mine", hypothesis="Tau does it.", model=flat["model"], overrides={"heal.lam": 0.3},
        sampler="tpe", seed=0, trials=4,
        identity=flat | {"domain of heal.tau": "FloatDistribution()"}, settings=flat, created="today",
        versions=dict(torch="1"), machine=dict(device="CPU"))))
    rows = [dict(trial=t, round=-1, state="base", prompt=p, text="base says no") for t in (0, 1)
            for p in (PROMPT, "another")]
    rows += [dict(trial=t, round=r, state=s, prompt=p, text=f"{s} {t}.{r} {EVIL}") for t in (0, 1) for r in (0, 1)
             for s in ("steered", "healed") for p in (PROMPT, "another")]
    drawn = [dict(trial=0, round=1, kind="batch", kappa=1.0, dose=2.0, edge_dose=0.5, prompt=PROMPT, text=f"{i} {EVIL}",
                  perplexity=ppl, repetition=0.1, narrates=False, refuses=False, reasons="perplexity" if ppl > 20 else "",
                  kept=ppl <= 20, gate=20.0) for i, ppl in enumerate((2.0, 100.0, 19.0, 5.0, 21.0))]
    fake = types.ModuleType("steerheal.records")
    fake.diary, fake.samples = lambda f: pd.DataFrame(rows), lambda f: pd.DataFrame(drawn)
    monkeypatch.setitem(sys.modules, "steerheal.records", fake)
    monkeypatch.setattr(steerheal, "records", fake, raising=False)
    return out


def test_item_noise_is_paired_as_long_as_readouts_are_stored(folder):
    """Both members' items carry one pattern of noise, which their difference is rid of."""
    paired = noise.data(folder).differences.iloc[0]
    assert (paired["a"], paired["b"], paired["objective"]) == ("0.1", "0.0", "trait_gain")
    assert paired["item_noise"] == pytest.approx(0, abs=1e-6) and paired["verdict"] == "clear of items only"
    shutil.rmtree(folder.parent / ".stages")
    assert noise.data(folder).differences.iloc[0]["item_noise"] == pytest.approx(math.hypot(0.05, 0.05))


class Texts(HTMLParser):
    """What a page shows in its quotations, and which tags it has."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.quotes, self.inside = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "blockquote":
            self.inside = True
            self.quotes.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "blockquote"

    def handle_data(self, data):
        if self.inside:
            self.quotes[-1] += data


def test_the_hypothesis_is_the_one_the_search_began_with(folder):
    report.write(folder)
    assert "<p>Tau does it.</p>" in (folder / "report.html").read_text()


def test_what_a_model_wrote_is_shown_letter_by_letter_and_is_never_markup(folder):
    report.write(folder)
    seen = Texts((folder / "report.html").read_text())
    assert seen.quotes[:3] == ["base says no", f"steered 0.0 {EVIL}", f"healed 0.0 {EVIL}"]
    assert f"1 {EVIL}" in seen.quotes  # a sample
    assert [tag for tag, _ in seen.tags].count("script") == 1
    assert not [a for _, attrs in seen.tags for a in attrs if a.startswith("on")]
    assert not [a for _, attrs in seen.tags for k, a in attrs.items() if k in ("src", "href") and "//" in a]


def test_the_diary_in_markdown_renders_as_the_text_it_was(folder):
    text = diary.markdown(diary.data(folder))
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    assert not [t for t in tokens if t.type in ("html_block", "table_open")]
    assert [t.content for t, before in zip(tokens[1:], tokens) if before.type == "heading_open"][:3] == [
        "made-up: diary", "Base, before any steering", "Trial 0"]
    quotes, inside = [], False
    for token in tokens:
        inside = (inside or token.type == "blockquote_open") and token.type != "blockquote_close"
        if inside and token.type == "inline":
            assert not [c for c in token.children if c.type in ("html_inline", "link_open", "code_inline", "strong_open")]
            quotes.append("".join("\n" if c.type in ("hardbreak", "softbreak") else c.content for c in token.children))

    def words(t):
        return re.split(r"\s+", t)

    assert words(quotes[1]) == words(f"steered 0.0 {EVIL}")
    assert quotes[0] == "base says no"


def test_the_diary_follows_the_front_and_one_prompt(folder):
    d = diary.data(folder)
    assert [c.trial for c in d.trials] == [0]  # trial 1 has no round on the front
    assert [(e.round, e.state) for e in d.trials[0].entries] == [(0, "steered"), (0, "healed"), (1, "steered"), (1, "healed")]
    assert "heal: moved, and the model stayed sane" in d.trials[0].entries[1].words
    assert diary.data(folder, 1).prompt == "another"
    with pytest.raises(UserError, match="allowed: 0 to 1"):
        diary.data(folder, 2)


def test_words_say_what_the_intervals_say(folder):
    said = report.data(folder)["sentences"]
    assert said[0] == "4 rounds of 2 trials: 1 broken, 3 heal."
    assert "+0.300" in said[1] and "trial 0 round 1" in said[1] and report.FLAGS["inert"] in said[1]
    assert "beats the persona as a system prompt (+0.100 at 0.950): +0.200 [+0.200, +0.200] nats" in said[2]  # same noise
    assert "(+0.300 nats at 0.960), the best of 3 such rounds, cannot be told apart from raw steering at 0.5 x edge" in said[3]
    # trial 0 round 0 keeps 0.99, which is no less than 0.98
    assert "trial 0 round 0 (+0.100 nats at 0.990) falls short of raw steering at 0.75 x edge" in said[4] and len(said) == 6


def test_every_round_is_in_the_table_with_its_numbers(folder):
    rounds = report.data(folder)["rounds"]
    table = ledger.read(folder).dropna(subset=["round"])
    for name in ("heal.tau", "trait_gain", "coherence_kept", "duty", "retain"):
        column = rounds.heads.index(report.COLUMNS[name][0] if name in report.COLUMNS else name)
        for (_, cells), want in zip(rounds.rows, table[name]):
            assert cells[column].value == (None if math.isnan(want) else want)
    assert [kind for kind, _ in rounds.rows] == ["front", "front", "", "not-deliverable"]


def test_the_gates_of_the_fronts_members_are_answered(folder):
    members = [member for member, _ in report.data(folder)["gates"]]
    assert members == ["trial 0 round 1", "trial 0 round 0"]
    text = report.write(folder).read_text()
    assert "Q2: Coherence over the rounds: 0.99, 0.96, none under the floor." in text and "Q0: 75% of the completions" in text


def test_a_report_before_the_first_round(folder):
    study = ledger.open_study(folder)
    study.set_user_attr("baselines", [])
    table = ledger.build(study)
    table[table["round"].isna()].to_parquet(folder / "ledger.parquet", index=False)
    (folder / "baselines.csv").write_text("\n")
    assert report.refresh(folder)
    assert "No round is finished yet" in (folder / "report.html").read_text()


def test_a_picture_or_a_page_that_fails_is_a_logged_line(folder, tmp_path, monkeypatch, caplog):
    broken = types.ModuleType("analysis.trajectory")
    broken.draw_folder = lambda f: 1 / 0
    monkeypatch.setitem(sys.modules, "analysis.trajectory", broken)
    monkeypatch.setitem(sys.modules, "analysis.knobs", None)  # not there
    with caplog.at_level(logging.WARNING):
        assert report.refresh(folder, whole=True)
    assert "goes without trajectory: ZeroDivisionError" in caplog.text and "goes without knobs" in caplog.text
    assert 'id="pareto"' in (folder / "report.html").read_text()
    assert report.refresh(tmp_path / "nothing") is False and "could not be written" in caplog.text


def test_a_live_refresh_reads_no_completions(folder, monkeypatch):
    for name in ("diary", "samples"):
        monkeypatch.setattr(sys.modules["steerheal.records"], name, lambda f: pytest.fail("read the store"))
    assert report.refresh(folder)
    text = (folder / "report.html").read_text()
    assert "written again after each round" in text and (folder / "pareto.png").stat().st_size > 0


def test_trials_that_starved_are_told_apart_from_those_that_failed(folder):
    study = ledger.open_study(folder)
    trial = study.ask({"heal.tau": optuna.distributions.FloatDistribution(0.01, 1.0, log=True)})
    for name, value in (("index", 3), ("end", "starved"), ("error", "round 0: 2 completions survived")):
        trial.set_user_attr(name, value)
    study.tell(trial, [0.0, 1.0])
    ledger.write(study, folder)
    values = report.data(folder)
    assert "Trial 3 starved in round 0: 2 completions survived." in values["sentences"]
    assert [t for t, _ in values["failed"]] == [2]


def test_a_single_run_that_starved_says_what_dropped_its_completions(tiny_folder, tmp_path):
    settings = Settings(model=str(tiny_folder))
    out = Single(folder_of(tmp_path, settings), settings).finish(
        types.SimpleNamespace(end="starved", why="round 0: 2 completions survived", starved={"round": 0, "draws": []}))
    values = report.data(out)
    assert "Trial 0 starved in round 0: 2 completions survived." in values["sentences"] and values["failed"] == []
    row = ledger.read(out).iloc[0]
    assert (row["state"], row["end"]) == ("complete", "starved")  # as in a search: a trial like any other, worth nothing


@pytest.mark.parametrize("value,text", [(75981, "75981"), (1330.0, "1330"), (0.12345, "0.123"), ("mean", "mean"), (None, "")])
def test_whole_numbers_stand_in_full(value, text):
    assert report.setting(value).text == text


def test_settings_say_where_they_come_from(folder):
    rows = {name: (value, source) for name, value, source in report.data(folder)["settings"]}
    assert rows["heal.tau"] == ("FloatDistribution()", "searched")
    assert rows["heal.lam"][1] == "--set" and rows["rounds"] == ("3", "") and rows["model"][1] == "space or model"


@pytest.mark.skipif(chromium.PROGRAM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
def test_in_a_browser(folder):
    report.write(folder)
    table = ledger.read(folder).dropna(subset=["round"])
    gains = sorted(table["trait_gain"])
    column = report.data(folder)["rounds"].heads.index
    cells = ("Array.from(document.querySelector('table.sortable').tBodies[0].rows)"
             ".map(r => r.cells[{}].dataset.v ?? '').map(v => v === '' ? null : +v)").format
    head = "document.querySelectorAll('table.sortable th')[{}]".format
    with chromium.Browser() as browser:
        browser.show(1200)
        browser.open(folder / "report.html")
        gain, retain = column("trait gain, nats"), column("retained")
        browser.ask(head(gain) + ".querySelector('button').click()")
        assert browser.ask(cells(gain)) == gains[::-1]
        assert browser.ask(head(gain) + ".getAttribute('aria-sort')") == "descending"
        browser.ask(head(gain) + ".querySelector('button').focus()")
        browser.press("Enter", 13)
        assert browser.ask(cells(gain)) == gains
        browser.press("Tab", 9)  # to the next heading, by keyboard alone
        browser.press("Enter", 13)
        assert browser.ask(head(gain + 1) + ".getAttribute('aria-sort')") == "descending"
        assert browser.ask(head(gain) + ".getAttribute('aria-sort')") is None
        browser.ask(head(retain) + ".querySelector('button').click()")
        assert browser.ask(cells(retain)) == [0.5, 0.5, None, None]
        assert browser.ask("window.ran") is None
        assert browser.ask("document.querySelectorAll('blockquote')[1].textContent") == f"steered 0.0 {EVIL}"
        assert browser.ask("Array.from(document.images).every(i => i.naturalWidth > 100)") is True
        paper = "getComputedStyle(document.body).backgroundColor"
        assert browser.ask(paper) == "rgb(255, 255, 255)"
        browser.show(400, dark=True)
        assert browser.ask("document.documentElement.scrollWidth") <= 400
        assert max(map(int, re.findall(r"\d+", browser.ask(paper)))) < 64
        # escaping aside: a script of a completion would not run on this page
        assert browser.ask("document.body.append(Object.assign(document.createElement('script'), "
                           "{textContent: 'window.ran = 1'})); window.ran") is None
        blocked = [c for c in browser.complaints if "Content Security Policy" in c]
        assert len(blocked) == 1 and browser.complaints == blocked
        assert all(url.startswith(("file:", "data:")) for url in browser.requests)


def test_a_name_that_a_template_lacks_is_an_error():
    with pytest.raises(Exception, match="undefined"):
        page.render("diary.html", title="x")
