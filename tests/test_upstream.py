"""Runs where steering-lite is installed (pip install -e '.[upstream]'); the error without it is tested everywhere."""

import importlib.util

import pytest
import torch
from conftest import TINY, make_lm, train

from steerheal import chat, steering, upstream
from steerheal.errors import UserError
from steerheal.generation import generate, greedy
from steerheal.history import Student, fold
from steerheal.loop import HealLoop
from steerheal.settings import from_flat
from steerheal.stages import Store
from steerheal.steering import Vector, steered

INSTALLED = importlib.util.find_spec("steering_lite") is not None
needs = pytest.mark.skipif(not INSTALLED, reason="steering-lite is not installed")
PERSONAS = ("You are kind.", "You are cruel.")
CONTEXTS = ["What now?", "Tell me about the sea.", "Why?"]
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.mark.skipif(INSTALLED, reason="steering-lite is installed")
def test_without_the_package_both_ways_out_are_named(tmp_path):
    with pytest.raises(UserError, match=r"upstream.*steer.method=mean_diff"):
        HealLoop(from_flat(TINY | {"steer.method": "steering-lite:sspace"}), make_lm(), Store(tmp_path))


@needs
def test_an_unknown_method_names_the_known_ones():
    with pytest.raises(UserError, match="steering-lite:sspace"):
        upstream.check("steering-lite:nothing")


@needs
def test_files_go_both_ways(tmp_path):
    import steering_lite as sl

    ours = Vector({1: torch.randn(32), 2: torch.randn(32)})
    steering.save(ours, tmp_path / "ours.safetensors", 2.0)
    theirs = sl.Vector.load(str(tmp_path / "ours.safetensors"))
    assert theirs.cfg.method == "mean_diff" and theirs.cfg.coeff == 2.0 and theirs.cfg.layers == [1, 2]
    assert all(torch.equal(theirs.state[i]["v"], ours.layers[i]) for i in (1, 2))
    lm = make_lm()
    with torch.no_grad():
        with steered(lm, ours, 2.0):
            want = lm.model(IDS).logits
        with theirs(lm.model):
            torch.testing.assert_close(lm.model(IDS).logits, want, atol=1e-5, rtol=1e-5)
    theirs.save(str(tmp_path / "theirs.safetensors"))
    back = steering.load(tmp_path / "theirs.safetensors")
    assert all(torch.equal(back.layers[i], ours.layers[i]) for i in (1, 2))


def test_directions_of_two_rounds_are_compared_where_they_act():
    """The singular vectors of a weight may come in another order and with another sign after a round; what is added to its
    output does not change with that."""
    u = torch.linalg.qr(torch.randn(8, 5)).Q
    s, d = torch.rand(5) + 0.5, torch.randn(5)
    order, signs = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    a = upstream.LiteVector("steering-lite:sspace", {"w": dict(U_r=u, sqrtS=s, dS_hat=d)})
    b = upstream.LiteVector("steering-lite:sspace", {"w": dict(U_r=u[:, order] * signs, sqrtS=s[order],
                                                                dS_hat=d[order] * signs)})
    assert steering.cosine(a, b) == pytest.approx(1.0)


@needs
def test_mean_diff_agrees_with_theirs():
    import steering_lite as sl

    lm = make_lm()
    ours = steering.extract(lm, *PERSONAS, CONTEXTS, [1, 2])
    pos, neg = ([chat.text(lm.tokenizer, p, [("user", c)]) for c in CONTEXTS] for p in PERSONAS)
    theirs = sl.Vector.train(lm.model, lm.tokenizer, pos, neg,
                             sl.MeanDiffC(layers=(1, 2), normalize=False, dtype=torch.float32))
    for i in (1, 2):
        torch.testing.assert_close(ours.layers[i], theirs.state[i]["v"], atol=1e-5, rtol=1e-4)


@needs
@pytest.mark.parametrize("name", ["mean_diff", "cosine_gated", "pca", "spherical", "sspace", "directional_ablation"])
def test_their_methods_act_as_their_own_code_does_and_a_batch_mixes_doses(name, tmp_path):
    import steering_lite as sl

    lm = make_lm()
    vector = upstream.extract(lm, *PERSONAS, CONTEXTS, [1, 2], f"steering-lite:{name}")
    again = upstream.LiteVector.from_tensors(vector.tensors(), vector.method)
    steering.save(again, tmp_path / "v.safetensors", 0.4)
    with torch.no_grad():
        plain = lm.model(IDS).logits
        with steered(lm, again, torch.tensor([0.4, 0.1])):
            ours = lm.model(IDS.repeat(2, 1)).logits
        for row, dose in enumerate((0.4, 0.1)):
            theirs = sl.Vector.load(str(tmp_path / "v.safetensors"))
            if theirs.cfg.layers is None:
                theirs.cfg.layers = (1, 2)
            with theirs(lm.model, C=dose):
                torch.testing.assert_close(ours[row], lm.model(IDS).logits[0], atol=1e-4, rtol=1e-4)
        assert (ours[0] - plain[0]).abs().max() > 1e-3
    mixed = generate(lm, [[1, 2, 3]] * 2, greedy(5), vector=again, doses=[0.4, 0.1])
    assert mixed[1] == generate(lm, [[1, 2, 3]], greedy(5), vector=again, doses=[0.1])[0]


@needs
def test_the_loop_runs_on_one_that_steers_inside_linear_layers(tmp_path):
    loop = HealLoop(from_flat(TINY | {"steer.method": "steering-lite:sspace", "steer.unit": "raw", "rounds": 2}), make_lm(),
                    Store(tmp_path))
    assert [r.outcome.round for r in loop.rounds()] == [0, 1]  # in round 1 the student's layers are PEFT's


@needs
def test_a_student_gives_the_state_of_a_model_with_its_weights():
    """What their code extracts from base + history is what it extracts from an ordinary model that has both in its weights."""
    student = Student(make_lm())
    rounds = [train(student)[0]]
    student.load_history(rounds)
    with student.plain():
        ours = upstream.extract(student.lm, *PERSONAS, CONTEXTS, [1, 2], "steering-lite:sspace")
    alone = make_lm()
    for path, (a, b) in fold(rounds).items():
        alone.model.get_submodule(path).weight.data += b @ a
    theirs = upstream.extract(alone, *PERSONAS, CONTEXTS, [1, 2], "steering-lite:sspace")
    assert ours.state.keys() == theirs.state.keys()
    for place, named in ours.state.items():
        for name, tensor in named.items():
            torch.testing.assert_close(tensor, theirs.state[place][name], atol=1e-4, rtol=1e-3)
    assert student.lm.model.get_submodule(next(iter(student.layers))) is next(iter(student.layers.values()))


@needs
def test_four_bit_weights_are_refused_where_a_method_reads_them():
    upstream.check("steering-lite:pca", quantised=True)
    with pytest.raises(UserError, match=r"quantise=none.*mean_diff"):
        upstream.check("steering-lite:sspace", quantised=True)
