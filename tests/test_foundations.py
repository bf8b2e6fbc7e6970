import pytest
import torch
from conftest import NO_SYSTEM, make_lm

from steerheal import chat, generation, personas
from steerheal.errors import UserError
from steerheal.evaluation import foundations
from steerheal.evaluation.foundations import OURS, PREFILL, Wording, natural_answer
from steerheal.personas import FOUNDATIONS
from steerheal.steering import Vector

ITEMS = personas.vignettes("builtin", 9)


def slot(lm, ids, prefill):
    """Answer log-probabilities and prefill NLL of one written-out sequence, in float64."""
    with torch.no_grad():
        logp = lm.model(torch.tensor([ids + prefill])).logits[0].double().log_softmax(-1)
    nll = -torch.stack([logp[len(ids) - 1 + i, t] for i, t in enumerate(prefill)]).mean()
    return logp[-1], nll


@pytest.mark.parametrize("n_shots", [0, 14])
def test_without_thinking_it_is_the_plain_computation(any_lm, n_shots):
    got = foundations.evaluate(any_lm, ITEMS, n_shots=n_shots, think_tokens=0)
    prefill = chat.plain(any_lm.tokenizer, PREFILL)
    answers = foundations.answer_ids(any_lm, FOUNDATIONS)
    for i, v in enumerate(ITEMS):
        for frame, order in enumerate((FOUNDATIONS, FOUNDATIONS[::-1])):
            ids = foundations._prompt(any_lm, v, order, n_shots, chat.NEUTRAL, OURS)
            want, nll = slot(any_lm, ids, prefill)
            torch.testing.assert_close(got.tensors["logp"][i, frame].double(), want[answers], atol=1e-3, rtol=1e-3)
            assert got.tensors["prefill_nll"][i, frame].item() == pytest.approx(nll.item(), rel=1e-3)


@pytest.mark.parametrize("budget", [1, 7])
def test_thinking_is_the_plain_computation(any_lm, budget):
    """Greedy token by token with a full forward pass each time, end tokens barred; then everything in one pass."""
    got = foundations.evaluate(any_lm, ITEMS[:4], n_shots=0, think_tokens=budget)
    prefill = chat.plain(any_lm.tokenizer, PREFILL)
    answers = foundations.answer_ids(any_lm, FOUNDATIONS)
    barred = [*any_lm.eos_ids, *any_lm.banned.tolist()]
    for i, v in enumerate(ITEMS[:4]):
        for frame, order in enumerate((FOUNDATIONS, FOUNDATIONS[::-1])):
            ids = foundations._prompt(any_lm, v, order, 0, chat.NEUTRAL, OURS)
            ids = ids + chat.plain(any_lm.tokenizer, foundations.THINK_OPEN)
            for _ in range(budget):
                with torch.no_grad():
                    logits = any_lm.model(torch.tensor([ids])).logits[0, -1]
                logits[barred] = -torch.inf
                ids = [*ids, int(logits.argmax())]
            ids = ids + chat.plain(any_lm.tokenizer, foundations.THINK_CLOSE + OURS.interruption(any_lm))
            want, nll = slot(any_lm, ids, prefill)
            torch.testing.assert_close(got.tensors["logp"][i, frame].double(), want[answers], atol=2e-3, rtol=2e-3)
            assert got.tensors["prefill_nll"][i, frame].item() == pytest.approx(nll.item(), rel=1e-3)


def test_the_interruption_closes_the_turn_and_opens_a_new_one():
    for template, bos in ((None, False), (NO_SYSTEM, True)):
        lm = make_lm(**({"template": template, "bos": bos} if template else {}))
        assert OURS.interruption(lm) == "<|end|><|user|>Just answer<|end|><|assistant|>"


def test_natural_answers_are_found_where_they_stand(lm):
    before, after = chat.plain(lm.tokenizer, "hm. "), chat.plain(lm.tokenizer, 'care"}')
    prefill = chat.plain(lm.tokenizer, PREFILL)
    assert natural_answer(lm, before + prefill + after) == (len(before), len(before) + len(prefill))
    assert natural_answer(lm, before + prefill) is None  # nothing answers it
    assert natural_answer(lm, before + prefill[:-1] + after) is None


def test_a_natural_answer_is_read_where_it_stands(lm, monkeypatch):
    """A model made to think the prefill and an answer is read there, not at the interruption."""
    from steerheal import generation

    script = chat.plain(lm.tokenizer, PREFILL + "care")
    real = generation.think

    def scripted(lm, prompts, budget, suffix, watch, *rest):
        seen = real(lm, prompts, budget, suffix, watch, *rest)
        seen.ids = [script[:budget]] * len(prompts)
        return seen

    monkeypatch.setattr(foundations, "think", scripted)
    got = foundations.evaluate(lm, ITEMS[:3], n_shots=0, think_tokens=len(script))
    assert got.tensors["natural"].min() == 1
    got = foundations.evaluate(lm, ITEMS[:3], n_shots=0, think_tokens=len(script) - 1)
    assert got.tensors["natural"].max() == 0


def test_answers_follow_the_foundation_through_both_frames(lm):
    """With list positions as answers each foundation is read on two different labels."""
    digits = Wording(OURS.user, lambda order: [str(i) for i in range(len(order))], OURS.interruption)
    got = foundations.evaluate(lm, ITEMS[:2], n_shots=0, think_tokens=0, wording=digits).tensors["logp"]
    prefill = chat.plain(lm.tokenizer, PREFILL)
    ids = foundations._prompt(lm, ITEMS[0], FOUNDATIONS[::-1], 0, chat.NEUTRAL, digits)
    want, _ = slot(lm, ids, prefill)
    place = FOUNDATIONS[::-1].index("authority")
    label = chat.plain(lm.tokenizer, str(place))[0]
    assert got[0, 1, FOUNDATIONS.index("authority")].item() == pytest.approx(want[label].item(), rel=1e-3)


def test_thoughts_that_do_not_fit_are_had_in_smaller_batches(lm, monkeypatch):
    want = foundations.evaluate(lm, ITEMS[:3], n_shots=0, think_tokens=4).tensors
    real, sizes = foundations.think, []

    def cramped(lm, prompts, *rest):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(lm, prompts, *rest)

    monkeypatch.setattr(generation, "_fits", {})
    monkeypatch.setattr(foundations, "think", cramped)
    for tried in ([6, 3, 2, 2, 2], [2, 2, 2]):
        got = foundations.evaluate(lm, ITEMS[:3], n_shots=0, think_tokens=4).tensors
        assert sizes == tried  # what fitted is remembered
        torch.testing.assert_close(got["logp"], want["logp"], atol=1e-4, rtol=1e-4)
        sizes.clear()


def test_colliding_first_tokens_are_an_error(lm):
    with pytest.raises(UserError, match="same first token"):
        foundations.answer_ids(lm, ["mouse", "moose"])


def test_steering_reaches_every_stage_of_the_readout(lm):
    v = Vector({1: torch.randn(32, generator=torch.Generator().manual_seed(0))})
    for think_tokens in (0, 3):
        plain = foundations.evaluate(lm, ITEMS[:2], n_shots=0, think_tokens=think_tokens)
        zero = foundations.evaluate(lm, ITEMS[:2], n_shots=0, think_tokens=think_tokens, vector=v, dose=0.0)
        far = foundations.evaluate(lm, ITEMS[:2], n_shots=0, think_tokens=think_tokens, vector=v, dose=2.0)
        torch.testing.assert_close(zero.tensors["logp"], plain.tensors["logp"])
        assert not torch.allclose(far.tensors["logp"], plain.tensors["logp"], atol=1e-2)


def test_thoughts_that_spell_out_their_end_are_read_where_all_others_are(lm, monkeypatch):
    """On most tokenizers the end of a thinking block is no token of its own, so it can be thought."""
    spelled, answered = chat.plain(lm.tokenizer, "</think> so"), chat.plain(lm.tokenizer, PREFILL + 'care"}</think>')
    real = foundations.think

    def thinking(lm, prompts, budget, *rest):
        seen = real(lm, prompts, budget, *rest)
        said = [spelled, spelled, answered, answered, [], []]  # both frames of each vignette
        seen.ids = [(a + [65] * budget)[:budget] if a else b for a, b in zip(said, seen.ids)]
        return seen

    before = foundations.evaluate(lm, ITEMS[:3], n_shots=0, think_tokens=80).tensors
    monkeypatch.setattr(foundations, "think", thinking)
    after = foundations.evaluate(lm, ITEMS[:3], n_shots=0, think_tokens=80).tensors
    order = sorted(range(3), key=lambda i: len(ITEMS[i].text))  # rows think by length
    closed, natural, other = order
    assert after["natural"][closed].sum() == 0 and (after["natural"][natural] == 1).all()
    for item in (closed, other):  # the states are those of the thoughts that were really had
        assert torch.equal(after["logp"][item], before["logp"][item])


def test_free_answers_must_parse_and_name_a_foundation(lm):
    good = ('This is wrong because {"violation": "care"}', '{ "violation" : "social", "why": "odd" } and so on')
    bad = ("care", '{"violation": "kindness"}', '{"violation": care}', '{"answer": "care"}', "{}", "", '{"violation": "care"')
    assert all(map(foundations.answers_in_json, good)) and not any(map(foundations.answers_in_json, bad))
    got = foundations.free_answers(lm, ITEMS, n_shots=7, think_tokens=0)
    assert got.tensors["valid"].tolist() == [foundations.answers_in_json(t) for t in got.record["texts"]]
