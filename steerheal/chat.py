"""Chat templates -> token ids.

Three things a template may do behind one's back are settled here: it may have no system role (the text then heads the
first user turn), insert today's date (frozen, or results would change overnight), and write a BOS that the tokenizer
would write again (written once).
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

NEUTRAL = "You are a helpful assistant."  # the system text wherever no persona is meant
FROZEN_DATE = "01 Jan 2025"
# Functions cannot be handed to a template, so the one that asks for today is shadowed inside it.
FREEZE = "{%- macro strftime_now(format) -%}" + FROZEN_DATE + "{%- endmacro -%}"

Turn = tuple[str, str]  # (role, text)


def text(tokenizer: PreTrainedTokenizerBase, system: str, turns: list[Turn]) -> str:
    """The conversation as the template writes it, open at an assistant turn."""
    messages = [{"role": role, "content": content} for role, content in turns]
    if not system:
        return _apply(tokenizer, messages)
    if has_system_role(tokenizer):
        return _apply(tokenizer, [{"role": "system", "content": system}, *messages])
    first = {"role": "user", "content": f"{system}\n\n{messages[0]['content']}"}
    return _apply(tokenizer, [first, *messages[1:]])


def encode(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    """Template output -> ids, with exactly one BOS where the tokenizer uses one."""
    ids = tokenizer(rendered, add_special_tokens=False).input_ids
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("x").input_ids[:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids


def prompt(tokenizer: PreTrainedTokenizerBase, user: str, system: str = NEUTRAL) -> list[int]:
    """Ids of one user turn, ending where the assistant's reply begins."""
    return encode(tokenizer, text(tokenizer, system, [("user", user)]))


def plain(tokenizer: PreTrainedTokenizerBase, reply: str) -> list[int]:
    """Ids of text that continues an open assistant turn."""
    return tokenizer(reply, add_special_tokens=False).input_ids


def has_system_role(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template shows a system message as its own turn (Gemma 2's refuses it, Gemma 3's folds it)."""
    marker, user = "SYSTEM-PROBE", "USER-PROBE"
    try:
        shown = _apply(tokenizer, [{"role": "system", "content": marker}, {"role": "user", "content": user}])
    except Exception:  # jinja's raise_exception arrives as TemplateError, or wrapped, depending on the version
        return False
    return marker in shown and shown != _apply(tokenizer, [{"role": "user", "content": f"{marker}\n\n{user}"}])


def default_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes a system text of its own where none is given. Ours is then always given."""
    own = _apply(tokenizer, [{"role": "user", "content": "USER-PROBE"}])
    return has_system_role(tokenizer) and len(own) > len(_apply(tokenizer, [{"role": "system", "content": ""},
                                                                           {"role": "user", "content": "USER-PROBE"}]))


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True,
        date_string=FROZEN_DATE, chat_template=FREEZE + tokenizer.get_chat_template())
    return str(rendered)
