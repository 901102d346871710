"""Mutated frames at a worker's sockets: no crash, no hang, and the counters add up. As a script: `--count 1000000`.

Frames are real ones, cut, flipped, spliced, or grown; a seed makes the same again. A bystander is served meanwhile.
"""

import argparse
import random
import resource
import time

import zmq
from fake_front import ABORT, ADD, ERROR, UTILITY, FakeFront, encode
from serving import VOCAB, Served, greedy, serving

from radixgen import Limits

LIMITS = Limits(max_waiting=64, max_num_seqs=16, max_frame_bytes=1 << 16, max_salt_len=64)


def frames(rng: random.Random) -> list[bytes]:
    """A message that a front end could send."""
    kind = rng.choice((ADD, ADD, ADD, ABORT, UTILITY, UTILITY))
    name = f"{rng.randrange(64):02}"
    if kind == ADD:
        sampling = {
            "max_tokens": rng.randint(1, 6),
            "temperature": rng.choice((0.0, 1.0)),
            "logit_bias": {1: 0.5},
            "stop_token_ids": [7],
            "_eos_token_id": 3,
            "_all_stop_token_ids": [3, 7],
            "structured_outputs": None,
        }
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))]
        return [kind, encode([name, prompt, None, sampling, None, 1.5, None, "salt", None, None, None, 0, 0, 0])]
    if kind == ABORT:
        return [kind, encode([name, "x"])]
    calls = (
        ("fork", [name, ["f" + name]]),
        ("score", [[1, 2], [[3], [4, 5]], None]),
        ("pin", [[1, 2, 3], None, 0, 0.5, None]),
        ("unpin", [rng.randrange(9)]),
        ("tree", [9]),
        ("stats", []),
        ("is_healthy", []),
    )
    return [kind, encode([0, rng.randrange(2**31), *rng.choice(calls)])]


def mutated(rng: random.Random) -> list[bytes]:
    """The same with something wrong, most of the time."""
    found = frames(rng)
    payload = bytearray(found[-1])
    for _ in range(rng.choice((0, 1, 1, 1, 2, 5))):
        place = rng.randrange(len(payload) + 1)
        how = rng.randrange(6)
        if how == 0:
            del payload[place:]
        elif how == 1 and payload:
            payload[place % len(payload)] = rng.randrange(256)
        elif how == 2 and payload:
            payload[place % len(payload)] ^= 1 << rng.randrange(8)
        elif how == 3:
            payload[place:place] = rng.randbytes(rng.randint(1, 4))
        elif how == 4:
            payload[place:place] = payload[: rng.randint(0, 40)]
        else:
            payload[place:place] = bytes([rng.choice((0x91, 0x81, 0xDD, 0xC7, 0xDF, 0xC1, 0xDB))]) * rng.randint(1, 300)
    found[-1] = bytes(payload)
    if rng.random() < 0.05:
        found[0] = rng.randbytes(rng.randint(0, 3))
    if rng.random() < 0.03:
        found += [rng.randbytes(rng.randint(0, 9)) for _ in range(rng.choice((1, 2, 100)))]
    return found if rng.random() > 0.01 else found[:1]


def bombard(count: int, seed: int) -> Served:
    """Send so many, and see that a front end is still served."""
    rng = random.Random(seed)
    with serving(2, limits=LIMITS, kv_tokens=1024) as served:
        front, other = served.fronts
        sent = 0
        while sent < count:
            try:
                front.inputs[0].send_multipart([front.identity, *mutated(rng)], zmq.DONTWAIT)
                sent += 1
            except zmq.Again:
                front.pump(5)
            if sent % 200 == 0:
                _forget(front)
            if sent % 10_000 == 0:
                _serve_bystander(other, str(sent))
                served.check()
        _serve_bystander(other, "end")
        counters = served.worker.counters.peers[front.address + "#0"]
        deadline = time.monotonic() + 60
        while counters.received < count:
            assert time.monotonic() < deadline, f"{counters.received} of {count} messages were received"
            _forget(front)
        served.check()
        assert counters.malformed > count / 20 and counters.accepted > count / 50, counters
    return served


def _forget(front: FakeFront) -> None:
    front.pump(1)
    for kept in (front.tokens, front.ends, front.outputs_of, front.replies):
        kept.clear()


def _serve_bystander(front: FakeFront, name: str) -> None:
    """Again where the queue was full, and only then."""
    for attempt in range(1_000):
        own = f"{name}-{attempt}"
        front.add(own, [1, 2, 3])
        front.ended(own)
        ((finish, said),) = front.ends[own]
        if finish != ERROR:
            assert front.tokens[own] == greedy([1, 2, 3]), (front.tokens[own], finish, said)
            return
        assert "QueueFull" in said, said
        time.sleep(0.01)
    raise AssertionError("a bystander was never served")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    served = bombard(chosen.count, chosen.seed)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{chosen.count:,} frames in {time.monotonic() - begin:.0f} s, {grown >> 10} MiB more at the peak")
    for counters in served.worker.counters.peers.values():
        print(counters)


if __name__ == "__main__":
    main()
