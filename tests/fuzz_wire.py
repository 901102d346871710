"""Coverage-guided frames at a worker, without sockets: `pip install atheris`, then `fuzz_wire.py -max_total_time=3600`.

What libFuzzer finds goes through the worker's own dispatch to an engine that steps. It begins with the frames of
`mutate_frames.py`. Any exception, failed invariant or slow input is a find.
"""

import random
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import atheris

from radixgen import Engine  # before, for Numba can't compile what is instrumented

with atheris.instrument_imports():
    from radixgen.serve.zmq import wire
    from radixgen.serve.zmq.counters import PeerCounters
    from radixgen.serve.zmq.service import Peer
    from radixgen.serve.zmq.worker import Worker

from mutate_frames import LIMITS, frames
from oracle import StampModel
from serving import VOCAB

KINDS = (wire.ADD, wire.ADD, wire.UTILITY, wire.ABORT, wire.START_WAVE, b"\x07")
_CHECKED = 500
_SEEDS = 2_000


class Target:
    """A worker whose two threads are this one."""

    def __init__(self, folder: Path) -> None:
        engine = Engine(StampModel(VOCAB, 4096), kv_tokens=512, limits=LIMITS, debug=True)
        self._worker = Worker(engine, [f"ipc://{folder}/handshake"])
        self._link: Any = SimpleNamespace(peer=Peer("fuzzer", PeerCounters()), tell=lambda *_: True, overflowed=False)
        self._count = 0

    def __call__(self, data: bytes) -> None:
        if not data:
            return
        self._count += 1
        self._link.peer.counters.received += 1
        self._worker._handle(self._link, [KINDS[data[0] % len(KINDS)], data[1:]])
        thread = self._worker._thread
        thread.engine_thread.run_commands(wait=False)
        thread.engine_thread.step()
        thread.take()
        if self._count % _CHECKED == 0:
            thread.service.check()
            self._link.peer.counters.check(len(self._link.peer.requests))


def seeds(folder: Path) -> None:
    """Real frames to begin with."""
    rng = random.Random(0)
    for number in range(_SEEDS):
        kind, payload = frames(rng)
        (folder / str(number)).write_bytes(bytes([KINDS.index(kind)]) + payload)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus"
        corpus.mkdir()
        seeds(corpus)
        atheris.Setup([*sys.argv, "-timeout=10", "-max_len=4096", str(corpus)], Target(folder))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
