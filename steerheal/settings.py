"""The settings of one loop run: frozen dataclasses, checked as a whole the moment they are built.

Every field carries its allowed values and whether it belongs to a result's *identity*. Identity fields decide what a
number means (dose, barrier, dtype, effective batch); the others (device, micro-batch) only decide how fast it comes.
`from_flat` / `to_flat` translate from and to the dotted names of the command line and of search spaces
("heal.tau"), and report every problem at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import typing
from dataclasses import dataclass, field
from typing import Any

from steerheal.errors import SettingsError


def number(default: float | int, low: float, high: float = math.inf, *, open_low: bool = False, help: str = "",
           identity: bool = True) -> Any:
    """A number in [low, high], or (low, high] with `open_low`. Integers stay integers."""
    return field(default=default, metadata=dict(low=low, high=high, open_low=open_low, help=help, identity=identity))


def choice(default: Any, *allowed: Any, help: str = "", identity: bool = True) -> Any:
    return field(default=default, metadata=dict(allowed=allowed, help=help, identity=identity))


def free(default: Any, *, help: str = "", identity: bool = True) -> Any:
    return field(default=default, metadata=dict(help=help, identity=identity))


FOUNDATIONS = ("care", "fairness", "loyalty", "authority", "sanctity", "liberty", "social")
SIGNED = [sign + foundation for foundation in FOUNDATIONS for sign in "-+"]  # less care, more sanctity, ...


@dataclass(frozen=True)
class SteerSettings:
    method: str = free("mean_diff", help="mean_diff, cosine_gated, or steering-lite:NAME where that package is installed")
    normalise: bool = free(False, help="scale each layer's vector to unit length (the default keeps the raw length)")
    band: tuple[float, ...] = free((0.45, 0.55), help="layers int(lo*L) .. int(hi*L)-1 that are steered")
    contexts: int = number(64, 1, 256, help="user turns the vector is averaged over")
    alpha: float = number(0.8, 0.0, help="top dose, in the unit below", open_low=True)
    unit: str = choice("edge", "edge", "raw", "kl", help="alpha counts edge doses, raw vectors, or doses of target_kl")
    target_kl: float = number(1.0, 0.0, open_low=True, help="nats of p95 per-token KL(steered || base) that are 1 kl dose")
    half_life: float = number(0.0, 0.0, help="completion tokens after which the dose has halved; 0 keeps it")


@dataclass(frozen=True)
class GenerateSettings:
    doses: tuple[float, ...] = free((0.5, 0.75, 1.0), help="shares of the top dose mixed in each batch")
    prompts: int = number(16, 1, help="prompts per batch; each is sampled once at every dose")
    max_new_tokens: int = number(64, 8, 8192, help="longest completion, in tokens")
    temperature: float = number(1.0, 0.0, 10.0, open_low=True, help="of the sampling")
    top_p: float = number(0.95, 0.0, 1.0, open_low=True, help="sampling draws from the likeliest tokens of this mass")
    top_k: int = number(64, 1, 1024, help="and from no more than this many")
    n_keep: int = number(48, 1, help="survivors to collect per round")
    min_train: int = number(12, 2, help="fewer survivors than this end the trial as starved; one in eight is held out")
    max_batches: int = number(6, 1, help="batches sampled per round before giving up on n_keep")
    pass_target: float = number(0.75, 0.0, 1.0, help="walk-C: survival that a dose must reach")
    kappa_min: float = number(0.2, 0.0, 1.0, open_low=True, help="walk-C: smallest multiplier on alpha")


@dataclass(frozen=True)
class FilterSettings:
    coherence: bool = free(True, help="drop by perplexity, repetition and soup")
    narration: bool = free(True, help="drop text that talks about the trait instead of enacting it")
    refusal: bool = free(True, help="drop refusals and identity boilerplate")
    ppl_gate: float = number(0.0, 0.0, help="perplexity gate; 0 = 1.5 x the 99th percentile of unsteered completions")
    repetition_gate: float = number(0.3, 0.0, 1.0, open_low=True, help="largest share of repeated token 3-grams")
    soup_gate: float = number(0.0, 0.0, help="most nats per byte; 0 = 2.2 x the median of unsteered completions")


@dataclass(frozen=True)
class HealSettings:
    barrier: str = choice("kl_rev", "kl_rev", "kl_fwd", "nll", help="divergence of the barrier; nll has none")
    aggregate: str = choice("rmse", "mean", "rmse", "p95", "max", help="per-position KL -> one number per completion")
    tau: float = number(0.5, 0.0, help="nats of aggregated KL that cost nothing")
    lam: float = number(0.3, 0.0, help="weight of the barrier")
    lam_round_pow: float = number(0.0, -8.0, 8.0, help="lam_r = lam * (1 + r) ** lam_round_pow")
    ref: str = choice("prev", "base", "prev", help="reference of the barrier: base, or the round's starting student")
    r: int = number(32, 1, 1024, help="LoRA rank; LoRA alpha is 2r")
    band: tuple[float, ...] = free((0.2, 0.8), help="blocks int(lo*L) .. int(hi*L)-1 that are adapted")
    lr: float = number(1e-4, 0.0, 1.0, open_low=True, help="peak AdamW learning rate")
    epochs: int = number(3, 1, 100, help="passes over the kept completions")
    batch: int = number(6, 1, 4096, help="effective batch, in completions")
    weight_decay: float = number(0.0, 0.0, help="AdamW's, on the adapter")
    spectral_lam: float = number(0.0, 0.0, help="weight of the mean largest singular value of the adapter")
    early_stop: int = number(0, 0, help="stop after so many epochs without a better validation NLL, and keep the best "
                                        "epoch's adapter; 0 = train every epoch and keep the last")
    micro_batch: int = number(6, 1, 4096, identity=False, help="completions per forward pass")
    gradient_checkpointing: bool = free(False, identity=False, help="recompute each block in the backward pass: about a third "
                                                                    "more arithmetic, far less memory")


@dataclass(frozen=True)
class EvaluateSettings:
    trait: str = choice("auto", "auto", "foundation", "conduct", *SIGNED,
                        help="readout of trait_gain; auto takes conduct where the trait's file asks for it, else its "
                             "foundation where that is valid at base, else conduct")
    items: str = free("builtin", help="vignettes: builtin, tinymfv:NAME (classic, scifi, ai-actor), or a JSONL file with text "
                                      "and foundation")
    n_items: int = number(70, 7, help="vignettes, a stratified sample")
    shots: int = choice(14, 0, 7, 14, help="worked examples before each vignette")
    think_tokens: int = number(0, 0, 4096, help="greedy thinking before the answer")
    n_conduct: int = number(24, 2, help="held-out dilemmas of the conduct readout, and as many control pairs")
    n_fluency: int = number(64, 1, help="free generations judged for fluency")
    fluency_tokens: int = number(48, 8, 2048, help="length of these generations")
    ladder: tuple[float, ...] = free((0.5, 0.75, 1.0, 1.25), help="raw-steering baselines, in edge doses")


@dataclass(frozen=True)
class Settings:
    model: str = free("auto", help="hub id, local folder, or a built-in name")
    dtype: str = choice("bfloat16", "bfloat16", "float32", help="dtype of the base weights")
    quantise: str = choice("none", "none", "nf4", help="4-bit NF4 through bitsandbytes")
    attention: str = choice("sdpa", "sdpa", "eager", help="implementation of attention")
    persona: str = free("authority", help="the trait: authority, love, or a TOML file")
    rounds: int = number(3, 1, 1000, help="rounds of each loop")
    seed: int = number(0, 0, 2**31 - 1, help="run seed: every draw of the loop derives from it")
    device: str = choice("auto", "auto", "cpu", "cuda", identity=False, help="auto takes a CUDA card where there is one")
    steer: SteerSettings = field(default_factory=SteerSettings)
    generate: GenerateSettings = field(default_factory=GenerateSettings)
    filter: FilterSettings = field(default_factory=FilterSettings)
    heal: HealSettings = field(default_factory=HealSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)

    def __post_init__(self) -> None:
        problems = _problems(self, "")
        problems += _cross_field_problems(self, {p.split(" = ")[0] for p in problems})
        if problems:
            raise SettingsError(problems)

    @property
    def lam_schedule(self) -> list[float]:
        """lam_r of each round: the barrier's effective weight."""
        return [self.heal.lam * (1 + r) ** self.heal.lam_round_pow for r in range(self.rounds)]


def _problems(part: Any, prefix: str) -> list[str]:
    out = []
    hints = typing.get_type_hints(type(part))
    for f in dataclasses.fields(part):
        name, value, meta = prefix + f.name, getattr(part, f.name), f.metadata
        if dataclasses.is_dataclass(value):
            out += _problems(value, name + ".")
        else:
            problem = _type_problem(hints[f.name], value) or _range_problem(meta, value)
            if problem:
                out.append(f"{name} = {value!r}: {problem}")
    return out


def _type_problem(kind: Any, value: Any) -> str | None:
    finite = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is float and not finite:
        return "must be a finite number"
    if kind is int and not (finite and isinstance(value, int)):
        return "must be a whole number"
    if kind is bool and not isinstance(value, bool):
        return "must be true or false"
    if kind is str and not isinstance(value, str):
        return "must be text"
    if typing.get_origin(kind) is tuple:
        ok = isinstance(value, tuple) and len(value) > 0
        if not (ok and all(_type_problem(float, v) is None for v in value)):
            return "must be a list of finite numbers, such as [0.5, 1.0]"
    return None


def _range_problem(meta: typing.Mapping[str, Any], value: Any) -> str | None:
    if "allowed" in meta and value not in meta["allowed"]:
        return "allowed: " + ", ".join(map(str, meta["allowed"]))
    if "low" in meta:
        low, high = meta["low"], meta["high"]
        if value < low or value > high or (meta["open_low"] and value == low):
            bound = f"above {low:g}" if meta["open_low"] else f"at least {low:g}"
            return f"must be {bound}" + (f" and at most {high:g}" if math.isfinite(high) else "")
    return None


def _cross_field_problems(s: Settings, wrong: set[str]) -> list[str]:
    """What types and ranges do not say, of the settings that are not `wrong` by these already."""
    out = []
    for name, band in (("steer.band", s.steer.band), ("heal.band", s.heal.band)):
        if name not in wrong and not (len(band) == 2 and 0 <= band[0] < band[1] <= 1):
            out.append(f"{name} = {band!r}: must be two shares of the depth, 0 <= lo < hi <= 1, such as [0.45, 0.55]")
    lite = str(s.steer.method).startswith("steering-lite:")
    if not (s.steer.method in ("mean_diff", "cosine_gated") or lite):
        out.append(f"steer.method = {s.steer.method!r}: allowed: mean_diff, cosine_gated, steering-lite:NAME")
    if lite and s.steer.normalise:
        out.append(f"steer.normalise = {s.steer.normalise!r}: {s.steer.method} scales its vectors itself; leave it false")
    for name, doses in (("generate.doses", s.generate.doses), ("evaluate.ladder", s.evaluate.ladder)):
        if name not in wrong and any(d <= 0 for d in doses):
            out.append(f"{name} = {doses!r}: every dose must be above 0")
        elif name == "generate.doses" and name not in wrong and max(doses) != 1:
            out.append(f"{name} = {doses!r}: the largest must be 1, the full dose, whose size steer.alpha says")
    if not {"generate.min_train", "generate.n_keep"} & wrong and s.generate.min_train > s.generate.n_keep:
        out.append(f"generate.min_train = {s.generate.min_train}: must not exceed generate.n_keep = "
                   f"{s.generate.n_keep}, or every trial starves")
    return out


# ---------------------------------------------------------------- dotted names


def leaves(kind: Any = Settings, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every setting by its dotted name, in the order of definition."""
    out: dict[str, dataclasses.Field] = {}
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[f.name]):
            out |= leaves(hints[f.name], prefix + f.name + ".")
        else:
            out[prefix + f.name] = f
    return out


def to_flat(settings: Settings) -> dict[str, Any]:
    """{"heal.tau": 0.5, ...}, tuples as lists, ready for JSON."""
    out: dict[str, Any] = {}
    for name in leaves():
        value: Any = settings
        for part in name.split("."):
            value = getattr(value, part)
        out[name] = list(value) if isinstance(value, tuple) else value
    return out


def from_flat(flat: dict[str, Any]) -> Settings:
    """Settings from dotted names, defaults for what is not named.

    Raises:
        SettingsError: unknown names (with the nearest known one) and values out of range, all of them at once.
    """
    known = leaves()
    problems = []
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            group = ", ".join(k for k in known if k.split(".")[0] == name.split(".")[0])
            problems.append(f"{name}: no such setting" + (f"; did you mean {near[0]}?" if near
                            else f"; allowed: {group or ', '.join(known)}"))
            continue
        kind = typing.get_type_hints(_owner(name))[name.split(".")[-1]]
        if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
            value = tuple(_as_float(v) for v in value)
        elif kind is float:
            value = _as_float(value)
        here = nested
        *path, last = name.split(".")
        for part in path:
            here = here.setdefault(part, {})
        here[last] = value
    parts: dict[str, Any] = {}
    hints = typing.get_type_hints(Settings)
    for key, value in nested.items():
        parts[key] = hints[key](**value) if dataclasses.is_dataclass(hints[key]) else value
    try:
        settings = Settings(**parts)
    except SettingsError as error:
        raise SettingsError(problems + error.problems) from None
    if problems:
        raise SettingsError(problems)
    return settings


def _as_float(value: Any) -> Any:
    """A whole number as a float, for 1 and 1.0 must be one identity; anything else as it is."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _owner(name: str) -> Any:
    kind: Any = Settings
    for part in name.split(".")[:-1]:
        kind = typing.get_type_hints(kind)[part]
    return kind


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """["heal.tau=1.0", "filter.coherence=false"] -> {"heal.tau": 1.0, "filter.coherence": False}.

    Values are JSON where they parse as JSON, else text.
    """
    out: dict[str, Any] = {}
    problems = []
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not name:
            problems.append(f"--set {text}: expected NAME=VALUE, such as heal.tau=1.0")
            continue
        try:
            out[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            out[name.strip()] = value.strip()
    if problems:
        raise SettingsError(problems)
    return out


def identity(settings: Settings) -> dict[str, Any]:
    """The settings that decide a result, by dotted name."""
    return {k: v for k, v in to_flat(settings).items() if leaves()[k].metadata["identity"]}


# ---------------------------------------------------------------- model presets

PRESETS: dict[str, dict[str, Any]] = {
    "google/gemma-3-4b-it": {
        "rounds": 8, "steer.contexts": 256, "generate.max_new_tokens": 512, "generate.n_keep": 64,
        "generate.min_train": 30, "heal.epochs": 6, "heal.micro_batch": 3, "evaluate.items": "tinymfv:classic",
        "evaluate.n_items": 132, "evaluate.shots": 0, "evaluate.think_tokens": 128,
    },
}


def preset(model: str) -> dict[str, Any]:
    """Defaults that depend on the model, by dotted name; empty for models that run on the general defaults."""
    return PRESETS.get(model, {})
