"""A worker in a thread, and front ends before it."""

import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fake_front import PATIENCE, FakeFront
from oracle import StampModel, expected_logits

from radixgen import Engine
from radixgen.serve.zmq.worker import Worker

T = TypeVar("T")
VOCAB = 8


def greedy(prompt: list[int], count: int = 12) -> list[int]:
    """What the oracle goes on with."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(expected_logits(tokens, VOCAB))))
    return tokens[len(prompt) :]


@dataclass
class Served:
    """A worker that runs."""

    worker: Worker
    model: Any
    thread: threading.Thread
    fronts: list[FakeFront] = field(default_factory=list)
    result: bool | None = None

    def inside(self, function: Callable[[], T]) -> T:
        """What `function` returns, between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self.worker._thread.post(run)
        return future.result(PATIENCE)

    def check(self) -> None:
        """Every invariant of the engine, and that the counters add up."""
        service = self.worker._thread.service

        def check() -> None:
            service.check()
            live = {peer.name: len(peer.requests) for peer in self.worker._links}
            for name, counters in self.worker.counters.peers.items():
                gone = sum(request.peer.name == name and request.peer.gone for request in service._requests.values())
                counters.check(live.get(name, 0) + gone)

        self.inside(check)

    def join(self) -> bool:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the worker does not end"
        assert self.result is not None
        return self.result


@contextmanager
def serving(fronts: int = 1, *, model: Any = None, ends: bool = True, **options: Any) -> Iterator[Served]:
    """A worker and this many fake front ends that have shaken hands, and in the end the proof that nothing is left.

    options: of the worker, and those of the engine. ends: whether the worker still runs when the test is done.
    """
    own = {name: options.pop(name) for name in list(options) if name.endswith("_timeout") or name == "engine_index"}
    model = model or StampModel(VOCAB, 4096)
    engine = Engine(model, **({"kv_tokens": 8192, "debug": True} | options))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        made = [FakeFront(folder / str(number)) for number in range(fronts)]
        for front in made:
            stack.callback(front.close)
        worker = Worker(engine, [front.address for front in made], **own)

        def run() -> None:
            served.result = worker.run()

        served = Served(worker, model, threading.Thread(target=run), made)
        served.thread.start()
        stack.callback(lambda: (worker.drain(), worker.drain(), served.thread.join(PATIENCE)))
        for front in made:
            front.accept()
        yield served
        if ends:
            served.check()
            worker.drain()
            assert served.join()
            for counters in worker.counters.peers.values():
                counters.check(0, settled=True)
