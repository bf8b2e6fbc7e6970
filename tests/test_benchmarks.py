"""The plain side of the benchmarks computes what ours computes; otherwise their ratios would mean nothing."""

import importlib
import inspect
from pathlib import Path

import pytest
import torch

from benchmarks import plain
from steerheal import forward, generation, healing, personas, steering
from steerheal.evaluation import foundations
from steerheal.healing import Sample
from steerheal.history import Student
from steerheal.settings import HealSettings
from steerheal.steering import cosine

MODULES = sorted(p.stem for p in Path(plain.__file__).parent.glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_loads_and_says_how_it_is_run(name):
    module = importlib.import_module(f"benchmarks.{name}")
    runs = '__name__ == "__main__"' in inspect.getsource(module)
    assert runs == module.__doc__.startswith(f"python -m benchmarks.{name}")


def test_extraction(lm):
    contexts, layers = personas.contexts(3), [1, 2]
    systems = ("Be kind.", "Obey.")
    ours, theirs = steering.extract(lm, *systems, contexts, layers), plain.extract(lm, systems, contexts, layers)
    assert cosine(ours, theirs) == pytest.approx(1, abs=1e-6)
    for i in layers:
        torch.testing.assert_close(ours.layers[i], theirs.layers[i], atol=1e-5, rtol=1e-4)


def test_likelihoods(lm):
    prompts, replies = [[1, 2, 3], [1, 2, 3], [9, 8]], [[4, 5, 6, 7], [4], [7, 7]]
    for p, r, ours in zip(prompts, replies, forward.token_logps(lm, prompts, replies)):
        torch.testing.assert_close(-ours, plain.token_nll(lm, p, r), atol=1e-5, rtol=1e-4)


def test_generation(lm, monkeypatch):
    """The likeliest token at each step, steered at a dose of each row's own."""
    real = plain.sampling
    monkeypatch.setattr(plain, "sampling", lambda *args: real(*args) | dict(top_k=1))
    vector = steering.Vector({1: torch.randn(32, generator=torch.Generator().manual_seed(0))})
    prompts, doses = [[1, 2, 3], [1, 2, 3], [9, 8, 7, 6, 5]], [0.0, 2.0, 1.0]
    ours = generation.generate(lm, prompts, generation.Sampling(8, 1.0, 0.95, 1), [1, 2, 3], vector, doses)
    theirs = plain.generate(lm, prompts, vector, doses, 8, [*lm.eos_ids, *lm.banned.tolist()])
    assert [c.ids for c in ours] == theirs and theirs[0] != theirs[1]


def test_healing(lm):
    """Same validation NLL after two epochs of the same batches, with a barrier that acts."""
    g = torch.Generator().manual_seed(0)
    samples = [Sample(torch.randint(0, 250, (6,), generator=g).tolist(), torch.randint(0, 250, (5,), generator=g).tolist())
               for _ in range(9)]
    settings = HealSettings(r=4, band=(0.0, 1.0), lr=1e-2, epochs=2, batch=4, tau=0.001)
    _, record = healing.heal(Student(lm), samples, settings, 5.0, 0, 0)
    order = healing._permutation(9, 0, 0, "split")
    lengths = {i: len(samples[i].inputs) for i in order[1:]}
    epochs = [healing.batches(lengths, 4, 0, 0, e) for e in range(2)]
    theirs = plain.heal(Student(lm), samples, [samples[order[0]]], epochs, settings, 5.0)
    assert record["val_nll"] == pytest.approx(theirs, rel=1e-4)
    assert record["duty"] > 0 and abs(theirs[-1] / theirs[0] - 1) > 1e-3


@pytest.mark.parametrize("think", [0, 4])
def test_the_readout(lm, think):
    items = personas.vignettes("builtin", 7)
    ours = foundations.evaluate(lm, items, n_shots=0, think_tokens=think).tensors["logp"]
    torch.testing.assert_close(ours, plain.read(lm, items, 0, think), atol=1e-4, rtol=1e-4)


def test_the_largest_batch_is_one_that_was_not_halved(lm, monkeypatch):
    from benchmarks import gpu
    from steerheal import generation
    from steerheal.generation import Sampling, generate

    monkeypatch.setattr(generation, "_fits", {})
    monkeypatch.setattr(generation, "_generate", halving(generation._generate, 6))

    def fits(n):
        generation._fits.clear()
        generate(lm, [[1, 2]] * n, Sampling(4), range(n))
        return not generation._fits

    assert gpu.largest(fits, 48) == 6


def halving(step, limit):
    def cramped(lm, prompts, *args):
        if len(prompts) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(lm, prompts, *args)

    return cramped


def test_the_healing_benchmark_runs_what_healing_runs(lm, monkeypatch):
    """Attention by rows included: without it a benchmark once timed something else."""
    from benchmarks import healing as benchmark

    seen = []
    attend = forward.Rows.attend
    monkeypatch.setattr(forward.Rows, "attend", lambda *args, **options: seen.append(1) or attend(*args, **options))
    student = Student(lm)
    parameters = student.start_round(student.targets(0, 1), 4, 0, 0)
    benchmark.ours(student, [Sample([1, 2, 3], [4, 5, 6]), Sample([1, 2, 3], [7, 8])], parameters, 1)
    assert seen
