"""The adapters in a search's folder are those of its front, whatever the front was before."""

from types import SimpleNamespace

import pandas as pd
import torch
from safetensors.torch import load_file

from steerheal import views
from steerheal.settings import from_flat

LORA_A = "base_model.model.block.q.lora_A.weight"


def test_adapters_follow_the_front(tmp_path, monkeypatch):
    plan = SimpleNamespace(folder=tmp_path, settings=from_flat({"model": "tiny"}), commit="")
    asked = []

    def factors(member):
        asked.append(member.row["adapter"])
        return {"block.q": (torch.full((1, 2), float(member.row["adapter"])), torch.ones(2, 1))}

    monkeypatch.setattr(views, "factors", factors)

    def export(*rows):
        asked.clear()
        count = views.export(plan, pd.DataFrame(rows, columns=["trial", "round", "adapter", "front"]))
        files = (tmp_path / "adapters").rglob("adapter_model.safetensors")
        there = {str(p.parent.relative_to(tmp_path / "adapters")): load_file(p)[LORA_A][0, 0].item() for p in files}
        assert count == len(there)
        return there, list(asked)

    assert export((0, 0, "1", True), (0, 1, "2", True), (1, 0, "3", False)) == ({"0/r0": 1.0, "0/r1": 2.0}, ["1", "2"])
    assert export((0, 0, "1", True), (0, 1, "2", True)) == ({"0/r0": 1.0, "0/r1": 2.0}, [])  # nothing new to write
    # the second left the front, and the first has come to be another adapter
    assert export((0, 0, "4", True), (0, 1, "2", False), (1, 0, "3", True)) == ({"0/r0": 4.0, "1/r0": 3.0}, ["4", "3"])
