"""A stage's code decides its results, so changed code must not replay old ones.

When this test fails: raise the stage's number in steerheal.stages.VERSIONS if results change (old results are then never
read again), and in either case write the new hashes down with  python tests/test_stage_versions.py
"""

import ast
import hashlib
import json
from pathlib import Path

from steerheal.stages import VERSIONS

ROOT = Path(__file__).parent.parent / "steerheal"
RECORD = Path(__file__).parent / "stage_sources.json"
SHARED = ("chat.py", "forward.py", "models.py")
STEERING = ("steering.py", "upstream.py")
GENERATION = ("generation.py", "prefill.py", "cpu.py", *STEERING)
SHOTS = ("personas.py:shots", "data/shots.jsonl")  # worked examples are named by their number alone
SOURCES = {
    "vector": ("workbench.py:vector", *STEERING, "history.py", *SHARED),
    "states": ("workbench.py:learned", "steering.py", "history.py", *SHARED),
    "kl_dose": ("workbench.py:kl_dose", "calibration.py", *STEERING, *SHARED),
    "log_ratio": ("workbench.py:log_ratio", *STEERING, "history.py", *SHARED),
    "diary": ("workbench.py:diary", *GENERATION, "history.py", *SHARED),
    "free_answers": ("workbench.py:reading", "evaluation/foundations.py", *SHOTS, *GENERATION, "history.py", *SHARED),
    "completions": ("workbench.py:completions", *GENERATION, "history.py", *SHARED),
    "scores": ("workbench.py:scores", "filtering.py", "history.py", *SHARED),
    "heal": ("workbench.py:heal", "healing.py", "divergence.py", "cpu.py", "history.py", *SHARED),
    "foundations": ("workbench.py:foundations", "evaluation/foundations.py", *SHOTS, *GENERATION, "history.py", *SHARED),
    "conduct": ("workbench.py:reading", "evaluation/conduct.py", *STEERING, "history.py", *SHARED),
    "round": ("loop.py", "dosing.py", "objectives.py", "evaluation/readings.py", "filtering.py:reasons"),
    "fluency": ("workbench.py:reading", "evaluation/fluency.py", "filtering.py", *GENERATION, "history.py", *SHARED),
}


def code_hash(source):
    """Of the syntax tree of FILE or FILE:FUNCTION without docstrings, so that comments and layout may change freely; of any
    other file whole."""
    file, _, function = source.partition(":")
    if not file.endswith(".py"):
        return hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:16]
    tree = ast.parse((ROOT / file).read_text())
    if function:
        (tree,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[0].value.value = ""
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def current():
    return {stage: dict(version=VERSIONS[stage], sources={f: code_hash(f) for f in files})
            for stage, files in SOURCES.items()}


def test_changed_stage_code_was_looked_at():
    assert set(SOURCES) == set(VERSIONS)
    assert current() == json.loads(RECORD.read_text()), __doc__


if __name__ == "__main__":
    RECORD.write_text(json.dumps(current(), indent=1) + "\n")
