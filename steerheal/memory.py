"""Peak memory of each stage, in bytes, from shapes alone: does it fit before anything is downloaded?

Counted are the tensors that are alive together at a stage's worst moment: weights, adapters, key-value cache, what the
backward pass has saved, logits. Not counted are the CUDA context (OVERHEAD), the allocator's fragments and the
kernels' own work space. `python -m benchmarks.memory` holds the estimate against measurement.

In what follows d is the hidden size, i the intermediate size, q and k the widths of queries and of keys (heads x
head size), b the bytes of one element. Per token and block, healing saves for the backward pass
    norms      their float32 inputs
    attention  queries, keys and values (repeated to all heads) and the output: 4 q b; on a CPU float32 copies of queries,
               keys and values, and the probabilities: 4 (q + 2 k + heads x length) + q b
    MLP        gate, its activation, up: 3 i b
    LoRA       the input of each adapted linear layer: in bfloat16 a copy of each, 2 (5 d + q + i); in float32 the
               layers share their input, and only what is not saved already counts: 4 (2 d + i)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steerheal.settings import Settings

GIB = 2**30
OVERHEAD = 0.8 * GIB  # CUDA context and library work space; no card here to measure it on
DESKTOP = 2.0 * GIB  # of a card that are not ours: a desktop's own, and the allocator's fragments
PROMPT = 128  # tokens of a chat prompt; those of the built-in dilemmas are shorter
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes per weight: 4 bits, an 8-bit scale per 64, a float32 per 256 scales
LOSS_COPIES, LOSS_LEFT = 6, 2  # float32 logits of one chunk alive at the loss's worst moment; of the chunk before it
OPTIMISER_COPIES = 7  # of the round's parameters: themselves, two moments, and the two terms' gradients with their sums


@dataclass(frozen=True)
class Shape:
    """What of a model decides its memory."""

    parameters: int  # of the whole model, vision tower included
    linear: int  # of these, weights that nf4 quantises: every linear layer but the head
    block_linear: int  # weights of one block's linear layers
    block_features: int  # sum over one block's linear layers of inputs + outputs
    largest_linear: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    queries: int
    keys: int
    vocabulary: int
    norm_inputs: int  # features that one block's norms read
    bytes: int  # of one element
    quantised: bool

    @property
    def weights(self) -> float:
        if not self.quantised:
            return self.parameters * self.bytes
        return self.linear * NF4 + (self.parameters - self.linear) * self.bytes

    def adapted(self, lo: float, hi: float) -> int:
        """The number of blocks int(lo L) .. int(hi L) - 1, as `LM.band`."""
        first = min(int(lo * self.layers), self.layers - 1)
        return max(int(hi * self.layers), first + 1) - first

    def adapter(self, s: Settings) -> float:
        """Bytes of one round's float32 factors, in memory and on disk."""
        return 4.0 * s.heal.r * self.block_features * self.adapted(*s.heal.band)

    def cache(self, rows: int, length: int) -> float:
        """Key-value cache of `rows` sequences; layers under a sliding window keep everything, too."""
        return 2.0 * rows * self.keys * self.bytes * self.layers * length

    def forward(self, tokens: int) -> float:
        """What one block holds at once without gradients: the MLP's three inner states, and the stream around it."""
        return tokens * (3 * self.intermediate * self.bytes + self.hidden * (2 * self.bytes + 4))


def shape_of(config: Any, dtype: str = "bfloat16", quantise: str = "none", attention: str = "sdpa") -> Shape:
    """The shape of a transformers config, its parameters counted on a model without storage."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    text = config.get_text_config()
    decoder = model.get_decoder()
    block = [m for m in decoder.layers[0].modules() if isinstance(m, nn.Linear)]
    every = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()]
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    norms = {n: m.weight.numel() for n, m in decoder.layers[0].named_modules() if "Norm" in type(m).__name__}
    per_head = {n: size * (heads if "q_" in n else kv_heads) for n, size in norms.items() if n.startswith("self_attn.")}
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()), linear=sum(m.weight.numel() for m in every),
        block_linear=sum(m.weight.numel() for m in block),
        block_features=sum(m.in_features + m.out_features for m in block),
        largest_linear=max(m.weight.numel() for m in block), layers=text.num_hidden_layers, hidden=text.hidden_size,
        intermediate=text.intermediate_size, heads=heads, queries=heads * head, keys=kv_heads * head,
        vocabulary=text.vocab_size, norm_inputs=sum((norms | per_head).values()),
        bytes=2 if dtype == "bfloat16" else 4, quantised=quantise != "none")


def allocatable(share: float, total: float) -> float:
    """What of a card of `total` bytes the allocator of a trial with a `share` of it may hold, as a fraction of the card: the
    context is not the allocator's, and the desktop's part nobody's."""
    return max(share * (total - DESKTOP) - OVERHEAD, 0.0) / total


def generating(m: Shape, rows: int, prompt: int, new: int) -> float:
    """Sampling `new` tokens in `rows` rows, beside the weights."""
    length = prompt + new
    repeated = 2.0 * rows * m.queries * length * m.bytes + rows * m.keys * length * m.bytes  # one layer, while it attends
    logits = rows * m.vocabulary * (10.0 if m.bytes == 2 else 8.0)  # this step's in both dtypes, and the last step's
    return m.cache(rows, length) + max(repeated, logits)


def merging(m: Shape, s: Settings) -> float:
    """Generation with history inside the weights: the originals beside them."""
    return 0.0 if m.quantised else m.adapted(*s.heal.band) * m.block_linear * m.bytes


def scoring(m: Shape, rows: int) -> float:
    """Log-probabilities at `rows` positions."""
    return 8.0 * rows * m.vocabulary


def saved(m: Shape, s: Settings, rows: int, length: int, device: str) -> tuple[float, float]:
    """What the blocks keep until the backward pass, and what that pass makes again of one block after the other."""
    from steerheal.cpu import SCORES

    lo, hi = s.heal.band
    adapted = m.adapted(lo, hi)
    above = m.layers - min(int(lo * m.layers), m.layers - 1)  # gradients flow from the top down to the lowest adapter
    if m.bytes == 2:
        block, lora = 4 * m.norm_inputs, 2 * (2 * m.hidden + m.queries + m.intermediate)
    else:
        block, lora = m.bytes * m.norm_inputs, 4 * (2 * m.hidden + m.intermediate)
    block += m.bytes * (4 * m.queries + 3 * m.intermediate)
    if device == "cpu" and rows * m.heads * length**2 <= SCORES:
        block += 4 * (m.queries + 2 * m.keys + m.heads * length) - 3 * m.bytes * m.queries
    tokens = rows * length
    if s.heal.gradient_checkpointing:
        return float(tokens) * m.bytes * (m.layers * m.hidden + tokens), float(tokens) * (block + lora)  # with the pack's mask
    return float(tokens) * (above * block + adapted * lora), 0.0


def healing(m: Shape, s: Settings, samples: int, prompt: int, new: int, device: str) -> float:
    """Training one round, beside weights and history."""
    from steerheal.divergence import LOSS_LOGITS

    micro = min(s.heal.micro_batch, s.heal.batch)
    states = samples * new * m.hidden * m.bytes if s.heal.barrier != "nll" else 0
    first = min(LOSS_LOGITS[device], micro * new * m.vocabulary)
    second = min(LOSS_LOGITS[device], micro * new * m.vocabulary - first)
    loss = 4.0 * max(LOSS_COPIES * first, LOSS_LEFT * first + LOSS_COPIES * second) + 8.0 * micro * new * m.hidden
    kept, again = saved(m, s, micro, prompt + new, device)
    return OPTIMISER_COPIES * m.adapter(s) + states + kept + max(loss, again)  # the loss is gone when blocks are remade


def stages(m: Shape, s: Settings, device: str) -> dict[str, float]:
    """Peak bytes of each stage in a trial's last round, weights and history included."""
    from steerheal.evaluation.foundations import TOKENS
    from steerheal.forward import LOGIT_ROWS, PACK_TOKENS

    g, e = s.generate, s.evaluate
    history = (s.rounds - 1) * m.adapter(s)
    held = m.weights + history + (OVERHEAD if device == "cuda" else 0)
    copies = history / 2 if m.bytes == 2 and not s.heal.gradient_checkpointing else 0  # in bfloat16, for the backward pass
    pack = m.forward(PACK_TOKENS[device]) + 2.0 * PACK_TOKENS[device] ** 2 * 2 * m.bytes
    thinkers = max(TOKENS[device] // (3 * PROMPT + e.think_tokens), 1)
    think = generating(m, thinkers, 3 * PROMPT, e.think_tokens) + 8.0 * thinkers * m.vocabulary if e.think_tokens else 0.0
    rows = g.prompts * len(g.doses)
    return {
        "weights": m.weights,
        "generate": held + merging(m, s) + generating(m, rows, PROMPT, g.max_new_tokens),
        "filter": held + max(scoring(m, LOGIT_ROWS), pack),
        "heal": held + copies + healing(m, s, g.n_keep, PROMPT, g.max_new_tokens, device),
        "evaluate": held + max(think, pack, merging(m, s) + generating(m, e.n_fluency, PROMPT, e.fluency_tokens)),
    }
