"""A headless Chromium, and a server on loopback for it to look at. Debian's packages chromium and chromium-driver."""

import asyncio
import shutil
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import uvicorn
from fastapi import FastAPI
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

WANTED = "needs Debian's packages chromium and chromium-driver"
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


def installed() -> bool:
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


@contextmanager
def serving(app: FastAPI, beside: Callable[[], Coroutine[Any, Any, None]] | None = None) -> Iterator[str]:
    """The address of `app`, served from a thread of its own until the end, with `beside` running in its loop."""
    config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1)
    server, failures = uvicorn.Server(config), []

    async def whole() -> None:
        task = asyncio.create_task(beside()) if beside else None
        await server.serve()
        if task is not None:
            task.cancel()
            failures.extend(one for one in await asyncio.gather(task, return_exceptions=True) if _failed(one))

    thread = threading.Thread(target=asyncio.run, args=(whole(),), daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        thread.join(0.01)
    (port,) = (sock.getsockname()[1] for one in server.servers for sock in one.sockets)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
    if failures:
        raise failures[0]


def _failed(result: object) -> bool:
    return isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError)


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A new one, with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for flag in _FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options.add_argument(f"--user-data-dir={profile}")
        driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def look_like(driver: webdriver.Chrome, width: int, height: int, *, dark: bool, phone: bool = False) -> None:
    """Give the page another size, and the other colours."""
    size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
