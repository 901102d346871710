"""A worker before front ends: the wire in use, utilities, faults, health, the end."""

import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import families
import pytest
import texts
import zmq.auth
from fake_front import ABORT, ABORTED, ADD, ERROR, LENGTH, STOP, FakeFront, encode
from faults import FAULTS, LONG, settled
from mutate_frames import bombard
from oracle import StampModel
from serving import VOCAB, greedy, serving
from test_cli import call

from radixgen import Engine, InvalidRequest, Limits
from radixgen.sampling.structured import Grammars
from radixgen.serve.zmq.endpoint import Curve, InsecureEndpoint, check_endpoint, smg_handshake
from radixgen.serve.zmq.worker import Worker


def test_a_front_end_is_served() -> None:
    with serving(engine_index=258) as served:
        (front,) = served.fronts
        assert front.identity == b"\x02\x01" and front.ready["max_model_len"] == 4096
        assert (front.ready["block_size"], front.ready["num_gpu_blocks"]) == (16, 512)
        front.add("a", [1, 2, 3, 4])
        front.add("b", [1, 2, 3, 4, 5], max_tokens=30)
        front.ended("a", "b")
        front.add("c", [1, 2, 3, 4, *greedy([1, 2, 3, 4]), 7])
        front.ended("c")
        assert front.tokens["a"] == greedy([1, 2, 3, 4]) and front.tokens["b"] == greedy([1, 2, 3, 4, 5], 30)
        assert front.ends == {name: [(LENGTH, None)] for name in "abc"}
        first, *rest = front.outputs_of["c"]
        stats = {"num_prompt_tokens": 17, "num_computed_tokens": 2, "num_cached_tokens": 15}
        assert {name: first[11][name] for name in stats} == stats
        assert all(output[11] is None for output in rest), "a prompt is counted once"
        counters = served.worker.counters.peers[front.address + "#0"]
        assert (counters.adds, counters.accepted, counters.finished) == (3, 3, {"length": 3})


def test_end_tokens_are_the_front_ends() -> None:
    """Pins that the model's own end tokens count for nothing: who wants them names them."""
    tokens = greedy([2, 2], 40)
    token = tokens[4]
    length = tokens.index(token) + 1
    with serving(model=StampModel(VOCAB, 256, frozenset([token]))) as served:
        (front,) = served.fronts
        assert front.ready["eos_token_ids"] == [token]
        front.add("none", [2, 2], max_tokens=40)
        front.add("eos", [2, 2], max_tokens=40, _eos_token_id=token)
        front.add("stop", [2, 2], max_tokens=40, stop_token_ids=[token])
        front.add("ignored", [2, 2], max_tokens=40, _eos_token_id=token, ignore_eos=True)
        front.ended("none", "eos", "stop", "ignored")
        assert front.ends["none"] == front.ends["ignored"] == [(LENGTH, None)]
        assert front.tokens["eos"] == front.tokens["stop"] == tokens[:length]
        assert front.ends["eos"] == [(STOP, None)] and front.ends["stop"] == [(STOP, token)]


def test_abort_and_priorities() -> None:
    with serving() as served:
        (front,) = served.fronts
        front.add("long", [1], max_tokens=LONG)
        front.until(lambda: bool(front.tokens.get("long")))
        front.abort("long", "never")
        front.ended("long")
        assert front.ends["long"] == [(ABORTED, None)] and len(front.tokens["long"]) < LONG
        request = ["at-once", [1], None, {"max_tokens": LONG}, None, 0, None, None, None, None, None, 0, 0, -7, None]
        front.send(ADD, encode([*request, False, None, None, None, True]))
        front.ended("at-once")
        assert front.ends["at-once"] == [(ABORTED, None)]


def test_salts_part_what_is_cached() -> None:
    with serving() as served:
        (front,) = served.fronts
        cached = []
        for name, salt in (("a", None), ("b", None), ("c", "x"), ("d", "y"), ("e", "x"), ("f", "")):
            front.add(name, [1, 2, 3, 4, 5], salt=salt)
            front.ended(name)
            cached.append(front.outputs_of[name][0][11]["num_cached_tokens"])
            assert front.tokens[name] == greedy([1, 2, 3, 4, 5])
        assert cached == [0, 5, 0, 0, 5, 5]
        spaces = served.inside(
            lambda: {root.namespace for root in served.worker._thread.service.engine._core.tree.roots()}
        )
        assert len(spaces) == 3 and not any("x" in space for space in spaces)


def test_utilities() -> None:
    with serving(2) as served:
        front, other = served.fronts
        assert front.call("get_supported_tasks") == ["generate"] and front.call("is_sleeping") is False
        front.add("trunk", [1, 2, 3], max_tokens=LONG)
        front.until(lambda: len(front.tokens.get("trunk", ())) > 3)
        assert front.call("fork", "trunk", ["left", "right"]) is None
        front.until(lambda: all(len(front.tokens.get(name, ())) > 60 for name in ("trunk", "left", "right")))
        front.abort("trunk", "left", "right")
        front.ended("trunk", "left", "right")
        assert all(tokens[:60] == greedy([1, 2, 3], 60) for tokens in front.tokens.values())
        (scores, more) = front.call("score", [1, 2], [[3, 4], [5]], None)
        assert len(scores) == 2 and len(more) == 1 and all(score < 0 for score in scores)
        pin = front.call("pin", [1, 2, 3], None, 0, 60.0)
        assert other.call("unpin", pin) is False, "another front end's pin"
        assert front.call("reset_prefix_cache", False, False) is True
        assert front.call("stats")["engine"]["kv_tokens_pinned"] == 3
        assert front.call("tree", 2) == [[-1, [], 0, 0, 0], [0, [1, 2], 2, 2, 0]] and front.call("unpin", pin) is True
        assert front.call("is_healthy") is True and "rows" in front.call("explain")
        assert front.call("counters")["peers"][front.address + "#0"]["forks"] == 2
        front.add("going", [4], max_tokens=LONG)
        front.until(lambda: bool(front.tokens.get("going")))
        for method, arguments, said in (
            ("launch", (), "must be one of"),
            ("fork", ("trunk", ["x"]), "UnknownRequest"),
            ("fork", (1, 2), "args"),
            ("fork", ("going", []), "len"),
            ("fork", ("going", [f"{number}" for number in range(200_000)]), "len"),
            ("fork", ("going", ["twin", "twin"]), "is taken"),
            ("pin", ([1], None, 0, -1.0), "ttl"),
            ("unpin", ("x",), "args"),
            ("tree", (10**6,), "nodes"),
            ("score", ([1], []), "continuations"),
            ("score", ([1], [[2], [VOCAB]]), "must be from 0"),
        ):
            with pytest.raises(RuntimeError, match=said):
                front.call(method, *arguments)
        front.abort("going")
        settled(served)


def test_vllm_s_kv_hints_are_applied_and_answered() -> None:
    keep = {"directives": [{"start": 0, "end": 3, "priority": 50, "duration": 60.0}]}
    action = {"action_id": "a", "action_type": "kv.retain", "action_version": "1.0", "payload": keep}
    envelope = {"protocol_version": "0.1", "message_id": "m", "actions": [action]}
    with serving() as served:
        (front,) = served.fronts
        sampling = {"temperature": 0.0, "max_tokens": 4}
        start = ["first", [1, 2, 3, 4, 5], None, sampling, None, 0.0, None, None, None, None, None, 0]
        front.send(ADD, encode([*start, 0, 0, None, False, None, None, None, False, "session", envelope]))
        front.ended("first")
        (pin,) = served.inside(lambda: list(served.worker._thread.service.engine._core.scheduler.pins))
        assert (pin.num_tokens, pin.priority) == (3, 50)
        assert front.outputs_of["first"][0][11]["cache_hints"] == [["retain", "accepted", 3, 60.0, ""]]


def test_pins_that_expired_are_forgotten() -> None:
    """Of a front end that pins for ever so short a while, again and again."""
    with serving(limits=Limits(max_pins=2)) as served:
        front = served.fronts[0]
        front.add("first", [1, 2, 3])
        front.ended("first")
        lasting = front.call("pin", [1, 2], None, 0, 60.0)
        made = {front.call("pin", [1, 2, 3], None, 0, 1e-9) for _ in range(20)}
        assert len(made) == 20
        (peer,) = served.worker._links
        assert lasting in served.inside(lambda: set(peer.pins)) and len(peer.pins) <= 4
        assert front.call("unpin", lasting) is True


def test_each_process_of_a_front_end_hears_its_own() -> None:
    """Pins that the client index, which anyone can set, decides nothing."""
    with serving() as served, tempfile.TemporaryDirectory() as folder:
        front = FakeFront(Path(folder) / "two", processes=2)
        served.worker.connect(front.address)
        front.accept()
        front.add("same", [1], process=0)
        front.add("same", [2], process=1)
        front.until(lambda: len(front.ends.get("same", ())) == 2)
        first = served.worker.counters.peers
        assert [peer.accepted for name, peer in first.items() if folder in name] == [1, 1]
        front.close()
        deadline = time.monotonic() + 30
        while not all(peer.lost for name, peer in first.items() if folder in name):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_structured_output_and_its_refusals() -> None:
    model = families.build("llama")
    with serving(model=model, tokenizer=texts.tokenizer(), kv_tokens=512, debug=False) as served:
        (front,) = served.fronts
        tokenizer = served.worker._thread.service.engine.tokenizer
        for number in range(3):
            front.add(f"choice-{number}", [1, 2, number], structured_outputs={"choice": ["yes", "no"]}, max_tokens=9)
        front.add("bad", [1], structured_outputs={"regex": "("})
        front.add("going", [4], max_tokens=60)
        front.add("dropped", [1], structured_outputs={"regex": "x{1,200}"}, max_tokens=200)
        front.abort("dropped")
        front.ended("choice-0", "choice-1", "choice-2", "bad", "going", "dropped")
        assert all(tokenizer.decode(front.tokens[f"choice-{n}"]) in ("yes", "no") for n in range(3))
        assert front.ends["bad"][0][0] == ERROR and front.ends["dropped"][0][0] in (ABORTED, LENGTH)


def test_a_grammar_waits_for_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that were aborted are not compiled."""
    compiled: list[str] = []
    compile_, may = Grammars._compile, threading.Event()

    def slowly(self: Grammars, kind: Any, text: str) -> Any:
        compiled.append(text)
        assert not text.startswith("x") or may.wait(60)
        return compile_(self, kind, text)

    monkeypatch.setattr(Grammars, "_compile", slowly)
    with serving(2, model=families.build("llama"), tokenizer=texts.tokenizer(), kv_tokens=512, debug=False) as served:
        one, two = served.fronts
        names = [f"x{number}" for number in range(5)]
        for name in names:
            one.add(name, [1], structured_outputs={"regex": name}, salt=name)
        one.abort(*names[1:4])
        one.ended(*names[1:4])
        two.add("small", [1], structured_outputs={"regex": "a"})
        two.ended("small")
        assert compiled == ["x0", "a"] and two.ends["small"][0][0] in (STOP, LENGTH)
        may.set()
        one.ended(*names)
        assert compiled == ["x0", "a", "x4"]


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name: str) -> None:
    fault: Any = FAULTS[name]
    fault(random.Random(7), **({"count": 2_000} if name == "abort_storm" else {}))


def test_mutated_frames() -> None:
    served = bombard(3_000, seed=1)
    counters = next(iter(served.worker.counters.peers.values()))
    assert counters.unknown and counters.malformed and counters.finished


def test_a_model_that_raises_costs_the_request_that_is_to_blame() -> None:
    with serving() as served:
        (front,) = served.fronts
        plain = served.model.run

        def picky(plan: Any, token_ids: Any, slots: Any, logit_rows: Any) -> Any:
            if 7 in token_ids[plan.row_positions == 0]:
                raise RuntimeError("a seven at the front")
            return plain(plan, token_ids, slots, logit_rows)

        served.model.run = picky
        front.add("good", [1, 7])
        front.add("bad", [7, 1])
        front.ended("good", "bad")
        assert front.tokens["good"] == greedy([1, 7]) and front.ends["bad"][0][0] == ERROR
        assert "a seven" in front.ends["bad"][0][1]


def test_an_engine_that_fails_as_a_whole_says_so() -> None:
    with serving(2, ends=False) as served:
        for front in served.fronts:
            front.add("open", [1], max_tokens=LONG)
        for front in served.fronts:
            front.until(lambda front=front: bool(front.tokens))
        served.model.fail_next = AssertionError("planted")
        for front in served.fronts:
            front.until(lambda front=front: front.dead)
            ((finish, said),) = front.ends["open"]
            assert finish == ERROR and "planted" in said
        assert served.join() is False and not served.worker.healthy


def test_an_engine_of_which_nothing_can_be_told_any_more_says_so() -> None:
    """Pins that ends were lost where the load was asked of an engine that had failed."""
    with serving(ends=False) as served:
        (front,) = served.fronts
        front.add("open", [1], max_tokens=LONG)
        front.until(lambda: bool(front.tokens))

        def broken() -> None:
            raise AssertionError("planted")

        served.worker._thread._load_time = 0.0
        served.worker._thread.service.load = broken  # type: ignore[method-assign]
        front.until(lambda: front.dead)
        ((finish, said),) = front.ends["open"]
        assert finish == ERROR and "planted" in said
        assert served.join() is False


def test_a_step_that_hangs_is_unhealthy() -> None:
    """Pins that the answer does not wait for the step."""
    going = threading.Event()
    with serving(stall_timeout=0.2) as served:
        (front,) = served.fronts
        plain = served.model.run

        def stuck(*arguments: Any) -> Any:
            going.wait(30)
            return plain(*arguments)

        served.model.run = stuck
        assert front.call("is_healthy") is True
        front.add("a", [1])
        front.until(lambda: front.call("is_healthy") is False)
        going.set()
        front.ended("a")
        assert front.call("is_healthy") is True and front.call("counters")["stalls"] >= 1
        assert front.tokens["a"] == greedy([1])


def test_drain_finishes_what_is_open_and_turns_away_the_rest() -> None:
    with serving(ends=False) as served:
        (front,) = served.fronts
        front.add("open", [1], max_tokens=400)
        front.until(lambda: bool(front.tokens))
        served.worker.drain()
        settled(served, live=1)
        served.inside(lambda: None)
        while not served.worker._thread.service.draining:
            time.sleep(0.001)
        front.add("late", [2])
        front.until(lambda: front.dead)
        assert front.ends == {"open": [(LENGTH, None)], "late": [(ABORTED, "draining")]}
        assert front.tokens["open"] == greedy([1], 400) and served.join() is True


def test_drain_aborts_what_does_not_end_in_time() -> None:
    with serving(ends=False, drain_timeout=0.1) as served:
        (front,) = served.fronts
        for number in range(5):
            front.add(str(number), [number], max_tokens=LONG)
        front.until(lambda: len(front.tokens) == 5)
        served.worker.drain()
        front.until(lambda: front.dead)
        assert front.ends == {str(n): [(ABORTED, "the worker stops")] for n in range(5)}
        assert served.join() is True


def test_drain_twice_stops_at_once() -> None:
    with serving(ends=False) as served:
        (front,) = served.fronts
        front.add("open", [1], max_tokens=LONG)
        front.until(lambda: bool(front.tokens))
        served.worker.drain()
        served.worker.drain()
        assert served.join() is False


def test_bad_handshakes_are_counted_and_tried_again(tmp_path: Path) -> None:
    with serving() as served:
        front = FakeFront(tmp_path / "front")
        served.worker.connect(front.address)
        good = front.init
        try:
            for bad in (
                b"\xc1",
                encode({"addresses": {"inputs": [], "outputs": []}, "parallel_config": {}}),
                encode({"addresses": {"inputs": ["tcp://10.0.0.1:5"], "outputs": ["tcp://10.0.0.1:6"]}}),
                encode({"addresses": {"inputs": ["ipc:///tmp/open"], "outputs": ["inproc://x"]}}),
                encode({"addresses": {"inputs": ["a"] * 99, "outputs": ["b"] * 99}}),
            ):
                identity, _ = front._receive(front.handshake)
                front.handshake.send_multipart([identity, bad])
            front.init = good
            front.accept()
            assert served.worker.counters.bad_handshakes == 5
            front.add("a", [1])
            front.ended("a")
            front.send(ABORT, encode(["a"]))
        finally:
            front.close()


def test_where_sockets_may_lead(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    for good in (f"ipc://{tmp_path}/x", "tcp://127.0.0.1:5", "tcp://localhost:5", "tcp://[::1]:5"):
        check_endpoint(good)
    for bad in (
        "",
        "ipc://@abstract",
        "ipc://relative",
        "inproc://x",
        "tcp://",
        "udp://127.0.0.1:1",
        "/tmp/x",
        "tcp://127.0.0.1",
        "tcp://[::1]",
        None,
    ):
        with pytest.raises(InvalidRequest):
            check_endpoint(bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="cannot be read"):
        check_endpoint(f"ipc://{tmp_path}/none/x")
    for far in ("tcp://10.0.0.1:5", "tcp://*:5", "tcp://0.0.0.0:5", "tcp://example.com:5", "tcp://127.0.0.1.x.com:5"):
        with pytest.raises(InsecureEndpoint):
            check_endpoint(far)
        check_endpoint(far, insecure_tcp=True)
        check_endpoint(far, curve=Curve(tmp_path, tmp_path))
    tmp_path.chmod(0o750)
    with pytest.raises(InsecureEndpoint, match="alone"):
        check_endpoint(f"ipc://{tmp_path}/x")
    tmp_path.chmod(0o700)


def test_keys_that_are_none(tmp_path: Path) -> None:
    public, secret = zmq.auth.create_certificates(tmp_path, "own")
    (tmp_path / "empty").write_text("")
    assert Curve(Path(secret), tmp_path).keys()[1]
    for bad in (public, tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(InvalidRequest, match="curve_secret"):
            Curve(Path(bad), tmp_path).keys()


def test_the_port_that_smg_derives() -> None:
    """What `smg.serve._zmq_handshake_port` of SMG 1.13.0 gives."""
    assert smg_handshake("ipc:///tmp/smg/run/w1") == "tcp://127.0.0.1:28468"
    with pytest.raises(InvalidRequest):
        smg_handshake("tcp://127.0.0.1:5")


def test_a_worker_says_what_it_was_given_wrong(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    for options, said in (
        (["--backend", "grpc"], "backend"),
        (["--handshake", "tcp://10.0.0.1:5"], "InsecureEndpoint"),
        (["--handshake", "x"], "address"),
        (["--smg", "x"], "worker_url"),
    ):
        result = call("worker", "--model", tmp_path, *options)
        assert result.exit_code == 1 and said in result.output
    with pytest.raises(InvalidRequest, match="handshakes"):
        Worker(Engine(StampModel(VOCAB, 64), kv_tokens=64), [])
