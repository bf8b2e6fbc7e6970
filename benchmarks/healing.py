"""python -m benchmarks.healing [--small]: a healing step, ours against the plain way, and the memory of the loss.

Plain (`benchmarks/plain.py`): one completion at a time with gradient accumulation, log-softmax of both models over the
whole vocabulary at every position, prompt included, and the reference run again at each step. Same model, adapter,
effective batch and objective, both in bfloat16 autocast; their gradients are compared before anything is timed.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.command import command
from benchmarks.timing import environment, forget_peak, in_turn, resident_peak
from steerheal import chat, divergence, forward, healing, models, personas
from steerheal.generation import Sampling, generate
from steerheal.healing import Sample
from steerheal.history import Student
from steerheal.settings import HealSettings, from_flat

SETTINGS = HealSettings(tau=0.0)  # the barrier acts on every completion
LAM = 0.3
GEMMA = 262_208  # vocabulary; a batch is 3 completions of 512 tokens, with states of 2560


# ---------------------------------------------------------------- two ways of one step


def ours(student: Student, samples: list[Sample], parameters: list[torch.nn.Parameter], epochs: int,
         micro_batch: int = 6, checkpointing: bool = False) -> list[Tensor | None]:
    """`epochs` steps on one effective batch, the reference made once; the last step's gradient."""
    settings = HealSettings(tau=0.0, gradient_checkpointing=checkpointing)
    with healing.training(student.lm):
        reference = healing._reference_states(student, samples, "base")
        student._activate(["round"])
        for _ in range(epochs):
            _start(parameters)
            healing._step_that_fits(student, parameters, samples, reference, settings, LAM, False, micro_batch)
    return [p.grad for p in parameters]


def plainly(student: Student, samples: list[Sample], parameters: list[torch.nn.Parameter],
            epochs: int) -> list[Tensor | None]:
    for _ in range(epochs):
        _start(parameters)
        plain.heal_step(student, samples, parameters, SETTINGS, LAM)
    return [p.grad for p in parameters]


def setting(samples: list[Sample] | None = None) -> tuple[Student, list[Sample], list[torch.nn.Parameter]]:
    """SmolLM2, six completions of its own, three to a dilemma as in a round, and an adapter as in mid-training."""
    lm = models.load(from_flat({"model": "smollm2-135m-instruct", "device": "cpu"}))
    if samples is None:
        prompts = [chat.prompt(lm.tokenizer, personas.load("authority").dilemmas[i // 3]) for i in range(6)]
        drawn = generate(lm, prompts, Sampling(64), list(range(6)))
        samples = [Sample(p, c.targets) for p, c in zip(prompts, drawn)]
    student = Student(lm)
    parameters = student.start_round(student.targets(*SETTINGS.band), SETTINGS.r, 0, 0)
    for p in parameters[1::2]:
        torch.nn.init.normal_(p, std=0.01, generator=torch.Generator().manual_seed(0))
    return student, samples, parameters


def _start(parameters: list[torch.nn.Parameter]) -> None:
    for p in parameters:
        p.grad = None
        p.requires_grad_(True)


# ---------------------------------------------------------------- peak memory


def step(way: str, samples: list[Sample], **options: object) -> Callable[[], object]:
    student, samples, parameters = setting(samples)
    return lambda: _autocast(lambda: globals()[way](student, samples, parameters, epochs=1, **options))


def loss(chunked: bool, vocabulary: int, n: int) -> Callable[[], object]:
    """The loss of n positions and its gradient, on random bfloat16 states and a random head."""
    head = torch.randn(vocabulary, 2560, dtype=torch.bfloat16)
    hidden, reference = (torch.randn(n, 2560, dtype=torch.bfloat16) for _ in range(2))
    targets = torch.randint(0, vocabulary, (n,))

    def logits(h: Tensor) -> Tensor:
        return (h @ head.T).float()

    def action() -> None:
        h = hidden.clone().requires_grad_()
        if chunked:
            nll, kl = divergence.nll_and_kl(h, targets, logits, vocabulary, reference, "kl_rev")
            assert kl is not None
        else:
            nll, kl = plain.nll_and_kl(logits(h), logits(reference), targets)
        (nll.mean() + kl.square().mean().sqrt()).backward()

    return action


def peak_gib(what: str, *args: object, **options: object) -> float:
    """GiB that `what` of this module needs beyond its set-up, by the kernel's count, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (what, args, options))


def _peak(what: str, args: tuple[object, ...], options: dict[str, object]) -> float:
    action = globals()[what](*args, **options)
    gc.collect()
    before = forget_peak()
    action()
    return resident_peak() - before


def _autocast(action: Callable[[], object]) -> object:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        return action()


# ---------------------------------------------------------------- tables


def measure(small: bool = False) -> int:
    print(f"SmolLM2-135M, bfloat16, r = {SETTINGS.r}, kl_rev, {environment()}")
    student, samples, parameters = setting()
    epochs = 1 if small else 3
    nodes = sum(len(pack.ids) for pack in forward.packs([s.inputs for s in samples], 0, 10**6))
    print(f"an effective batch of {len(samples)} completions, {sum(len(s.inputs) for s in samples)} positions ({nodes} as a "
          f"tree), {sum(len(s.targets) for s in samples)} of them learned, for {epochs} epochs")
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: _autocast(lambda: ours(student, samples, parameters, epochs)),
        "plain": lambda: _autocast(lambda: plainly(student, samples, parameters, epochs))}
    a, b = (torch.cat([g.flatten() for g in side()]) for side in sides.values())  # type: ignore[attr-defined]
    print(f"their gradients differ by {float((a - b).norm() / b.norm()):.1%} (bfloat16)")
    seconds = in_turn(sides, repeats=1 if small else 3)
    ratio = seconds["plain"] / seconds["ours"]
    for name, value in seconds.items():
        print(f"{name:6} {value / epochs:6.2f} s per step", flush=True)

    print("\npeak memory of a step")
    for label, way, options in (("plain", "plainly", {}), ("ours, micro-batch 6", "ours", {}),
                                ("ours, micro-batch 1", "ours", {"micro_batch": 1}),
                                ("ours, micro-batch 6, checkpointing", "ours", {"checkpointing": True})):
        print(f"{label:36} {peak_gib('step', way, samples, **options):5.2f} GiB", flush=True)

    print("\npeak memory of the loss alone, 3 completions of 512 tokens, states of 2560")
    for vocabulary in (49_152, 131_072, GEMMA):
        n = 96 if small else 3 * 512
        peak = peak_gib("loss", True, vocabulary, n)
        # the plain loss of a large vocabulary does not fit beside other work: measured on the smallest only
        other = f"{peak_gib('loss', False, vocabulary, n):5.2f} GiB" if vocabulary == 49_152 else "not run"
        print(f"vocabulary {vocabulary:7}   ours {peak:5.2f} GiB   whole {other}", flush=True)
    print(f"RESULT heal_ratio={ratio:.2f} loss_gib={peak:.2f}")
    return 0


if __name__ == "__main__":
    command(measure)
