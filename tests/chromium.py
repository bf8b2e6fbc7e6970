"""Headless Chromium through its debugging pipe: enough to open a page, press keys and ask the page questions.

The protocol (Chrome DevTools) is JSON, messages ended by a zero byte, read from descriptor 3 and written to 4.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium")


class Browser:
    """Context manager with one page. `complaints` holds what the console said and what scripts threw."""

    def __enter__(self) -> Browser:
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self.to = os.pipe()
        self.back, to_write = os.pipe()
        command = (f'exec "$0" --headless=new --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir="$1" '
                   f"3<&{to_read} 4>&{to_write}")
        self.process = subprocess.Popen(["bash", "-c", command, str(PROGRAM), self.profile.name], pass_fds=(to_read, to_write),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self.buffer, self.count, self.session = b"", 0, ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.loaded = False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *exc: Any) -> None:
        self.process.kill()
        self.process.wait()
        self.profile.cleanup()

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command; its result."""
        self.count += 1
        message = dict(id=self.count, method=method, params=params) | (dict(sessionId=self.session) if self.session else {})
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            data = os.read(self.back, 1 << 20)
            assert data, "chromium ended"
            self.buffer += data
        raw, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(raw)
        if message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(message["params"]))
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        self.loaded = self.loaded or message.get("method") == "Page.loadEventFired"
        return message

    def open(self, path: Path) -> None:
        self.requests, self.loaded = [], False
        self.send("Page.navigate", url=path.absolute().as_uri())
        while not self.loaded:
            self._next()

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            text = dict(text="\r") if key == "Enter" and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def show(self, width: int, dark: bool = False) -> None:
        """Be a screen of this width, with this colour scheme."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
        self.send("Emulation.setEmulatedMedia",
                  features=[dict(name="prefers-color-scheme", value="dark" if dark else "light")])
