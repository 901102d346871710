"""`Client` and `AsyncClient` before one worker and two, in threads and in processes."""

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zmq
import zmq.auth
from faults import stamp_workers
from oracle import StampModel, expected_logits
from serving import VOCAB, greedy

from radixgen import (
    AsyncClient,
    Client,
    Engine,
    EngineClosed,
    EngineDead,
    InvalidRequest,
    Limits,
    RequestFailed,
    SamplingParams,
)
from radixgen.serve.zmq.endpoint import Curve, InsecureEndpoint
from radixgen.serve.zmq.utility import UTILITIES
from radixgen.serve.zmq.worker import Worker

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def lasting(count: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count)


@contextmanager
def workers(address: str, count: int = 1, *, eos: int | None = None, **options: Any) -> Iterator[list[Worker]]:
    """So many in threads, which drain in the end."""
    made = []
    for index in range(count):
        model = StampModel(VOCAB, 4096, frozenset() if eos is None else frozenset([eos]))
        engine = Engine(model, kv_tokens=8192, debug=True)
        made.append(Worker(engine, [address], engine_index=index, **options))
    ended: list[bool] = []
    threads = [threading.Thread(target=lambda one=one: ended.append(one.run())) for one in made]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        for worker in made:
            worker.drain()
        for thread in threads:
            thread.join(30)
    assert ended == [True] * count
    for worker in made:
        for counters in worker.counters.peers.values():
            counters.check(0, settled=True)


def test_a_client_of_two_workers() -> None:
    prompts = [[1, 2, 3, i % VOCAB, i // VOCAB] for i in range(40)]
    with Client(workers=2) as client, workers(client.address, 2) as served:
        outputs = client.generate(prompts, GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == [greedy(prompt) for prompt in prompts]
        assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)
        assert [o.prompt_token_ids for o in outputs] == prompts and sorted(client.workers) == [0, 1]
        shares = [next(iter(worker.counters.peers.values())).adds for worker in served]
        assert sum(shares) == 40 and min(shares) > 5
        (again,) = client.generate(prompts[:1], GREEDY, worker=1)
        assert again.outputs[0].token_ids == greedy(prompts[0])
        with pytest.raises(InvalidRequest, match="worker"):
            client.call("stats")
        assert client.call("check", worker=0) and client.call("check", worker=1)
        with pytest.raises(EngineDead, match="worker 7"):
            client.generate(prompts, worker=7)


def test_a_client_tells_what_the_engine_tells() -> None:
    """The twin is the engine in this process."""
    many = [
        GREEDY,
        SamplingParams(temperature=0.0, max_tokens=30, stop_token_ids=[3]),
        SamplingParams(temperature=1.0, seed=5, max_tokens=20, logprobs=3, top_k=5),
        SamplingParams(temperature=0.7, seed=6, max_tokens=9, logprobs=0, prompt_logprobs=2, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=9, logit_bias={2: 5.0}, min_tokens=4, presence_penalty=0.5),
    ]
    prompts = [[1, 2, 3], [4, 5], [6], [1, 2, 3, 7, 7], [2]]
    model = StampModel(VOCAB, 4096, frozenset([6]))
    with Engine(model, kv_tokens=8192) as engine:
        wanted = [engine.generate(prompt, params)[0] for prompt, params in zip(prompts, many, strict=True)]
    with Client() as client, workers(client.address, eos=6):
        for prompt, params, want in zip(prompts, many, wanted, strict=True):
            (found,) = client.generate([prompt], params)
            one, other = found.outputs[0], want.outputs[0]
            assert (one.token_ids, one.finish_reason, one.stop_reason) == (
                other.token_ids,
                other.finish_reason,
                other.stop_reason,
            )
            assert found.num_cached_tokens == want.num_cached_tokens
            assert (one.logprobs is None) == (other.logprobs is None)
            for mine, theirs in zip(one.logprobs or (), other.logprobs or (), strict=True):
                assert next(iter(mine)) == next(iter(theirs)) and mine == pytest.approx(theirs, abs=1e-6)
            if params.logprobs is not None:
                assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-5)
            if params.prompt_logprobs is not None:
                assert found.prompt_logprobs is not None and want.prompt_logprobs is not None
                for mine, theirs in zip(found.prompt_logprobs[1:], want.prompt_logprobs[1:], strict=True):
                    assert mine == pytest.approx(theirs, abs=1e-6)


def test_streams_forks_scores_and_pins() -> None:
    with Client() as client, workers(client.address):
        counted = client.stream([1, 2], replace(lasting(3_000), logprobs=0))
        for _ in range(3):
            next(counted)
        (fork,) = client.fork(counted, 1)
        told = next(fork).outputs[0]
        assert told.cumulative_logprob == pytest.approx(sum(next(iter(one.values())) for one in told.logprobs))
        counted.close()
        fork.close()
        stream = client.stream([1, 2], lasting(3_000))
        found = [next(stream)]
        forks = client.fork(stream, 2)
        for one, told in ((stream, found), *((fork, []) for fork in forks)):
            told += [next(one) for _ in range(60 - len(told))]
            one.abort()
            tokens = [token for output in told for token in output.outputs[0].token_ids]
            assert one.whole().outputs[0].finish_reason == "abort"
            assert tokens[:60] == greedy([1, 2], 60)
        with pytest.raises(RequestFailed, match="UnknownRequest"):
            client.fork(stream)
        ((score,),) = client.score([1, 2], [[3]])
        logits = torch.from_numpy(expected_logits([1, 2], VOCAB))
        assert score == pytest.approx(float(logits.log_softmax(-1)[3]), abs=1e-5)
        pin = client.pin([1, 2], ttl=60)
        assert pin is not None and client.unpin(pin) and not client.unpin(pin)
        stream = client.stream([3], lasting(3_000))
        next(stream)
        stream.abort()
        assert stream.whole().outputs[0].finish_reason == "abort"
        stream = client.stream([3], lasting(3_000))
        next(stream)
        stream.close()
        assert list(stream) == []
        with pytest.raises(RequestFailed, match="to its end"):
            stream.whole()
        while client.call("stats")["live"]:
            time.sleep(0.01)


def test_any_free_port() -> None:
    """Pins that the address of such a client was one that nobody can connect to."""
    with Client("tcp://127.0.0.1:*", timeout=60) as client, workers(client.address):
        assert client.generate([[1]], GREEDY)[0].outputs[0].token_ids == greedy([1])


def test_refusals() -> None:
    with Client() as client, workers(client.address):
        for bad in (SamplingParams(n=2), SamplingParams(stop="x")):
            with pytest.raises(InvalidRequest):
                client.generate([[1]], bad)
        (output,) = client.generate([[VOCAB]], GREEDY)
        assert output.outputs[0].finish_reason == "error" and "prompt[0]=8" in str(output.outputs[0].stop_reason)
        with pytest.raises(RequestFailed, match="must be one of"):
            client.call("nothing")
        with pytest.raises(InvalidRequest, match="bytes"):
            client.generate([np.zeros(9_000_000, np.int8)], GREEDY)
    with pytest.raises(EngineClosed):
        client.generate([[1]])
    client.close()


def test_nobody_comes(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    late = pytest.raises(EngineDead, match=r"0 of 1 workers connected within 0\.05 s")
    with Client(f"ipc://{tmp_path}/handshake", timeout=0.05) as client, late:
        client.generate([[1]])
    with pytest.raises(InsecureEndpoint):
        Client("tcp://0.0.0.0:0")
    address = f"tcp://127.0.0.1:{free_port()}"
    with Client(address), pytest.raises(InvalidRequest, match="cannot be bound"):
        Client(address)
    with pytest.raises(InvalidRequest, match="workers"):
        Client(workers=0)


def test_a_standby_takes_over() -> None:
    """A second worker of one index waits for the end of the first."""
    with Client() as client, workers(client.address) as (first,):
        assert client.generate([[1]], GREEDY)[0].outputs[0].token_ids == greedy([1])
        with workers(client.address) as (second,):
            deadline = time.monotonic() + 30
            while not client._front._standby:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            first.drain()
            while second.counters.handshakes < 1:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            client._front.wait(1, 30)
            assert client.generate([[2]], GREEDY)[0].outputs[0].token_ids == greedy([2])


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, workers do not answer `get_supported_tasks`."""
    event = threading.Event()
    slow = {**UTILITIES, "get_supported_tasks": lambda *_: event.wait(60)}
    monkeypatch.setattr("radixgen.serve.zmq.service.UTILITIES", slow)
    return event


def wait_forgotten(client: Client | AsyncClient) -> None:
    """Until no reply is expected."""
    (worker,) = client._front.live()
    deadline = time.monotonic() + 30
    while worker.calls:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_late_reply_is_forgotten(late: threading.Event) -> None:
    with Client() as client, workers(client.address):
        assert client.call("is_sleeping") is False
        client._timeout = 0.01
        with pytest.raises(RequestFailed, match="no answer within"):
            client.call("get_supported_tasks")
        wait_forgotten(client)
        late.set()
        client._timeout = 60
        assert client.call("is_sleeping") is False


def test_a_late_reply_to_a_coroutine_is_forgotten(late: threading.Event) -> None:
    async def test() -> None:
        async with AsyncClient() as client:
            with workers(client.address):
                assert await client.call("is_sleeping") is False
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client.call("get_supported_tasks"), 0.01)
                client._timeout = 0.01
                with pytest.raises(RequestFailed, match="no answer within"):
                    await client.call("get_supported_tasks")
                await asyncio.to_thread(wait_forgotten, client)
                late.set()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_coroutines() -> None:
    prompts = [[1, 2, 3, i % VOCAB, i // VOCAB] for i in range(40)]

    async def tokens(client: AsyncClient, prompt: list[int]) -> list[int]:
        return [t async for delta in client.generate(prompt, GREEDY) for t in delta.outputs[0].token_ids]

    async def test(client: AsyncClient) -> None:
        assert await asyncio.gather(*(tokens(client, p) for p in prompts)) == [greedy(p) for p in prompts]
        assert len(await client.score([1], [[2], [3, 4]])) == 2
        outputs = client.generate([1], lasting(3_000))
        await anext(outputs)
        await outputs.aclose()
        task = asyncio.create_task(tokens(client, [1] * 3_000))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while any([(await client.call("stats", worker=index))["live"] for index in (0, 1)]):
            await asyncio.sleep(0.01)
        with pytest.raises(RequestFailed):
            await client.call("nothing", worker=0)

    async def whole() -> None:
        async with AsyncClient(workers=2) as client:
            with workers(client.address, 2):
                await asyncio.wait_for(test(client), 60)
        with pytest.raises(EngineClosed):
            await tokens(client, [1])

    asyncio.run(whole())


def test_keys(tmp_path: Path) -> None:
    """TCP beyond loopback's trust: only a worker whose key is in the folder gets in."""
    trusted, front = tmp_path / "trusted", tmp_path / "front"
    trusted.mkdir()
    front.mkdir()
    server_public, server_secret = zmq.auth.create_certificates(front, "front")
    _, secret = zmq.auth.create_certificates(trusted, "worker")
    _, stranger = zmq.auth.create_certificates(front, "stranger")
    keys = Curve(Path(server_secret), trusted)
    port = free_port()
    with Client(f"tcp://127.0.0.1:{port}", curve=keys, timeout=30) as client:
        engine = Engine(StampModel(VOCAB, 64), kv_tokens=64)
        intruder = Worker(engine, [client.address], engine_index=5, curve=Curve(Path(stranger), Path(server_public)))
        thread = threading.Thread(target=intruder.run)
        thread.start()
        with workers(client.address, curve=Curve(Path(secret), Path(server_public))):
            assert client.generate([[1, 2]], GREEDY)[0].outputs[0].token_ids == greedy([1, 2])
            assert list(client.workers) == [0] and not intruder.counters.handshakes
        intruder.drain()
        thread.join(30)


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def test_what_workers_tell_is_read_with_care() -> None:
    """A message that can't be read is dropped, and the next one is read."""
    with Client(limits=Limits()) as client, workers(client.address):
        client.wait()
        (worker,) = client._front.live()
        stranger = client._front._context.socket(zmq.PUSH)
        stranger.connect(worker.output.socket.getsockopt_string(zmq.LAST_ENDPOINT))
        for bad in (b"", b"\xc1", b"\x95\x00\x91\x91\xa1a", b"\x91" * 5_000):
            stranger.send(bad)
        intruder = client._front._context.socket(zmq.DEALER)
        intruder.setsockopt(zmq.IDENTITY, b"odd")
        intruder.connect(client._front._input_address)
        intruder.send(b"\x80")
        deadline = time.monotonic() + 30
        while client._front.dropped < 5:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert client.generate([[1]], GREEDY)[0].outputs[0].token_ids == greedy([1])
        stranger.close(0)
        intruder.close(0)


def test_a_worker_that_is_asked_to_end_lets_everything_end_first() -> None:
    with Client(timeout=180) as client, stamp_workers(client.address, 1) as (child,):
        client.wait()
        going = client.stream([5], lasting(500))
        tokens = next(going).outputs[0].token_ids
        child.send_signal(signal.SIGTERM)
        with suppress(EngineDead):  # it has ended already
            end = client.generate([[6]], GREEDY)[0].outputs[0]
            assert end.token_ids == greedy([6]) or (end.finish_reason, end.stop_reason) == ("abort", "draining")
        assert tokens + going.whole().outputs[0].token_ids == greedy([5], 500)
        assert child.wait(120) == 0
