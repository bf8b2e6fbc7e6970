import math

import pytest
import torch

from steerheal import divergence

KINDS = ["kl_rev", "kl_fwd"]
AGGREGATES = ["mean", "rmse", "p95", "max"]
VOCABULARY, WIDTH = 50, 8


def brute_kl(student, reference, kind):
    """float64 logits, from probabilities, term by term."""
    p, q = student.softmax(-1), reference.softmax(-1)
    a, b = (p, q) if kind == "kl_rev" else (q, p)
    return (a * (a.log() - b.log())).sum(-1)


def brute_aggregate(kl, how):
    """Of float64 [n], with sorting and arithmetic alone."""
    x = kl.sort().values
    n = len(x)
    if how == "mean":
        return x.sum() / n
    if how == "rmse":
        return ((x * x).sum() / n + 1e-8) ** 0.5
    if how == "max":
        return x[-1]
    place = 0.95 * (n - 1)
    i = math.floor(place)
    return x[i] + (place - i) * (x[min(i + 1, n - 1)] - x[i])


def ours(hidden, targets, head, reference, kind):
    return divergence.nll_and_kl(hidden, targets, lambda h: (h @ head.T).float(), len(head), reference, kind)


def draw(n, dtype=torch.float32, apart=1.0):
    g = torch.Generator().manual_seed(n)
    head = torch.randn(VOCABULARY, WIDTH, generator=g).to(dtype)
    hidden = torch.randn(n, WIDTH, generator=g).to(dtype)
    reference = (hidden + apart * torch.randn(n, WIDTH, generator=g)).to(dtype)
    return hidden.requires_grad_(), torch.randint(0, VOCABULARY, (n,), generator=g), head, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 37])
@pytest.mark.parametrize("how", AGGREGATES)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_against_float64(kind, how, n, dtype, monkeypatch):
    monkeypatch.setattr(divergence, "LOSS_LOGITS", {"cpu": 10 * VOCABULARY})  # chunks of 10, 10, 10 and 7 positions
    hidden, targets, head, reference = draw(n, dtype)
    nll, kl = ours(hidden, targets, head, reference, kind)
    d = divergence.aggregate(kl, how)
    got = nll.mean() + 0.7 * (d - 0.1).relu()
    got.backward()

    exact = hidden.detach().double().requires_grad_()
    z = exact @ head.double().T
    brute_nll = -(z.exp() / z.exp().sum(-1, keepdim=True)).log()[range(n), targets]
    brute = brute_aggregate(brute_kl(z, reference.double() @ head.double().T, kind), how)
    want = brute_nll.mean() + 0.7 * (brute - 0.1).relu()
    want.backward()
    exactly = dtype == torch.float32
    close = dict(atol=1e-5, rtol=1e-4) if exactly else dict(atol=0.02, rtol=0.02)  # of bfloat16 logits
    assert brute > 0.1  # the hinge is open
    torch.testing.assert_close(d.double(), brute, **close)
    torch.testing.assert_close(got.double(), want, **close)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, **(close if exactly else dict(atol=0.1, rtol=0.1)))


def test_without_a_barrier_there_is_cross_entropy_alone():
    hidden, targets, head, _ = draw(12)
    nll, kl = ours(hidden, targets, head, None, "nll")
    assert kl is None
    nll.sum().backward()
    exact = hidden.detach().double().requires_grad_()
    want = torch.nn.functional.cross_entropy(exact @ head.double().T, targets, reduction="none")
    want.sum().backward()
    torch.testing.assert_close(nll.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("how", AGGREGATES)
@pytest.mark.parametrize("kind", KINDS)
def test_identical_distributions_have_no_divergence_and_no_nan(kind, how, n, dtype):
    hidden, targets, head, _ = draw(n, dtype)
    _, kl = ours(hidden, targets, head, hidden.detach(), kind)
    d = divergence.aggregate(kl, how)
    assert d.item() == (pytest.approx(1e-4) if how == "rmse" else 0.0)
    d.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


@pytest.mark.parametrize("how", AGGREGATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_certain_model_gives_no_nan(kind, how):
    hidden, targets, head, reference = draw(5)
    sure = (1000 * hidden.detach()).requires_grad_()  # probabilities underflow to exact zeros
    nll, kl = ours(sure, targets, head, 1000 * reference, kind)
    (nll.sum() + divergence.aggregate(kl, how)).backward()
    assert torch.isfinite(nll).all() and torch.isfinite(kl).all() and torch.isfinite(sure.grad).all()


def test_a_short_loop_hides_from_the_mean_only():
    # the worked case: a 4-token loop in a completion of 60 tokens, under the usual tau of 0.5 in the mean
    kl = torch.full((60,), 0.05)
    kl[20:24] = 5.3
    assert float(divergence.aggregate(kl, "mean")) < 0.5
    for how in ("rmse", "p95", "max"):
        assert float(divergence.aggregate(kl, how)) > 1


@pytest.mark.parametrize("kind", [*KINDS, "nll"])
def test_the_size_of_chunks_changes_neither_value_nor_gradient(kind, monkeypatch):
    found = []
    for rows in (1, 3, 1000):
        monkeypatch.setattr(divergence, "LOSS_LOGITS", {"cpu": rows * VOCABULARY})
        hidden, targets, head, reference = draw(10)
        nll, kl = ours(hidden, targets, head, None if kind == "nll" else reference, kind)
        (nll.sum() + (0 if kl is None else kl.square().sum())).backward()
        found.append((nll.detach(), hidden.grad))
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


@pytest.mark.parametrize("vocabulary", [100, 20_000])
@pytest.mark.parametrize("n", [3, 700])
def test_memory_grows_with_neither_vocabulary_nor_positions(vocabulary, n, monkeypatch):
    monkeypatch.setattr(divergence, "LOSS_LOGITS", {"cpu": 40_000})
    made = []

    def logits(h):
        made.append(h.shape[0] * vocabulary)
        return h @ torch.ones(WIDTH, vocabulary)

    hidden, targets, _, reference = draw(n)
    nll, kl = divergence.nll_and_kl(hidden, targets, logits, vocabulary, reference, "kl_rev")
    assert max(made) <= 40_000
    assert sum(made) == 2 * n * vocabulary  # student and reference, once each
    assert sum(t.numel() for t in nll.grad_fn.saved_tensors) == 2 * n * WIDTH
    calls = len(made)
    (nll.sum() + kl.sum()).backward()
    assert len(made) == calls  # nothing is made again
