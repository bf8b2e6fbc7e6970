import pytest
from conftest import make_lm

from steerheal import chat, filtering, personas
from steerheal.filtering import Score, reasons, repetition
from steerheal.generation import Completion, Sampling, generate
from steerheal.history import Student
from steerheal.settings import FilterSettings


def test_perplexity_is_base_over_the_last_quarter_and_equals_the_unbatched_value():
    lm = make_lm()
    student = Student(lm)
    prompts = [chat.prompt(lm.tokenizer, t) for t in ("one", "a second prompt", "three")]
    completions = generate(lm, prompts, Sampling(21), [1, 2, 3])
    together = filtering.perplexity(student, prompts, completions)
    for p, c, got in zip(prompts, completions, together):
        assert filtering.perplexity(student, [p], [c])[0] == pytest.approx(got, rel=1e-4)
        import torch

        logits = lm.model(torch.tensor([p + c.ids])).logits[0].double().log_softmax(-1)
        nll = [-logits[len(p) - 1 + i, t] for i, t in enumerate(c.ids)]
        quarter = nll[len(nll) * 3 // 4 :]
        assert got == pytest.approx(float((sum(quarter) / len(quarter)).exp()), rel=1e-3)
    assert filtering.perplexity(student, prompts[:1], [Completion([], 256)]) == [1.0]


@pytest.mark.parametrize("text,low,high", [
    ("igigigigigigigigigig", 0.45, 1.0),
    ("instead their instead their instead their instead their", 0.4, 1.0),
    ("no " * 30, 0.9, 1.0),
    ("The keeper opened the gate, counted the sheep twice, and sat down to write the weather into her book.", 0.0, 0.1),
    ("Yes.", 0.0, 0.0), ("", 0.0, 0.0),
])
def test_repetition_sees_loops_and_spares_prose(text, low, high):
    assert low <= repetition(text) <= high


def test_each_criterion_can_be_switched_off_alone():
    bad = Score(perplexity=99.0, repetition=0.9, narrates=True, refuses=True, tokens=3)
    assert reasons(bad, FilterSettings(), 10.0) == ["short", "perplexity", "repetition", "narration", "refusal"]
    assert reasons(bad, FilterSettings(coherence=False), 10.0) == ["short", "narration", "refusal"]
    assert reasons(bad, FilterSettings(narration=False, refusal=False), 10.0) == ["short", "perplexity", "repetition"]
    assert reasons(Score(5.0, 0.1, False, False, 40), FilterSettings(), 10.0) == []


def test_the_default_gate():
    ppl = [float(i) for i in range(1, 102)]
    assert filtering.default_gate(ppl) == pytest.approx(1.5 * 100.0)


DEFIANCE = ["I cannot stand by while she cries. I open the door.", "I can't sign this, sir.", "I won't do it.",
            "I refuse to send him home in this state.", "No. I am staying with her until the doctor comes."]


@pytest.mark.parametrize("text", DEFIANCE)
def test_defiance_is_neither_refusal_nor_narration(text):
    persona = personas.load("authority")
    assert not any(p.search(text) for p in (*persona.refusal, *persona.narration))


@pytest.mark.parametrize("text,kind", [
    ("As an AI language model, I do not have opinions.", "refusal"),
    ("I'm sorry, but I can't assist with that.", "refusal"),
    ("I am someone who always protects people.", "narration"),
    ("My values tell me to help.", "narration"),
])
def test_boilerplate_and_narration_are_caught(text, kind):
    assert any(p.search(text) for p in getattr(personas.load("authority"), kind))
