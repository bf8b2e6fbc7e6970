"""python -m benchmarks.memory [--small]: peak memory of each stage, estimated from shapes and measured.

On a CPU, random models of several shapes run the stages, and every tensor that an operator returns is counted while it
lives (`Live`). On a card, the CUDA allocator's own peak is read. Afterwards the estimate for gemma-3-4b on a 24 GB card.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, LlamaConfig, PretrainedConfig

from benchmarks.command import command
from benchmarks.timing import environment
from steerheal import healing, memory, models, weights
from steerheal.forward import token_logps
from steerheal.generation import Sampling, generate
from steerheal.history import Student
from steerheal.settings import Settings, from_flat, preset


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operators return, from birth to death: `now` and `peak`.

    What `model` holds at the start is not counted.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            # weights packed for a CPU's decode loop have no storage to ask, and no counterpart on a card
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta" and not tensor.is_mkldnn:
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class Measured:
    """Bytes above what was there at the start, at the worst moment: `with Measured(lm) as m: ...; m.bytes`."""

    def __init__(self, lm: models.LM):
        self.cuda, self.live, self.bytes = lm.device.type == "cuda", Live(lm.model), 0

    def __enter__(self) -> Measured:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self.start
        else:
            self.live.__exit__(*error)
            self.bytes = self.live.peak


def random_model(config: PretrainedConfig, dtype: torch.dtype, device: str, tokenizer: Any) -> models.LM:
    """An untrained model of a given shape; its tokenizer only lends its length."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None  # no row ends early: the worst case is what is estimated
    return models.wrap(model, tokenizer, config.model_type, "")


def compare(lm: models.LM, s: Settings, prompt: int, rows: int, samples: int) -> dict[str, tuple[float, float]]:
    """{stage: (estimated, measured)} in bytes, without weights and history."""
    shape = memory.shape_of(lm.model.config, {torch.bfloat16: "bfloat16", torch.float32: "float32"}[lm.model.dtype])
    new = s.generate.max_new_tokens
    torch.manual_seed(0)
    ids = torch.randint(10, 200, (max(rows, samples), prompt + new)).tolist()
    student = Student(lm)
    out = {}
    lm.__dict__["eos_ids"] = frozenset()
    with Measured(lm) as m:
        generate(lm, [row[i % 2 : prompt] for i, row in enumerate(ids[:rows])], Sampling(new), seeds=range(rows))
    out["generate"] = memory.generating(shape, rows, prompt, new), m.bytes
    with Measured(lm) as m:
        token_logps(lm, [row[:prompt] for row in ids[:1]], [row[prompt:] for row in ids[:1]])
    out["filter"] = max(memory.scoring(shape, new), shape.forward(prompt + new)), m.bytes
    pairs = [healing.Sample(row[:prompt], row[prompt:]) for row in ids[:samples]]
    with Measured(lm) as m:
        healing.heal(student, pairs, s.heal, 0.3, 0, 0)
    out["heal"] = memory.healing(shape, s, samples, prompt, new, lm.device.type), m.bytes
    return out


def shapes(small: bool) -> list[tuple[str, PretrainedConfig, dict[str, Any]]]:
    """Models in which activations, the vocabulary, or the cache is what counts."""
    def llama(**kw: Any) -> LlamaConfig:
        return LlamaConfig(**dict(vocab_size=49_152, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
                                  num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True) | kw)

    def gemma(**kw: Any) -> Gemma3TextConfig:
        return Gemma3TextConfig(**dict(vocab_size=49_152, hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
                                       num_attention_heads=4, num_key_value_heads=2, head_dim=64, sliding_window=64,
                                       layer_types=["sliding_attention"] * 5 + ["full_attention"]) | kw)

    long = {"generate.max_new_tokens": 256, "heal.micro_batch": 3}
    found = [("llama, activations", llama(), long), ("gemma, activations", gemma(), long),
             ("gemma, vocabulary", gemma(vocab_size=262_208, hidden_size=64), {"generate.max_new_tokens": 64})]
    return found[1:2] if small else found


def measure(small: bool = False) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(weights.locate(weights.EMBEDDED))
    print(f"peak MiB beside the weights, estimated and measured on {device}; {environment()}")
    worst = 1.0
    for name, config, changes in shapes(small):
        for dtype in (torch.bfloat16,) if small else (torch.bfloat16, torch.float32):
            settings = from_flat({"heal.epochs": 1, "heal.r": 8} | changes)
            found = compare(random_model(config, dtype, device, tokenizer), settings, 48, 12, 7)
            for stage, (estimate, measured) in found.items():
                ratio = estimate / measured
                worst = max(worst, ratio, 1 / ratio)
                print(f"{name:20} {str(dtype)[6:]:9} {stage:9} {estimate / 2**20:8.0f} {measured / 2**20:8.0f}  "
                      f"ratio {ratio:.2f}", flush=True)
    table = gemma_table()
    print("RESULT " + f"worst_ratio={worst:.2f} " + " ".join(f"{k}_gib={v:.1f}" for k, v in table.items()))
    return 0


def gemma_4b() -> PretrainedConfig:
    """The published shape of gemma-3-4b's text model (transformers' defaults are another size)."""
    return Gemma3TextConfig(vocab_size=262_208, hidden_size=2560, intermediate_size=10_240, num_hidden_layers=34,
                            num_attention_heads=8, num_key_value_heads=4, head_dim=256, sliding_window=1024,
                            query_pre_attn_scalar=256)


def gemma_table() -> dict[str, float]:
    """GiB of each stage on gemma-3-4b's text model at its own settings, in bf16 and nf4, printed; bf16 is returned."""
    settings = from_flat(preset(weights.GEMMA) | {"model": weights.GEMMA})
    columns = {q: memory.stages(memory.shape_of(gemma_4b(), quantise=q), settings, "cuda") for q in ("none", "nf4")}
    print(f"\n{weights.GEMMA}, estimated GiB, CUDA context included (a 24 GB card beside a desktop: 22)")
    for stage in columns["none"]:
        print(f"{stage:9} bf16 {columns['none'][stage] / memory.GIB:6.1f}   nf4 {columns['nf4'][stage] / memory.GIB:6.1f}")
    return {stage: value / memory.GIB for stage, value in columns["none"].items()}


if __name__ == "__main__":
    command(measure)
