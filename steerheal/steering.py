"""Steering vectors: mean-difference extraction, and addition to the residual stream with one dose per row.

    v_l = mean over contexts of  h_l(positive persona) - h_l(negative persona),   h_l = output of block l, last token

Contrastive activation addition (Rimsky et al. 2024, arXiv:2312.06681; mean-difference vectors as in Marks & Tegmark
2024, arXiv:2310.06824), applied at every position, prompt included:

    mean_diff      h_l <- h_l + dose[row] * v_l
    cosine_gated   h_l <- h_l + dose[row] * |cos(h_l, v_l)| * v_l        states that know nothing of v are left alone

Other methods come from the steering-lite package (`steerheal.upstream`); both kinds of vector have the same members.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from steerheal import chat
from steerheal.errors import UserError
from steerheal.forward import run_packs
from steerheal.models import LM

METHODS = ("mean_diff", "cosine_gated")


@dataclass
class Dial:
    """The doses now in force, one per row of the running batch, or one for all rows. [rows] or []

    spreads: whether a batch of one row under several doses comes out as one row per dose; the blocks before the first
    steered output then run once for all of them.
    """

    dose: Tensor
    spreads: bool = False


class Steers(Protocol):
    """What the loop asks of a vector, whoever made it."""

    method: str

    def direction(self) -> Tensor: ...  # all layers end to end, float64
    def tensors(self) -> dict[str, Tensor]: ...  # named as in steering-lite's files
    def attach(self, lm: LM, dial: Dial) -> list[Any]: ...  # handles of the hooks that steer


@dataclass
class Vector:
    """A direction per layer: {block index: float32 [d]}, on the CPU."""

    layers: dict[int, Tensor]
    method: str = "mean_diff"

    def direction(self) -> Tensor:
        return torch.cat([self.layers[i] for i in sorted(self.layers)]).double()

    def normalised(self) -> Vector:
        return Vector({i: v / v.norm() for i, v in self.layers.items()}, self.method)

    def tensors(self) -> dict[str, Tensor]:
        return {f"layer{i}.v": v for i, v in self.layers.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], method: str = "mean_diff") -> Vector:
        return cls({int(k.removeprefix("layer").removesuffix(".v")): v for k, v in tensors.items()}, method)

    def attach(self, lm: LM, dial: Dial) -> list[Any]:
        handles = []
        for i, direction in self.layers.items():
            on_device = direction.to(lm.device)

            def hook(module: Any, args: Any, output: Any, v: Tensor = on_device) -> Any:
                states = output[0] if isinstance(output, tuple) else output
                scale = dial.dose.view(-1, 1, 1)
                if self.method == "cosine_gated":
                    scale = scale * torch.cosine_similarity(states.float(), v, dim=-1).abs()[..., None]
                states = states + (scale * v).to(states.dtype)
                return (states, *output[1:]) if isinstance(output, tuple) else states

            handles.append(lm.blocks[i].register_forward_hook(hook))
        return handles


def cosine(a: Steers, b: Steers) -> float | None:
    """Cosine of two vectors with their layers laid end to end; None where they have no common space, as with a method
    that steers inside a layer."""
    x, y = a.direction(), b.direction()
    if x.shape != y.shape or not (x.isfinite().all() and y.isfinite().all()):
        return None
    return float(x @ y / (x.norm() * y.norm()))


def extract(lm: LM, positive: str, negative: str, contexts: Sequence[str], layers: Sequence[int],
            method: str = "mean_diff") -> Vector:
    """The mean-difference vector of a persona pair.

    Args:
        positive, negative: system prompts.
        contexts: user turns; both personas see the same ones.
        layers: block indices to read.
    """
    up, down = (mean_states(lm, persona, contexts, layers) for persona in (positive, negative))
    return Vector({i: (up[i] - down[i]).float() for i in layers}, method)


@torch.no_grad()
def mean_states(lm: LM, system: str, contexts: Sequence[str], layers: Sequence[int]) -> dict[int, Tensor]:
    """Mean over contexts of each layer's output at the last token of the prompt: {layer: float64 [d]}, on the CPU."""
    prompts = [chat.prompt(lm.tokenizer, c, system) for c in contexts]
    sums: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def collect(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            outputs[layer] = (output[0] if isinstance(output, tuple) else output)[0]
        return hook

    handles = [lm.blocks[i].register_forward_hook(collect(i)) for i in layers]
    config = lm.model.config.get_text_config()
    depth = config.num_hidden_layers
    if not getattr(config, "hidden_size_per_layer_input", 0):  # these inputs are laid out for the whole depth
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
    return {i: total.cpu() / len(contexts) for i, total in sums.items()}


@contextlib.contextmanager
def steered(lm: LM, vector: Steers | None, dose: float | Tensor = 0.0) -> Iterator[Dial]:
    """Steer while the context is open.

    Args:
        vector: None leaves the model alone.
        dose: one number, or a tensor [rows]; the caller may reassign `dial.dose` as rows leave the batch.
    """
    dial = Dial(torch.as_tensor(dose, dtype=torch.float32, device=lm.device), spreads=isinstance(vector, Vector))
    handles = vector.attach(lm, dial) if vector else []
    try:
        yield dial
    finally:
        for handle in handles:
            handle.remove()


def save(vector: Steers, path: Path, dose: float) -> None:
    """Write a vector in steering-lite's file format: safetensors, its config as JSON in the header.

    Args:
        dose: the raw dose that `steering_lite.Vector.load` will apply by default.
    """
    from safetensors.torch import save_file

    name = vector.method.removeprefix("steering-lite:")
    layers = sorted({int(k.split(".")[0].removeprefix("layer")) for k in vector.tensors() if k.startswith("layer")})
    config = dict(method=name, layers=layers or None, coeff=dose, dtype="float32")
    if isinstance(vector, Vector):
        config |= dict(normalize=False)  # what is stored is added as it is
    save_file({k: v.contiguous() for k, v in vector.tensors().items()}, path, metadata={"cfg": json.dumps(config)})


def load(path: Path) -> Vector:
    """A mean_diff or cosine_gated vector from a file of ours or of steering-lite's.

    Raises:
        UserError: another method, or no vector file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get("cfg", "{}"))
            tensors = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no vector file: {error}") from None
    if config.get("method") not in METHODS:
        raise UserError(f"{path} holds a vector of method {config.get('method')!r}; allowed here: {', '.join(METHODS)}. "
                        f"steering_lite.Vector.load reads the others.")
    return Vector.from_tensors(tensors, config["method"])
