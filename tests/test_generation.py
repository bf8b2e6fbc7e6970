import pytest
import torch
import transformers
from conftest import make_lm

from steerheal import generation
from steerheal.forward import token_logps
from steerheal.generation import Sampling, _draw, generate, greedy
from steerheal.steering import Vector, steered

PROMPTS = [[1, 2, 3], list(range(40)), [7], [9, 9, 9, 9, 9, 9], list(range(30, 5, -1))]


@pytest.mark.parametrize("steps", [1, 20])
def test_batched_greedy_equals_one_by_one(any_lm, steps):
    together = generate(any_lm, PROMPTS, greedy(steps))
    for prompt, got in zip(PROMPTS, together):
        assert generate(any_lm, [prompt], greedy(steps))[0] == got


@torch.no_grad()
def test_greedy_equals_transformers(lm):
    want = lm.model.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=15, do_sample=False, eos_token_id=256,
                             pad_token_id=256)[0, len(PROMPTS[1]) :].tolist()
    got = generate(lm, [PROMPTS[1]], greedy(15))[0]
    assert got.targets == want


def test_draws_do_not_depend_on_the_batch(any_lm):
    s = Sampling(12)
    seeds = [11, 12, 13, 14, 15]
    together = generate(any_lm, PROMPTS, s, seeds)
    for prompt, seed, got in zip(PROMPTS, seeds, together):
        assert generate(any_lm, [prompt], s, [seed])[0] == got
    assert generate(any_lm, PROMPTS, s, [1] * 5) != together


def test_one_batch_mixes_doses(lm):
    v = Vector({1: 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))})
    mixed = generate(lm, [PROMPTS[1]] * 3, greedy(10), vector=v, doses=[0.0, 1.0, 5.0])
    for dose, got in zip((0.0, 1.0, 5.0), mixed):
        assert generate(lm, [PROMPTS[1]], greedy(10), vector=v, doses=[dose])[0] == got
    assert mixed[0] == generate(lm, [PROMPTS[1]], greedy(10))[0] and mixed[0] != mixed[2]


def test_rows_end_on_every_eos_id_and_leave_the_batch(lm):
    free = generate(lm, PROMPTS, Sampling(30), [1, 2, 3, 4, 5])
    stops = {free[0].ids[3], free[2].ids[5]}
    lm.model.generation_config.eos_token_id = [256, *stops]
    lm.__dict__.pop("eos_ids", None)
    sizes = []
    handle = lm.decoder.register_forward_pre_hook(lambda m, a, kw: sizes.append(len(kw["input_ids"])), with_kwargs=True)
    ended = generate(lm, PROMPTS, Sampling(30), [1, 2, 3, 4, 5])
    handle.remove()
    for before, after in zip(free, ended):
        cut = next((i for i, t in enumerate(before.ids) if t in stops), None)
        assert after.ids == (before.ids if cut is None else before.ids[:cut])
        assert after.end == (before.end if cut is None else before.ids[cut])
    assert sizes[-1] < max(sizes) == len(PROMPTS)


def test_ids_without_a_token_are_never_drawn():
    lm = make_lm("gemma3")
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[-8:] += 100  # by far the likeliest
    drawn = generate(lm, PROMPTS, Sampling(20), [1, 2, 3, 4, 5])
    assert max(max(c.ids, default=0) for c in drawn) < len(lm.tokenizer)
    assert lm.model.config.image_token_id in lm.banned.tolist()


def test_nucleus_sampling_has_the_right_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -6.0]])
    n = 20_000
    uniform = (torch.arange(n) + 0.5) / n
    drawn = _draw(logits.expand(n, -1), Sampling(1, 1.0, 0.95, 4), uniform)
    p = logits[0, :4].double().softmax(-1)  # top_k cuts the fifth, top_p the fourth: three reach 0.97
    assert p[:2].sum() < 0.95 <= p[:3].sum()
    p = torch.cat([p[:3] / p[:3].sum(), torch.zeros(2, dtype=torch.float64)])
    share = torch.bincount(drawn, minlength=5) / n
    torch.testing.assert_close(share.double(), p, atol=2e-4, rtol=0)


def test_sampling_without_seeds_is_refused(lm):
    with pytest.raises(ValueError, match="one seed per row"):
        generate(lm, PROMPTS, Sampling(3), [1])


LONG = [[*range(40), *tail] for tail in ([1, 2, 3], [7], [9, 9, 9, 9, 9, 9], list(range(30, 5, -1)))]


@torch.no_grad()
def test_a_shared_beginning_is_run_once_and_changes_nothing(any_lm):
    sizes, rows = [], [[], []]
    handles = [any_lm.decoder.register_forward_pre_hook(lambda m, a, kw: sizes.append(kw["input_ids"].shape),
                                                        with_kwargs=True),
               any_lm.blocks[1].register_forward_pre_hook(lambda m, a: rows[0].append(len(a[0]))),
               any_lm.blocks[2].register_forward_pre_hook(lambda m, a: rows[1].append(len(a[0])))]
    v = Vector({1: torch.randn(32, generator=torch.Generator().manual_seed(0))})
    doses = [0.5, 3.0] * 4
    together = generate(any_lm, [p for p in LONG for _ in range(2)], greedy(12), vector=v, doses=doses)
    for handle in handles:
        handle.remove()
    for prompt, dose, got in zip([p for p in LONG for _ in range(2)], doses, together):
        assert generate(any_lm, [prompt], greedy(12), vector=v, doses=[dose])[0] == got
    rest = sum(len(p) - 40 for p in LONG)
    assert sizes[:3] == [(1, 40), (1, rest), (8, 1)]
    assert rows[0][:3] == [1, 1, 8] and rows[1][:3] == [2, 2, 8]  # once under each dose, from the steered block on


def test_doses_with_prompts_of_their_own(any_lm):
    """One dose shares its prompts with another, a third has others: nothing is run under a dose that did not ask for it."""
    v = Vector({1: 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))})
    rows = [(PROMPTS[1], 1.0), (PROMPTS[4], 2.0), (PROMPTS[1], 5.0), (PROMPTS[2], 2.0), (PROMPTS[1], 1.0)]
    got = generate(any_lm, [p for p, _ in rows], greedy(10), vector=v, doses=[d for _, d in rows])
    for (prompt, dose), one in zip(rows, got):
        assert generate(any_lm, [prompt], greedy(10), vector=v, doses=[dose])[0] == one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_eager_attention_decodes_too(dtype):
    lm = make_lm(dtype=dtype)
    fused = generate(lm, PROMPTS, greedy(12))
    lm.model.set_attn_implementation("eager")
    eager = generate(lm, PROMPTS, greedy(12))
    if dtype == torch.float32:
        assert eager == fused
    ids = [c.ids for c in fused]
    with_eager = token_logps(lm, PROMPTS, ids)
    lm.model.set_attn_implementation("sdpa")
    for a, b in zip(with_eager, token_logps(lm, PROMPTS, ids)):
        torch.testing.assert_close(a, b, atol=0.1, rtol=0.05)


@torch.no_grad()
def test_the_dose_halves_along_the_completion(lm):
    """Token by token with a full forward pass, each token's states steered by the dose of its own step."""
    v = Vector({1: 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))})
    ids = list(PROMPTS[1])
    cache = transformers.DynamicCache()
    new = ids
    for step in range(10):
        with steered(lm, v, 2.0 * 0.5 ** (step / 3)):
            states = lm.decoder(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True).last_hidden_state
        logits = lm.logits(states[:, -1])
        logits[:, lm.banned] = -torch.inf
        new = [int(logits.argmax())]
        if new[0] in lm.eos_ids:
            break
        ids += new
    got = generate(lm, [PROMPTS[1]], greedy(10), vector=v, doses=[2.0], half_life=3)[0]
    assert got.ids == ids[len(PROMPTS[1]) :] and got != generate(lm, [PROMPTS[1]], greedy(10), vector=v, doses=[2.0])[0]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")])
def test_a_batch_that_does_not_fit_is_halved_and_that_is_remembered(lm, monkeypatch, error):
    want = generate(lm, PROMPTS, Sampling(8), [1, 2, 3, 4, 5])
    sizes = []

    def small_card(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise error

    monkeypatch.setattr(generation, "_fits", {})
    handle = lm.decoder.register_forward_pre_hook(small_card, with_kwargs=True)
    assert generate(lm, PROMPTS, Sampling(8), [1, 2, 3, 4, 5]) == want
    tried = max(sizes)
    sizes.clear()
    assert generate(lm, PROMPTS, Sampling(8), [1, 2, 3, 4, 5]) == want
    handle.remove()
    assert tried == 5 and max(sizes) == 2
    handle = lm.decoder.register_forward_pre_hook(lambda m, a: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(torch.OutOfMemoryError):
        generate(lm, PROMPTS, Sampling(8), [1, 2, 3, 4, 5])
    handle.remove()
    handle = lm.decoder.register_forward_pre_hook(lambda m, a: (_ for _ in ()).throw(RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):  # no smaller batch would help
        generate(lm, PROMPTS, Sampling(8), [1, 2, 3, 4, 5])
    handle.remove()
