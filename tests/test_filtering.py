import copy
import math

import pytest
import torch
from conftest import make_lm

from steerheal import chat, filtering, models, personas
from steerheal.errors import UserError
from steerheal.filtering import Gates, Score, reasons, repetition
from steerheal.generation import Completion, Sampling, generate
from steerheal.history import Student
from steerheal.settings import FilterSettings, from_flat


def test_likelihoods_are_under_base_and_equal_the_unbatched_values_and_float64():
    lm = make_lm()
    student = Student(lm)
    prompts = [chat.prompt(lm.tokenizer, t) for t in ("one", "a second prompt", "three", "four")]
    completions = generate(lm, prompts, Sampling(70), [1, 2, 3, 4])
    for c, n in zip(completions, (70, 41, 9, 1)):  # of different lengths, as completions are
        del c.ids[n:]
    together = filtering.score(student, None, prompts, completions)
    precise = copy.deepcopy(lm.model).double()
    for p, c, got in zip(prompts, completions, together):
        alone = filtering.score(student, None, [p], [c])[0]
        assert (alone.perplexity, alone.soup) == pytest.approx((got.perplexity, got.soup), rel=1e-5)
        logits = precise(torch.tensor([p + c.ids])).logits[0].log_softmax(-1)
        nll = [-float(logits[len(p) - 1 + i, t]) for i, t in enumerate(c.ids)]
        quarter = nll[len(nll) * 3 // 4 :]
        assert got.perplexity == pytest.approx(math.exp(sum(quarter) / len(quarter)), rel=1e-4)
        per_byte = [sum(nll[i : i + 32]) / len(lm.text(c.ids[i : i + 32]).encode())
                    for i in range(max(1, len(nll) - 31))]
        assert got.soup == pytest.approx(max(per_byte), rel=1e-4)
    assert filtering.score(student, None, prompts[:1], [Completion([], 256)]) == [Score(1.0, 0.0, 0.0, False, False, 0)]


def test_repetition_is_the_share_of_known_3_grams_in_the_worst_64_tokens():
    loop = [1, 2, 3, 4, 5] * 12
    assert repetition(loop) == pytest.approx(1 - 5 / 58)
    assert repetition(list(range(300))) == repetition([]) == repetition([7, 7]) == 0.0
    assert repetition([7] * 40) == pytest.approx(1 - 1 / 38)
    late = list(range(100, 400)) + loop  # the loop is a sixth of the whole, and all of its end
    assert repetition(late) == pytest.approx(1 - (5 + 4) / 62)  # 64 tokens: four of them before the loop
    assert repetition([*range(20), *range(20)]) == pytest.approx(1 - 20 / 38)  # a loop whose period is long


def test_each_criterion_can_be_switched_off_alone():
    bad, gates = Score(perplexity=99.0, repetition=0.9, soup=2.0, narrates=True, refuses=True, tokens=3), Gates(10.0, 1.0)
    assert reasons(bad, FilterSettings(), gates) == ["short", "perplexity", "repetition", "soup", "narration", "refusal"]
    assert reasons(bad, FilterSettings(coherence=False), gates) == ["short", "narration", "refusal"]
    assert reasons(bad, FilterSettings(narration=False, refusal=False), gates) == ["short", "perplexity", "repetition", "soup"]
    assert reasons(Score(5.0, 0.1, 0.9, False, False, 40), FilterSettings(), gates) == []


def test_a_model_that_says_hardly_a_word_needs_gates_of_the_settings():
    short = [Score(5.0, 0.0, 1.0, False, False, 3)]
    with pytest.raises(UserError, match=r"filter\.ppl_gate"):
        filtering.gates(lambda: short, FilterSettings())


def test_gates_come_from_unsteered_completions_or_from_the_settings():
    unsteered = [Score(float(i), 0.0, i / 100, False, False, 40) for i in range(1, 102)]
    short = Score(1e6, 0.0, 1e6, False, False, filtering.MIN_TOKENS - 1)
    found = filtering.gates(lambda: [*unsteered, short], FilterSettings())
    assert (found.perplexity, found.soup) == pytest.approx((1.5 * 100.0, 2.2 * 0.51))
    half = filtering.gates(lambda: unsteered, FilterSettings(ppl_gate=12.0))
    assert (half.perplexity, half.soup) == pytest.approx((12.0, 2.2 * 0.51))


def test_gates_of_the_settings_ask_for_no_completions():
    assert filtering.gates(lambda: pytest.fail("asked"), FilterSettings(ppl_gate=12.0, soup_gate=0.7)) == Gates(12.0, 0.7)


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


LABELLED = personas.labelled()
# (criterion, recall, precision against coherent text) on all 150 texts, a little under what docs/filter.md measures. The gates
# of perplexity and soup come from sampled completions: other rounding moves a text or two (soup's precision 0.94 or 0.88)
FLOORS = [("perplexity", 0.9, 0.7), ("repetition", 0.95, 0.95), ("soup", 0.9, 0.85), ("narration", 0.9, 0.95),
          ("refusal", 0.83, 0.95)]


def test_the_labelled_set_is_balanced_and_its_held_out_part_shares_no_prompt():
    for split, n in (("choose", 20), ("held_out", 10)):
        labels = [row["label"] for row in LABELLED if row["split"] == split]
        assert {label: labels.count(label) for label in labels} == dict.fromkeys(
            ("coherent", "looping", "soup", "narrating", "refusing"), n)
    prompts = [{row["prompt"] for row in LABELLED if row["split"] == split} for split in ("choose", "held_out")]
    assert not prompts[0] & prompts[1]
    assert len({row["text"] for row in LABELLED}) == 150


@pytest.mark.parametrize("kind,label,floor", [("narration", "narrating", 27), ("refusal", "refusing", 25)])
def test_patterns_catch_their_label_and_spare_the_others(kind, label, floor):
    patterns = {name: getattr(personas.load(name), kind) for name in personas.builtin()}
    caught = [row["label"] for row in LABELLED if any(p.search(row["text"]) for p in patterns[row["persona"]])]
    assert caught.count(label) >= floor
    assert set(caught) == {label}


@pytest.mark.real
def test_criteria_keep_their_recall_and_precision_on_the_real_model():
    from benchmarks.filter import judge, model_gates, quality

    lm = models.load(from_flat({"model": "smollm2-135m-instruct"}))
    judged = judge(lm, {name: model_gates(lm, name) for name in personas.builtin()})
    for criterion, recall_floor, precision_floor in FLOORS:
        recall, precision, _ = quality(judged, criterion)
        assert recall >= recall_floor and precision >= precision_floor, (criterion, recall, precision)
