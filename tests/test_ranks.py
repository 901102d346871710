"""Whatever fails while the ranks of a model start is told soon and plainly, and the process is left as it was."""

import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
import torch.distributed as dist
from test_parallel import a_job
from torch.distributed import _symmetric_memory as symmetric_memory

from radixgen import Engine, EngineDead
from radixgen.core.settings import as_rank_0, rank_environment
from radixgen.model import parallel, ranks
from radixgen.model.frame_ring import RingWriter
from radixgen.model.lockstep import Channel, ChannelClosed
from radixgen.model.rank_all_reduce import RankAllReduce
from radixgen.model.ranks import Followers, in_thread

VARIABLES = ("LOCAL_RANK", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class Process:
    """Stands for one that ends when it is told to."""

    def __init__(self, code: int = 0) -> None:
        self.ours, theirs = socket.socketpair()
        self.channel = Channel(theirs)
        self.code = code

    def wait(self, _: float | None = None) -> int:
        self.channel.close()
        return self.code


@pytest.fixture
def followers(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Followers]:
    """Two ranks beside rank 0, without processes."""

    def start(self: Followers, _: int) -> None:
        process = Process()
        self._channels.append(Channel(process.ours))
        self.processes.append(process)

    monkeypatch.setattr(Followers, "_start", start)
    monkeypatch.setattr(ranks, "_STOP_SECONDS", 0.1)
    monkeypatch.setattr(ranks, "_GIVE_UP_SECONDS", 0.1)
    found = Followers(replace(a_job(tmp_path), size=3, device=getattr(request, "param", "cpu")))
    yield found
    found.stop()


def test_answers_come_in_any_order(followers: Followers) -> None:
    second, third = (process.channel for process in followers.processes)
    third.answer(started=3)
    second.answer(started=2)
    assert followers.answers(5.0) == [{"started": 2}, {"started": 3}]
    third.answer(kv_room=1)
    with pytest.raises(TimeoutError, match=r"within 0\.01 s of rank 1"):
        followers.answers(0.01)


def test_a_rank_that_fails_is_not_waited_for_behind_another(followers: Followers) -> None:
    followers.processes[1].channel.answer(raised="OutOfMemoryError: full")
    followers.processes[1].channel.close()
    with pytest.raises(ChannelClosed, match="rank 2 raised OutOfMemoryError: full"):
        followers.answers(60.0)
    assert followers.describe_exits() == "rank 2 raised OutOfMemoryError: full"


def test_nothing_is_sent_where_a_rank_has_ended(followers: Followers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor waited for behind it, where it left the ring full."""
    monkeypatch.setattr(followers, "_ring", RingWriter(64))
    followers._ring.add_reader()
    followers.send(bytes(24))
    followers.send(bytes(24))
    monkeypatch.setattr(ranks, "STEP_SECONDS", 0.01)
    with pytest.raises(TimeoutError, match="read nothing"):
        followers.send(b"")
    monkeypatch.setattr(ranks, "STEP_SECONDS", 60.0)
    sending = in_thread(lambda: followers.send(b""), "test")
    followers.processes[0].channel.close()
    with pytest.raises(ChannelClosed):
        sending.result(10)
    assert followers.ended.wait(10)
    with pytest.raises(ChannelClosed):
        followers.send(b"")


def test_work_beside_others(followers: Followers) -> None:
    assert followers.run_watched(lambda: threading.current_thread().daemon) is True
    with pytest.raises(ZeroDivisionError):
        followers.run_watched(lambda: 1 // 0)


def test_work_that_waits_for_a_rank_that_ended_is_given_up(followers: Followers) -> None:
    """As rank 0 does where it looks for the others, and on a GPU."""
    never = threading.Event()

    def wait() -> None:
        followers.processes[0].channel.answer(raised="RuntimeError: no such GPU")
        followers.processes[0].channel.close()
        never.wait()

    with pytest.raises(ChannelClosed):
        followers.run_watched(wait)
    assert followers.describe_exits() == "rank 1 raised RuntimeError: no such GPU"
    never.set()


def test_what_rank_0_says_itself_is_not_lost(followers: Followers) -> None:
    """Where another rank has ended first."""

    def lose_peer() -> None:
        followers.processes[0].channel.close()
        time.sleep(0.01)
        raise RuntimeError("connection closed by peer")

    with pytest.raises(RuntimeError, match="closed by peer"):
        followers.run_watched(lose_peer)


@pytest.mark.parametrize("followers", ["cuda"], indirect=True)
@pytest.mark.parametrize("when", ["stopped", "a rank ends", "in a step"])
def test_an_abort_that_hangs_holds_nobody(
    when: str, followers: Followers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """NCCL's abort waits for a communicator that is not complete; a fake one waits for ever."""
    called, over = threading.Event(), threading.Event()

    def abort() -> None:
        called.set()
        over.wait()

    backend = SimpleNamespace(_abort_process_group=abort)
    fake = SimpleNamespace(is_initialized=lambda: True, get_backend=lambda: "nccl", distributed_c10d=backend)
    monkeypatch.setattr(ranks, "dist", fake)
    if when == "a rank ends":
        followers.processes[0].channel.close()
        assert called.wait(10)
    elif when == "in a step":
        with pytest.raises(ChannelClosed):
            followers.run_watched(lambda: (followers.processes[0].channel.close(), over.wait()))
    followers.stop()
    assert called.wait(10) and "NCCL did not end" in caplog.text
    over.set()


def test_threads_of_ours_hand_over_what_they_raise() -> None:
    assert in_thread(lambda: 5, "test").result(10) == 5
    with pytest.raises(KeyboardInterrupt):
        in_thread(lambda: (_ for _ in ()).throw(KeyboardInterrupt()), "test").result(10)


# -- the environment ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [{}, {"LOCAL_RANK": "7", "GLOO_SOCKET_IFNAME": "eth0"}])
def test_the_environment_is_as_it_was(before: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    seen = dict(os.environ)
    with as_rank_0():
        assert os.environ["LOCAL_RANK"] == "0"
        assert os.environ["GLOO_SOCKET_IFNAME"] == before.get("GLOO_SOCKET_IFNAME", "lo")
        assert os.environ["NCCL_SOCKET_IFNAME"] == "lo"
    assert dict(os.environ) == seen
    assert rank_environment(2)["LOCAL_RANK"] == "2" and rank_environment(2)["NCCL_SOCKET_IFNAME"] == "lo"


def test_transformers_takes_the_first_gpu_for_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own function, on a machine that seems to have GPUs. Without the variable 5.17 raises a KeyError there."""
    from transformers.distributed.utils import initialize_tensor_parallelism

    taken: list[int] = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: taken[-1])
    monkeypatch.setattr(torch.accelerator, "set_device_index", taken.append)
    monkeypatch.setattr(dist, "init_device_mesh", lambda *_: None)
    with as_rank_0(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        device, _ = initialize_tensor_parallelism("auto", tp_size=2)
    assert device == torch.device("cuda", 0) and taken == [0]


def test_rank_0_loads_as_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    seen: list[str | None] = []

    def load(*_: object) -> None:
        seen.append(os.environ.get("LOCAL_RANK"))
        raise MemoryError("full")

    class Alone:
        def __init__(self, job: object) -> None:
            self.job = job

        answers = stop = agree = lambda *_: []
        describe_exits = lambda _: ""  # noqa: E731
        run_watched = lambda _, call: call()  # noqa: E731

    families.build("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(parallel, "Followers", Alone)
    monkeypatch.setattr(parallel, "_join_and_load", load)
    with pytest.raises(EngineDead, match="full"):
        Engine(tmp_path, kv_tokens=64, tensor_parallel_size=2)
    assert seen == ["0"] and "LOCAL_RANK" not in os.environ


# -- processes ------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    families.build("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("waits", [False, True])
def test_a_rank_that_ends_at_once(llama: Path, monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    """At some time, or before it is told its job."""
    plain = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> Any:
        process = plain(*arguments, **options)
        if waits:
            process.wait()
        return process

    monkeypatch.setattr(ranks.subprocess, "Popen", start)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineDead, match="2 ranks did not start: rank 1 ended with exit code 1"):
        Engine(llama, kv_tokens=64, tensor_parallel_size=2)


def test_a_rank_that_cannot_join(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 would look for it in vain."""
    broken = {"GLOO_SOCKET_IFNAME": "none-such"}
    monkeypatch.setattr(ranks, "rank_environment", lambda rank: rank_environment(rank) | broken)
    monkeypatch.setattr(ranks, "_GIVE_UP_SECONDS", 0.5)
    with pytest.raises(EngineDead, match=r"2 ranks did not start: rank 1 raised .*none-such"):
        Engine(llama, kv_tokens=64, tensor_parallel_size=2)
    assert not dist.is_initialized()


def test_a_process_that_cannot_be_made(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(ranks.subprocess, "Popen", fail)
    with pytest.raises(EngineDead, match=r"did not start: .*Resource temporarily unavailable"):
        Engine(llama, kv_tokens=64, tensor_parallel_size=2)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_where_no_memory_is_shared_the_library_adds_up(caplog: pytest.LogCaptureFixture) -> None:
    reduce, data = RankAllReduce(), torch.ones(3)
    reduce.connect(torch.device("cpu"))
    reduce.all_reduce(data)
    reduce.stop_waiting()
    assert data.tolist() == [1.0, 1.0, 1.0] and not reduce.supports(torch.float32, 4)
    assert "do not share memory" in caplog.text


@pytest.mark.usefixtures("alone")
def test_memory_is_shared_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch counts what a process has exchanged: in a second group it would wait for what nobody sends."""
    pytest.importorskip("triton")
    lent: list[torch.Tensor] = []

    def empty(size: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        lent.append(torch.full((size,), 255, dtype=dtype, device=device))
        return lent[-1]

    monkeypatch.setattr(symmetric_memory, "empty", empty)
    monkeypatch.setattr(
        symmetric_memory, "rendezvous", lambda memory, _: SimpleNamespace(buffer_ptrs=[memory.data_ptr()])
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    reduce, parts = RankAllReduce(), torch.ones(2, 5)
    reduce.connect(torch.device("cpu"))
    assert reduce.supports(torch.bfloat16, 1 << 20) and not lent[0].any()
    assert reduce.all_reduce_parts(parts, torch.float16).tolist() == [2.0] * 5
    reduce.stop_waiting()
    reduce.connect(torch.device("cpu"))
    assert not reduce.supports(torch.bfloat16, 1) and len(lent) == 1
    assert reduce.all_reduce_parts(parts, torch.float32).tolist() == [2.0] * 5
