"""The hub's answers in words, and downloads that are pinned, resumed and never repeated; real client, server on localhost."""

import os
import subprocess
import sys
from pathlib import Path

import fake_hub
import pytest
from fake_hub import COMMITS, NAME

ROOT = Path(__file__).parent.parent
CALL = """
import sys
from steerheal import hub
from steerheal.errors import UserError
try:
    print("=", getattr(hub, sys.argv[1])(*sys.argv[2:]))
except UserError as error:
    print("!", error)
"""


@pytest.fixture
def hub(tiny_folder):
    with fake_hub.serve(tiny_folder) as hub:
        yield hub


def call(hub, home, *args, **env):
    done = subprocess.run([sys.executable, "-c", CALL, *args], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=os.environ | hub.environment(home) | env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def snapshot(home, commit=COMMITS[0]):
    return home / "hub" / "models--someone--tiny" / "snapshots" / commit


def test_fetched_once_and_whole_then_never_asked_again(hub, tmp_path, tiny_folder):
    wanted = sum(f.stat().st_size for f in tiny_folder.iterdir())
    assert call(hub, tmp_path, "bytes_to_fetch", NAME) == f"= {wanted}"
    assert not [a for a in hub.asked if a.startswith("GET /someone/tiny/resolve")]  # nothing was downloaded for that
    assert call(hub, tmp_path, "fetch", NAME) == f"= {snapshot(tmp_path)}"
    assert (snapshot(tmp_path) / "model.safetensors").read_bytes() == (tiny_folder / "model.safetensors").read_bytes()
    hub.asked.clear()
    hub.head = COMMITS[1]  # the hub moved on overnight
    assert call(hub, tmp_path, "fetch", NAME) == f"= {snapshot(tmp_path)}"
    assert call(hub, tmp_path, "bytes_to_fetch", NAME) == "= 0"
    assert hub.asked == []


def test_an_interrupted_download_is_not_taken_for_a_model(hub, tmp_path):
    call(hub, tmp_path, "fetch", NAME)
    (snapshot(tmp_path) / "model.safetensors").unlink()
    assert call(hub, tmp_path, "cached", NAME) == "= None"
    assert call(hub, tmp_path, "fetch", NAME) == f"= {snapshot(tmp_path)}"
    assert (snapshot(tmp_path) / "model.safetensors").exists()


def test_a_config_fetched_alone_is_not_taken_for_a_model(hub, tmp_path):
    alone = "from huggingface_hub import hf_hub_download; hf_hub_download('someone/tiny', 'config.json')"
    subprocess.run([sys.executable, "-c", alone], check=True, env=os.environ | hub.environment(tmp_path))
    assert (snapshot(tmp_path) / "config.json").exists()
    assert call(hub, tmp_path, "cached", NAME) == "= None"
    assert call(hub, tmp_path, "fetch", NAME) == f"= {snapshot(tmp_path)}"
    assert (snapshot(tmp_path) / "model.safetensors").exists()


def test_a_commit_is_fetched_and_kept_beside_a_newer_one(hub, tmp_path):
    hub.head = COMMITS[1]
    assert call(hub, tmp_path, "fetch", NAME) == f"= {snapshot(tmp_path, COMMITS[1])}"
    assert call(hub, tmp_path, "fetch", NAME, COMMITS[0]) == f"= {snapshot(tmp_path, COMMITS[0])}"
    assert call(hub, tmp_path, "fetch", NAME) == f"= {snapshot(tmp_path, COMMITS[1])}"


@pytest.mark.parametrize("access,token,words", [
    ("gated", None, ["gated", "no token", "https://huggingface.co/someone/tiny", "hf auth login"]),
    ("gated", "hf_x", ["gated", "has no access", "https://huggingface.co/someone/tiny"]),
    ("bad-token", "hf_x", ["refuses your token", "https://huggingface.co/settings/tokens"]),
    ("missing", None, ["no such model", "smollm2-135m-instruct"]),
])
def test_no_access_is_said_before_anything_is_downloaded(hub, tmp_path, access, token, words):
    hub.access = access
    for what in ("bytes_to_fetch", "fetch"):
        said = call(hub, tmp_path, what, NAME, **({"HF_TOKEN": token} if token else {}))
        assert said.startswith("!") and all(word in said for word in words), said
    assert not snapshot(tmp_path).exists() or not list(snapshot(tmp_path).glob("*.safetensors"))


def test_no_network_is_said(hub, tmp_path):
    for what in ("bytes_to_fetch", "fetch"):
        said = call(hub, tmp_path, what, NAME, HF_ENDPOINT="http://127.0.0.1:9")
        assert "cannot be reached" in said and "smollm2-135m-instruct" in said


class ProxyError(Exception):
    """As the HTTP client's errors: of no class that the hub's client or Python names."""


@pytest.mark.parametrize("error,words", [
    (RuntimeError("Data processing error: CAS service error"), "cannot be reached (RuntimeError)"),  # Xet's
    (ProxyError("407 Proxy Authentication Required"), "cannot be reached (ProxyError)"),
    (RuntimeError("No space left on device (os error 28)"), "the disk is full"),
])
def test_whatever_a_download_raises_is_told(error, words, monkeypatch):
    from steerheal import hub
    from steerheal.errors import UserError

    def fail(*args, **kw):
        raise error

    monkeypatch.setattr(hub, "cached", lambda *args: None)
    monkeypatch.setattr(hub, "snapshot_download", fail)
    for ask in (hub.fetch, hub.bytes_to_fetch):
        with pytest.raises(UserError) as caught:
            ask("someone/none")
        assert words in str(caught.value)
