"""python -m steerheal.persona_lint [FILE.toml ...] [--model NAME ...]: is this a proper trait? Without files, all built-in
ones. With models, replies are matched in tokens too.

Checks what docs/traits.md asks for: a pair of direct opposites without negation and of matched length; held-out dilemmas
that do not recur among those generated from; replies matched in length; patterns that spare every ready reply.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from steerheal import personas
from steerheal.cli import run_main
from steerheal.errors import UserError
from steerheal.personas import Persona

TOKENS_APART = 0.15  # largest difference of two replies' token counts, as a share of the longer
RUN = 5  # words in a row that two texts may not share
NEGATION = re.compile(r"\b(?:not|no|never|nothing|nobody|without|cannot)\b|n't\b|\w+less\b", re.IGNORECASE)


def problems(p: Persona) -> list[str]:
    """Everything that makes a trait improper, in words."""
    out = []
    for name, text in (("positive", p.positive), ("negative", p.negative)):
        if found := NEGATION.search(text):
            out.append(f"{name}: {found[0]!r} negates; say what the persona is, not what it lacks")
    if abs(len(p.positive.split()) - len(p.negative.split())) > 1:
        out.append("positive and negative differ by more than one word in length")
    situations = [*p.dilemmas, *(d.prompt for d in p.conduct)]
    for a, b in shared_runs([without_question(t) for t in situations]):
        out.append(f"{RUN} words in a row stand in both {situations[a]!r} and {situations[b]!r}")
    for i, dilemma in enumerate(p.conduct):
        for j, (enact, oppose) in enumerate(dilemma.pairs):
            if abs(len(enact.split()) - len(oppose.split())) > 1 or _apart(enact, oppose) > 0.1:
                out.append(f"conduct[{i}].pairs[{j}]: lengths differ by more than a word or a tenth")
            for text in (enact, oppose):
                if any(pattern.search(text) for pattern in (*p.narration, *p.refusal)):
                    out.append(f"conduct[{i}].pairs[{j}]: a filter pattern would drop {text!r}")
    return out


def token_problems(p: Persona, tokenizer: Any) -> list[str]:
    """Reply pairs, control pairs included, whose token counts differ by more than TOKENS_APART."""
    from steerheal import chat  # brings transformers, which only this needs

    out = []
    for name, dilemmas in (("conduct", p.conduct), ("control", personas.controls(len(p.conduct)))):
        for i, dilemma in enumerate(dilemmas):
            for j, pair in enumerate(dilemma.pairs):
                a, b = (len(chat.plain(tokenizer, reply)) for reply in pair)
                if abs(a - b) > TOKENS_APART * max(a, b):
                    out.append(f"{name}[{i}].pairs[{j}]: {a} and {b} tokens")
    return out


def _apart(a: str, b: str) -> float:
    return abs(len(a) - len(b)) / max(len(a), len(b))


def shared_runs(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Index pairs of texts that share RUN words in a row, case and punctuation aside."""
    seen: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for i, text in enumerate(texts):
        words = re.findall(r"[a-z0-9']+", text.lower())
        for k in range(len(words) - RUN + 1):
            seen[tuple(words[k : k + RUN])].add(i)
    return sorted({pair for where in seen.values() for pair in itertools.combinations(sorted(where), 2)})


def without_question(text: str) -> str:
    """A dilemma without its closing question, which many may share."""
    shorter = re.sub(r"[^.!?]*\?\s*$", "", text)
    return shorter or text


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    from steerheal.weights import locate

    return AutoTokenizer.from_pretrained(locate(model), local_files_only=True)


def main() -> None:
    def action() -> int:
        arguments = argparse.ArgumentParser(prog="python -m steerheal.persona_lint", description=__doc__.split("\n\n")[0])
        arguments.add_argument("files", nargs="*", metavar="FILE.toml")
        arguments.add_argument("--model", action="append", default=[], help="whose tokenizer counts, such as "
                               "smollm2-135m-instruct; may be given several times")
        given = arguments.parse_args()
        tokenizers = {name: _tokenizer(name) for name in given.model}
        bad = 0
        for name in given.files or personas.builtin():
            try:
                trait = personas.load(name)
                found = problems(trait) + [f"{line} of {model}" for model, tokenizer in tokenizers.items()
                                           for line in token_problems(trait, tokenizer)]
            except UserError as error:
                found = [str(error)]
            bad += bool(found)
            print(f"{name}: " + ("proper" if not found else "".join(f"\n  - {line}" for line in found)))
        return int(bad > 0)

    run_main(action)


if __name__ == "__main__":
    main()
