"""Run a worker process: the body of `radixgen worker`."""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from radixgen.core import InvalidRequest
from radixgen.engine.engine import Engine
from radixgen.model.ranks import await_hangup
from radixgen.serve.zmq.endpoint import Curve, check_endpoint, smg_handshake
from radixgen.serve.zmq.kv_events import KVEvents, KVEventsConfig
from radixgen.serve.zmq.sentinel import Sentinel
from radixgen.serve.zmq.worker import Worker, check_worker, run_until_signalled


def run_worker(
    load: Callable[[], Engine],
    handshakes: Sequence[str],
    *,
    smg: str | None = None,
    kv_events_config: str | None = None,
    curve_secret: Path | None = None,
    curve_server: Path | None = None,
    insecure_tcp: bool = False,
    engine_index: int = 0,
    drain_timeout: float = 25.0,
    stall_timeout: float = 60.0,
    parent_fd: int | None = None,
) -> bool:
    """Serve front ends until SIGINT or SIGTERM. Returns whether every request received its last output.

    load: creates the engine; called after all other arguments were checked.
    smg: URL of this worker in SMG, from which the handshake address is derived.
    kv_events_config: JSON of a `KVEventsConfig`.
    parent_fd: file descriptor of a pipe; this process exits at once when the other end is closed.
    Other arguments are those of `Worker`.

    Raises `InvalidRequest`, `InsecureEndpoint`.
    """
    if parent_fd is not None:
        end = partial(os._exit, 1)
        threading.Thread(target=await_hangup, args=([parent_fd], end), name="radixgen-parent", daemon=True).start()
    if bool(curve_secret) != bool(curve_server):
        raise InvalidRequest("curve_secret", curve_secret, "requires --curve-server")
    keys = Curve(curve_secret, curve_server) if curve_secret and curve_server else None
    addresses = [*handshakes, *([smg_handshake(smg)] if smg else ())]
    check_worker(addresses, engine_index, drain_timeout, stall_timeout)
    for address in addresses:
        check_endpoint(address, curve=keys, insecure_tcp=insecure_tcp)
    events = KVEventsConfig.parse(kv_events_config) if kv_events_config else None
    with ExitStack() as stack:
        sentinel = stack.enter_context(Sentinel(keys))
        engine = load()
        published = None
        if events is not None and events.enabled:
            published = stack.enter_context(KVEvents(engine, events))
        worker = Worker(
            engine,
            addresses,
            engine_index=engine_index,
            curve=keys,
            insecure_tcp=insecure_tcp,
            drain_timeout=drain_timeout,
            stall_timeout=stall_timeout,
            sentinel=sentinel,
            kv_events=published,
        )
        return run_until_signalled(worker)
