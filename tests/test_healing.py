import pytest
import torch
from conftest import make_lm

from steerheal import healing, history
from steerheal.healing import Sample, heal
from steerheal.history import Student, fold
from steerheal.settings import HealSettings

SMALL = dict(r=4, epochs=2, lr=5e-3, band=(0.0, 1.0))
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def samples(n=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [Sample(torch.randint(0, 250, (6,), generator=g).tolist(), [40, 41, 42, 43, 44][: 1 + i % 5])
            for i in range(n)]


def train(student, index=0, lam=0.0, **overrides):
    settings = HealSettings(**(SMALL | overrides))
    return heal(student, samples(), settings, lam, run_seed=0, round_index=index)


def test_it_learns(any_lm):
    _, record = train(Student(any_lm), epochs=6, barrier="nll")
    assert record["val_nll"][-1] < record["val_nll"][0] - 0.5
    assert record["train_nll"][-1] < record["train_nll"][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ref", ["base", "prev"])
def test_a_fresh_adapter_is_a_no_op_with_zero_divergence(dtype, ref):
    lm = make_lm(dtype=dtype)
    student = Student(lm)
    before = lm.model(IDS).logits
    _, record = train(student, lam=1.0, ref=ref, tau=0.0)
    # sqrt(1e-8) where every KL is 0; the reference ran in other batches, so bfloat16 leaves its rounding
    assert max(record["steps"][0]["D"]) == pytest.approx(1e-4, abs=1e-6 if dtype == torch.float32 else 1e-3)
    student.start_round(student.targets(0, 1), 4, 0, 0)
    assert torch.equal(lm.model(IDS).logits, before)


def test_training_goes_on_after_the_first_step_in_bfloat16():
    # autocast caches casts of the weights unless told otherwise, and would train against stale copies
    _, record = train(Student(make_lm(dtype=torch.bfloat16)), epochs=6, barrier="nll", lr=2e-2)
    assert record["val_nll"][-1] < record["val_nll"][0] - 0.5


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


def test_the_barrier_holds_the_student_near_its_reference(lm):
    free, _ = train(Student(lm), epochs=6, barrier="nll")
    held, record = train(Student(lm), epochs=6, lam=50.0, tau=0.0)
    size = lambda f: sum(float((b @ a).norm()) for a, b in f.values())  # noqa: E731
    assert size(held) < 0.5 * size(free)
    assert record["duty"] == 1.0


def test_an_inert_barrier_is_nll(lm):
    a, record = train(Student(lm), lam=10.0, tau=1e6)
    b, _ = train(Student(lm), barrier="nll")
    assert record["duty"] == 0.0
    for path in a:
        torch.testing.assert_close(a[path], b[path], atol=1e-6, rtol=1e-4)


def test_accumulation_is_the_whole_batch(lm):
    a, ra = train(Student(lm), lam=1.0, tau=0.01, micro_batch=6)
    b, rb = train(Student(lm), lam=1.0, tau=0.01, micro_batch=2)
    assert ra["steps"][-1]["loss"] == pytest.approx(rb["steps"][-1]["loss"], rel=1e-3)
    for path in a:
        torch.testing.assert_close(a[path], b[path], atol=1e-3, rtol=1e-2)


def test_one_step_against_autograd_by_hand(lm):
    """The accumulated gradient of one effective batch equals that of the written-out loss."""
    student = Student(lm)
    batch = samples(6)
    settings = HealSettings(**SMALL, tau=0.05, micro_batch=4)
    parameters = student.start_round(student.targets(0, 1), 4, 0, 0)
    with torch.no_grad():
        for p in parameters[1::2]:
            p.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    with student.base():
        reference = [lm.model(torch.tensor([s.inputs])).logits[0, 5:].detach() for s in batch]
        states = [lm.decoder(input_ids=torch.tensor([s.inputs])).last_hidden_state[0, 5:].detach() for s in batch]
    student._activate(["round"])
    for p in parameters:
        p.requires_grad_(True)
    row = healing._step(student, parameters, batch, states, settings, 2.0, True, 4)
    got = [p.grad.clone() for p in parameters]
    total, tokens = 0.0, sum(len(s.targets) for s in batch)
    for s, ref in zip(batch, reference):
        logits = lm.model(torch.tensor([s.inputs])).logits[0, 5:]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(s.targets), reduction="sum") / tokens
        kl = (logits.softmax(-1) * (logits.log_softmax(-1) - ref.log_softmax(-1))).sum(-1)
        total = total + 2.0 * torch.relu((kl.square().mean() + 1e-8).sqrt() - 0.05) / 6
    want = torch.autograd.grad(total, parameters)
    assert row["loss"] == pytest.approx(total.item(), rel=1e-4)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-3)
    assert row["pressure"] == pytest.approx(row["barrier_gradient"] / row["nll_gradient"])


def test_spectral_norm_is_the_largest_singular_value():
    g = torch.Generator().manual_seed(0)
    parameters = [torch.randn(4, 10, generator=g), torch.randn(12, 4, generator=g)] * 2
    want = 2 * torch.linalg.matrix_norm(parameters[1] @ parameters[0], 2)
    assert float(healing.spectral_norm(parameters)) == pytest.approx(float(want), rel=1e-5)
    zero = [parameters[0].requires_grad_(), torch.zeros(12, 4, requires_grad=True)]
    healing.spectral_norm(zero).backward()
    assert all(torch.isfinite(p.grad).all() for p in zero)


def test_a_loss_that_is_not_finite_names_step_and_way_out(lm):
    with pytest.raises(FloatingPointError, match=r"step \d+ .*heal.lr"):
        train(Student(lm), lr=1.0, epochs=50, lam=1e38, tau=0.0)


def test_folding_equals_stacking_and_pefts_own_concatenation(lm):
    from peft import PeftModel

    student = Student(lm)
    rounds = [train(student, r)[0] for r in range(3)]
    student.load_history(rounds)
    folded = lm.model(IDS).logits
    total = {p: sum(f[p][1] @ f[p][0] for f in rounds) for p in rounds[0]}
    both = fold(rounds)
    for p, (a, b) in both.items():
        assert a.shape[0] == 12
        torch.testing.assert_close(b @ a, total[p], atol=1e-5, rtol=1e-4)
    assert issubclass(PeftModel, torch.nn.Module)
    fresh = make_lm()
    for p, update in total.items():
        fresh.model.get_submodule(p).weight.data += update
    torch.testing.assert_close(fresh.model(IDS).logits, folded, atol=1e-3, rtol=1e-3)


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


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_exports_load_in_plain_peft(architecture, tmp_path):
    from peft import PeftModel

    lm = make_lm(architecture)
    student = Student(lm)
    rounds = [train(student, r)[0] for r in range(2)]
    student.load_history(rounds)
    want = lm.model(IDS).logits
    history.export(fold(rounds), tmp_path / "a", "tiny")
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


def test_order_and_init_do_not_depend_on_tuned_settings(lm):
    student = Student(lm)
    a = student.start_round(student.targets(0, 1), 4, 7, 1)
    first = [p.detach().clone() for p in a]
    b = student.start_round(student.targets(0, 1), 4, 7, 1)
    assert all(torch.equal(x, y) for x, y in zip(first, b))
    other = student.start_round(student.targets(0, 1), 4, 7, 2)
    assert not torch.equal(first[0], other[0])
