"""A front end's side of cache events: what it believes to be held, through gaps, late beginnings and nonsense."""

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from oracle import StampModel

from radixgen import Engine, SamplingParams
from radixgen.serve.zmq import kv_subscriber
from radixgen.serve.zmq.kv_events import KVEvents, KVEventsConfig
from radixgen.serve.zmq.kv_subscriber import AllBlocksCleared, BlockStored, Event, KVSubscriber

VOCAB = 3
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


class Held:
    """The blocks that workers hold, as was told."""

    def __init__(self) -> None:
        self.blocks: dict[Hashable, set[int]] = {}
        self.cleared = 0

    def __call__(self, worker: Hashable, events: Sequence[Event]) -> None:
        blocks = self.blocks.setdefault(worker, set())
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.cleared += 1
                blocks.clear()
            elif isinstance(event, BlockStored):
                blocks.update(event.block_hashes)
            else:
                blocks.difference_update(event.block_hashes)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never comes"
        time.sleep(0.005)


def config(folder: Path, **options: Any) -> KVEventsConfig:
    folder.chmod(0o700)
    where = {"endpoint": f"ipc://{folder}/events", "replay_endpoint": f"ipc://{folder}/replay", "block_size": 4}
    return KVEventsConfig(**(where | options))


@contextmanager
def subscriber(held: Held) -> Iterator[KVSubscriber]:
    one = KVSubscriber(held)
    try:
        yield one
    finally:
        one.close()


def prompts(count: int, length: int = 16) -> list[list[int]]:
    """Each begins unlike the others."""
    return [[number // 3**place % 3 for place in range(length)] for number in range(count)]


@pytest.mark.parametrize("buffer_steps", [10_000, 2])
def test_what_is_held_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_steps: int) -> None:
    """From a beginning in the middle, through evictions and batches that never come; also where a replay of these is no
    longer to be had, but all that is held.
    """
    plain, lost = kv_subscriber._Feed._read_new, []

    def deaf(self: kv_subscriber._Feed, sequence: bytes, payload: bytes) -> list[Event]:
        number = int.from_bytes(sequence, "big")
        if number % 3 == 1 or 8 < number < 16:
            lost.append(sequence)
            return []
        return plain(self, sequence, payload)

    monkeypatch.setattr(kv_subscriber._Feed, "_read_new", deaf)
    monkeypatch.setattr(kv_subscriber, "_QUIET_SECONDS", 60.0)
    engine = Engine(StampModel(VOCAB, 128), kv_tokens=96, max_step_tokens=32, debug=True)
    held = Held()
    with engine, KVEvents(engine, config(tmp_path, buffer_steps=buffer_steps)) as events, subscriber(held) as one:
        engine.generate(prompts(2), GREEDY)
        one.follow("worker", events.bound_config, 96)
        for prompt in prompts(40)[2:]:
            batches = events.stats().batches
            engine.generate(prompt, GREEDY)
            wait_for(lambda: events.stats().batches > batches)  # noqa: B023
        monkeypatch.setattr(kv_subscriber, "_QUIET_SECONDS", 0.05)
        wait_for(lambda: held.blocks.get("worker") == set(events._publisher._held["GPU"]))
        assert events.stats().blocks > 10 and engine.stats().evicted_tokens and lost
        assert events.stats().snapshots >= (1 if buffer_steps == 10_000 else 2) and held.cleared >= 1
        one.leave("worker")
        told = one.batches
        engine.generate([2] * 16, GREEDY)
        time.sleep(0.1)
        assert one.batches == told


def test_nonsense_is_the_end_of_what_is_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held, made = Held(), config(tmp_path)
    with zmq.Context() as context, context.socket(zmq.PUB) as pub, context.socket(zmq.ROUTER) as replay:
        pub.bind(made.endpoint)
        replay.bind(str(made.replay_endpoint))
        with subscriber(held) as one:
            one.follow("worker", made, 96)
            peer, empty, start = replay.recv_multipart()
            assert (empty, start) == (b"", b"\xff" * 8)
            batch = [0.0, [{"type": "AllBlocksCleared"}, {"type": "BlockStored", "block_hashes": [7], "new": 1}], 0]
            told = msgspec.msgpack.encode(batch)
            for sequence, payload in ((3, told), (-1, b"")):
                replay.send_multipart([peer, b"", b"", sequence.to_bytes(8, "big", signed=True), payload])
            wait_for(lambda: held.blocks.get("worker") == {7})
            sender = threading.Event()
            while not sender.wait(0.01) and "no longer followed" not in caplog.text:
                pub.send_multipart([b"", (4).to_bytes(8, "big"), b"\xc1"])
            wait_for(lambda: held.blocks["worker"] == set())
            assert not one._feeds
        replay.close(0)
        pub.close(0)


def test_blocks_in_host_memory_do_not_count(tmp_path: Path) -> None:
    engine = Engine(StampModel(VOCAB, 128), kv_tokens=96, host_kv_tokens=800, max_step_tokens=32, debug=True)
    held = Held()
    with engine, KVEvents(engine, config(tmp_path)) as events, subscriber(held) as one:
        engine.generate(prompts(2), GREEDY)
        one.follow("worker", events.bound_config, 96 + 800)
        engine.generate(prompts(20), GREEDY)
        wait_for(lambda: events.stats().host_blocks > 24)
        wait_for(lambda: held.blocks.get("worker") == set(events._publisher._held["GPU"]))
        assert engine._core.host is not None
        engine._core.host.saves.complete()
        engine._core.tree.reset()
        wait_for(lambda: held.blocks["worker"] == set() and not events.stats().blocks)
        assert events.stats().host_blocks
