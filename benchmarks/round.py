"""python -m benchmarks.round [--small] [--repeats 3]: one fixed round on SmolLM2, stage by stage, ours and the plain way.

    extract    64 contexts under both personas, blocks int(.45 L) .. int(.55 L)-1
    generate   24 completions of 64 tokens at raw doses 1, 2, 3; nothing ends early
    filter     perplexity and the other criteria on these completions
    heal       on 24 completions of 64 tokens for 2 epochs and 3 more held out: r = 32, kl_rev, rmse, effective batch 4
    evaluate   foundations on 132 vignettes in both frames, 32 tokens of thinking

Both sides read the same inputs and take turns (`benchmarks/plain.py` is the other side); medians of the turns, and how far
apart the results are. The arithmetic of our side is counted once, apart from the timing, over the matrix products of linear
layers; its rate is given as a share of what this machine reaches on one large bfloat16 product. --profile prints, in place of
all that, the operators that take most of each of our stages.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import plain
from benchmarks.command import command
from benchmarks.timing import environment, forget_peak, resident_peak
from steerheal import chat, filtering, healing, models, personas, steering
from steerheal.evaluation import foundations
from steerheal.generation import Completion, Sampling, generate
from steerheal.healing import Sample
from steerheal.history import Student
from steerheal.settings import HealSettings, from_flat

DOSES = (1.0, 2.0, 3.0)
HEAL = HealSettings(epochs=2, batch=4, micro_batch=4, tau=0.1)
LAM = 0.3


@dataclasses.dataclass
class Stage:
    """One stage's two sides. `check` says in words how their results compare."""

    name: str
    ours: Callable[[], Any]
    plain: Callable[[], Any]
    tokens: int  # of the completions, prompts or thoughts it is about
    check: Callable[[Any, Any], str]


def stages(small: bool) -> list[Stage]:
    lm = models.load(from_flat({"model": "smollm2-135m-instruct", "device": "cpu"}))
    endless = dataclasses.replace(lm)
    endless.__dict__["eos_ids"] = frozenset()  # so that every completion has its full length on both sides
    student, trait = Student(lm), personas.load("authority")
    contexts, layers = personas.contexts(4 if small else 64), lm.band(0.45, 0.55)
    rows, tokens, n_items, think = (6, 16, 7, 8) if small else (24, 64, 132, 32)
    vector = steering.extract(lm, *trait.systems, contexts, layers)
    prompts = [chat.prompt(lm.tokenizer, d) for d in trait.dilemmas[: rows // len(DOSES)] for _ in DOSES]
    doses = [*DOSES] * (rows // len(DOSES))
    completions = generate(endless, prompts, Sampling(tokens), range(rows), vector, doses)
    items = personas.vignettes("builtin", n_items)
    extra = [chat.prompt(lm.tokenizer, d) for d in trait.dilemmas[rows : rows + max(rows // 8, 1)]]
    samples = [Sample(p, c.ids) for p, c in zip([*prompts, *extra], [*completions, *completions[: len(extra)]])]
    return [
        Stage("extract", lambda: steering.extract(lm, *trait.systems, contexts, layers),
              lambda: plain.extract(lm, trait.systems, contexts, layers),
              sum(len(chat.prompt(lm.tokenizer, c, s)) for c in contexts for s in trait.systems),
              lambda a, b: f"cosine {steering.cosine(a, b):.4f}"),
        Stage("generate", lambda: generate(endless, prompts, Sampling(tokens), range(rows), vector, doses),
              lambda: plain.generate(lm, prompts, vector, doses, tokens, sorted(lm.eos_ids)), rows * tokens,
              lambda a, b: f"{sum(len(c.ids) for c in a)} and {sum(map(len, b))} tokens"),
        Stage("filter", lambda: filtering.score(student, trait, prompts, completions),
              lambda: [filter_plainly(lm, trait, p, c) for p, c in zip(prompts, completions)], rows * tokens,
              lambda a, b: f"perplexities {max(abs(x.perplexity / y.perplexity - 1) for x, y in zip(a, b)):.1%} apart"),
        Stage("heal", lambda: healing.heal(student, samples, HEAL, LAM, 0, 0)[1]["val_nll"],
              lambda: heal_plainly(student, samples), sum(len(s.targets) for s in samples) * HEAL.epochs,
              lambda a, b: f"validation NLL {a[-1]:.3f} and {b[-1]:.3f}"),
        Stage("evaluate", lambda: foundations.evaluate(lm, items, n_shots=0, think_tokens=think).tensors["logp"],
              lambda: plain.read(lm, items, 0, think), 2 * n_items * think,
              lambda a, b: f"shares {float((a.softmax(-1).mean(0) - b.softmax(-1).mean(0)).abs().max()):.4f} apart"),
    ]


def filter_plainly(lm: models.LM, trait: personas.Persona, prompt: list[int], completion: Completion) -> filtering.Score:
    nll, text = plain.token_nll(lm, prompt, completion.ids), lm.text(completion.ids)
    return filtering.Score(filtering.perplexity(nll), filtering.repetition(completion.ids),
                           filtering.soup(lm, completion.ids, nll), any(p.search(text) for p in trait.narration),
                           any(p.search(text) for p in trait.refusal), len(completion.ids))


def heal_plainly(student: Student, samples: list[Sample]) -> list[float]:
    """On our side's split and batches, so that both learn the same."""
    order = healing._permutation(len(samples), 0, 0, "split")
    n_val = max(len(samples) // 8, 1)
    held, train = order[:n_val], sorted(order[n_val:])
    lengths = {i: len(samples[i].inputs) for i in train}
    epochs = [healing.batches(lengths, HEAL.batch, 0, 0, e) for e in range(HEAL.epochs)]
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        return plain.heal(student, samples, [samples[i] for i in held], epochs, HEAL, LAM)


def measure(small: bool = False, repeats: int | None = None, profile: bool = False) -> int:
    repeats = repeats or (1 if small else 3)
    if profile:
        for stage in stages(small):
            print(f"{stage.name:9} {shares(stage.ours)}", flush=True)
        return 0
    print(f"one round on SmolLM2-135M, bfloat16, {environment()}, medians of {repeats}")
    ceiling = matmul_rate()
    print(f"one large bfloat16 product: {ceiling / 1e9:.0f} GFLOP/s\n")
    print(f"{'stage':9} {'ours':>8} {'plain':>8} {'ratio':>6} {'tokens/s':>9} {'GFLOP':>7} {'of ceiling':>11} "
          f"{'peak GiB':>11}   results")
    result, sums, peaks = {}, [0.0, 0.0], [0.0, 0.0]
    for stage in stages(small):
        count = flops(stage.ours)  # warms it up, too
        outputs: list[Any] = [None, None]
        seconds: list[list[float]] = [[], []]
        peak = [0.0, 0.0]
        for turn in range(repeats):
            for i, side in list(enumerate((stage.ours, stage.plain)))[:: -1 if turn % 2 else 1]:
                forget_peak()
                started = time.perf_counter()
                outputs[i] = side()
                seconds[i].append(time.perf_counter() - started)
                peak[i] = max(peak[i], resident_peak())
        took = [statistics.median(s) for s in seconds]
        sums, peaks = [a + b for a, b in zip(sums, took)], [max(a, b) for a, b in zip(peaks, peak)]
        result[f"{stage.name}_ratio"] = took[1] / took[0]
        print(f"{stage.name:9} {took[0]:6.2f} s {took[1]:6.2f} s {took[1] / took[0]:6.2f} {stage.tokens / took[0]:9.0f} "
              f"{count / 1e9:7.0f} {count / took[0] / ceiling:11.0%} {peak[0]:5.2f} {peak[1]:5.2f}   {stage.check(*outputs)}",
              flush=True)
    print(f"{'round':9} {sums[0]:6.2f} s {sums[1]:6.2f} s {sums[1] / sums[0]:6.2f}")
    print("RESULT " + " ".join(f"{name}={value:.2f}" for name, value in
                               {"round_ratio": sums[1] / sums[0], **result, "peak_gib": peaks[0]}.items()))
    return 0


def shares(side: Callable[[], Any], most: int = 8) -> str:
    """Where the time of one run goes: the operators that take most of it themselves, by torch's profiler."""
    side()  # warm
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        side()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    whole = sum(row.self_cpu_time_total for row in rows)
    return ", ".join(f"{row.key} {row.self_cpu_time_total / whole:.0%} ({row.count})" for row in rows[:most])


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of matrix products while it is open."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.total += 2 * args[0].numel() * out.shape[-1]
        elif func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def flops(side: Callable[[], Any]) -> int:
    """Floating-point operations of the linear layers in one run."""
    with Flops() as counter:
        side()
    return counter.total


def matmul_rate() -> float:
    """FLOP/s of the best of ten products of two 2048 x 2048 matrices."""
    n = 2048
    a, b = (torch.randn(n, n, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


if __name__ == "__main__":
    command(measure)
