"""python -m benchmarks.parity [MODEL [BATCH]]: our foundations readout against tinymfv's `evaluate`, same items and words.

Runs where tinymfv is installed (pip install -e '.[upstream]'). Its question and answer labels are taken from the
installed package; what is compared is everything else: frames, thinking, interruption, answer slot, aggregation.
"""

from __future__ import annotations

import time

import numpy as np
import tyro

from benchmarks.command import command
from steerheal import models, personas
from steerheal.errors import UserError
from steerheal.evaluation import foundations
from steerheal.evaluation.readings import Reading
from steerheal.settings import from_flat
from steerheal.stages import Result


def theirs_in_our_protocol() -> foundations.Wording:
    """tinymfv's words: schema after the vignette, list positions as answers, the nudge as a fresh conversation."""
    from tinymfv import guided

    def interruption(lm: models.LM) -> str:
        sentinel = "ASSISTANT-PROBE"
        nudge = lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": foundations.INTERRUPTION}, {"role": "assistant", "content": sentinel}],
            tokenize=False, continue_final_message=True)
        return guided._assistant_close(lm.tokenizer) + str(nudge).split(sentinel, 1)[0]

    return foundations.Wording(
        lambda text, order: f"{text}\n\n{guided._make_forced_hint(list(order))}",
        lambda order: [str(i) for i in range(len(order))], interruption)


def compare(model: tyro.conf.Positional[str] = "smollm2-135m-instruct", batch: tyro.conf.Positional[int] = 1,
            items: int = 10) -> int:
    """Print the differences; `batch` is the reference's batch size. Exit code 1 where they exceed 1e-3."""
    try:
        import tinymfv
        from tinymfv.data import load_vignettes
    except ImportError:
        raise UserError("tinymfv is not installed: pip install -e '.[upstream]'") from None
    lm = models.load(from_flat({"model": model, "dtype": "float32"}))
    # tinymfv masks every pad id it sees, so the pad must not be the end-of-turn token that prompts are full of
    lm.tokenizer.pad_token = lm.tokenizer.unk_token or lm.tokenizer.pad_token
    rows = load_vignettes("classic")
    rows = rows[:: max(len(rows) // items, 1)][:items]
    vignettes = [personas.Vignette(str(r["id"]), "care", r["other_violate"]) for r in rows]
    worst = 0.0
    for think_tokens in (16, 64):
        started = time.monotonic()
        # `generate` never feeds its last token back, so the cache that tinymfv goes on with lacks the last thought
        ours = foundations.evaluate(lm, vignettes, n_shots=0, think_tokens=think_tokens - 1, system="",
                                    wording=theirs_in_our_protocol())
        middle = time.monotonic()
        reference = tinymfv.evaluate(lm.model, lm.tokenizer, vignettes=rows, max_think_tokens=think_tokens, batch_size=batch,
                                     return_per_row=True, verbose=0)
        seconds = middle - started, time.monotonic() - middle
        natural = ours.tensors["natural"]
        reading = Reading.of(ours, Result({}, dict(conduct=natural[:, 0], control=natural[:, 0])))  # only foundations count
        theirs = np.stack([r["p"] for r in reference["per_row"]])
        profile = np.abs(reading.p.mean(0) - theirs.mean(0)).max()
        mass = abs(reading.value("coherence") - reference["mean_pmass_allowed"])
        worst = max(worst, profile, mass)
        print(f"think {think_tokens:3}: largest profile difference {profile:.1e} (of single items "
              f"{np.abs(reading.p - theirs).max():.1e}), p_ans_any {reading.value('coherence'):.5f} and "
              f"{reference['mean_pmass_allowed']:.5f}, {int(natural.sum())} natural answers, {seconds[0]:.0f} s ours, "
              f"{seconds[1]:.0f} s theirs", flush=True)
    print(f"RESULT parity={worst:.2e} items={len(rows)}")
    return int(worst > 1e-3)


if __name__ == "__main__":
    command(compare)
