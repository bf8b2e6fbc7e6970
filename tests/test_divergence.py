import math

import pytest
import torch

from steerheal import divergence


def brute_kl(student, reference, kind):
    """float64, position by position, from probabilities."""
    out = []
    for s, r in zip(student.double(), reference.double()):
        p, q = s.softmax(-1), r.softmax(-1)
        a, b = (p, q) if kind == "kl_rev" else (q, p)
        out.append((a * (a.log() - b.log())).sum())
    return torch.stack(out)


def brute_aggregate(kl, how):
    x = sorted(float(v) for v in kl)
    if how == "mean":
        return sum(x) / len(x)
    if how == "rmse":
        return math.sqrt(sum(v * v for v in x) / len(x) + 1e-8)
    if how == "max":
        return x[-1]
    place = 0.95 * (len(x) - 1)
    i = int(place)
    return x[i] + (place - i) * (x[min(i + 1, len(x) - 1)] - x[i])


@pytest.mark.parametrize("kind", ["kl_rev", "kl_fwd"])
@pytest.mark.parametrize("how", ["mean", "rmse", "p95", "max"])
@pytest.mark.parametrize("n", [1, 2, 37])
def test_value_and_gradient_against_float64(kind, how, n):
    g = torch.Generator().manual_seed(n)
    student = (3 * torch.randn(n, 50, generator=g)).requires_grad_()
    reference = 3 * torch.randn(n, 50, generator=g)
    got = divergence.aggregate(divergence.per_position_kl(student, reference, kind), how)
    exact = student.detach().double().requires_grad_()
    kl = brute_kl(exact, reference, kind)
    assert got.item() == pytest.approx(brute_aggregate(kl.detach(), how), rel=1e-5)
    got.backward()
    divergence.aggregate(kl, how).backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["mean", "rmse", "p95", "max"])
def test_identical_distributions_give_no_nan(how):
    logits = torch.randn(5, 20).requires_grad_()
    divergence.aggregate(divergence.per_position_kl(logits, logits.detach(), "kl_rev"), how).backward()
    assert torch.isfinite(logits.grad).all()


def test_a_short_loop_hides_from_the_mean_only():
    # the seeds' worked case: a 4-token loop in 60 tokens, with the mean under the usual tau of 0.5
    kl = torch.full((60,), 0.05)
    kl[20:24] = 5.3
    assert float(divergence.aggregate(kl, "mean")) < 0.5
    for how in ("rmse", "p95", "max"):
        assert float(divergence.aggregate(kl, how)) > 1


@pytest.mark.parametrize("kind", ["kl_rev", "kl_fwd", "nll"])
@pytest.mark.parametrize("rows", [3, 256])
def test_chunks_change_neither_value_nor_gradient(kind, rows, monkeypatch):
    monkeypatch.setattr(divergence, "LOSS_ROWS", rows)
    g = torch.Generator().manual_seed(0)
    head = torch.randn(40, 8, generator=g)
    hidden, other = torch.randn(10, 8, generator=g), torch.randn(10, 8, generator=g)
    targets = torch.randint(0, 40, (10,), generator=g)

    def loss(h, whole):
        if whole:
            nll = torch.nn.functional.cross_entropy(h @ head.T, targets, reduction="none")
            kl = None if kind == "nll" else divergence.per_position_kl(h @ head.T, other @ head.T, kind)
        else:
            nll, kl = divergence.nll_and_kl(h, targets, lambda x: x @ head.T, None if kind == "nll" else other, kind)
        return nll.sum() + (0 if kl is None else kl.square().sum())

    grads = []
    for whole in (True, False):
        h = hidden.clone().requires_grad_()
        value = loss(h, whole)
        value.backward()
        grads.append((value.detach(), h.grad))
    torch.testing.assert_close(grads[0], grads[1])
