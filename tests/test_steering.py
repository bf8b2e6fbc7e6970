import pytest
import torch
from conftest import make_lm

from steerheal import chat, steering
from steerheal.errors import UserError
from steerheal.steering import Vector, extract, steered


@torch.no_grad()
def test_extraction_is_the_mean_difference_at_the_last_token(any_lm):
    contexts, layers = ["first thing", "a much longer second thing to say", "third"], [1, 2]
    got = extract(any_lm, "You are good.", "You are bad at it.", contexts, layers)
    for layer in layers:
        want = torch.zeros(32, dtype=torch.float64)
        for sign, persona in ((1, "You are good."), (-1, "You are bad at it.")):
            for c in contexts:
                ids = torch.tensor([chat.prompt(any_lm.tokenizer, c, persona)])
                # hidden_states[0] is the embedding, so block l's output is hidden_states[l + 1]
                states = any_lm.model(ids, output_hidden_states=True).hidden_states[layer + 1]
                want += sign * states[0, -1].double() / len(contexts)
        torch.testing.assert_close(got.layers[layer].double(), want, atol=1e-3, rtol=1e-3)


def test_extraction_leaves_the_model_whole(lm):
    ids = torch.tensor([[1, 2, 3]])
    before = lm.model(ids).logits
    extract(lm, "You are a.", "You are b.", ["x"], [1])
    assert torch.equal(lm.model(ids).logits, before)


@torch.no_grad()
def test_every_row_gets_its_own_dose_at_every_position(any_lm):
    v = Vector({1: torch.randn(32, generator=torch.Generator().manual_seed(0))})
    ids = torch.tensor([[3, 1, 4, 1, 5]] * 3)
    seen = {}
    any_lm.blocks[2].register_forward_pre_hook(lambda m, a: seen.update(x=a[0].clone()))
    any_lm.model(ids)
    plain = seen["x"]
    with steered(any_lm, v, torch.tensor([0.0, 1.0, -2.5])):
        any_lm.model(ids)
    for row, dose in enumerate((0.0, 1.0, -2.5)):
        torch.testing.assert_close(seen["x"][row], plain[row] + dose * v.layers[1])
    any_lm.model(ids)
    assert torch.equal(seen["x"], plain)  # nothing is left behind


def test_the_gate_leaves_unrelated_states_alone(lm):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    seen = []

    def states_of(vector):
        with steered(lm, vector, 2.0):
            handle = lm.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
            lm.decoder(input_ids=torch.tensor([[5, 6, 7, 8, 9]]))
            handle.remove()
        return (seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]).reshape(5, -1).double()

    h, v = states_of(None), direction.double()
    cos = (h @ v) / (h.norm(dim=-1) * v.norm())
    got = states_of(Vector({1: direction}, "cosine_gated"))
    torch.testing.assert_close(got, h + 2.0 * cos.abs()[:, None] * v, atol=1e-5, rtol=1e-5)


def test_vectors_survive_their_tensors_and_know_their_angle():
    a = Vector({1: torch.tensor([1.0, 0.0]), 2: torch.tensor([0.0, 2.0])})
    assert steering.cosine(Vector.from_tensors(a.tensors()), a) == pytest.approx(1.0)
    assert steering.cosine(a, Vector({1: torch.tensor([0.0, 1.0]), 2: torch.tensor([1.0, 0.0])})) == pytest.approx(0.0)
    assert all(v.norm() == pytest.approx(1.0) for v in a.normalised().layers.values())


def test_vector_files_go_round(tmp_path):
    a = Vector({15: torch.randn(8), 3: torch.randn(8)}, "cosine_gated")
    steering.save(a, tmp_path / "v.safetensors", 2.5)
    b = steering.load(tmp_path / "v.safetensors")
    assert b.method == "cosine_gated" and all(torch.equal(a.layers[i], b.layers[i]) for i in (3, 15))
    (tmp_path / "no.safetensors").write_bytes(b"no vector")
    with pytest.raises(UserError, match="no vector file"):
        steering.load(tmp_path / "no.safetensors")
    with pytest.raises(UserError, match="no vector file"):
        steering.load(tmp_path / "absent.safetensors")


def test_layers_of_gemma_3_4b_are_15_16_17():
    assert make_lm(layers=34).band(0.45, 0.55) == [15, 16, 17]
    assert make_lm(layers=30).band(0.45, 0.55) == [13, 14, 15]
    assert make_lm(layers=4).band(0.45, 0.55) == [1]
    assert steering.Dial(torch.tensor(0.0)).dose == 0
