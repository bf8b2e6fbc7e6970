"""What makes decoding and training fast on a CPU, while a context is open. On other devices nothing changes.

    attention  torch's fused kernel, with the query heads of a key-value head as so many queries where there is one query per
               row: keys and values are neither repeated nor read once per head. Under a gradient, two float32 products
               over the key-value heads take a fraction of its time, and round less
    weights    with few rows per step, oneDNN spends a good part of every bfloat16 product on rearranging the weight: each
               is rearranged once, and the copies live as long as the context
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from steerheal.models import LM

SCORES = 2**22  # attention scores of one block that may exist at once: under a gradient every block keeps its own


@contextlib.contextmanager
def products(lm: LM) -> Iterator[None]:
    """Attention as `attention` does it, where the model's is sdpa."""
    if lm.device.type != "cpu":
        yield
        return
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # transformers' own shows again


@contextlib.contextmanager
def decoding(lm: LM, rows: int) -> Iterator[None]:
    """`products`, and the bfloat16 weights rearranged.

    Args:
        rows: of the batches to come, which the layout of the weights is chosen for.
    """
    usable = (lm.device.type == "cpu" and torch.backends.mkldnn.is_available()
              and torch.ops.mkldnn._is_mkldnn_bf16_supported())  # processors without AVX-512 have no such kernel
    layers = [m for m in lm.model.modules() if type(m) is nn.Linear and m.weight.dtype == torch.bfloat16 and usable]
    try:
        for layer in layers:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)

            def forward(x: Tensor, weight: Tensor = weight, bias: Tensor | None = layer.bias) -> Tensor:
                return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

            layer.forward = forward  # type: ignore[assignment]
        with products(lm):
            yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              scaling: float | None = None, **options: Any) -> tuple[Tensor, None]:
    """Attention in the form of transformers' interface.

    Args:
        query: [rows, heads, queries, d]; key: [rows, key-value heads, places, d]; value: the same, or with another d.
        attention_mask: boolean [rows, 1, queries, places], True where a place is seen; None for causal.

    Returns:
        ([rows, queries, heads, value's d], None)
    """
    rows, heads, n, d = query.shape
    groups, places = key.shape[1:3]
    if not query.requires_grad:
        if attention_mask is None and 1 < n < places:
            attention_mask = _causal(n, places)
        seen = query.reshape(rows, groups, heads // groups, d) if n == 1 else query
        out = scaled_dot_product_attention(seen, key, value, attention_mask, scale=scaling, enable_gqa=n > 1,
                                           is_causal=attention_mask is None and n > 1)
        return out.reshape(rows, heads, n, -1).transpose(1, 2), None
    if rows * heads * n * places > SCORES or (attention_mask is not None and attention_mask.dtype != torch.bool):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    seen_by = _causal(n, places) if attention_mask is None else attention_mask
    with torch.autocast("cpu", enabled=False):
        q = query.float().reshape(rows, groups, heads // groups * n, d) * (d**-0.5 if scaling is None else scaling)
        scores = (q @ key.float().transpose(2, 3)).view(rows, groups, heads // groups, n, places)
        scores = scores.masked_fill(~seen_by[:, :, None], torch.finfo(torch.float32).min)
        out = scores.softmax(-1).view(rows, groups, heads // groups * n, places) @ value.float()
    return out.to(query.dtype).view(rows, heads, n, -1).transpose(1, 2), None


def _causal(n: int, places: int) -> Tensor:
    """What the last n of so many places see: boolean [1, 1, n, places]."""
    return torch.ones(n, places, dtype=torch.bool).tril(places - n)[None, None]
