import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_lm

from steerheal import cpu

SHAPES = dict(decode=(1, 9), causal=(9, 9), behind_a_cache=(4, 9))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradient_against_float64(shape, masked, monkeypatch):
    """Six heads on two key-value heads, and places that are not seen."""
    monkeypatch.setattr(cpu, "sdpa_attention_forward", None)  # it must not be called
    (n, places), g = shape, torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, heads, length, 8, generator=g).requires_grad_()
              for heads, length in ((6, n), (2, places), (2, places))]
    sees = torch.ones(n, places, dtype=torch.bool).tril(places - n).expand(3, n, places)
    if masked:
        sees = sees & (torch.arange(places) >= torch.tensor([0, 2, 5])[:, None, None])  # as padding on the left
        sees = sees | torch.eye(places, dtype=torch.bool)[places - n :]
    got, _ = cpu.attention(torch.nn.Identity(), *inputs, sees[:, None] if masked else None)
    query, key, value = (t.detach().double().requires_grad_() for t in inputs)
    want = torch.zeros(3, n, 6, 8, dtype=torch.float64)
    for row in range(3):
        for head in range(6):
            scores = query[row, head] @ key[row, head // 3].T / 8**0.5
            p = scores.masked_fill(~sees[row], -torch.inf).softmax(-1)
            want[row, :, head] = p @ value[row, head // 3]
    torch.testing.assert_close(got.double(), want.detach(), atol=1e-5, rtol=1e-5)
    weights = torch.randn(want.shape, generator=g)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for t, exact in zip(inputs, (query, key, value)):
        torch.testing.assert_close(t.grad.double(), exact.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_training_through_the_products_has_the_gradient_of_the_fused_kernel(kind):
    lm = make_lm(kind)
    ids = torch.tensor([list(range(30)), list(range(40, 70))])
    gradients = []
    for context in (cpu.products(lm), torch.enable_grad()):
        lm.model.zero_grad()
        for p in lm.blocks.parameters():
            p.requires_grad_(True)
        with context:
            lm.decoder(input_ids=ids, use_cache=False).last_hidden_state.square().mean().backward()
        gradients.append([p.grad.clone() for p in lm.blocks.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_packed_weights_give_the_same_states_and_leave_no_trace():
    lm = make_lm(dtype=torch.bfloat16)
    ids = torch.tensor([[*range(40)], [*range(40, 0, -1)]])
    plain = lm.model(ids).logits
    with cpu.decoding(lm, 2):
        inside = lm.model(ids).logits
        assert "forward" in vars(lm.blocks[0].mlp.up_proj)
    torch.testing.assert_close(inside, plain, atol=0.2, rtol=0.02)  # bfloat16 steps of logits around 10
    assert torch.equal(lm.model(ids).logits, plain) and "forward" not in vars(lm.blocks[0].mlp.up_proj)


def test_bfloat16_decodes_on_a_processor_without_avx512():
    """oneDNN reads the limit once, when it is first used: hence another process."""
    code = """
import torch
from conftest import make_lm
from steerheal.generation import generate, greedy
lm = make_lm(dtype=torch.bfloat16)
assert not torch.ops.mkldnn._is_mkldnn_bf16_supported()
print(len(generate(lm, [[1, 2, 3], [4, 5]], greedy(4))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent,
                          env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": f"{Path(__file__).parent.parent}"})
    assert done.stdout.strip() == "2", done.stderr


@torch.no_grad()
def test_values_may_be_narrower_than_keys():
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, n, d, generator=g) for n, d in ((1, 8), (7, 8), (7, 5)))
    out, _ = cpu.attention(torch.nn.Identity(), query, key, value, None)
    want = (query.double() @ key.double().transpose(2, 3) / 8**0.5).softmax(-1) @ value.double()
    torch.testing.assert_close(out.double(), want.transpose(1, 2), atol=1e-5, rtol=1e-5)
