import collections
import json

import pytest

from steerheal import persona_lint, personas
from steerheal.errors import UserError
from steerheal.persona_lint import shared_runs, without_question
from steerheal.personas import DATA, FOUNDATIONS


def test_vignettes_are_balanced_and_all_different():
    rows = [json.loads(line) for line in (DATA / "vignettes.jsonl").read_text().splitlines()]
    assert collections.Counter(r["foundation"] for r in rows) == {f: 20 for f in FOUNDATIONS}
    assert len({r["id"] for r in rows}) == 140
    assert all(r["text"].startswith("You see") and r["text"].count(".") == 1 for r in rows)
    assert not shared_runs([r["text"] for r in rows] + [s.text for s in personas.shots(14)])
    assert collections.Counter(s.foundation for s in personas.shots(7)) == {f: 1 for f in FOUNDATIONS}


def test_contexts_and_fluency_prompts():
    texts = personas.contexts(256)
    assert len(texts) == 256 and len(personas.fluency_prompts(64)) == 64
    assert not shared_runs(texts + personas.fluency_prompts(64))
    kinds = [json.loads(line)["kind"] for line in (DATA / "contexts.jsonl").read_text().splitlines()]
    assert all(len(set(kinds[i : i + 10])) == 10 for i in range(0, 250, 10))


BUILTIN = personas.builtin()


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_traits_are_proper_and_complete(name):
    p = personas.load(name)
    assert persona_lint.problems(p) == []
    assert len(p.dilemmas) == 48 and len(p.conduct) == 48 and all(len(d.pairs) == 2 for d in p.conduct)
    assert p.systems[0] == f"You are {p.positive}."


def test_controls_are_matched_and_stand_apart():
    controls = personas.controls(48)
    for (a, b), in (d.pairs for d in controls):
        assert abs(len(a.split()) - len(b.split())) <= 1 and persona_lint._apart(a, b) <= 0.1
    for name in BUILTIN:
        p = personas.load(name)
        assert not shared_runs([without_question(t) for t in (*p.dilemmas, *(d.prompt for d in p.conduct),
                                                              *(d.prompt for d in controls))])


def test_the_linter_sees_improper_traits():
    import dataclasses

    p = personas.load("authority")
    bad = dataclasses.replace(
        p, positive="someone who does not obey", negative="an obedient one that follows every single order it is given",
        dilemmas=(*p.dilemmas, p.conduct[0].prompt),
        conduct=(*p.conduct, personas.Dilemma("A new one?", (("I am someone who helps.", "I go."),))))
    text = "\n".join(persona_lint.problems(bad))
    for words in ("'not' negates", "differ by more than one word in length", "stand in both", "conduct[48].pairs[0]: lengths",
                  "a filter pattern would drop"):
        assert words in text


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
    path.write_text('{"foundation": "care", "text": null, "id": "a"}\n{"foundation": "care", "text": "z", "id": "a"}\n')
    with pytest.raises(UserError) as error:
        personas.vignettes(str(path), 7)
    assert "line 1: text None" in str(error.value) and "line 2: id 'a' is that of line 1" in str(error.value)
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


ONE = '{prompt = "q", pairs = [{enact = "a", oppose = "b"}]}'
CONDUCT = f'conduct = [{ONE}, {{prompt = "r", pairs = [{{enact = "c", oppose = "d"}}]}}]'
WHOLE = f"""
name = "x"
summary = "s"
positive = "p"
negative = "n"
headline = ["h"]
dilemmas = ["d"]
{CONDUCT}
[readout]
foundation = "care"
direction = 1
conduct_direction = 1
off_target = []
[patterns]
narration = []
refusal = []
"""


def test_lists_of_the_wrong_kind_are_refused(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(WHOLE)
    assert personas.load(str(path)).conduct[0].pairs == (("a", "b"),)
    for old, new, words in (
            ("off_target = []", 'off_target = ["kindness"]', "readout.off_target = ['kindness']: allowed: care"),
            ("off_target = []", 'off_target = []\ntrait = "care"', "readout.trait = 'care': allowed: auto, conduct"),
            ('dilemmas = ["d"]', "dilemmas = []", "dilemmas: expected texts, at least 1"),
            ('headline = ["h"]', "headline = [1]", "headline: expected texts"),
            ("narration = []", "narration = [5]", "narration: expected texts"),
            (CONDUCT, "conduct = []", "conduct: expected at least two"),
            (CONDUCT, f"conduct = [{ONE}]", "conduct: expected at least two"),
            (CONDUCT, 'conduct = ["x"]', "conduct[0]: needs a prompt"),
            ('pairs = [{enact = "a", oppose = "b"}]', "pairs = 3", "conduct[0]: needs a prompt")):
        assert old in WHOLE
        path.write_text(WHOLE.replace(old, new))
        with pytest.raises(UserError) as error:
            personas.load(str(path))
        assert words in str(error.value)
    path.write_bytes(WHOLE.replace("summary = \"s\"", "summary = \"caf\xe9\"").encode("latin-1"))
    with pytest.raises(UserError, match="not valid TOML"):
        personas.load(str(path))
    (tmp_path / "v.jsonl").write_text('{"text": "x", "foundation": "care"}')
    with pytest.raises(UserError, match="1 vignettes; it takes two"):
        personas.vignettes(str(tmp_path / "v.jsonl"), 7)
    (tmp_path / "v.jsonl").write_bytes(b'{"text": "caf\xe9", "foundation": "care"}')
    with pytest.raises(UserError, match="must be UTF-8"):
        personas.vignettes(str(tmp_path / "v.jsonl"), 7)
