"""A real browser for tests: headless Chromium, driven over the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--hide-scrollbars", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-quic", "--disable-dev-shm-usage"),
    "--remote-debugging-port=0",
)
WEBGL = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")  # drawn by the CPU
WAIT_S = 60.0


@dataclass
class Browser:
    """One tab.

    `complaints` are its scripts' errors and what is on its console; `requests` what it asked for, data: URLs apart.
    """

    runner: asyncio.Runner
    socket: aiohttp.ClientWebSocketResponse
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    _number: int = 0

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to one command of the protocol."""
        return self.runner.run(asyncio.wait_for(self._send(method, parameters), WAIT_S))

    def open(self, path: Path, width: int = 1280, height: int = 900, ratio: float = 1.0) -> None:
        """Show a file, in a window of CSS pixels, with `ratio` pixels of the screen to each."""
        self.visit(path.as_uri(), width, height, ratio)
        self.wait(f"location.href === {path.as_uri()!r} && document.readyState === 'complete'")

    def visit(self, url: str, width: int, height: int, ratio: float = 1.0) -> None:
        """The same with any address, which may lead on to others; it does not wait for the page."""
        size = {"width": width, "height": height, "deviceScaleFactor": ratio, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.complaints.clear()
        self.requests.clear()
        assert "errorText" not in self.send("Page.navigate", url=url)

    def value(self, script: str) -> Any:
        """What an expression of JavaScript yields, as JSON keeps it."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not self.value(script):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.02)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element, in CSS pixels of the window, once it is in view."""
        measure = """(element => {
            element.scrollIntoView({block: 'center'});
            const box = element.getBoundingClientRect();
            return [box.x, box.y, box.width, box.height];
        })"""
        return tuple(self.value(f"{measure}(document.querySelector({selector!r}))"))

    def click(self, selector: str) -> None:
        left, top, width, height = self.box(selector)
        self.drag((left + width / 2, top + height / 2))

    def drag(self, *points: tuple[float, float]) -> None:
        """The mouse goes down at the first point and up at the last."""
        kinds = ["mousePressed", *["mouseMoved"] * len(points), "mouseReleased"]
        for kind, (x, y) in zip(kinds, [points[0], *points, points[-1]], strict=True):
            pressed = {"x": x, "y": y, "button": "left", "buttons": int(kind != "mouseReleased"), "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, **pressed)

    def swipe(self, *points: tuple[float, float]) -> None:
        """A finger goes down at the first point and up at the last."""
        for number, (x, y) in enumerate(points):
            kind = "touchMove" if number else "touchStart"
            self.send("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str, code: int) -> None:
        """A key, on what has the focus; `code` as in KeyboardEvent.keyCode."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def picture(self, whole: bool = False) -> NDArray[np.uint8]:
        """(y, x, 3): the window, or the whole page."""
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
        answer = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        with Image.open(io.BytesIO(base64.b64decode(answer["data"]))) as picture:
            return np.asarray(picture.convert("RGB"))

    async def _send(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self.socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json()
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        kind, told = message.get("method"), message.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.complaints.append(told["exceptionDetails"].get("exception", {}).get("description", str(told)))
        elif kind == "Log.entryAdded" and told["entry"]["level"] in ("warning", "error"):
            self.complaints.append(told["entry"]["text"])
        elif kind == "Runtime.consoleAPICalled":
            self.complaints.append(str(told["args"]))
        elif kind == "Network.requestWillBeSent" and not told["request"]["url"].startswith("data:"):
            self.requests.append(told["request"]["url"])


@contextmanager
def chromium(folder: Path, webgl: bool = False) -> Iterator[Browser]:
    """Chromium with its profile in a folder, with WebGL if asked for; nothing of it runs at the end.

    Skips the test if it is not installed, or fails it if NRRN_ALL_PARTS is 1.
    """
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        reason = f"no browser is installed: there is no {' or '.join(NAMES)}"
        pytest.fail(reason) if os.environ.get("NRRN_ALL_PARTS") == "1" else pytest.skip(reason)
    flags = (*FLAGS, *(WEBGL if webgl else ("--disable-gpu",)), f"--user-data-dir={folder}/profile")
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", program, *flags, "about:blank"],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        port = _port(folder, process)
        with asyncio.Runner() as runner:
            session, socket = runner.run(_connect(port))
            try:
                browser = Browser(runner, socket)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    browser.send(f"{domain}.enable")
                yield browser
            finally:
                runner.run(_disconnect(session, socket))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _port(folder: Path, process: subprocess.Popen[bytes]) -> int:
    """Which one it chose, once it has."""
    deadline = time.monotonic() + WAIT_S
    chosen = folder / "profile/DevToolsActivePort"
    while not chosen.exists() or not chosen.read_text():
        assert process.poll() is None, (folder / "log").read_text()[-1500:]
        assert time.monotonic() < deadline, (folder / "log").read_text()[-1500:]
        time.sleep(0.05)
    return int(chosen.read_text().splitlines()[0])


async def _connect(port: int) -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
    """To the first tab."""
    session = aiohttp.ClientSession()
    async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
        tab = next(target for target in await answer.json() if target["type"] == "page")
    return session, await session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)


async def _disconnect(session: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse) -> None:
    await socket.close()
    await session.close()
