"""Schemathesis against the application's own description, in a server of its own process: no 5xx, no stall.

`python tests/http_fuzz.py [--cases 10000] [--stall-ms 50] [--seed N]`

Half of the cases fit the description, half do not. The server's event loop is looked at every 5 ms: how late it comes
to look is how long something held it up. For so long as it or the engine's thread waited for a processor that others
had, the machine held it up, and not we (Linux tells, in schedstat). Exit status 1 where any answer is 500 or above, or
the loop was held up by us for longer than allowed; each is printed with its request.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from fastapi import APIRouter
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import Case, GenerationMode

from radixgen.serve.http.auth import Gate

HERE = Path(__file__).parent
_LOOK_SECONDS = 0.005


class Stalls:
    """How late an event loop comes to look at the clock."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []
        """Of each that was late by 10 ms or more since the last time they were taken: seconds, and how many of them
        the loop's thread and the engine's had waited for a processor"""
        self._delays: list[int] = []
        """What tells of that, open: to open it anew would let the engine's thread go first, each time"""

    async def watch(self) -> None:
        for thread in threading.enumerate():
            if thread in (threading.current_thread(), *_named("radixgen-engine")):
                self._delays.append(os.open(f"/proc/self/task/{thread.native_id}/schedstat", os.O_RDONLY))
        while True:
            begin = self._clocks()
            await asyncio.sleep(_LOOK_SECONDS)
            late, waited = (now - then for now, then in zip(self._clocks(), begin, strict=True))
            if late - _LOOK_SECONDS > 0.01:
                self.found.append((late - _LOOK_SECONDS, waited))

    def _clocks(self) -> tuple[float, float]:
        now = time.perf_counter()
        return now, sum(int(os.pread(one, 100, 0).split()[1]) for one in self._delays) / 1e9

    def take(self) -> list[tuple[float, float]]:
        found, self.found = self.found, []
        return found

    def routes(self, gate: Gate) -> APIRouter:
        """`GET /stalls` begins to watch, and tells what was seen since the last time."""
        router, watching = APIRouter(), []

        @router.get("/stalls", include_in_schema=False, dependencies=[gate.open])
        async def stalls() -> list[tuple[float, float]]:
            if not watching:
                watching.append(asyncio.create_task(self.watch()))
            return self.take()

        return router


def _named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


@dataclass
class Found:
    """What came of some cases."""

    statuses: Counter[int] = field(default_factory=Counter)
    by_route: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    stalls: list[tuple[float, str]] = field(default_factory=list)
    """Seconds by which the process held its own loop up"""
    others: int = 0
    """How often others did"""


def fuzz(url: str, cases: int, number: int, *, stall_seconds: float | None = None) -> Found:
    """Ask `cases` requests of the server at `url`."""
    description = httpx.get(f"{url}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(description)
    found = Found()
    operations = [one.ok() for one in schema.get_all_operations()]
    bodies = [one for one in operations if one.method.upper() == "POST" and one.body]
    share = max(cases // (2 * len(bodies)), 1)
    with httpx.Client(base_url=url, timeout=60) as client:
        for operation in operations:
            asks = any(operation is one for one in bodies)
            most = share if asks else max(share // 20, 1)
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE) if asks else (GenerationMode.POSITIVE,):

                @seed(number)
                @settings(
                    max_examples=most,
                    database=None,
                    deadline=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                @given(operation.as_strategy(generation_mode=mode))
                def ask(case: Case) -> None:
                    _ask(client, case, found, stall_seconds)

                ask()
    return found


def _ask(client: httpx.Client, case: Case, found: Found, stall_seconds: float | None) -> None:
    asked = _request(client, case)
    if asked is None:
        return
    answer = client.send(asked)
    found.statuses[answer.status_code] += 1
    found.by_route[f"{case.method} {case.path}"] += 1
    told = f"{asked.method} {asked.url} {asked.content[:400]!r}"
    if answer.status_code >= 500 and answer.status_code != 503:
        found.failures.append(f"{answer.status_code} {answer.text[:200]} <- {told}")
    if answer.status_code >= 400:
        keys = {"type", "error", "request_id"} if case.path.startswith("/v1/messages") else {"error"}
        assert set(answer.json()) == keys, told
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.endswith("\n\n") and _ended(answer.text), told
        if '"server_error"' in answer.text:
            found.failures.append(f"{answer.text[-300:]} <- {told}")
    if stall_seconds is not None:
        late = [(late - waited, late) for late, waited in client.get("/stalls").json()]
        found.stalls += [(own, told) for own, _ in late if own > stall_seconds]
        found.others += sum(own <= stall_seconds < late for own, late in late)


def _ended(stream: str) -> bool:
    """Whether a stream has the last event of its route."""
    last = stream.rstrip("\n").rpartition("\n\n")[2]
    ends = ("data: [DONE]", "event: message_stop", "event: error", "event: response.")
    return last.startswith(ends)


def _request(client: httpx.Client, case: Case) -> httpx.Request | None:
    """What `case` asks for; None where it is no HTTP."""
    given = case.as_transport_kwargs(base_url=str(client.base_url))
    headers = {str(name): str(value) for name, value in (given.get("headers") or {}).items()}
    headers = {name: value for name, value in headers.items() if name.lower() not in ("host", "origin")}
    options: dict[str, Any] = {"params": given.get("params") or None}
    if "json" in given:
        options["content"] = json.dumps(given["json"]).encode()
        headers = {name: value for name, value in headers.items() if name.lower() != "content-type"}
        headers["content-type"] = "application/json"
    elif given.get("data") is not None:
        data = given["data"]
        options["content"] = data if isinstance(data, bytes) else str(data).encode()
    try:
        return client.build_request(given["method"], given["url"], headers=headers, **options)
    except (UnicodeEncodeError, httpx.InvalidURL, ValueError):
        return None


# -- the server -----------------------------------------------------------------------------------------------


def serve() -> None:
    """A tiny model on a free port, which is printed."""
    import served
    import torch

    from radixgen import AsyncEngine
    from radixgen.serve.http.app import ServeOptions, create_app
    from radixgen.serve.http.binding import Binding
    from radixgen.serve.server import HTTPServer

    torch.set_num_threads(1)
    sys.setswitchinterval(0.001)
    engine = served.tiny(debug=False, limits=served.limited(max_n=8))
    server = HTTPServer(create_app(AsyncEngine(engine), ServeOptions(names=["tiny"]), Stalls().routes), Binding(port=0))

    def tell() -> None:
        while not server.started:
            time.sleep(0.01)
        print(server.servers[0].sockets[0].getsockname()[1], flush=True)

    threading.Thread(target=tell, daemon=True).start()
    server.run()


@contextmanager
def server() -> Iterator[str]:
    """Its address."""
    command = [sys.executable, str(Path(__file__)), "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(child.stdout.readline())}"
        finally:
            child.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--stall-ms", type=float, default=50.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "examples")]
    if chosen.serve:
        serve()
        return 0
    with server() as url:
        while httpx.get(f"{url}/ready").status_code != 200:
            time.sleep(0.05)
        httpx.get(f"{url}/stalls")
        begin = time.monotonic()
        found = fuzz(url, chosen.cases, chosen.seed, stall_seconds=chosen.stall_ms / 1e3)
        seconds = time.monotonic() - begin
    for failure in found.failures:
        print(failure)
    for late, told in found.stalls:
        print(f"held up for {1e3 * late:.0f} ms: {told}")
    print(f"{sum(found.statuses.values()):,} cases in {seconds:.0f} s: {dict(sorted(found.statuses.items()))}")
    print(f"{len(found.failures)} answers of 500 and above")
    print(f"{len(found.stalls)} stalls over {chosen.stall_ms:g} ms, and {found.others} by others on the machine")
    return int(bool(found.failures or found.stalls))


if __name__ == "__main__":
    sys.exit(main())
