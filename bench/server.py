"""`radixgen serve` in a process of its own, for benchmarks that ask it over HTTP."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

_START_SECONDS = 180


@contextmanager
def server(path: Path, port: int, *options: str, core: int | None = None) -> Iterator[str]:
    """Its address, once it is ready. `core`: the one that it keeps to."""
    command = [sys.executable, "-m", "radixgen", "serve", "--model", str(path), "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    given = [*command, "--served-model-name", "model", "--no-access-log", "--log-level", "warning", *options]
    with subprocess.Popen(given, env=environment, stderr=subprocess.DEVNULL) as child:
        try:
            if core is not None:
                os.sched_setaffinity(child.pid, {core})
            url = f"http://127.0.0.1:{port}"
            _wait(child, url)
            yield url
        finally:
            child.terminate()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found


def figures(text: str) -> dict[str, float]:
    """Of `/metrics`, those without labels."""
    families = text_string_to_metric_families(text)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """p50, p99 and the longest, in ms."""
    ordered = sorted(seconds) or [0.0]
    return tuple(1e3 * ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99, 1.0))  # type: ignore[return-value]


def _wait(child: "subprocess.Popen[bytes]", url: str) -> None:
    stop = time.monotonic() + _START_SECONDS
    while time.monotonic() < stop:
        if child.poll() is not None:
            raise RuntimeError(f"the server ended with {child.returncode}")
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise RuntimeError("the server does not get ready")
