"""python -m benchmarks.gpu [--small] [--part fit|speed|profile]: does a round fit a 24 GB card, how long is it, and why?

Random weights in the exact shape of gemma-3-4b's text model, in bf16 and in 4-bit NF4; with --small a tiny model of
the same architecture, which also runs on a CPU.

    fit      peak of healing, generation and evaluation with the card held to 24 GiB, and the largest batch that fits
    speed    the same stages against one sample at a time, in turn; generation in both precisions
    profile  shares of attention, matrix products, sampling and Python in a round, and how long the card idles
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig

from benchmarks import plain
from benchmarks.command import command
from benchmarks.memory import Measured, gemma_4b, random_model
from benchmarks.timing import environment, in_turn
from steerheal import chat, generation, healing, models, personas, weights
from steerheal.errors import UserError
from steerheal.evaluation import foundations
from steerheal.forward import token_logps
from steerheal.generation import Sampling, generate
from steerheal.history import Student
from steerheal.settings import Settings, from_flat, preset

CARD = 24 * 2**30
Part = Literal["fit", "speed", "profile"]


class Bench:
    """One model and the work of a round on it. `small` cuts counts and lengths, never the steps."""

    def __init__(self, quantise: str, small: bool, tokenizer: Any):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = gemma_4b()
        if small:
            config = Gemma3TextConfig(vocab_size=50_000, hidden_size=128, intermediate_size=512, num_hidden_layers=6,
                                      num_attention_heads=4, num_key_value_heads=2, head_dim=32, sliding_window=32)
        self.lm = build(config, quantise, self.device, tokenizer)
        self.lm.__dict__["eos_ids"] = frozenset()  # no row ends early: every completion has its full length
        self.student = Student(self.lm)
        changes: dict[str, Any] = {"heal.epochs": 1, "evaluate.items": "builtin"}
        if small:
            changes |= {"generate.max_new_tokens": 24, "generate.prompts": 2, "generate.n_keep": 7, "generate.min_train": 2,
                        "evaluate.n_items": 7, "evaluate.think_tokens": 8}
        self.s: Settings = from_flat(preset(weights.GEMMA) | {"model": weights.GEMMA} | changes)
        g = self.s.generate
        dilemmas = personas.load("authority").dilemmas
        self.rows = g.prompts * len(g.doses)
        self.prompts = [chat.prompt(tokenizer, dilemmas[i % len(dilemmas)]) for i in range(self.rows)]
        torch.manual_seed(0)
        ids = torch.randint(10, 10_000, (g.n_keep, g.max_new_tokens)).tolist()
        self.samples = [healing.Sample(self.prompts[i % self.rows], row) for i, row in enumerate(ids)]
        self.items = personas.vignettes("builtin", self.s.evaluate.n_items)

    def generate(self, rows: int | None = None, tokens: int | None = None) -> bool:
        """Whether the rows fitted as one batch."""
        generation._fits.clear()
        prompts = [self.prompts[i % self.rows] for i in range(rows or self.rows)]
        generate(self.lm, prompts, Sampling(tokens or self.s.generate.max_new_tokens), range(len(prompts)))
        return not generation._fits

    def heal(self, ref: str = "prev", micro_batch: int | None = None, count: int | None = None) -> bool:
        """Whether the micro-batch fitted."""
        import dataclasses

        changed = dataclasses.replace(self.s.heal, ref=ref, micro_batch=micro_batch or self.s.heal.micro_batch,
                                      batch=max(self.s.heal.batch, micro_batch or 0))
        return healing.heal(self.student, self.samples[:count], changed, 0.3, 0, 0)[1]["micro_batch"] == changed.micro_batch

    def evaluate(self, count: int | None = None) -> bool:
        foundations.evaluate(self.lm, self.items[:count], n_shots=0, think_tokens=self.s.evaluate.think_tokens)
        return True

    # -------------------------------------------------- one sample at a time

    def generate_plain(self, count: int) -> None:
        """`model.generate` with batch 1."""
        plain.generate(self.lm, self.prompts[:count], None, [0.0] * count, self.s.generate.max_new_tokens)

    def heal_plain(self, count: int) -> None:
        """Batch 1; log-softmax over the whole sequence and vocabulary before masking; the reference anew at each step."""
        parameters = self.student.start_round(self.student.targets(*self.s.heal.band), self.s.heal.r, 0, 0)
        with torch.autocast(self.device, torch.bfloat16, cache_enabled=False):
            plain.heal_step(self.student, self.samples[:count], parameters, self.s.heal, 0.3)
        self.student.finish_round()

    def evaluate_plain(self, count: int) -> None:
        """Batches of 8, no shared prefix, thinking by `model.generate`."""
        plain.read(self.lm, self.items[:count], 0, self.s.evaluate.think_tokens)


def build(config: Any, quantise: str, device: str, tokenizer: Any) -> models.LM:
    """A random model in bf16, or its NF4 form: saved once and loaded through bitsandbytes, as real weights are."""
    if quantise == "none":
        return random_model(config, torch.bfloat16, device, tokenizer)
    from transformers import BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as folder:
        random_model(config, torch.bfloat16, "cpu", tokenizer).model.save_pretrained(Path(folder))
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                 bnb_4bit_compute_dtype=torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, device_map={"": device},
                                                     dtype=torch.bfloat16)
    return models.wrap(model, tokenizer, "nf4", "", quantised=True)


def fit(benches: dict[str, Bench]) -> dict[str, Any]:
    """Peak GiB of each stage, weights included; on a card also the largest batches that fit 24 GiB."""
    result = {}
    for name, b in benches.items():
        held = sum(p.nbytes for p in b.lm.model.parameters())
        for stage, run in (("heal_prev", lambda b=b: b.heal("prev")), ("heal_base", lambda b=b: b.heal("base")),
                           ("generate", lambda b=b: b.generate()), ("evaluate", lambda b=b: b.evaluate())):
            with Measured(b.lm) as m:
                fitted = run()
            result[f"{name}_{stage}_gib"] = (held + m.bytes) / 2**30
            print(f"fit      {name:5} {stage:10} peak {result[f'{name}_{stage}_gib']:7.2f} GiB"
                  + ("" if fitted else ", in smaller batches than asked for: the whole did not fit"), flush=True)
        if b.device == "cuda":
            result[f"{name}_heal_batch"] = largest(lambda n, b=b: b.heal("prev", micro_batch=n, count=n + n // 7 + 1), 48)
            result[f"{name}_generate_rows"] = largest(lambda n, b=b: b.generate(n), 512)
            print(f"fit      {name:5} largest micro-batch in healing {result[f'{name}_heal_batch']}, "
                  f"rows in generation {result[f'{name}_generate_rows']}", flush=True)
    return result


def largest(run: Callable[[int], bool], limit: int) -> int:
    """The largest power-of-two multiple of 3 up to `limit` that fits whole; 0 where 3 does not.

    Args:
        run: whether so many fit; both stages take smaller batches where they run out of memory, and raise only at one.
    """
    fits, n = 0, 3
    while n <= limit:
        try:
            if not run(n):
                break
        except torch.OutOfMemoryError:
            break
        fits, n = n, 2 * n
        torch.cuda.empty_cache()
    torch.cuda.empty_cache()
    return fits


def speed(benches: dict[str, Bench], small: bool) -> dict[str, Any]:
    """Seconds of each stage and the ratio, per item, to one sample at a time."""
    result = {}
    few = 2
    for name, b in benches.items():
        tokens = b.rows * b.s.generate.max_new_tokens
        sides: dict[str, tuple[Callable[[], object], Callable[[], None], float]] = {
            "generate": (b.generate, lambda b=b: b.generate_plain(few), b.rows / few),
            "heal": (b.heal, lambda b=b: b.heal_plain(few), len(b.samples) * 7 / 8 / few),
            "evaluate": (b.evaluate, lambda b=b: b.evaluate_plain(min(8, len(b.items))), len(b.items) / min(8, len(b.items))),
        }
        for stage, (ours, theirs, scale) in sides.items():
            seconds = in_turn({"ours": _synchronised(ours), "plain": _synchronised(theirs)}, repeats=1 if small else 3)
            ratio = seconds["plain"] * scale / seconds["ours"]
            result[f"{name}_{stage}_ratio"] = ratio
            rate = f"{tokens / seconds['ours']:8.0f} tokens/s" if stage == "generate" else ""
            print(f"speed    {name:5} {stage:10} ours {seconds['ours']:7.2f} s, plain {seconds['plain'] * scale:7.2f} s "
                  f"(scaled up {scale:.1f} x), ratio {ratio:6.2f} {rate}", flush=True)
        one = in_turn({"one": _synchronised(lambda b=b: b.generate(1))}, repeats=1 if small else 3)["one"]
        result[f"{name}_tokens_per_s_1"] = b.s.generate.max_new_tokens / one
        result[f"{name}_tokens_per_s"] = tokens / in_turn({"all": _synchronised(b.generate)}, repeats=1)["all"]
        print(f"speed    {name:5} generation: {result[f'{name}_tokens_per_s_1']:.0f} tokens/s in one row, "
              f"{result[f'{name}_tokens_per_s']:.0f} in {b.rows} rows", flush=True)
    return result


def _synchronised(run: Callable[[], None]) -> Callable[[], None]:
    def wait() -> None:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return wait


KINDS = {"attention": ("attention", "flash", "fmha", "sdpa"), "matmul": ("gemm", "mm", "linear", "cutlass", "matmul"),
         "sampling": ("topk", "sort", "softmax", "cumsum", "gather", "isin")}


def profile(b: Bench) -> dict[str, Any]:
    """Shares of the operators' own time over one round, and on a card the share of wall time without a kernel."""
    from time import perf_counter

    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    cuda = b.device == "cuda"
    result: dict[str, Any] = {}
    rounds: dict[str, Callable[[], object]] = {
        # the profiler keeps every kernel: a few tokens and vignettes
        "generate": lambda: b.generate(tokens=16), "heal": lambda: b.heal(count=13), "evaluate": lambda: b.evaluate(8),
        "filter": lambda: token_logps(b.lm, b.prompts[:4], [s.targets for s in b.samples[:4]])}
    for stage, run in rounds.items():
        started = perf_counter()
        with torch_profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
            run()
            if cuda:
                torch.cuda.synchronize()
        wall = (perf_counter() - started) * 1e6
        # a card's kernels are listed by themselves, and once more as the time of the operator that started them
        events = [e for e in seen.key_averages() if not cuda or (e.device_type == DeviceType.CUDA
                                                                                   and not e.is_user_annotation)]
        own = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) for e in events}
        busy = sum(own.values())
        shares = {kind: sum(t for key, t in own.items() if any(w in key.lower() for w in words)) / busy
                  for kind, words in KINDS.items()}
        result |= {f"{stage}_{kind}": share for kind, share in shares.items()}
        result[f"{stage}_idle"] = max(1 - busy / wall, 0.0)
        print(f"profile  {stage:9} " + ", ".join(f"{k} {v:.0%}" for k, v in shares.items()) +
              f"; no operator runs {result[f'{stage}_idle']:.0%} of the time (profiler's own cost included)", flush=True)
    return result


def measure(small: bool = False, part: Part | None = None) -> int:
    parts = [part] if part else get_args(Part)
    cuda = torch.cuda.is_available()
    if not cuda and not small:
        raise UserError("no CUDA card here: --small runs every part on the CPU")
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(CARD / total, 1.0))
        print(f"{torch.cuda.get_device_name(0)}, held to {CARD / 2**30:.0f} of {total / 2**30:.0f} GiB")
    print(environment())
    tokenizer = AutoTokenizer.from_pretrained(weights.locate(weights.EMBEDDED))
    result: dict[str, Any] = {}
    for quantise in ("none", "nf4"):
        b = {{"none": "bf16", "nf4": "nf4"}[quantise]: Bench(quantise, small, tokenizer)}
        result |= fit(b) if "fit" in parts else {}
        result |= speed(b, small) if "speed" in parts else {}
        result |= profile(b["bf16"]) if "profile" in parts and quantise == "none" else {}
        del b  # the next precision has the card to itself
    print("RESULT " + " ".join(f"{k}={v:.3g}" for k, v in result.items()))
    return 0


if __name__ == "__main__":
    command(measure)
