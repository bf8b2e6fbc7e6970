"""Does a model compute what the rest of the program takes for granted? Asked once, on two short texts, when it is loaded.

    logits      are those of the head on the decoder's last states, soft-capped at most (Granite and Cohere scale them, too)
    prefixes    two texts that begin alike may run as one tree of tokens, under a mask (a recurrent layer knows no mask)
    caches      every layer keeps keys and values of every token
"""

from __future__ import annotations

import torch

from steerheal import chat
from steerheal.errors import UserError, card_failed, ran_out
from steerheal.forward import hidden_states
from steerheal.generation import generate, greedy
from steerheal.models import LM
from steerheal.weights import KINDS

TEXTS = "Tell me about the sea.", "Tell me about the old town."
APART = 0.5  # nats of KL at the last token; rounding in bfloat16 makes less than 0.01 of it


@torch.no_grad()
def check(lm: LM) -> None:
    """Raises UserError where the model is of another kind."""
    prompts = [chat.prompt(lm.tokenizer, text) for text in TEXTS]
    try:
        ours = {i: lm.logits(states[-1]) for i, states in hidden_states(lm, prompts, [len(p) - 1 for p in prompts])}
        generate(lm, prompts, greedy(2))
        kl = []
        for i, prompt in enumerate(prompts):
            p, q = (z.float().log_softmax(-1) for z in (
                lm.model(torch.tensor([prompt], device=lm.device), use_cache=False).logits[0, -1], ours[i]))
            kl.append(float((p.exp() * (p - q)).sum()))
    except (RuntimeError, IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        if ran_out(error) or card_failed(error):
            raise
        first = (str(error).splitlines() or [""])[0]
        raise _refused(lm, f"{type(error).__name__}: {first}") from error
    if not max(kl) < APART:  # nor is NaN
        raise _refused(lm, f"its predictions are {max(kl):.2g} nats from those of its own code")


def _refused(lm: LM, why: str) -> UserError:
    return UserError(f"model = {lm.name!r}: this architecture ({type(lm.model).__name__}) cannot be steered and healed here "
                     f"({why}). {KINDS}; name one of these.")
