"""Steering vectors: mean-difference extraction, and addition to the residual stream with one dose per row.

    v_l = mean over contexts of  h_l(positive persona) - h_l(negative persona),   h_l = output of block l, last token

Contrastive activation addition (Rimsky et al. 2024, arXiv:2312.06681; mean-difference vectors as in Marks & Tegmark
2024, arXiv:2310.06824), applied as  h_l <- h_l + dose[row] * v_l  at every position, prompt included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerheal import chat
from steerheal.forward import run_packs
from steerheal.models import LM


@dataclass
class Vector:
    """A direction per layer: {block index: float32 [d]}, on the CPU."""

    layers: dict[int, Tensor]

    def cosine(self, other: Vector) -> float:
        """Cosine of the two vectors with their layers laid end to end."""
        a, b = self._flat(), other._flat()
        return float(a @ b / (a.norm() * b.norm()))

    @property
    def norm(self) -> float:
        return float(self._flat().norm())

    def _flat(self) -> Tensor:
        return torch.cat([self.layers[i] for i in sorted(self.layers)]).double()

    def normalised(self) -> Vector:
        return Vector({i: v / v.norm() for i, v in self.layers.items()})

    def tensors(self) -> dict[str, Tensor]:
        return {f"layer.{i}": v for i, v in self.layers.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Vector:
        return cls({int(k.removeprefix("layer.")): v for k, v in tensors.items()})


def extract(lm: LM, positive: str, negative: str, contexts: Sequence[str], layers: Sequence[int]) -> Vector:
    """The mean-difference vector of a persona pair.

    Args:
        positive, negative: system prompts.
        contexts: user turns; both personas see the same ones.
        layers: block indices to read.
    """
    sums: dict[int, Tensor] = {}
    for sign, persona in ((1, positive), (-1, negative)):
        prompts = [chat.prompt(lm.tokenizer, c, persona) for c in contexts]
        for i, total in _sum_of_last_states(lm, prompts, layers).items():
            sums[i] = sign * total + sums.get(i, 0)
    return Vector({i: (s / len(contexts)).float().cpu() for i, s in sums.items()})


@torch.no_grad()
def _sum_of_last_states(lm: LM, prompts: list[list[int]], layers: Sequence[int]) -> dict[int, Tensor]:
    """Sum over prompts of each layer's output at the last token: {layer: float64 [d]}."""
    sums: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def collect(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            outputs[layer] = (output[0] if isinstance(output, tuple) else output)[0]
        return hook

    handles = [lm.blocks[i].register_forward_hook(collect(i)) for i in layers]
    config = lm.model.config.get_text_config()
    depth = config.num_hidden_layers
    config.num_hidden_layers = max(layers) + 1  # the blocks above are not read, so they do not run
    try:
        for pack, _, _ in run_packs(lm, prompts):
            ends = torch.stack([path[-1] for path in pack.paths.values()]).to(lm.device)
            for layer in layers:
                sums[layer] = sums.get(layer, 0) + outputs[layer][ends].double().sum(0)
    finally:
        config.num_hidden_layers = depth
        for handle in handles:
            handle.remove()
    return sums


@dataclass
class Dial:
    """The doses now in force, one per row of the running batch, or one for all rows. [rows] or []"""

    dose: Tensor


@contextlib.contextmanager
def steered(lm: LM, vector: Vector | None, dose: float | Tensor = 0.0) -> Iterator[Dial]:
    """Add dose * v_l to the output of block l at every position while the context is open.

    Args:
        vector: None leaves the model alone.
        dose: one number, or a tensor [rows]; the caller may reassign `dial.dose` as rows leave the batch.
    """
    dial = Dial(torch.as_tensor(dose, dtype=torch.float32, device=lm.device))
    handles = []
    for i, direction in (vector.layers if vector else {}).items():
        on_device = direction.to(lm.device)

        def hook(module: Any, args: Any, output: Any, v: Tensor = on_device) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            shift = (dial.dose.view(-1, 1, 1) * v).to(states.dtype)
            return (states + shift, *output[1:]) if isinstance(output, tuple) else states + shift

        handles.append(lm.blocks[i].register_forward_hook(hook))
    try:
        yield dial
    finally:
        for handle in handles:
            handle.remove()
