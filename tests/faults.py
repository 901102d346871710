"""What goes wrong around a worker, each fault with a bystander that must not notice. As a script: `--times 50`.

Every accepted request has to end exactly once, the engine's invariants to hold, the counters to add up, and the
bystander, another front end with requests of its own, to get its tokens.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq
from fake_front import ABORTED, ADD, ERROR, LENGTH, PATIENCE, FakeFront, encode
from serving import VOCAB, Served, greedy, serving

from radixgen import Client, EngineDead, Limits, SamplingParams

LONG = 3_000


@contextmanager
def bystanders(served: Served, front: FakeFront, rng: random.Random) -> Iterator[None]:
    """Requests that go on meanwhile, and must end as if they were alone."""
    prompts = {f"bystander-{n}": [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))] for n in range(6)}
    lengths = {name: rng.randint(20, 120) for name in prompts}
    for name, prompt in prompts.items():
        front.add(name, prompt, max_tokens=lengths[name])
    yield
    front.add("late", [1, 2, 3])
    front.ended(*prompts, "late")
    assert front.tokens["late"] == greedy([1, 2, 3])
    for name, prompt in prompts.items():
        assert front.tokens[name] == greedy(prompt, lengths[name]), name
        assert front.ends[name] == [(LENGTH, None)]
    served.check()


def settled(served: Served, live: int = 0) -> None:
    """Wait until no more than so many requests are open."""
    deadline = time.monotonic() + PATIENCE
    while served.worker._thread.service.num_live > live:
        assert time.monotonic() < deadline, "requests are never let go of"
        time.sleep(0.01)


@contextmanager
def process(folder: str, served: Callable[[str], None], requests: int) -> "Iterator[subprocess.Popen[str]]":
    """A front end in a process of its own, that has asked for something and reads no more."""
    command = [sys.executable, str(Path(__file__).parent / "fake_front.py"), folder, str(requests)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        served(child.stdout.readline().strip())
        assert child.stdout.readline().strip() == "asked"
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def _a_process_goes(how: int, rng: random.Random) -> None:
    with serving() as served, tempfile.TemporaryDirectory() as folder:
        (front,) = served.fronts

        with bystanders(served, front, rng), process(folder + "/front", served.worker.connect, 8) as child:
            child.send_signal(how)
            settled(served, live=6)
            lost = [peer for name, peer in served.worker.counters.peers.items() if folder in name]
            assert [(peer.accepted, peer.finished, peer.lost) for peer in lost] == [(8, {"abort": 8}, 1)]


def front_killed(rng: random.Random) -> None:
    """kill -9 of a front end: its requests are freed within seconds."""
    _a_process_goes(signal.SIGKILL, rng)


def front_stopped(rng: random.Random) -> None:
    """SIGSTOP of a front end that said it answers heartbeats: as if it were gone."""
    _a_process_goes(signal.SIGSTOP, rng)


def front_closed(rng: random.Random) -> None:
    """A front end closes in the middle of everything, comes back, and is served."""
    with serving(2) as served:
        one, other = served.fronts
        with bystanders(served, other, rng):
            folder = Path(one.address.removeprefix("ipc://")).parent
            for number in range(9):
                one.add(f"doomed-{number}", [number % VOCAB], max_tokens=LONG)
            if rng.random() < 0.5:
                one.until(lambda: len(one.tokens) == 9)
            one.close()
            again = FakeFront(folder)
            served.fronts[0] = again
            try:
                again.accept()
                again.add("again", [5, 6])
                again.ended("again")
                assert again.tokens == {"again": greedy([5, 6])}
            finally:
                settled(served, live=7)
                if rng.random() < 0.5:
                    again.close()
        again.close()


def never_reads(rng: random.Random) -> None:
    """A front end that asks and never reads: what waits is bounded, its requests are aborted, and when it reads after
    all it finds one end for each, and is served again.
    """
    with serving(1, limits=Limits(max_outbox_bytes=20_000)) as served:
        (other,) = served.fronts
        with tempfile.TemporaryDirectory() as folder:
            front = FakeFront(Path(folder) / "front", high_water=1)
            try:
                served.worker.connect(front.address)
                front.accept()
                peer = next(p for name, p in served.worker.counters.peers.items() if folder in name)
                with bystanders(served, other, rng):
                    names = [f"doomed-{number}" for number in range(5)]
                    for name in names:
                        front.add(name, [int(name[-1])], max_tokens=LONG)
                    deadline = time.monotonic() + PATIENCE
                    while not peer.overflows:
                        assert time.monotonic() < deadline
                        for _ in range(100):
                            front.inputs[0].send_multipart(
                                [front.identity, b"\x03", encode([0, 7, "tree", [1000]])], zmq.DONTWAIT
                            )
                        time.sleep(0.02)
                    settled(served, live=7)
                    assert all(link.waiting < 100_000 for link in served.worker._links.values())
                front.ended(*names)
                assert all(len(front.ends[name]) == 1 and front.ends[name][0][0] == ABORTED for name in names)
                front.add("after", [3, 3])
                front.ended("after")
                assert front.tokens["after"] == greedy([3, 3])
                assert peer.overflow_aborted >= 5
            finally:
                front.close()


def abort_storm(rng: random.Random, count: int = 10_000) -> None:
    """Thousands of aborts, of live requests, ended ones, and none."""
    with serving(2) as served:
        front, other = served.fronts
        with bystanders(served, other, rng):
            names = [f"storm-{number}" for number in range(200)]
            for name in names:
                front.add(name, [rng.randrange(VOCAB)], max_tokens=LONG)
            for number in range(count):
                front.abort(rng.choice(names) if number % 2 else f"never-{number}")
                if number % 500 == 0:
                    front.pump()
            front.abort(*names, *names)
            front.ended(*names)
            front.call("is_sleeping")
            assert all(front.ends[name] == [(ABORTED, None)] for name in names)


def duplicate_ids(rng: random.Random) -> None:
    """Requests under the ids of live ones are dropped; the first ones go on, and other front ends may use the ids."""
    with serving(2) as served:
        front, other = served.fronts
        with bystanders(served, other, rng):
            front.add("bystander-0", [1, 1], max_tokens=200)
            for number in range(100):
                front.add("bystander-0", [number % VOCAB], max_tokens=5)
            front.send(ADD, encode(["bystander-0", "no tokens"]))
            front.ended("bystander-0")
            front.call("is_sleeping")
            assert front.tokens["bystander-0"][:200] == greedy([1, 1], 200)
            counters = served.worker.counters.peers[front.address + "#0"]
            assert counters.duplicates + counters.accepted == 101 and counters.malformed == 1
            assert len(front.ends["bystander-0"]) == counters.accepted + counters.unread


def past_limits(rng: random.Random) -> None:
    """Requests past every limit end at once with an error that says which."""
    bad: dict[str, tuple[list[int], dict[str, object]]] = {
        "prompt": ([], {}),
        "must be from 0": ([VOCAB], {}),
        "must be from  0": ([-1], {}),
        "64 bits": ([2**63], {}),
        "tokens can be served": ([1] * 9_000, {}),
        "temperature": ([1], {"temperature": -1.0}),
        "top_p": ([1], {"top_p": 2.0}),
        "top_k": ([1], {"top_k": -2}),
        "logprobs": ([1], {"logprobs": 21}),
        "prompt_logprobs": ([1], {"prompt_logprobs": -1}),
        "n": ([1], {"n": 2}),
        "max_tokens": ([1], {"max_tokens": 0}),
        "stop_token_ids": ([1], {"stop_token_ids": [1] * 129}),
        "logit_bias": ([1], {"logit_bias": dict.fromkeys(range(40_000), 1.0)}),
        "allowed_token_ids": ([1], {"allowed_token_ids": [1]}),
        "bad_words_token_ids": ([1], {"_bad_words_token_ids": [[1]]}),
        "structural_tag": ([1], {"structured_outputs": {"structural_tag": "{}"}}),
        "only one": ([1], {"structured_outputs": {"regex": "a", "choice": ["a"]}}),
        "json": ([1], {"structured_outputs": {"json": "x" * 300_000}}),
        "Malformed": ([1], {"temperature": "hot"}),
    }
    with serving(2) as served:
        front, other = served.fronts
        with bystanders(served, other, rng):
            asked = list(bad.items())
            rng.shuffle(asked)
            for name, (prompt, sampling) in asked:
                front.add(name, prompt, **sampling)
            front.add("salt", [1], salt="s" * 5_000)
            front.add("i" * 300, [1])
            front.ended(*bad, "salt", "i" * 300)
            assert {name: len(ends) for name, ends in front.ends.items()} == dict.fromkeys(front.ends, 1)
            for name, ((finish, said),) in front.ends.items():
                assert finish == ERROR and isinstance(said, str) and not front.tokens[name], (name, said)
                if name.isidentifier() and len(name) < 100:
                    assert name in said, (name, said)


def pool_full(rng: random.Random) -> None:
    """A pool that is always full: requests wait, are preempted, and get the same tokens."""
    with serving(2, kv_tokens=160, limits=Limits(max_num_seqs=12)) as served:
        front, other = served.fronts
        with bystanders(served, other, rng):
            prompts = {f"full-{n}": [rng.randrange(VOCAB) for _ in range(20)] for n in range(30)}
            for name, prompt in prompts.items():
                front.add(name, prompt, max_tokens=40)
            front.ended(*prompts)
            for name, prompt in prompts.items():
                assert front.tokens[name] == greedy(prompt, 40) and front.ends[name] == [(LENGTH, None)]


def oversized_frame(rng: random.Random) -> None:
    """A frame that is too large costs its sender the connection, and it may come back."""
    with serving(2, limits=Limits(max_frame_bytes=10_000)) as served:
        front, other = served.fronts
        with bystanders(served, other, rng):
            front.send(ADD, bytes(20_000))
            front.accept()
            front.add("after", [4, 4])
            front.ended("after")
            assert front.tokens["after"] == greedy([4, 4])


@contextmanager
def stamp_workers(address: str, count: int) -> "Iterator[list[subprocess.Popen[bytes]]]":
    """Workers of the oracle in processes of their own."""
    script = str(Path(__file__).parent / "stamp_worker.py")
    children = [subprocess.Popen([sys.executable, script, address, str(index)]) for index in range(count)]
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait()


@contextmanager
def _a_worker_goes(how: signal.Signals, rng: random.Random) -> "Iterator[tuple[Client, subprocess.Popen[bytes]]]":
    """Of two workers with streams one is sent a signal: its streams end with an error, the other's as they should."""
    lasting, enough = (SamplingParams(temperature=0.0, max_tokens=count) for count in (3_000, 400))
    with Client(workers=2, timeout=180) as client, stamp_workers(client.address, 2) as children:
        client.wait()
        prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))] for _ in range(4)]
        doomed = [client.stream(prompt, lasting, worker=0) for prompt in prompts]
        others = [client.stream(prompt, enough, worker=1) for prompt in prompts]
        begun = [next(stream).outputs[0].token_ids for stream in (*doomed, *others)]
        children[0].send_signal(how)
        for stream in doomed:
            with pytest.raises(EngineDead, match="worker 0"):
                list(stream)
        assert list(client.workers) == [1]
        for prompt, stream, first in zip(prompts, others, begun[4:], strict=True):
            assert first + stream.whole().outputs[0].token_ids == greedy(prompt, 400)
        yield client, children[0]


def worker_killed(rng: random.Random) -> None:
    """kill -9 of a worker."""
    with _a_worker_goes(signal.SIGKILL, rng) as (client, _):
        client.call("check", worker=1)


def worker_stopped(rng: random.Random) -> None:
    """SIGSTOP of a worker is as if it were gone; after SIGCONT it comes back, without what it had."""
    with _a_worker_goes(signal.SIGSTOP, rng) as (client, child):
        child.send_signal(signal.SIGCONT)
        client.wait()
        (output,) = client.generate([[4]], SamplingParams(temperature=0.0, max_tokens=12), worker=0)
        assert output.outputs[0].token_ids == greedy([4])
        for number in range(2):
            client.call("check", worker=number)


FAULTS: dict[str, Callable[[random.Random], None]] = {
    one.__name__: one
    for one in (
        front_killed,
        front_stopped,
        front_closed,
        worker_killed,
        worker_stopped,
        never_reads,
        abort_storm,
        duplicate_ids,
        past_limits,
        pool_full,
        oversized_frame,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*FAULTS, []], help="faults; all by default")
    parser.add_argument("--times", type=int, default=50)
    chosen = parser.parse_args()
    for name in chosen.names or FAULTS:
        begin = time.monotonic()
        for seed in range(chosen.times):
            try:
                FAULTS[name](random.Random(seed))
            except BaseException:
                print(f"{name} failed with seed {seed}", flush=True)
                raise
        print(f"{name}: {chosen.times} times, {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
