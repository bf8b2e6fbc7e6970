"""Prompts into a key-value cache, with room behind them for what is generated.

The prompts run as a token tree (`forward.py`): what they share is computed once, under each dose, and nothing is padded.
Prompts that are asked for under several doses run as one row up to the first steered block, which no dose has touched.
Then every row gets places of its own, its prompt at the right end, so that all rows go on at the same place. A step of
the decode loop writes into the room; nothing is copied as rows grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from steerheal.forward import run_packs
from steerheal.models import LM
from steerheal.steering import Dial


class Room(DynamicLayer):
    """One layer's keys and values, each [rows, heads, places, d] with `taken` places in use.

    Every layer keeps everything, under a sliding window too: there the mask decides what is seen.
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: int, places: int, taken: int) -> None:
        """As wide as these keys and values of some other batch."""
        super().__init__()
        # zeros, because a masked place still enters the product with the values, and 0 x NaN is NaN
        self.room = tuple(like.new_zeros(rows, like.shape[1], places, like.shape[3]) for like in (keys, values))
        self.taken = taken
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = shown = self.room[0][:, :, : self.taken], self.room[1][:, :, : self.taken]
        return shown

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        here = slice(self.taken, self.taken + key_states.shape[2])
        for room, new in zip(self.room, (key_states, value_states)):
            room[:, :, here] = new
        self.taken = here.stop
        return self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        keys, values = self.room
        self.room = keys[indices], values[indices]
        self._show()


@dataclass
class Prompts:
    """Prompts that have run. states [rows, d]: final hidden state of each prompt's last token; mask [rows, places]: 1
    where a place holds a token."""

    states: Tensor
    cache: Cache
    mask: Tensor


def prefill(lm: LM, prompts: Sequence[list[int]], room: int, dial: Dial, doses: Sequence[float]) -> Prompts:
    """Run prompts, each under its dose.

    Args:
        room: places that will be asked for behind the prompts.
        dial: of the steering in force; its dose is left as it comes to be.
        doses: one per prompt.
    """
    width = max(map(len, prompts))
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=lm.device)
    states = torch.empty(0)
    layers: list[Room] = []
    for together in _together(prompts, doses) if dial.spreads else [[dose] for dose in sorted(set(doses))]:
        dial.dose = torch.tensor(together, dtype=torch.float32, device=lm.device)
        members = [i for i, dose in enumerate(doses) if dose in together]
        tree = DynamicCache()
        for pack, shared, out in run_packs(lm, [prompts[i] for i in members], cache=tree):
            if not layers:
                states = out.new_empty(len(prompts), out.shape[-1])
                layers = [Room(keys, values, len(prompts), width + room, width) for keys, values, _ in tree]
            rows: list[int] = []
            places: list[int] = []
            under: list[int] = []
            nodes: list[int] = []
            for i, path in pack.paths.items():
                row, n = members[i], shared + len(path)
                dose = together.index(doses[row])
                states[row] = out[dose, path[-1]]
                rows += [row] * n
                under += [dose] * n
                places += range(width - n, width)
                nodes += [*range(shared), *(shared + path).tolist()]
            at = torch.tensor(rows, device=lm.device), slice(None), torch.tensor(places, device=lm.device)
            dose_of, node_of = torch.tensor(under, device=lm.device), torch.tensor(nodes, device=lm.device)
            for layer, (keys, values, _) in zip(layers, tree):
                for to, seen in zip(layer.room, (keys, values)):
                    to[at] = seen[dose_of % len(seen), :, node_of]  # one row below the steered blocks
    return Prompts(states, Cache(layers=list(layers)), mask)


def _together(prompts: Sequence[list[int]], doses: Sequence[float]) -> list[list[float]]:
    """The doses, those with the same prompts in one list."""
    asked: dict[float, set[tuple[int, ...]]] = {}
    for prompt, dose in zip(prompts, doses):
        asked.setdefault(dose, set()).add(tuple(prompt))
    out: dict[frozenset[tuple[int, ...]], list[float]] = {}
    for dose in sorted(asked):
        out.setdefault(frozenset(asked[dose]), []).append(dose)
    return list(out.values())
