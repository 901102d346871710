"""Several engines behind one address: who gets a request, what a death costs, and that nothing outlives the server."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import texts
import torch
from msgspec import Raw
from oracle import StampModel
from serving import VOCAB
from typer.testing import CliRunner

from radixgen import AsyncClient, Client, Engine, EngineDead, InvalidRequest, SamplingParams
from radixgen.cli import app
from radixgen.core.settings import replica_environment
from radixgen.serve.http.worker_backend import start
from radixgen.serve.replicas import ReplicaOptions, Replicas
from radixgen.serve.zmq import wire
from radixgen.serve.zmq.balancer import Balancer
from radixgen.serve.zmq.kv_events import KVEvents, KVEventsConfig
from radixgen.serve.zmq.salts import salted_namespace
from radixgen.serve.zmq.worker import Worker

SHORT = SamplingParams(temperature=0.0, max_tokens=4)
PREFIX = "Sixteen tokens are a block, and this text has a few of them: "
PATIENCE = 180.0


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never comes"
        time.sleep(0.01)


# -- one server of two replicas, which the last tests of this part end ------------------------------------------------


@dataclass
class Server:
    process: "subprocess.Popen[bytes]"
    socket: str

    async def ask_all(self, prompts: Sequence[str], **body: Any) -> list[httpx.Response]:
        """Ask for a completion of each, all at once."""
        async with self.client() as client:
            asked = {"max_tokens": 4, "temperature": 0.0} | body
            return await asyncio.gather(
                *(client.post("/v1/completions", json=asked | {"prompt": one}) for one in prompts)
            )

    def ask(self, *prompts: str, **body: Any) -> list[httpx.Response]:
        return asyncio.run(self.ask_all(prompts, **body))

    def client(self) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(uds=self.socket)
        return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=PATIENCE)

    def get(self, path: str) -> httpx.Response:
        with httpx.Client(transport=httpx.HTTPTransport(uds=self.socket)) as client:
            return client.get(f"http://localhost{path}", timeout=PATIENCE)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, "the server has ended"
        return Path(self.socket).exists() and self.get("/ready").status_code == 200

    def figure(self, name: str) -> float:
        """Of all replicas, now."""
        lines = self.get("/metrics").text.splitlines()
        return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"radixgen:{name} "))

    def replicas(self) -> dict[int, int]:
        """Processes of the replicas by their index."""
        found = {}
        for child in children(self.process.pid):
            words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            if "worker" in words:
                found[int(words[words.index("--engine-index") + 1])] = child
        return found


class Stream:
    """A completion of 200 tokens that is streamed. Ends as its finish reason, or as `error`, begun or not."""

    def __init__(self, server: Server, prompt: str) -> None:
        self.begun = asyncio.Event()
        self.end = asyncio.create_task(self._read(server, prompt))

    async def _read(self, server: Server, prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": 200, "ignore_eos": True, "stream": True}
        ends = []
        async with server.client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.is_server_error:
                return "error"
            async for line in answer.aiter_lines():
                self.begun.set()
                if line.startswith("data: {"):
                    told = json.loads(line.removeprefix("data: "))
                    ends.append("error" if "error" in told else told["choices"][0]["finish_reason"])
        (end,) = filter(None, ends)
        return end


def children(process: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def descendants(process: int) -> list[int]:
    found = children(process)
    return found + [one for child in found for one in descendants(child)]


def cached(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    count: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("replicas")
    options = ["-dp", "2", "--kv-tokens", "2048", "--device", "cpu", "--shutdown-delay", "0"]
    command = [sys.executable, "-m", "radixgen", "serve", str(texts.saved_model(folder)), *options]
    environment = replica_environment((), 2)
    with subprocess.Popen([*command, "--uds", str(folder / "socket")], env=environment) as process:
        served = Server(process, str(folder / "socket"))
        try:
            wait_for(served.is_ready)
            yield served
        finally:
            process.kill()


def test_a_prefix_is_found_where_it_is(server: Server) -> None:
    assert len(server.replicas()) == 2
    assert cached(server.ask(PREFIX + "one")[0]) == 0
    for end in ("two", "three", "four"):
        assert cached(server.ask(PREFIX + end)[0]) >= len(PREFIX)


@pytest.mark.parametrize("salt", ["", "a secret"])
def test_prefixes_that_lie_apart_are_each_found(server: Server, salt: str) -> None:
    """By cache events, as nothing is live any more: of prompts that went to either replica, every one."""
    prompts = [f"{number}{salt}: a prompt that is as long as some blocks of the cache" for number in range(6)]
    body = {"cache_salt": salt} if salt else {}
    assert [cached(one) for one in server.ask(*prompts, **body)] == [0] * 6
    time.sleep(0.2)  # events take 10 ms, and what has not come yet costs a computation alone
    assert all(cached(one) >= 48 for one in server.ask(*prompts, **body))


def test_a_session_goes_on_where_it_was(server: Server) -> None:
    async def turns() -> list[int]:
        async with server.client() as client:
            counts, messages = [], []
            for text in ("Tell me of the sea.", "And of ships?", "And of harbours?"):
                messages.append({"role": "user", "content": text})
                body = {"messages": messages, "session_id": "s", "max_tokens": 4}
                answer = await client.post("/v1/chat/completions", json=body)
                counts.append(cached(answer))
                messages.append(answer.json()["choices"][0]["message"])
            return counts

    first, *later = asyncio.run(turns())
    assert first < 16 and later[0] >= 16 and later[1] > later[0]


def test_figures_are_of_all_replicas(server: Server) -> None:
    assert server.figure("kv_tokens") == 2 * 2048
    assert server.get("/health").status_code == server.get("/ready").status_code == 200


def test_a_replica_that_is_killed_costs_its_own_requests_alone(server: Server) -> None:
    victim = server.replicas()[0]

    async def ask() -> list[str]:
        os.kill(victim, signal.SIGSTOP)  # so that it has some when it is killed, however late that is
        ends = [Stream(server, f"{number} is the number of this prompt").end for number in range(8)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        os.kill(victim, signal.SIGKILL)
        return await asyncio.gather(*ends)

    ends = asyncio.run(ask())
    assert sorted({*ends}) == ["error", "length"], ends
    assert [one.status_code for one in server.ask(*(f"{number} more" for number in range(4)))] == [200] * 4
    assert server.get("/health").status_code == 200 and list(server.replicas()) == [1]


def test_sigterm_lets_requests_end_and_leaves_no_process(server: Server) -> None:
    left = descendants(server.process.pid)

    async def ask() -> str:
        stream = Stream(server, "The last one")
        await stream.begun.wait()
        server.process.send_signal(signal.SIGTERM)
        return await stream.end

    assert asyncio.run(ask()) == "length" and server.process.wait(PATIENCE) == 0
    wait_for(lambda: not any(Path(f"/proc/{one}").exists() for one in left))


# -- processes --------------------------------------------------------------------------------------------------------


def test_a_replica_ends_when_the_server_is_killed(tmp_path: Path) -> None:
    """Which closes the pipe, and so does this test. The replica is still loading, and heeds no signal."""
    code = (
        "import signal, sys, time\n"
        "from radixgen.serve.zmq.launch import run_worker\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "run_worker(lambda: time.sleep(600), [f'ipc://{sys.argv[1]}/handshake'], parent_fd=int(sys.argv[3]))"
    )
    tmp_path.chmod(0o700)
    ends: list[str] = []
    replicas = Replicas([[sys.executable, "-c", code, str(tmp_path)]], [replica_environment((), 1)], ends.append)
    (process,) = replicas.processes
    wait_for(lambda: len(children(process.pid)) == 1)  # its sentinel, which it starts before it loads
    os.close(replicas._pipe)
    replicas._pipe = -1
    wait_for(lambda: ends == ["replica 0 ended with exit code 1"])
    replicas.close()


def test_a_replica_that_ends_before_it_serves_ends_the_start() -> None:
    class Failing(ReplicaOptions):
        def command(self, handshake: str, index: int) -> list[str]:
            return ["sh", "-c", "exit 3" if index else "sleep 600"]

    with pytest.raises(EngineDead, match="replica 1 ended with exit code 3 before it served"):
        start(Failing(2, device="cpu"), model="tiny", tokenizer=texts.tokenizer())


def test_gpus_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(options: ReplicaOptions) -> list[str]:
        return [one["CUDA_VISIBLE_DEVICES"] for one in options.environments()]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert seen(ReplicaOptions(4)) == ["0", "1", "2", "3"]
    assert seen(ReplicaOptions(2, ranks=2)) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,GPU-5a, 3,1")
    assert seen(ReplicaOptions(3)) == ["7", "GPU-5a", "3"]
    for options, says in (
        (ReplicaOptions(5), "data_parallel_size=5: needs 5 GPUs, and 4 are visible"),
        (ReplicaOptions(3, ranks=2), "data_parallel_size=3: needs 3 × 2 GPUs, and 4 are visible"),
        (ReplicaOptions(2, device="cuda:1"), "each replica has a GPU of its own"),
        (ReplicaOptions(-1), "data_parallel_size=-1"),
    ):
        with pytest.raises(InvalidRequest, match=says):
            options.environments()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-dp", "0"], "data_parallel_size=0: must be"),
        (["--data-parallel-size", "1000"], "data_parallel_size=1000: must be"),
        (["-dp", "2", "--tp", "0", "--device", "cpu"], "tensor_parallel_size=0: must be"),
        (["-dp", "2", "--zmq", "ipc:///nowhere"], "with --zmq, use --workers"),
    ],
    ids=str,
)
def test_what_can_t_be_meant_is_refused(options: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["serve", "absent", *options])
    assert result.exit_code == 1 and says in " ".join(result.stderr.split()), result.stderr


# -- workers that publish what they hold ------------------------------------------------------------------------------


@contextmanager
def workers(address: str, *, events: bool, folder: Path) -> Iterator[list[Worker]]:
    """Two in threads."""
    folder.chmod(0o700)
    with ExitStack() as stack:
        served = []
        for index in range(2):
            engine = Engine(StampModel(VOCAB, 4096), kv_tokens=2048, debug=True)
            where = {"endpoint": f"ipc://{folder}/events-{index}", "replay_endpoint": f"ipc://{folder}/replay-{index}"}
            told = stack.enter_context(KVEvents(engine, KVEventsConfig(**where))) if events else None
            served.append(Worker(engine, [address], engine_index=index, drain_timeout=0.1, kv_events=told))
            thread = threading.Thread(target=served[-1].run)
            thread.start()
            stack.callback(thread.join, 30)
            stack.callback(served[-1].drain)
        yield served


def adds(served: list[Worker]) -> list[int]:
    return [sum(peer.adds for peer in one.counters.peers.values()) for one in served]


@pytest.mark.parametrize("salt", [None, "a secret"])
@pytest.mark.parametrize("events", [True, False])
def test_a_prefix_that_nobody_uses_is_known_by_events_alone(tmp_path: Path, events: bool, salt: str | None) -> None:
    prompt = [number % VOCAB for number in range(64)]
    with (
        Client(workers=2, timeout=PATIENCE, own_salts=True) as client,
        workers(client.address, events=events, folder=tmp_path) as served,
    ):
        client.wait()
        router = client._front._balancer._router
        # The one that came last: of equal ones a request goes to the one that came first.
        holder = max(client._front.live(), key=lambda one: router.replicas.index(one.serial))
        client.generate([prompt], SHORT, worker=holder.index, cache_salt=salt)
        blocks = client._front.blocks(prompt, salt)
        if events:
            wait_for(lambda: router.match(holder.serial, blocks) == 4)
        before = adds(served)
        (output,) = client.generate([[*prompt, 1]], SHORT, cache_salt=salt)
        went = [now - then for now, then in zip(adds(served), before, strict=True)]
        expected = holder.index if events else 1 - holder.index
        assert went == [int(index == expected) for index in (0, 1)]
        assert output.num_cached_tokens == (64 if events else 0)
        assert all(router.load(one.serial) == 0 for one in client._front.live())


@pytest.mark.parametrize("events", [True, False])
def test_equal_prompts_sent_at_once_go_together(tmp_path: Path, events: bool) -> None:
    """Sixteen requests, while another keeps the first worker a little busier than the second."""
    prompt = [number % VOCAB for number in range(64)]
    with (
        Client(workers=2, timeout=PATIENCE) as client,
        workers(client.address, events=events, folder=tmp_path) as served,
    ):
        with closing(client.stream([5] * 40, SamplingParams(temperature=0.0, max_tokens=3_000), worker=0)):
            outputs = client.generate([prompt] * 16, SHORT)
        wait_for(lambda: adds(served)[0] == 1)  # the first worker may be late
        assert adds(served) == [1, 16] and len({tuple(one.outputs[0].token_ids) for one in outputs}) == 1


def test_load_is_spread(tmp_path: Path) -> None:
    prompts = [[number % VOCAB, *([number // VOCAB] * 40)] for number in range(40)]
    with (
        Client(workers=2, timeout=PATIENCE) as client,
        workers(client.address, events=True, folder=tmp_path) as served,
    ):
        client.generate(prompts, SHORT)
        assert sum(adds(served)) == 40 and min(adds(served)) >= 10, adds(served)


def test_samples_of_one_request_go_together(tmp_path: Path) -> None:
    async def whole() -> None:
        async with AsyncClient(workers=2, timeout=PATIENCE) as client:
            with workers(client.address, events=False, folder=tmp_path) as served:
                streams = [await client.open([1, 2, 3], SHORT)]
                streams += [await client.open([1, 2, 3], SHORT, beside=streams[0]) for _ in range(5)]
                for stream in streams:
                    assert [output async for output in stream][-1].finished
                assert sorted(adds(served)) == [0, 6]

    asyncio.run(asyncio.wait_for(whole(), PATIENCE))


def test_events_that_can_t_be_followed_are_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of other blocks, over TCP that others reach, or without replays."""
    tmp_path.chmod(0o700)
    good = {"endpoint": f"ipc://{tmp_path}/events", "replay_endpoint": f"ipc://{tmp_path}/replay"}
    for bad, says in (
        ({"block_size": 8}, "block_size=8: must be 16"),
        ({"replay_endpoint": None}, "replay_endpoint"),
        ({"encoding": "array"}, "encoding='array': must be map"),
        ({"endpoint": "tcp://10.0.0.1:5557"}, "neither ipc nor loopback"),
        ({"unknown": 1}, "unknown"),
    ):
        caplog.clear()
        balancer = Balancer(b"key")
        balancer.joined(1, wire.Ready(64, 4, kv_events_config=Raw(wire.encode(good | bad))))
        balancer.close()
        assert "routing without the KV cache events" in caplog.text and says in caplog.text, caplog.text


def test_salts_become_namespaces_by_a_key() -> None:
    one, other = (salted_namespace("salt", key) for key in (b"one", b"other"))
    assert one.startswith("salt:") and one != other and not salted_namespace("", b"one")
