"""Adapters of finished rounds: folding, gating, merging, export; on float and on 4-bit bases."""

import pytest
import torch
from conftest import IDS, make_lm, train

from steerheal import chat, history, models, personas
from steerheal.healing import Sample, heal
from steerheal.history import Student, fold
from steerheal.settings import HealSettings, from_flat


@pytest.fixture
def load_quantised(tiny_folder, tmp_path, monkeypatch):
    """Loads the tiny model in NF4 with double quantisation, through bitsandbytes' CPU kernels."""
    monkeypatch.setenv("STEERHEAL_CACHE", str(tmp_path / "cache"))
    return lambda: models.load(from_flat({"model": str(tiny_folder), "quantise": "nf4", "device": "cpu"}))


@pytest.fixture
def quantised(load_quantised):
    return load_quantised()


def test_base_is_bit_identical_whatever_was_learned(any_lm):
    before = any_lm.model(IDS).logits
    student = Student(any_lm)
    rounds = []
    for r in range(2):
        factors, _ = train(student, r)
        rounds.append(factors)
        student.load_history(rounds)
        assert not torch.equal(any_lm.model(IDS).logits, before)
        with student.base():
            assert torch.equal(any_lm.model(IDS).logits, before)
    student.load_history([])
    assert torch.equal(any_lm.model(IDS).logits, before)


def test_folding_equals_stacking_and_pefts_own_concatenation():
    """Three rounds as one adapter of ours, as three active PEFT adapters, and as PEFT concatenates them."""
    from peft import LoraConfig, get_peft_model

    lm = make_lm()
    student = Student(lm)
    rounds = []
    for r in range(3):
        student.load_history(rounds)
        rounds.append(train(student, r)[0])
    student.load_history(rounds)
    folded = lm.model(IDS).logits
    assert {a.shape[0] for a, _ in fold(rounds).values()} == {12}

    names = ["r0", "r1", "r2"]
    config = LoraConfig(r=4, lora_alpha=4, target_modules=list(rounds[0]))
    peft = get_peft_model(make_lm().model, config, adapter_name="r0")
    peft.add_adapter("r1", config)
    peft.add_adapter("r2", config)
    for name, factors in zip(names, rounds):
        for path, (a, b) in factors.items():
            layer = peft.get_submodule(f"base_model.model.{path}")
            layer.lora_A[name].weight.data = a
            layer.lora_B[name].weight.data = b
    peft.base_model.set_adapter(names)
    torch.testing.assert_close(peft(IDS).logits, folded, atol=1e-5, rtol=1e-5)
    peft.add_weighted_adapter(names, [1.0, 1.0, 1.0], "cat", combination_type="cat")
    peft.set_adapter("cat")
    torch.testing.assert_close(peft(IDS).logits, folded, atol=1e-5, rtol=1e-5)


def test_merging_for_generation_gives_the_exact_bits_back(any_lm):
    student = Student(any_lm)
    factors, _ = train(student)
    student.load_history([factors])
    weights = {n: p.clone() for n, p in any_lm.model.named_parameters()}
    before = any_lm.model(IDS).logits
    with student.merged():
        torch.testing.assert_close(any_lm.model(IDS).logits, before, atol=1e-3, rtol=1e-3)
        assert any(not torch.equal(p, weights[n]) for n, p in any_lm.model.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in any_lm.model.named_parameters())
    assert torch.equal(any_lm.model(IDS).logits, before)


def test_base_stays_base_whatever_merges_inside_it(lm):
    before = lm.model(IDS).logits
    student = Student(lm)
    student.load_history([train(student)[0]])
    with student.base():
        for form in (student.merged, student.plain):
            with form():
                assert torch.equal(lm.model(IDS).logits, before)
    assert not torch.equal(lm.model(IDS).logits, before)


def test_memory_that_runs_out_while_merging_leaves_the_base_as_it_was(lm, monkeypatch):
    student = Student(lm)
    factors, _ = train(student)
    student.load_history([factors])
    before, real, calls = lm.model(IDS).logits, history._factors, []

    def scarce(layer, name):
        calls.append(name)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(layer, name)

    monkeypatch.setattr(history, "_factors", scarce)
    with pytest.raises(torch.OutOfMemoryError), student.merged():
        pytest.fail("nothing was merged")
    assert torch.equal(lm.model(IDS).logits, before)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_exports_load_in_plain_peft(architecture, tmp_path):
    from peft import PeftConfig, PeftModel

    lm = make_lm(architecture)
    student = Student(lm)
    rounds = [train(student, r)[0] for r in range(2)]
    student.load_history(rounds)
    want = lm.model(IDS).logits
    history.export(fold(rounds), tmp_path / "a", "tiny", "a" * 40)
    assert PeftConfig.from_pretrained(tmp_path / "a").revision == "a" * 40
    loaded = PeftModel.from_pretrained(make_lm(architecture).model, tmp_path / "a")
    torch.testing.assert_close(loaded(IDS).logits, want, atol=1e-6, rtol=1e-6)


def test_lora_reaches_every_linear_layer_of_the_band_and_nothing_else():
    lm = make_lm("gemma3", layers=10)
    paths = Student(lm).targets(0.2, 0.8)
    assert {int(p.split("layers.")[1].split(".")[0]) for p in paths} == set(range(2, 8))
    assert len(paths) == 6 * 7 and not any("vision" in p or "head" in p for p in paths)


def test_a_second_student_on_a_resident_model_starts_clean(lm):
    before = lm.model(IDS).logits
    student = Student(lm)
    factors, _ = train(student)
    student.load_history([factors])
    again = Student(lm)
    assert torch.equal(lm.model(IDS).logits, before)
    assert set(again.linears) == set(student.linears)
    repeated, _ = train(again)
    for p in factors:
        torch.testing.assert_close(repeated[p], factors[p])


# ---------------------------------------------------------------- 4-bit bases


def test_a_round_on_a_4_bit_base(quantised, load_quantised, tmp_path):
    import bitsandbytes as bnb
    from peft import PeftModel

    assert quantised.quantised
    student = Student(quantised)
    layer = student.linears[student.targets(0, 1)[0]]
    assert isinstance(layer, bnb.nn.Linear4bit)
    assert layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested  # double quantisation
    before = quantised.model(IDS).logits
    packed = layer.weight.data.clone()
    factors, record = train(student, epochs=6, lr=2e-2, batch=6, micro_batch=3, lam=0.1, tau=0.5)
    assert record["val_nll"][-1] < record["val_nll"][0] - 0.5
    assert max(record["steps"][0]["D"]) < 1e-3
    assert all(t.dtype == torch.float32 for pair in factors.values() for t in pair)
    student.load_history([factors])
    healed = quantised.model(IDS).logits
    assert not torch.equal(healed, before)
    with student.merged():  # 4-bit weights are never merged into
        assert torch.equal(quantised.model(IDS).logits, healed)
    with student.base():
        assert torch.equal(quantised.model(IDS).logits, before)
    assert torch.equal(layer.weight.data, packed)
    history.export(fold([factors]), tmp_path / "adapter", quantised.name)
    loaded = PeftModel.from_pretrained(load_quantised().model, tmp_path / "adapter")
    torch.testing.assert_close(loaded(IDS).logits, healed)


def test_gradients_pass_a_4_bit_base_exactly(quantised):
    """They equal those on an ordinary model that has the dequantised weights."""
    import bitsandbytes.functional as F

    plain = make_lm(dtype=torch.bfloat16)
    with torch.no_grad():
        for path, linear in Student(quantised).linears.items():
            w = linear.weight
            plain.model.get_submodule(path).weight.copy_(F.dequantize_4bit(w.data, w.quant_state))
    found = []
    for lm in (quantised, plain):
        student = Student(lm)
        lm.model(IDS)  # an evaluation before training must not put the weights into a layout without gradients
        parameters = student.start_round(student.targets(0, 1), 4, 0, 0)
        for p in parameters[1::2]:
            p.data.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
        out = lm.model(IDS).logits.float()
        out.log_softmax(-1)[..., 3].sum().backward()
        found.append((out.detach(), [p.grad for p in parameters]))
        student.finish_round()
    (out, grads), (want_out, want) = found
    torch.testing.assert_close(out, want_out, atol=0.1, rtol=0.05)
    for g, w in zip(grads, want):
        assert (g - w).norm() < 0.1 * w.norm()  # bfloat16


def test_checkpointing_on_a_4_bit_base(quantised):
    (a, ra), (b, rb) = (train(Student(quantised), gradient_checkpointing=c) for c in (False, True))
    assert ra == rb
    assert all(torch.equal(x, y) for path in a for x, y in zip(a[path], b[path]))


@pytest.mark.real
def test_a_round_on_smollm2_in_4_bit():
    lm = models.load(from_flat({"model": "smollm2-135m-instruct", "quantise": "nf4", "device": "cpu"}))
    trait = personas.load("authority")
    learned = [Sample(chat.prompt(lm.tokenizer, d.prompt), chat.plain(lm.tokenizer, d.pairs[0][0])) for d in trait.conduct[:7]]
    before = lm.model(IDS).logits
    student = Student(lm)
    settings = HealSettings(lr=1e-3, epochs=5, batch=6, micro_batch=3, tau=2.0)  # batch 3, accumulated twice
    factors, record = heal(student, learned, settings, 0.1, run_seed=0, round_index=0)
    assert record["train_nll"][-1] < 0.8 * record["train_nll"][0]
    assert len(factors) == 18 * 7  # every linear layer of blocks 6 .. 23
    student.load_history([factors])
    assert not torch.equal(lm.model(IDS).logits, before)
    with student.base():
        assert torch.equal(lm.model(IDS).logits, before)
