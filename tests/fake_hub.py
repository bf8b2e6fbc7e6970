"""A Hugging Face hub on localhost, spoken to by the real client: one repository, gated or not, from a folder."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME = "someone/tiny"
COMMITS = ("a" * 40, "b" * 40)  # an older and a newer one


class Hub:
    """What the server knows and was asked. `access`: open, gated (licence and token needed), bad-token or missing."""

    def __init__(self, folder: Path):
        self.folder, self.access, self.head, self.asked = folder, "open", COMMITS[0], []
        self.url = ""

    def environment(self, home: Path) -> dict[str, str]:
        return dict(HF_ENDPOINT=self.url, HF_HOME=str(home), HF_HUB_CACHE=str(home / "hub"), HF_HUB_OFFLINE="0",
                    HF_TOKEN="", HUGGING_FACE_HUB_TOKEN="", HF_TOKEN_PATH=str(home / "token"), HF_HUB_DISABLE_XET="1",
                    HF_HUB_DISABLE_TELEMETRY="1", no_proxy="*")


def answer(hub: Hub, path: str) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of a GET."""
    api = f"/api/models/{NAME}"
    if not path.startswith((api, f"/{NAME}/")) or hub.access == "missing":
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
    if hub.access == "bad-token":
        return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b"{}"
    if "/resolve/" in path and hub.access == "gated":
        return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
    if "/tree/" in path:
        files = [dict(type="file", path=f.name, size=f.stat().st_size, oid=hashlib.sha1(f.read_bytes()).hexdigest())
                 for f in sorted(hub.folder.iterdir())]
        return 200, {}, json.dumps(files).encode()
    if "/resolve/" in path:
        commit, name = path.split("/resolve/")[1].split("/", 1)
        if not (hub.folder / name).is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        body = (hub.folder / name).read_bytes()
        headers = {"X-Repo-Commit": hub.head if commit == "main" else commit,
                   "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
        return 200, headers, body
    return 200, {}, json.dumps(dict(id=NAME, sha=hub.head, siblings=[], tags=[], private=False, downloads=0)).encode()


@contextmanager
def serve(folder: Path):
    hub = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.split("?")[0]
            hub.asked.append(f"{self.command} {path}")
            status, headers, body = answer(hub, path)
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
