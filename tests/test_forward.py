import contextlib

import pytest
import torch
from conftest import WINDOW, make_lm
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from steerheal import cpu, forward
from steerheal.generation import generate, greedy


def brute(lm, sequence):
    """Final hidden states of one sequence, alone, with nothing shared."""
    return lm.decoder(input_ids=torch.tensor([sequence]), use_cache=False).last_hidden_state[0]


def family(shared, seed=0):
    """Sequences with a common prefix, groups under it, different lengths, and one duplicate."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(0, 250, (n,), generator=g).tolist()  # noqa: E731
    root = draw(shared)
    groups = [root + draw(7) for _ in range(3)]
    return [q + draw(n) for q in groups for n in (3, 9, 14)] + [groups[0] + [1, 2, 3], groups[0] + [1, 2, 3]]


@torch.no_grad()
@pytest.mark.parametrize("shared", [0, 5, 40, 3 * WINDOW])
@pytest.mark.parametrize("size", [16, 512])
@pytest.mark.parametrize("by_rows", [True, False])
def test_sharing_prefixes_changes_nothing(any_lm, shared, size, by_rows, monkeypatch):
    monkeypatch.setitem(forward.PACK_TOKENS, "cpu", size)
    monkeypatch.setattr(forward.Rows, "scores", 0 if by_rows else 10**9)
    sequences = family(shared)
    first = [max(len(s) - 3, 0) for s in sequences]
    got = dict(forward.hidden_states(any_lm, sequences, first))
    assert sorted(got) == list(range(len(sequences)))
    for i, s in enumerate(sequences):
        torch.testing.assert_close(got[i], brute(any_lm, s)[first[i] :], atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_a_window_on_every_layer_is_kept_in_scoring_training_and_generation():
    lm = make_lm("mistral")
    sequences = family(3 * WINDOW)
    got = dict(forward.hidden_states(lm, sequences, [WINDOW] * len(sequences)))
    trained = forward.training_states(lm, sequences, [WINDOW] * len(sequences)).split([len(s) - WINDOW for s in sequences])
    for i, s in enumerate(sequences):
        want = brute(lm, s)[WINDOW:]
        torch.testing.assert_close(got[i], want, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(trained[i], want, atol=2e-4, rtol=2e-4)
    for drawn, prompt in zip(generate(lm, sequences[:2], greedy(4)), sequences):
        text = list(prompt)
        for token in drawn.targets:
            logits = lm.logits(brute(lm, text)[-1])
            logits[lm.banned] = -torch.inf
            assert int(logits.argmax()) == token
            text.append(token)


@torch.no_grad()
def test_states_inside_the_common_part_are_returned_too(lm):
    sequences = [[*list(range(50)), 60], [*list(range(50)), 61, 62]]
    got = dict(forward.hidden_states(lm, sequences, [10, 45]))
    for i, f in ((0, 10), (1, 45)):
        torch.testing.assert_close(got[i], brute(lm, sequences[i])[f:], atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_token_logps_against_float64_softmax(any_lm):
    prompts, replies = [[1, 2, 3], [1, 2, 3], [9, 8]], [[4, 5, 6, 7], [4], [7, 7]]
    for p, r, got in zip(prompts, replies, forward.token_logps(any_lm, prompts, replies)):
        logits = any_lm.model(torch.tensor([p + r])).logits[0].double()
        want = torch.stack([logits[len(p) - 1 + i].log_softmax(-1)[t] for i, t in enumerate(r)])
        torch.testing.assert_close(got.double(), want, atol=2e-4, rtol=2e-4)


def test_each_distinct_prefix_is_computed_once():
    sequences = family(40)
    distinct = {tuple(s[: i + 1]) for s in sequences for i in range(40, len(s))}
    nodes = sum(len(p.ids) for p in forward.packs(sequences, 40, 10_000))
    assert nodes == len(distinct)


def test_packs_respect_their_size():
    sequences = family(0, seed=3)
    packs = list(forward.packs(sequences, 0, 30))
    assert all(len(p.ids) <= 30 for p in packs) and len(packs) > 1
    assert sorted(i for p in packs for i in p.paths) == list(range(len(sequences)))
    for p in packs:
        for i, path in p.paths.items():
            assert p.ids[path].tolist() == sequences[i]
            assert p.depth[path].tolist() == list(range(len(sequences[i])))


@torch.no_grad()
@pytest.mark.parametrize("trunks, length, tails", [(1, 0, (60, 55, 9, 8, 30)), (1, 50, (60, 55, 9, 8, 30)),
                                                   (1, 0, (400, 3, 3, 3, 3, 3, 3)), (2, 200, (1,) * 12),
                                                   (2, 60, (20, 0, 0, 0))])
def test_attention_is_done_where_it_costs_less(lm, trunks, length, tails, monkeypatch):
    """By rows, which adds a fifth of padding to each side of what a sequence would cost alone and leaves out those that others
    begin with; or over the pack as a whole, where twelve replies to each of two long prompts would repeat the prompts."""
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, 250, (n,), generator=g).tolist()  # noqa: E731
    sequences = [[*trunk, *draw(n)] for trunk in [draw(length) for _ in range(trunks)] for n in tails]
    shared = length if trunks == 1 else 0
    calls = []
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy(calls))
    for _ in forward.hidden_states(lm, sequences, [len(s) - 1 for s in sequences]):
        pass
    layers = len(lm.blocks)
    scores = sum(rows * queries * places for rows, queries, places in calls[layers if shared else 0 :]) / layers
    once = {tuple(s) for s in sequences if not any(t[: len(s)] == s for t in sequences if len(t) > len(s))}
    alone = sum((len(s) - shared) * len(s) for s in once)
    nodes = sum(len(p.ids) for p in forward.packs(sequences, shared, 10_000))
    assert 0 < scores <= min(alone / forward.ROW_FILL**2, nodes * (shared + nodes))


@torch.no_grad()
def test_behind_a_long_prefix_no_row_reads_it_anew(lm, monkeypatch):
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, 250, (n,), generator=g).tolist()  # noqa: E731
    prefix = draw(forward.LONG_PREFIX)
    sequences = [[*prefix, i, *draw(20)] for i in range(6)]
    calls = []
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy(calls))
    got = dict(forward.hidden_states(lm, sequences, [len(s) - 1 for s in sequences]))
    assert {rows for rows, _, _ in calls} == {1} and len(calls) == 2 * len(lm.blocks)
    for i, s in enumerate(sequences):
        torch.testing.assert_close(got[i], brute(lm, s)[-1:], atol=2e-4, rtol=2e-4)


def spy(calls):
    def attention(module, query, key, *args, **options):
        calls.append((len(query), query.shape[2], key.shape[2]))
        return sdpa_attention_forward(module, query, key, *args, **options)

    return attention


def test_common_prefix():
    assert forward.common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert forward.common_prefix([1, 2], [1, 2, 4]) == 2
    assert forward.common_prefix([], [1]) == 0


def test_bfloat16_models_run(monkeypatch):
    lm = make_lm(dtype=torch.bfloat16)
    got = dict(forward.hidden_states(lm, family(40), [45] * 11))
    assert all(torch.isfinite(s).all() for s in got.values())


@pytest.mark.parametrize("way", ["by rows", "by rows, CPU products", "by mask", "eager"])
@pytest.mark.parametrize("shared", [0, 5, 3 * WINDOW])
def test_states_of_training_and_their_gradient_are_those_of_each_sequence_alone(any_lm, shared, way):
    sequences = family(shared)
    first = [max(len(s) - 4, 0) for s in sequences]
    weight = any_lm.blocks[0].mlp.up_proj.weight.requires_grad_()
    chosen = torch.randn(sum(len(s) - f for s, f in zip(sequences, first)), any_lm.embedding.shape[1])
    any_lm.model.set_attn_implementation("eager" if way == "eager" else "sdpa")
    with contextlib.ExitStack() as stack:
        if way == "by rows, CPU products":
            stack.enter_context(cpu.products(any_lm))
        if way.startswith("by rows"):
            stack.enter_context(forward.attention_by_rows())
        got = forward.training_states(any_lm, sequences, first)
        (got_gradient,) = torch.autograd.grad((got * chosen).sum(), weight)
    want = torch.cat([brute(any_lm, s)[f:] for s, f in zip(sequences, first)])
    (gradient,) = torch.autograd.grad((want * chosen).sum(), weight)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(got_gradient, gradient, atol=2e-3, rtol=2e-3)


def test_training_computes_shared_beginnings_once_and_pads_nothing(lm):
    sequences, seen = family(40), []
    handle = lm.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    forward.training_states(lm, sequences, [len(s) - 1 for s in sequences])
    handle.remove()
    assert [shape[:2].numel() for shape in seen] == [len({tuple(s[: i + 1]) for s in sequences for i in range(len(s))})]
