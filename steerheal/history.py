"""The student: a frozen base and the LoRA adapters of finished rounds, folded by rank concatenation.

With A = [A_0; A_1; ...] and B = [B_0, B_1, ...] the sum of all rounds' updates is one ordinary LoRA, BA. Base weights
are never written, so base is one gate away. PEFT (Mangrulkar et al. 2022) holds two adapters inside the model: the
folded `history` and the `round` in training. A merged form may generate (it is faster); it never scores.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from steerheal.models import LM
from steerheal.stages import atomic_write, seed_of

Factors = dict[str, tuple[Tensor, Tensor]]  # module path -> (A [r, in], B [out, r]) with the scaling in B, float32


def fold(rounds: Sequence[Factors]) -> Factors:
    """All rounds as one adapter: ranks concatenated in order."""
    paths = sorted({path for factors in rounds for path in factors})
    return {p: (torch.cat([f[p][0] for f in rounds if p in f], dim=0),
                torch.cat([f[p][1] for f in rounds if p in f], dim=1)) for p in paths}


def to_tensors(factors: Factors) -> dict[str, Tensor]:
    return {f"{path}.{name}": t for path, pair in factors.items() for name, t in zip("AB", pair)}


def bits(factors: Factors) -> str:
    """SHA-256 over a round's factors: equal for adapters that are equal to the bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(to_tensors(factors).items()):
        digest.update(f"{name} {list(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def from_tensors(tensors: dict[str, Tensor]) -> Factors:
    return {k[:-2]: (tensors[k], tensors[k[:-2] + ".B"]) for k in tensors if k.endswith(".A")}


class Student:
    """An LM whose adapters can be loaded, trained, gated and merged."""

    def __init__(self, lm: LM):
        self.lm = lm
        self.layers = _lora_layers(lm.model)  # a resident model may carry those of an earlier student
        for name in ("history", "round"):
            self._drop(name)
        inside = tuple(path + "." for path in self.layers)
        self.linears: dict[str, nn.Linear] = {}
        for path, module in lm.model.named_modules():
            if path.startswith(lm.blocks_path + ".") and not (inside and path.startswith(inside)):
                linear = module.get_base_layer() if isinstance(module, LoraLayer) else module
                if isinstance(linear, nn.Linear):
                    self.linears[path] = linear
        self.has_history = False
        self.gated = False  # whether `base` is open
        self.use_student()

    def targets(self, lo: float, hi: float) -> list[str]:
        """Paths of all linear layers of the language model's blocks in the depth band."""
        heads = tuple(f"{self.lm.blocks_path}.{i}." for i in self.lm.band(lo, hi))
        return [path for path in self.linears if path.startswith(heads)]

    def load_history(self, rounds: Sequence[Factors]) -> None:
        """Make the student base + these rounds. An empty list makes it base."""
        self._drop("history")
        self.has_history = bool(rounds)
        if rounds:
            self._add("history", fold(rounds))
        self.use_student()

    def start_round(self, paths: Sequence[str], r: int, run_seed: int, round_index: int) -> list[nn.Parameter]:
        """A fresh trainable adapter on top of history: A as PEFT draws it but from the run's own seed, B = 0.

        LoRA alpha is 2r; the factor 2 lives in B's stored form. Returns the parameters to train.
        """
        fresh = {}
        for path in paths:
            linear = self.linears[path]
            generator = torch.Generator().manual_seed(seed_of(run_seed, "heal", round_index, "init", path))
            a = torch.empty(r, linear.in_features)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            fresh[path] = (a, torch.zeros(linear.out_features, r))
        self._drop("round")
        self._add("round", fresh, scaling=2.0)
        self._activate(["history", "round"] if self.has_history else ["round"])
        parameters = [p for layer in self.layers.values() if "round" in layer.lora_A for p in _factors(layer, "round")]
        for p in parameters:
            p.requires_grad_(True)
        return parameters

    def finish_round(self) -> Factors:
        """Take the trained adapter out of the model; the student is base + history again."""
        factors = {}
        for path, layer in self.layers.items():
            if "round" in layer.lora_A:
                a, b = _factors(layer, "round")
                factors[path] = (a.detach().cpu().clone(), b.detach().cpu() * layer.scaling["round"])
        self._drop("round")
        self.use_student()
        return factors

    def use_student(self) -> None:
        self._activate(["history"] if self.has_history else [])

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """The untouched base while the context is open: bit-identical to the model as loaded."""
        self.gated = True
        self._activate([])
        try:
            yield
        finally:
            self.gated = False
            self.use_student()

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """History inside the weights, for generation only; the exact original bits come back. Inside `base` there is none.

        Quantised weights cannot be merged without loss of their own, so there the factored form generates.
        """
        if not self.has_history or self.lm.quantised or self.gated:
            yield
            return
        originals = {}
        try:  # around the merging, too: memory may run out half-way
            with torch.no_grad():
                for path, layer in self.layers.items():
                    if "history" in layer.lora_A:
                        weight = self.linears[path].weight
                        originals[path] = weight.data
                        a, b = _factors(layer, "history")
                        weight.data = (weight.float() + b @ a).to(weight.dtype)
            self._activate([])
            yield
        finally:
            for path, bits in originals.items():
                self.linears[path].weight.data = bits
            self.use_student()

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """`merged`, and without PEFT's modules around the linear layers: for code that looks for these by their class."""
        with self.merged():
            wrapped = {} if self.lm.quantised else {path: self.lm.model.get_submodule(path) for path in self.layers}
            for path in wrapped:
                self.lm.model.set_submodule(path, self.linears[path])
            try:
                yield
            finally:
                for path, layer in wrapped.items():
                    self.lm.model.set_submodule(path, layer)

    def _add(self, name: str, factors: Factors, scaling: float = 1.0) -> None:
        r = next(iter(factors.values()))[0].shape[0]
        config = LoraConfig(r=r, lora_alpha=round(scaling * r), lora_dropout=0.0, bias="none",
                            target_modules=list(factors))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*multiple adapters.*")  # history and round: that is the point
            inject_adapter_in_model(config, self.lm.model, name)
        self.layers = _lora_layers(self.lm.model)
        for path, (a, b) in factors.items():
            layer = self.layers[path]
            # PEFT makes adapters in the base's dtype; ours are float32 on every base
            layer.lora_A[name].weight = nn.Parameter(a.to(self.lm.device, torch.float32), requires_grad=False)
            layer.lora_B[name].weight = nn.Parameter(b.to(self.lm.device, torch.float32), requires_grad=False)

    def _drop(self, name: str) -> None:
        for layer in self.layers.values():
            if name in layer.lora_A:
                layer.delete_adapter(name)

    def _activate(self, names: list[str]) -> None:
        for layer in self.layers.values():
            layer.enable_adapters(bool(names))
            if names:
                layer.set_adapter(names)
            for parameter in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
                parameter.requires_grad_(False)  # set_adapter makes every active adapter trainable


def _factors(layer: LoraLayer, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of one adapter of a PEFT layer."""
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    assert isinstance(a, nn.Parameter) and isinstance(b, nn.Parameter)
    return a, b


def _lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {path: m for path, m in model.named_modules() if isinstance(m, LoraLayer)}


def export(factors: Factors, folder: Path, base_model: str, commit: str = "") -> None:
    """Write an adapter that `PeftModel.from_pretrained` loads onto the base model.

    Args:
        factors: a round's student, folded (`fold`).
        base_model: hub id or folder, written into adapter_config.json.
        commit: of a hub model, which PEFT's automatic loading then takes.
    """
    from safetensors.torch import save

    r = next(iter(factors.values()))[0].shape[0]
    config = LoraConfig(r=r, lora_alpha=r, lora_dropout=0.0, bias="none", target_modules=sorted(factors),
                        base_model_name_or_path=base_model, revision=commit or None, task_type="CAUSAL_LM",
                        inference_mode=True).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    tensors = {}
    for path, (a, b) in factors.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.contiguous()
    atomic_write(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    text = json.dumps(config, indent=2, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    atomic_write(folder / "adapter_config.json", text.encode())
