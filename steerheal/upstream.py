"""Steering methods of the steering-lite package (github.com/wassname/steering-lite), behind our vector's interface.

`steer.method = "steering-lite:NAME"` takes any method of that package's registry. Its state is extracted from the same
prompts as ours, and applied by its own code to the rows of each dose in turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerheal import chat
from steerheal.errors import UserError
from steerheal.models import LM
from steerheal.steering import Dial

PREFIX = "steering-lite:"


@dataclass
class LiteVector:
    """State of one method: {block index or path of a linear layer: named tensors}."""

    method: str  # steering-lite:NAME
    state: dict[int | str, dict[str, Tensor]]

    def direction(self) -> Tensor:
        """What is added to the states at every place, end to end; one NaN where the method adds no fixed direction.

        sspace keeps coordinates in the singular vectors of a weight that changes from round to round: only what they
        come to in the weight's output can be compared.
        """
        parts = []
        for _, s in sorted(self.state.items(), key=lambda kv: str(kv[0])):
            if "v" in s:
                parts.append(s["v"].double())
            elif {"dS_hat", "sqrtS", "U_r"} <= s.keys():
                parts.append((s["dS_hat"] * s["sqrtS"]).double() @ s["U_r"].double().T)
        return torch.cat(parts) if parts else torch.full((1,), torch.nan, dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        return {(f"layer{place}.{k}" if isinstance(place, int) else f"sub::{place}::{k}"): t
                for place, named in self.state.items() for k, t in named.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], method: str) -> LiteVector:
        state: dict[int | str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("sub::"):
                place, _, name = key.removeprefix("sub::").rpartition("::")
                state.setdefault(place, {})[name] = tensor
            else:
                layer, _, name = key.partition(".")
                state.setdefault(int(layer.removeprefix("layer")), {})[name] = tensor
        return cls(method, state)

    def attach(self, lm: LM, dial: Dial) -> list[Any]:
        apply, config = _method(self.method), _config(self.method, ())
        handles = []
        for place, state in self.state.items():
            module = lm.blocks[place] if isinstance(place, int) else _linear(lm, place)
            on_device = {k: t.to(lm.device) for k, t in state.items()}

            def hook(module: Any, args: Any, output: Any, state: dict[str, Tensor] = on_device) -> Any:
                states = output[0] if isinstance(output, tuple) else output
                doses = dial.dose.expand(len(states))
                moved = torch.empty_like(states)
                for dose in doses.unique().tolist():
                    rows = doses == dose
                    cfg = dataclasses.replace(config, coeff=dose)
                    moved[rows] = apply.apply(module, args[0][rows], states[rows], state, cfg)
                return (moved, *output[1:]) if isinstance(output, tuple) else moved

            handles.append(module.register_forward_hook(hook))
        return handles


def extract(lm: LM, positive: str, negative: str, contexts: Sequence[str], layers: Sequence[int],
            method: str) -> LiteVector:
    """Train one of the package's methods on the persona pair. It looks for linear layers by their class, so a student that
    has learned something must be `plain`."""
    import steering_lite
    from loguru import logger

    logger.disable("steering_lite")
    config = _config(method, layers)
    pos, neg = ([chat.text(lm.tokenizer, s, [("user", c)]) for c in contexts] for s in (positive, negative))

    def tokenizer(texts: list[str], **options: Any) -> Any:
        return lm.tokenizer(texts, **options | dict(add_special_tokens=False, truncation=False))  # the template has the BOS

    return LiteVector(method, steering_lite.Vector.train(lm.model, tokenizer, pos, neg, config).state)


def check(method: str, quantised: bool = False) -> None:
    """Raises UserError where the package or the method is missing, or reads weights that are quantised."""
    try:
        import steering_lite  # noqa: F401
        from steering_lite.config import REGISTRY
    except ImportError:
        raise UserError(f"steer.method = {method!r}: steering-lite is not installed. Two ways out: "
                        f"pip install -e '.[upstream]', or --set steer.method=mean_diff.") from None
    if method.removeprefix(PREFIX) not in REGISTRY:
        raise UserError(f"steer.method = {method!r}: allowed: mean_diff, cosine_gated, "
                        + ", ".join(PREFIX + name for name in sorted(REGISTRY)))
    if quantised and "sspace" in method:  # sspace and its kin alone look at weights
        raise UserError(f"steer.method = {method!r} decomposes the weights of linear layers, which quantise = nf4 has packed "
                        f"into 4 bits. Two ways out: --set quantise=none, or --set steer.method=mean_diff.")


def _method(method: str) -> Any:
    from steering_lite.config import REGISTRY

    return REGISTRY[method.removeprefix(PREFIX)]


def _config(method: str, layers: Sequence[int]) -> Any:
    from steering_lite.config import _CONFIG_REGISTRY

    return _CONFIG_REGISTRY[method.removeprefix(PREFIX)](layers=tuple(layers) or None, dtype=torch.float32)


def _linear(lm: LM, place: str) -> Any:
    """The module that the package calls layers.5.mlp.down_proj."""
    _, index, path = place.split(".", 2)
    return lm.blocks[int(index)].get_submodule(path)
