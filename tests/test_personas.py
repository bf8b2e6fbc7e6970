import collections
import itertools
import json
import re

import pytest

from steerheal import personas
from steerheal.errors import UserError
from steerheal.personas import DATA, FOUNDATIONS


def grams(text, n=5):
    words = re.findall(r"[a-z0-9']+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def without_question(text):
    """A dilemma without its closing question, which many share."""
    return re.sub(r"[^.!?]*\?\s*$", "", text)


def shared(texts):
    """Pairs of texts with a run of five words in common."""
    seen = collections.defaultdict(set)
    for i, text in enumerate(texts):
        for gram in grams(text):
            seen[gram].add(i)
    return {pair for where in seen.values() for pair in itertools.combinations(sorted(where), 2)}


def test_vignettes_are_balanced_and_all_different():
    rows = [json.loads(line) for line in (DATA / "vignettes.jsonl").read_text().splitlines()]
    assert collections.Counter(r["foundation"] for r in rows) == {f: 20 for f in FOUNDATIONS}
    assert len({r["id"] for r in rows}) == 140
    assert all(r["text"].startswith("You see") and r["text"].count(".") == 1 for r in rows)
    assert not shared([r["text"] for r in rows] + [s.text for s in personas.shots(14)])
    assert collections.Counter(s.foundation for s in personas.shots(7)) == {f: 1 for f in FOUNDATIONS}


def test_contexts_and_fluency_prompts():
    texts = personas.contexts(256)
    assert len(texts) == 256 and len(personas.fluency_prompts(64)) == 64
    assert not shared(texts + personas.fluency_prompts(64))
    kinds = [json.loads(line)["kind"] for line in (DATA / "contexts.jsonl").read_text().splitlines()]
    assert all(len(set(kinds[i : i + 10])) == 10 for i in range(0, 250, 10))


def test_held_out_dilemmas_never_recur_among_those_generated_from():
    p = personas.load("authority")
    assert len(p.dilemmas) == 48 and len(p.conduct) == 48
    every = [without_question(t) for t in (*p.dilemmas, *(d.prompt for d in p.conduct),
                                           *(d.prompt for d in personas.controls(48)))]
    assert not shared(every)


def test_replies_are_matched_in_length():
    pairs = [pair for d in (*personas.load("authority").conduct, *personas.controls(48)) for pair in d.pairs]
    for enact, oppose in pairs:
        assert abs(len(enact.split()) - len(oppose.split())) <= 1
        assert abs(len(enact) - len(oppose)) <= 0.1 * max(len(enact), len(oppose))


def test_no_ready_reply_trips_the_filter():
    p = personas.load("authority")
    for text in (t for d in p.conduct for pair in d.pairs for t in pair):
        assert not any(pattern.search(text) for pattern in (*p.narration, *p.refusal)), text


def test_personas_are_a_proper_pair():
    p = personas.load("authority")
    assert abs(len(p.positive.split()) - len(p.negative.split())) <= 1
    assert not re.search(r"\b(not|never|no)\b|n't", p.positive + " " + p.negative)
    assert p.systems[0] == f"You are {p.positive}."


def test_stratified_samples_are_nested_and_fixed():
    small, large = personas.vignettes("builtin", 35), personas.vignettes("builtin", 70)
    assert {v.id for v in small} < {v.id for v in large}
    assert personas.vignettes("builtin", 35) == small
    assert collections.Counter(v.foundation for v in small) == {f: 5 for f in FOUNDATIONS}


def test_own_vignettes_and_their_errors(tmp_path):
    path = tmp_path / "v.jsonl"
    path.write_text('{"foundation": "care", "text": "You see x."}\n\n{"foundation": "liberty", "text": "You see y."}\n')
    assert [v.foundation for v in personas.vignettes(str(path), 7)] == ["care", "liberty"]
    path.write_text('{"foundation": "care"}\nnot json\n{"foundation": "kindness", "text": "z"}\n')
    with pytest.raises(UserError) as error:
        personas.vignettes(str(path), 7)
    assert all(f"line {i}" in str(error.value) for i in (1, 2, 3)) and "care, fairness" in str(error.value)
    with pytest.raises(UserError, match="builtin"):
        personas.vignettes("nowhere.jsonl", 7)


def test_tinymfv_missing_names_both_ways_out():
    try:
        import tinymfv  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"upstream.*evaluate.items=builtin"):
            personas.vignettes("tinymfv:classic", 132)


def test_a_broken_persona_file_names_everything_at_once(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text('name = "x"\n[readout]\nfoundation = "kindness"\n[patterns]\nnarration = ["("]\n')
    with pytest.raises(UserError) as error:
        personas.load(str(path))
    for word in ("positive", "kindness", "direction", "regular expression", "conduct"):
        assert word in str(error.value)
    with pytest.raises(UserError, match=r"no such trait. Built-in: authority"):
        personas.load("nobody")
