"""Talking to what a search found: a streaming chat with one member of the front, and one question to all of them.

The chat keeps the conversation of the steered-and-healed student. `/base` lets the model as loaded answer the last message
in its place, `/dose x` adds x raw steering vectors (of base, as in round 0) to whoever answers, so that adapter, base and
raw steering can be compared on the same words.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import TextStreamer

from steerheal import chat, models
from steerheal.display import interval
from steerheal.errors import UserError
from steerheal.export import Member, factors
from steerheal.generation import generate, greedy
from steerheal.settings import Settings
from steerheal.steering import Steers, steered
from steerheal.workbench import Workbench

CHAT_TOKENS, ASK_TOKENS = 512, 128  # longest answers
HELP = ("/base: base answers your last message. /dose X: add X raw steering vectors to whoever answers (0: none). "
        "/reset: forget the conversation. /quit")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline: a terminal would obey them

Write = Callable[[str], Any]


@functools.lru_cache(maxsize=1)
def _resident(model: str, dtype: str, quantise: str, attention: str, device: str, commit: str) -> models.LM:
    return models.load(Settings(model=model, dtype=dtype, quantise=quantise, attention=attention, device=device), commit)


def open_bench(member: Member) -> Workbench:
    """The member's workbench, on a model that stays in memory between members of one search."""
    s = member.settings
    return Workbench(s, _resident(s.model, s.dtype, s.quantise, s.attention, s.device, member.commit), member.store)


def printable(text: str) -> str:
    """Model output without control characters."""
    return CONTROL.sub("", text)


def ask(members: Sequence[Member], question: str, write: Write) -> None:
    """One question to base and to every member, greedily: only the weights differ. An error costs one answer."""
    for member in (None, *members):
        row = None if member is None else member.row
        write("\nbase\n" if row is None or member is None else
              f"\n{member.name}: trait gain {interval(row)} nats, coherence kept {row['coherence_kept']:.3f}\n")
        with reported(write):
            student = open_bench(member or members[0]).student
            student.load_history([factors(member)] if member else [])
            prompt = chat.prompt(student.lm.tokenizer, question)
            with student.merged():
                [answer] = generate(student.lm, [prompt], greedy(ASK_TOKENS))
            write("  " + printable(student.lm.text(answer.ids)).strip().replace("\n", "\n  ") + "\n")


@contextlib.contextmanager
def reported(write: Write) -> Iterator[None]:
    """An error becomes one line, and what follows goes on."""
    try:
        yield
    except Exception as error:
        words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        write(f"error: {words.splitlines()[0]}\n")


class Session:
    """A conversation with one member of a front."""

    def __init__(self, member: Member, write: Write):
        self.member, self.write = member, write
        self.bench = open_bench(member)
        self.student, self.lm = self.bench.student, self.bench.lm
        self.student.load_history([factors(member)])
        self.turns: list[chat.Turn] = []
        self.dose = 0.0
        self.vector: Steers | None = None

    def run(self, lines: Iterable[str]) -> None:
        """Answer line by line, until the lines end or /quit."""
        self.write(f"{self.member.name}. {HELP}\n")
        for line in lines:
            word, _, rest = line.strip().partition(" ")
            if word == "/quit":
                return
            with reported(self.write):
                self.take(word, rest.strip(), line.strip())

    def take(self, word: str, rest: str, line: str) -> None:
        """Obey one command, or answer one message."""
        if word == "/base":
            asked = [("user", rest)] if rest else self.turns[: len(self.turns) - 1]
            if not asked:
                raise UserError("/base: say something first, or /base TEXT.")
            with self.student.base():
                self.answer(asked, "base")
        elif word == "/dose":
            self.set_dose(rest)
        elif word == "/reset":
            self.turns = []
        elif word.startswith("/"):
            self.write(HELP + "\n")
        elif line:
            turns = [*self.turns, ("user", line)]
            self.turns = [*turns, ("assistant", self.answer(turns, self.member.name))]

    def set_dose(self, text: str) -> None:
        try:
            dose = float(text)
            if not math.isfinite(dose):
                raise ValueError
        except ValueError:
            raise UserError(f"/dose {text}: a number, such as /dose {self.member.row['edge']:.3g} (the edge dose)") from None
        if self.vector is None:
            with self.student.base():  # where the store has no vector, it is made here
                self.vector, _ = self.bench.vector(())
        self.dose = dose
        self.write(f"dose {dose:g}, {dose / self.member.row['edge']:.2f} x the edge dose\n")

    def answer(self, turns: list[chat.Turn], who: str) -> str:
        """Stream one answer of the model as it now is; its text. Ctrl-C ends the answer, not the conversation."""
        g, lm = self.member.settings.generate, self.lm
        ids = chat.encode(lm.tokenizer, chat.text(lm.tokenizer, chat.NEUTRAL, turns))
        room = lm.model.config.get_text_config().max_position_embeddings - len(ids)
        if room < 1:
            raise UserError(f"the conversation has {len(ids)} tokens, more than the model reads: /reset")
        self.write(f"[{who}{f', dose {self.dose:g}' if self.dose else ''}] ")
        streamer = Streamer(lm.tokenizer, self.write)
        prompt = torch.tensor([ids], device=lm.device)
        model: Any = lm.model  # whose class only some versions declare to generate
        try:
            with steered(lm, self.vector, self.dose), torch.no_grad():
                model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, do_sample=True,
                    repetition_penalty=1.0,  # a model's own would hide the loops
                    max_new_tokens=min(CHAT_TOKENS, room), temperature=g.temperature, top_p=g.top_p, top_k=g.top_k,
                    eos_token_id=sorted(lm.eos_ids), pad_token_id=min(lm.eos_ids), suppress_tokens=lm.banned.tolist())
        except KeyboardInterrupt:
            self.write(" (stopped)")
        self.write("\n")
        return streamer.text


class Streamer(TextStreamer):
    """Hands finished words on as they come, and keeps them."""

    def __init__(self, tokenizer: Any, write: Write):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.text = write, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.write(printable(text))
