"""Weights in the layout that a CPU's matrix kernels want, for the time of a decode loop.

With few rows per step, oneDNN spends a good part of every bfloat16 product on rearranging the weight. Done once per loop it
saves that; the copies live as long as the context.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from steerheal.models import LM


@contextlib.contextmanager
def packed(lm: LM, rows: int) -> Iterator[None]:
    """Run the model's bfloat16 linear layers on rearranged copies of their weights; on a CPU only.

    Args:
        rows: of the batches to come, which the layout is chosen for.
    """
    usable = lm.device.type == "cpu" and torch.backends.mkldnn.is_available()
    layers = [m for m in lm.model.modules() if type(m) is nn.Linear and m.weight.dtype == torch.bfloat16 and usable]
    for layer in layers:
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)

        def forward(x: Tensor, weight: Tensor = weight, bias: Tensor | None = layer.bias) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

        layer.forward = forward  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
