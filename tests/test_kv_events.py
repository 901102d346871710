"""Cache events over real sockets: their bytes, and routers that join late, miss batches and ask again."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from consumer import Consumer, Router, blocks_of, wire_events
from oracle import StampModel

from radixgen import AsyncEngine, Engine, InvalidRequest, SamplingParams
from radixgen.cache import BlocksAdded, BlocksDropped, BlocksReset, as_tokens
from radixgen.serve.zmq import kv_events
from radixgen.serve.zmq.kv_events import KVEvents, KVEventsConfig

VOCAB = 3
ANYWHERE = {"endpoint": "tcp://127.0.0.1:*", "replay_endpoint": "tcp://127.0.0.1:*", "block_size": 4}
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def config(**options: Any) -> KVEventsConfig:
    return KVEventsConfig(**(ANYWHERE | options))


def engine(slots: int = 96) -> Engine:
    return Engine(StampModel(VOCAB, 128), kv_tokens=slots, max_step_tokens=32, debug=True)


def prompts(seed: int, count: int = 12) -> list[list[int]]:
    """Some that begin alike, more than the pool holds."""
    random = np.random.default_rng(seed)
    stem = random.integers(0, VOCAB, 20).tolist()
    return [stem[: random.integers(0, 20)] + random.integers(0, VOCAB, 9).tolist() for _ in range(count)]


# -- bytes ------------------------------------------------------------------------------------------------------------

BATCH = [
    BlocksReset(),
    BlocksAdded([2**64 - 1, 7], None, as_tokens([1, 2, 3, 4, 49151, 6, 7, 8]), ""),
    BlocksAdded([9], None, as_tokens([1, 2, 3, 4]), "tenant"),
    BlocksAdded([11], 9, as_tokens([5, 6, 7, 8]), "tenant"),
    BlocksDropped([7]),
]
GOLDEN = {
    "map": (
        "93cb3ff80000000000009481a474797065b0416c6c426c6f636b73436c656172656488a474797065ab426c6f636b53746f726564ac626c6f"
        "636b5f68617368657392cfffffffffffffffff07b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f69647398010203"
        "04cdbfff060708aa626c6f636b5f73697a6504a76c6f72615f6964c0a66d656469756da3475055a96c6f72615f6e616d65c089a4747970"
        "65ab426c6f636b53746f726564ac626c6f636b5f68617368657392090bb1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f"
        "696473980102030405060708aa626c6f636b5f73697a6504a76c6f72615f6964c0a66d656469756da3475055a96c6f72615f6e616d65c0"
        "aa65787472615f6b6579739291a674656e616e74c083a474797065ac426c6f636b52656d6f766564ac626c6f636b5f6861736865739107"
        "a66d656469756da347505500"
    ),
    "array": (
        "93cb3ff80000000000009491b0416c6c426c6f636b73436c656172656498ab426c6f636b53746f72656492cfffffffffffffffff07c098"
        "01020304cdbfff06070804c0a3475055c099ab426c6f636b53746f72656492090bc098010203040506070804c0a3475055c09291a67465"
        "6e616e74c093ac426c6f636b52656d6f7665649107a347505500"
    ),
}


def publisher_of(queue: kv_events._Queue, **options: Any) -> kv_events._Publisher:
    return kv_events._Publisher(config(**options), queue)


def replay_of(events: "KVEvents | kv_events._Publisher", *frames: bytes) -> list[list[bytes]]:
    """All replies to one request."""
    with zmq.Context.instance().socket(zmq.DEALER) as socket:
        socket.connect(str(events.replay_endpoint))
        socket.send_multipart(frames)
        replies: list[list[bytes]] = []
        while not replies or replies[-1][-1]:
            assert socket.poll(10_000)
            replies.append(socket.recv_multipart())
        return replies


@pytest.mark.parametrize("encoding", ["map", "array"])
def test_golden_frames(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Topic, sequence and payload, byte for byte as they were when Dynamo's router read them."""
    monkeypatch.setattr(kv_events.time, "time", lambda: 1.5)
    queue = kv_events._Queue(100)
    for event in BATCH:
        queue.put(event)
    publisher = publisher_of(queue, encoding=encoding, topic="kv@1@smollm2")
    while not publisher.stats().batches:
        time.sleep(0.01)
    batch, end = replay_of(publisher, b"", bytes(8))
    publisher.close()
    assert batch[:3] == [b"", b"kv@1@smollm2", bytes(8)]
    assert batch[3].hex() == GOLDEN[encoding]
    assert end == [b"", b"", b"\xff" * 8, b""]


def test_a_typed_reader_of_the_map_form_takes_every_batch() -> None:
    """The structs are what vLLM's own subscribers decode with, in their order; unknown fields would be refused."""

    class Event(msgspec.Struct, tag=True, forbid_unknown_fields=True):
        pass

    class BlockStored(Event):
        block_hashes: list[int]
        parent_block_hash: int | None
        token_ids: list[int]
        block_size: int
        lora_id: int | None
        medium: str | None
        lora_name: str | None
        extra_keys: list[tuple[Any, ...] | None] | None = None

    class BlockRemoved(Event):
        block_hashes: list[int]
        medium: str | None

    class AllBlocksCleared(Event):
        pass

    class Batch(msgspec.Struct, array_like=True):
        ts: float
        events: list[BlockStored | BlockRemoved | AllBlocksCleared]
        data_parallel_rank: int | None = None

    batch = msgspec.msgpack.decode(bytes.fromhex(GOLDEN["map"]), type=Batch)
    assert [type(event).__name__ for event in batch.events] == [
        "AllBlocksCleared", "BlockStored", "BlockStored", "BlockRemoved"
    ]  # fmt: skip
    assert batch.events[2] == BlockStored([9, 11], None, [*range(1, 9)], 4, None, "GPU", None, [("tenant",), None])


# -- routers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["map", "array"])
def test_a_router_follows_a_pool_that_is_always_full(encoding: str) -> None:
    with engine() as served, KVEvents(served, config(encoding=encoding)) as events, Router(events) as router:
        for seed in range(6):
            served.generate(prompts(seed), GREEDY)
            served.submit(prompts(seed)[0], GREEDY, namespace="tenant")
            while served.has_unfinished:
                served.step()
            router.follow(served._core.tree)
            served.check()
        assert {namespace for namespace, _ in router.consumer.held.values()} == {"", "tenant"}
        assert any(isinstance(event, BlocksDropped) for event in router.consumer.events)
        assert served.reset_prefix_cache()
        router.follow(served._core.tree)
        assert isinstance(router.consumer.events[-1], BlocksReset) and not router.consumer.held
        stats = events.stats()
    assert stats.batches and not stats.blocks and not stats.dropped_events and not stats.lags


def test_routers_join_late_and_miss_batches() -> None:
    with engine() as served, KVEvents(served, config()) as events:
        served.generate(prompts(0), GREEDY)
        with Router(events, deaf_to=(3, 4, 7)) as late, Router(events) as second:
            late.ask(0)
            late.follow(served._core.tree)
            for seed in range(1, 12):
                served.generate(prompts(seed), GREEDY)
                late.follow(served._core.tree)
            assert second.ask(-1) == 1, "a snapshot is one batch"
            second.follow(served._core.tree)
            assert events.stats().snapshots == 1
        assert events.stats().batches > 7


def test_who_asks_for_what_is_no_longer_kept_gets_a_snapshot() -> None:
    with engine() as served, KVEvents(served, config(buffer_steps=1)) as events, Router(events) as router:
        for seed in range(3):
            served.generate(prompts(seed), GREEDY)
            router.follow(served._core.tree)
        with Router(events) as late:
            assert late.ask(0) == 1
            late.consumer.check(served._core.tree)
            assert late.next == events.stats().batches
            parents = [event.parent for event in late.consumer.events if isinstance(event, BlocksAdded)]
            assert None in parents and len(parents) < len(late.consumer.held), "blocks in a row are one event"
        assert events.stats().snapshots == 1


def test_a_publisher_tells_what_was_cached_before_it_came() -> None:
    with engine() as served:
        served.generate(prompts(0), GREEDY)
        with KVEvents(served, config()) as events, Router(events) as router:
            router.follow(served._core.tree)
            assert router.consumer.held
        assert not served._core.tree.listeners
        with KVEvents(served, config(block_size=2)) as events, Router(events) as router:
            router.follow(served._core.tree)


def test_the_medium_is_told() -> None:
    """A router that counts what lies in either memory by its medium, through evictions from both, and a late one."""
    served = Engine(StampModel(VOCAB, 128), kv_tokens=96, host_kv_tokens=160, max_step_tokens=32, debug=True)
    assert served._core.host is not None
    trees = {"GPU": served._core.tree, "CPU": served._core.host.tree}
    with served, KVEvents(served, config()) as events:
        for seed in range(6):
            served.generate(prompts(seed), GREEDY)
            served.check()
        for reset in (False, True):
            if reset:
                served._core.host.saves.complete()
                served._core.tree.reset()
            wait_until(lambda: not (events._queue._events or events._host_queue._events))
            time.sleep(0.05)
            for start in (0, -1):
                consumers = by_medium(replay_of(events, b"", start.to_bytes(8, "big", signed=True)))
                for medium, tree in trees.items():
                    consumers[medium].check(tree)
                    assert bool(consumers[medium].held) == (medium == "CPU" or not reset)
        assert served.stats().host_evicted_tokens and events.stats().host_blocks == len(consumers["CPU"].held)
        served.reset_prefix_cache()
        wait_until(lambda: not events.stats().blocks and not events.stats().host_blocks)
    assert not any(tree.listeners for tree in trees.values())


def wait_until(condition: Callable[[], bool]) -> None:
    stop = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < stop, "it never comes"
        time.sleep(0.01)


def by_medium(replies: list[list[bytes]]) -> dict[str, Consumer]:
    """What subscribers believe after a replay, of each medium."""
    consumers = {"GPU": Consumer(4), "CPU": Consumer(4)}
    for reply in replies[:-1]:
        _, events, _ = msgspec.msgpack.decode(reply[-1])
        for fields, event in zip(events, wire_events(reply[-1]), strict=True):
            for medium, consumer in consumers.items():
                if fields.get("medium", medium) == medium:
                    consumer(event)
    return consumers


def test_an_async_engine_under_load_with_cancels() -> None:
    async def main() -> None:
        inner = engine(200)
        async with AsyncEngine(inner) as served:
            with KVEvents(served, config()) as events, Router(events) as router:

                async def ask(prompt: list[int], leave: bool) -> None:
                    async for _ in served.generate(prompt, GREEDY):
                        if leave:
                            break

                await asyncio.gather(*(ask(one, i % 3 == 0) for i, one in enumerate(prompts(1, 60))))
                await served.check()
                await asyncio.to_thread(router.follow, inner._core.tree)
                assert router.consumer.held
            await served.check()
            assert not inner._core.tree.listeners

    asyncio.run(main())


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_sender_that_does_not_keep_up_loses_events_and_tells_all_anew(caplog: pytest.LogCaptureFixture) -> None:
    with engine() as served, KVEvents(served, config(max_queue_size=1)) as events, Router(events) as router:
        router.follow(served._core.tree)
        events._queue.limit = 5
        take, events._queue.take = events._queue.take, list
        with caplog.at_level(logging.WARNING):
            served.generate(prompts(0), GREEDY)
        events._queue.take = take
        assert events.stats().dropped_events and "is too slow" in caplog.text
        events._queue.limit = 10**6
        served.generate([prompts(1)[0]], GREEDY)
        router.follow(served._core.tree)


def test_a_batch_that_fails_leaves_a_gap_and_the_replay_is_a_snapshot(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with engine() as served, KVEvents(served, config()) as events, Router(events) as router:
        router.follow(served._core.tree)
        encode = events._publisher._encode
        monkeypatch.setattr(events._publisher, "_encode", lambda _: 1 // 0)
        served.generate(prompts(0), GREEDY)
        while events._queue._events:
            time.sleep(0.01)
        with caplog.at_level(logging.ERROR):
            monkeypatch.setattr(events._publisher, "_encode", encode)
        served.generate(prompts(1), GREEDY)
        router.follow(served._core.tree)
        assert events.stats().dropped_events and events.stats().snapshots


def test_a_subscriber_that_lags_is_counted_and_the_others_get_all() -> None:
    queue = kv_events._Queue(10**6)
    publisher = publisher_of(queue, hwm=4)
    context = zmq.Context.instance()
    with context.socket(zmq.SUB) as slow, context.socket(zmq.SUB) as good:
        slow.set(zmq.RCVHWM, 1)
        slow.set(zmq.RCVBUF, 4096)
        for socket in (slow, good):
            socket.connect(publisher.endpoint)
            socket.subscribe(b"")
        sequences, number = [], 0
        while not publisher.stats().lags or number < 20:
            queue.put(BlocksAdded([number], None, as_tokens(np.arange(200_000)), ""))
            number += 1
            assert number < 200, "nobody lags"
            while publisher.stats().batches < number:
                time.sleep(0.001)
            while not sequences or sequences[-1] < number - 1:  # the first ones may come before the subscription
                if good.poll(1_000):
                    sequences.append(int.from_bytes(good.recv_multipart()[1], "big"))
                elif not sequences:
                    break
        assert sequences == [*range(sequences[0], number)], "the one that reads lost batches too"
        late = []
        while slow.poll(500):
            late.append(int.from_bytes(slow.recv_multipart()[1], "big"))
        assert late == sorted(late) and len(late) < number - 1
    publisher.close()


@pytest.mark.parametrize("frames", [[b""], [b"", b"1"], [b"x", bytes(8)], [b"", bytes(8), b""], [b"", bytes(900)]])
def test_a_request_for_a_replay_that_is_none_is_counted(frames: list[bytes]) -> None:
    with engine() as served, KVEvents(served, config()) as events, Router(events) as router:
        with zmq.Context.instance().socket(zmq.DEALER) as socket:
            socket.connect(str(events.replay_endpoint))
            socket.send_multipart(frames)
            while not events.stats().bad_requests:
                time.sleep(0.01)
            assert not socket.poll(20)
        served.generate(prompts(0), GREEDY)
        router.follow(served._core.tree)
        assert events.stats().bad_requests == 1


def test_a_reader_that_goes_away_in_a_replay_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine() as served, KVEvents(served, config()) as events, Router(events) as router:
        router.follow(served._core.tree)
        answer = kv_events._Publisher._answer
        socket = zmq.Context.instance().socket(zmq.DEALER)

        def late(self: kv_events._Publisher, replay: "zmq.Socket[bytes]") -> None:
            socket.close(linger=0)
            time.sleep(0.2)
            answer(self, replay)

        monkeypatch.setattr(kv_events._Publisher, "_answer", late)
        socket.connect(str(events.replay_endpoint))
        socket.send_multipart([b"", bytes(8)])
        while not events.stats().replays:
            time.sleep(0.01)
        monkeypatch.setattr(kv_events._Publisher, "_answer", answer)
        served.generate(prompts(0), GREEDY)
        router.follow(served._core.tree)
        assert events.stats().cut_replays == 1


@pytest.mark.parametrize("replay_endpoint", [None, "tcp://127.0.0.1:*"])
def test_an_idle_publisher_sleeps(replay_endpoint: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A poller without sockets returns at once: a publisher without replays took a whole core."""
    calls = []
    take = kv_events._Queue.take
    monkeypatch.setattr(kv_events._Queue, "take", lambda queue: calls.append(1) or take(queue))
    with engine() as served, KVEvents(served, config(replay_endpoint=replay_endpoint)):
        time.sleep(0.3)
    assert 2 <= len(calls) < 100


def test_one_publisher_an_engine_and_one_an_endpoint() -> None:
    with engine() as served, KVEvents(served, config()) as events:
        with pytest.raises(InvalidRequest, match="published already"):
            KVEvents(served, config())
        with engine() as other, pytest.raises(InvalidRequest, match=r"endpoint=.*in use"):
            KVEvents(other, config(endpoint=events.endpoint))
        events.close()
        events.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoint": "tcp://*:5557"}, "unencrypted"),
        ({"endpoint": "tcp://10.0.0.1:5557"}, "unencrypted"),
        ({"replay_endpoint": "tcp://0.0.0.0:5558"}, "unencrypted"),
        ({"endpoint": "udp://127.0.0.1:1"}, "tcp:// or ipc://"),
        ({"endpoint": "tcp://127.0.0.1:nothing"}, "cannot be opened"),
        ({"endpoint": "ipc:///nowhere/at/all"}, "cannot be opened"),
        ({"block_size": 0}, "block_size"),
        ({"buffer_steps": 2**40}, "buffer_steps"),
        ({"topic": "t" * 257}, "topic"),
        ({"encoding": "xml"}, "encoding"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with engine() as served, pytest.raises(InvalidRequest, match=message):
        KVEvents(served, config(**options))


def test_the_flag_is_that_of_vllm() -> None:
    text = '{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:5557", "topic": "kv@a@b"}'
    found = KVEventsConfig.parse(text)
    assert (found.endpoint, found.topic, found.enabled) == ("tcp://*:5557", "kv@a@b", True)
    assert not KVEventsConfig.parse('{"publisher": "null"}').enabled
    for bad in ("", "[]", '{"port": 1}', '{"block_size": "16"}', '{"publisher": "kafka"}', '"\udcff"'):
        with pytest.raises(InvalidRequest, match="kv_events_config"):
            KVEventsConfig.parse(bad)


def test_beyond_the_machine_only_when_allowed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with engine() as served, KVEvents(served, config(endpoint="tcp://*:*", allow_insecure_tcp=True)) as events:
        assert "unencrypted" in caplog.text and events.endpoint.startswith("tcp://")


def test_prompts_of_sequences_that_share_nothing_are_not_told() -> None:
    with Engine(StampModel(VOCAB, 128), kv_tokens=96, share=False) as served, KVEvents(served, config()) as events:
        served.generate(prompts(0, 3), GREEDY)
        assert not blocks_of(served._core.tree, 4)
    assert wire_events(events._publisher._sent[0][1]) == [BlocksReset()] and len(events._publisher._sent) == 1
