"""Headless Chromium, driven over the pipes of its DevTools protocol, which need no library."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

SECONDS = 60.0
"""For one answer: the first one includes Chromium's start beside other tests."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
REQUIRED = "BROWSER_REQUIRED"
"""Set by .ci/run: there, tests without a browser fail."""


def find_browser() -> str:
    """The program; without one the test is skipped with what to do, and fails where it is `REQUIRED`."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        message = "no Chromium: the page of a run is tested in it; on Debian: apt-get install chromium"
        pytest.fail(message) if os.environ.get(REQUIRED) else pytest.skip(message)
    return found


class Browser:
    """A browser with one empty page, without a network."""

    def __init__(self, program: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        theirs, self.write = os.pipe()
        self.read, answers = os.pipe()
        arguments = [
            program, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-extensions",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={self.folder.name}", "--window-size=1200,900",
            "about:blank",
        ]  # fmt: skip
        # Chromium reads commands from 3 and answers on 4. The pipes may have these numbers here.
        high = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 10) for one in (theirs, answers)]
        log = os.open(os.devnull, os.O_RDWR)
        actions = [(os.POSIX_SPAWN_DUP2, high[0], 3), (os.POSIX_SPAWN_DUP2, high[1], 4)]
        actions += [(os.POSIX_SPAWN_DUP2, log, number) for number in (0, 1, 2)]
        self.process = os.posix_spawn(
            program, arguments, {**os.environ, "HOME": self.folder.name}, file_actions=actions, setsid=True
        )
        for one in (theirs, answers, log, *high):
            os.close(one)
        self.rest, self.number, self.session = b"", 0, None
        self.requests: list[str] = []
        """URLs that the page has asked for."""
        self.errors: list[str] = []
        """What the page has reported as an error."""
        page = next(one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        return self._until(lambda answer: answer.get("id") == self.number, method)

    def _until(self, wanted: Any, what: str) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while True:
            while b"\0" in self.rest:
                text, _, self.rest = self.rest.partition(b"\0")
                answer = json.loads(text)
                self._note(answer)
                if wanted(answer):
                    assert "error" not in answer, (what, answer["error"])
                    return answer.get("result", answer)
            ready, _, _ = select.select([self.read], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"Chromium did not answer {what} in {SECONDS:.0f} s"
            chunk = os.read(self.read, 1 << 20)
            assert chunk, f"Chromium ended before it answered {what}"
            self.rest += chunk

    def _note(self, answer: dict[str, Any]) -> None:
        found = answer.get("params", {})
        if answer.get("method") == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"].partition(",")[0])
        elif answer.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(found["exceptionDetails"].get("exception", {}).get("description")))
        elif answer.get("method") == "Log.entryAdded" and found["entry"]["level"] == "error":
            self.errors.append(found["entry"]["text"])

    def open(self, path: Path, width: int = 1200, dark: bool = False, phone: bool = False) -> None:
        """Load a file, in a window of this width."""
        self.requests.clear()
        self.errors.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.absolute().as_uri())
        self._until(lambda answer: answer.get("method") == "Page.loadEventFired", "Page.navigate")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page, as JSON."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key."""
        codes = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowRight": 39, "Escape": 27}
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        code = codes.get(key, ord(key[0].upper()))
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def close(self) -> None:
        os.close(self.write)
        os.close(self.read)
        os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        self.folder.cleanup()
