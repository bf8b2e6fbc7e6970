"""python -m benchmarks.readouts [--small]: the foundations readout, ours against the plain way.

Plain: batches of 8, left padding, no shared prefix, thinking by `model.generate`, whose cache the interruption reuses.
Both sides answer the same prompts; their answers are compared before anything is timed.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.timing import environment, in_turn
from steerheal import chat, models, personas
from steerheal.cli import run_main
from steerheal.evaluation import foundations
from steerheal.personas import FOUNDATIONS
from steerheal.settings import from_flat

BATCH = 8


def main() -> None:
    run_main(lambda: measure(small="--small" in sys.argv[1:]))


@torch.no_grad()
def plain(lm: models.LM, items: list[personas.Vignette], n_shots: int, think_tokens: int) -> torch.Tensor:
    """Log-probabilities of the seven answers, [items, 2, 7]."""
    out = torch.empty(len(items), 2, 7)
    prefill = chat.plain(lm.tokenizer, foundations.PREFILL)
    answers = foundations.answer_ids(lm, FOUNDATIONS)
    suffix = chat.plain(lm.tokenizer, foundations.THINK_CLOSE + foundations.OURS.interruption(lm)) + prefill
    for frame, order in enumerate((FOUNDATIONS, FOUNDATIONS[::-1])):
        prompts = [foundations._prompt(lm, v, order, n_shots, chat.NEUTRAL, foundations.OURS) for v in items]
        tail = chat.plain(lm.tokenizer, foundations.THINK_OPEN) if think_tokens else prefill
        for i in range(0, len(items), BATCH):
            rows = [p + tail for p in prompts[i : i + BATCH]]
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=lm.device)
            mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=lm.device)
            if think_tokens:
                thought = lm.model.generate(ids, attention_mask=mask, max_new_tokens=think_tokens, do_sample=False,
                                            min_new_tokens=think_tokens, suppress_tokens=sorted(lm.eos_ids),
                                            return_dict_in_generate=True, pad_token_id=0)
                last = torch.cat([thought.sequences[:, -1:], torch.tensor([suffix] * len(rows), device=lm.device)], 1)
                mask = torch.cat([mask, mask.new_ones(len(rows), think_tokens + len(suffix))], 1)
                position = (mask.cumsum(1) - 1)[:, -last.shape[1] :]
                logits = lm.model(last, attention_mask=mask, position_ids=position, logits_to_keep=1,
                                  past_key_values=thought.past_key_values).logits
            else:
                position = (mask.cumsum(1) - 1).clamp(min=0)
                logits = lm.model(ids, attention_mask=mask, position_ids=position, logits_to_keep=1).logits
            out[i : i + len(rows), frame] = logits[:, -1].float().log_softmax(-1)[:, answers].cpu()
    return out


def measure(small: bool) -> int:
    lm = models.load(from_flat({"model": "smollm2-135m-instruct"}))
    items = personas.vignettes("builtin", 14 if small else 140)
    print(f"foundations on {len(items)} vignettes x 2 frames, {lm.name}, bfloat16, {environment()}")
    ratios = {}
    for name, shots, think_tokens in (("shots", 14, 0), ("think32", 0, 32)):
        def ours(shots: int = shots, think_tokens: int = think_tokens) -> torch.Tensor:
            return foundations.evaluate(lm, items, n_shots=shots, think_tokens=think_tokens).tensors["logp"]

        def theirs(shots: int = shots, think_tokens: int = think_tokens) -> torch.Tensor:
            return plain(lm, items, shots, think_tokens)

        apart = (ours().softmax(-1).mean(0) - theirs().softmax(-1).mean(0)).abs().max()
        seconds = in_turn({"ours": ours, "plain": theirs}, repeats=1 if small else 3)
        ratios[name] = seconds["plain"] / seconds["ours"]
        print(f"{name:8} ours {seconds['ours']:6.1f} s   plain {seconds['plain']:6.1f} s   ratio {ratios[name]:.2f}   "
              f"largest difference of a mean answer share {apart:.4f}", flush=True)
    print("RESULT " + " ".join(f"{name}_ratio={ratio:.2f}" for name, ratio in ratios.items()))
    return 0


if __name__ == "__main__":
    main()
