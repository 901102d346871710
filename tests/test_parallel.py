"""A model sharded over two processes serves what one process serves, and none of its processes outlives it."""

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn
from weakref import WeakValueDictionary

import families
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from oracle import StampModel
from transformers import LlamaConfig, LlamaForCausalLM

from radixgen import (
    AsyncEngine,
    BeamSearchParams,
    Engine,
    EngineDead,
    InvalidRequest,
    RequestOutput,
    SamplingParams,
    UnsupportedModel,
)
from radixgen.core import Plan
from radixgen.core.settings import rank_environment
from radixgen.kernels.drawable_tokens import DrawableTokens
from radixgen.model import ranks
from radixgen.model.follower import _agree as agree
from radixgen.model.follower import follow
from radixgen.model.frame_ring import RingReader
from radixgen.model.graphs import NotCapturable, StepGraphs
from radixgen.model.lockstep import (
    COLUMNS,
    MAX_FRAME,
    Channel,
    ChannelClosed,
    ModelInput,
    PlanOrigins,
    RankCommand,
    RankJob,
    pack,
    pack_step,
    unpack,
    unpack_step,
)
from radixgen.model.parallel import ParallelModel
from radixgen.model.ranks import Followers
from radixgen.model.sharded_logits import RankLogits

ARCHITECTURES = ("llama", "qwen3-moe", "gemma2")
TIGHT: dict[str, Any] = {"kv_tokens": 96, "max_step_tokens": 16, "dtype": "float32"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)


def prompts() -> list[list[int]]:
    """Prefixes shared at several depths, one prompt twice, one alone."""
    rng = np.random.default_rng(0)
    base, middle, end, alone = (rng.integers(3, families.VOCAB, count).tolist() for count in (24, 9, 13, 40))
    return [base, base + middle, base + middle + end, base + middle + end, base[:12] + end, alone]


def saved(name: str, folder: Path) -> Path:
    families.build(name).save_pretrained(folder)
    return folder


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[one.token_ids for one in output.outputs] for output in outputs]


def serve(engine: Engine) -> list[list[list[int]]]:
    """Greedy requests step by step, samples of one prompt, and beams."""
    for prompt in prompts():
        engine.submit(prompt, GREEDY, output_kind="final")
    found: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        found |= {output.request_id: output for output in engine.step()}
        engine.check()
    drawn = engine.generate(prompts()[1], SamplingParams(n=4, temperature=1.0, seed=5, max_tokens=12, ignore_eos=True))
    beams = engine.beam_search(prompts()[0], BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True))
    engine.check()
    return tokens([found[name] for name in sorted(found)] + drawn + beams)


class Pair(NamedTuple):
    """One model in two engines."""

    architecture: str
    plain: Engine
    sharded: Engine

    @property
    def model(self) -> ParallelModel:
        return self.sharded._model

    @property
    def follower(self) -> "subprocess.Popen[bytes]":
        return self.model.followers.processes[0]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """For the tests of a module in their order: the last one breaks it."""
    model = saved(request.param, tmp_path_factory.mktemp(request.param))
    with Engine(model, **TIGHT) as plain, Engine(model, **TIGHT, tensor_parallel_size=2) as sharded:
        found = Pair(request.param, plain, sharded)
        yield found
    assert found.follower.poll() is not None and not dist.is_initialized()
    assert not Path(found.model.followers.job.store).parent.exists()


def test_two_ranks_equal_one_process(pair: Pair) -> None:
    """Through a pool that is always full: chunks, evictions and preemptions are the same too."""
    expected = serve(pair.plain)
    assert len({str(one) for one in expected}) == len(expected) - 1
    assert serve(pair.sharded) == expected
    stats = pair.plain.stats()
    assert stats.preemptions > 0 and stats.evicted_tokens > 0
    assert pair.sharded.stats() == stats


def test_two_ranks_score_as_one_process(pair: Pair) -> None:
    wanted, found = (engine.score(prompts()[0], [[5, 6, 7], [5, 9]]) for engine in (pair.plain, pair.sharded))
    assert [len(one) for one in found] == [3, 2]
    assert np.concatenate(found) == pytest.approx(np.concatenate(wanted), abs=1e-4)


OWN_LOGITS = [
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=5, top_p=0.8),
    SamplingParams(min_p=0.1, top_k=0),
]
ALL_LOGITS = [
    SamplingParams(top_p=0.8),
    SamplingParams(top_k=300, top_p=0.9),
    SamplingParams(top_k=5, repetition_penalty=1.2),
    SamplingParams(temperature=0.0, logprobs=2),
]


def test_ranks_draw_from_their_own_logits(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a gather where that is exact, in one batch or alone; tokens that may not be drawn are known to all."""
    gathered = count_calls(monkeypatch, RankLogits, "gather")
    both = pair.plain, pair.sharded
    for excluded in None, DrawableTokens(np.array([3, 30, families.VOCAB - 1]), families.VOCAB), None:
        for engine in both:
            monkeypatch.setattr(engine._core, "_drawable", excluded)
        own = [replace(params, max_tokens=6, seed=7, n=2 - params.greedy, ignore_eos=True) for params in OWN_LOGITS]
        expected, found = (tokens(engine.generate(prompts()[:4], own)) for engine in both)
        assert found == expected and not gathered
        if excluded is not None:
            assert not {3, 30, families.VOCAB - 1} & {token for one in found for answer in one for token in answer}
    every = [replace(params, max_tokens=6, seed=7, ignore_eos=True) for params in ALL_LOGITS]
    expected, found = ([tokens(engine.generate(prompts()[1], params)) for params in every] for engine in both)
    assert found == expected and len(gathered) == 6 * len(every)


def test_a_rank_has_its_share_of_the_heads(pair: Pair) -> None:
    shapes = pair.plain._model.model.layer_shapes
    shares = pair.model.runner.model.layer_shapes
    assert [replace(share, kv_heads=2 * share.kv_heads) for share in shares] == shapes
    assert pair.model.kv_bytes_per_token == pair.plain._model.kv_bytes_per_token


def test_signals_to_all_processes_are_for_rank_0(pair: Pair) -> None:
    for one in signal.SIGINT, signal.SIGTERM:
        pair.follower.send_signal(one)
    pair.sharded.generate(prompts()[0], GREEDY)
    assert pair.follower.poll() is None


def kill(pair: Pair) -> None:
    pair.follower.kill()


def freeze(pair: Pair) -> None:
    pair.follower.send_signal(signal.SIGSTOP)


def fail(pair: Pair) -> None:
    def run(*_: object) -> NoReturn:
        raise IndexError("no such slot")

    pair.model.runner.run = run


FAULTS = dict(
    zip(
        ARCHITECTURES,
        [(kill, "rank 1 was killed by signal 9"), (fail, "IndexError"), (freeze, "Timed out")],
        strict=True,
    )
)


def test_what_breaks_a_rank_ends_every_request(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is killed or frozen; or a step raises, in which the other ranks then wait in vain."""
    monkeypatch.setattr(ranks, "STEP_SECONDS", 3.0)
    monkeypatch.setattr(ranks, "_STOP_SECONDS", 0.5)
    monkeypatch.setattr(ranks, "_LOOK_SECONDS", 0.1)  # PyTorch ends a process that waits for twice STEP_SECONDS
    ranks.bound_steps(pair.model.runner.model.model)
    fault, says = FAULTS[pair.architecture]

    async def read(engine: AsyncEngine, prompt: list[int], begun: asyncio.Event) -> str:
        try:
            async for _ in engine.generate(prompt, LONG):
                begun.set()
        except EngineDead as error:
            return str(error)
        return "finished"

    async def run() -> list[str]:
        begun = asyncio.Event()
        async with AsyncEngine(pair.sharded) as engine:
            reads = [asyncio.create_task(read(engine, prompt, begun)) for prompt in prompts()]
            await begun.wait()
            fault(pair)
            ends = await asyncio.wait_for(asyncio.gather(*reads), 120)
            with pytest.raises(EngineDead):
                await anext(engine.generate([3, 4]))
        return ends

    ends = asyncio.run(run())
    assert len(ends) == len(prompts()) and all(says in end for end in ends), ends
    assert pair.follower.poll() is not None


def test_four_ranks_equal_one_process_until_one_of_them_is_killed(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    sizes = {"vocab_size": families.VOCAB + 3, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = LlamaConfig(**heads, **sizes, bos_token_id=None, eos_token_id=None, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    params = [replace(own, max_tokens=8, seed=3, ignore_eos=True) for own in OWN_LOGITS]
    with Engine(tmp_path, **TIGHT) as plain:
        expected = tokens(plain.generate(prompts()[:4], params))
    with Engine(tmp_path, **TIGHT, tensor_parallel_size=4) as sharded:
        for gather in True, False:
            sharded._model.gather_logits = gather
            assert tokens(sharded.generate(prompts()[:4], params)) == expected
        processes = sharded._model.followers.processes
        processes[1].kill()
        with pytest.raises(EngineDead, match="rank 2 was killed by signal 9"):
            sharded.generate(prompts(), LONG)
        assert all(process.wait(60) is not None for process in processes)


# -- processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("llama"))


SCRIPT = """
import sys, torch
from radixgen import Engine, SamplingParams
torch.set_num_threads(1)
engine = Engine(sys.argv[1], kv_tokens=256, tensor_parallel_size=2)
print("ready", flush=True)
while True:
    engine.generate([3, 4, 5])
"""


def test_two_ranks_keep_their_kv_in_host_memory(llama: Path) -> None:
    """Each its own heads; what comes back is what went."""
    answers = []
    for options in {}, {"tensor_parallel_size": 2, "host_kv_tokens": 2_000}:
        with Engine(llama, **TIGHT, **options) as engine:
            if engine._core.host is not None:
                engine._core.host.fetches.min_fetch = 1
            found = [engine.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in 2 * prompts()]
            engine.check()
            assert bool(engine.stats().host_fetched_tokens) == bool(options)
        answers.append(found)
    assert answers[0] == answers[1]


def test_no_rank_outlives_a_killed_engine(llama: Path, tmp_path: Path) -> None:
    """Its followers hold its standard error, which ends when the last of them does. Nor does their folder stay."""
    command = [sys.executable, "-c", SCRIPT, str(llama)]
    environment = rank_environment(0) | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=-1, stderr=-1, env=environment) as engine:
        assert engine.stdout is not None and engine.stdout.readline() == b"ready\n"
        engine.kill()
        engine.communicate(timeout=120)
    assert not list(tmp_path.glob("radixgen-*"))


def test_ranks_that_were_forgotten_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they have begun to listen too."""
    monkeypatch.setattr(ranks, "_STOP_SECONDS", 0.2)
    followers = Followers(a_job(tmp_path))
    (process,) = followers.processes
    home = Path(followers.job.store).parent
    del followers
    gc.collect()
    assert process.poll() is not None and not home.exists()


def test_what_no_rank_can_run_is_refused_once_by_name(tmp_path: Path) -> None:
    """Cohere norms queries and keys by a weight for each head, which transformers' plan does not shard."""
    with pytest.raises(UnsupportedModel, match=r"cohere.*does not run"):
        Engine(saved("cohere", tmp_path), kv_tokens=64, tensor_parallel_size=2)
    assert not dist.is_initialized()


# -- refusals, before any process is started ------------------------------------------------------------------


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        pytest.fail("a process was started")

    monkeypatch.setattr(subprocess, "Popen", started)


@pytest.mark.parametrize(
    ("family", "size", "says"),
    [
        ("gpt2", 2, r"gpt2.*no tensor-parallel plan"),
        ("starcoder2", 2, r"starcoder2.*1 KV heads"),
        ("llama", 3, r"llama.*2 KV heads"),
        ("llama", 4, r"llama.*6 query heads"),
    ],
)
@pytest.mark.usefixtures("no_process")
def test_models_that_cannot_be_sharded(family: str, size: int, says: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        Engine(saved(family, tmp_path), kv_tokens=64, tensor_parallel_size=size)


@pytest.mark.usefixtures("no_process")
def test_gguf_files_are_not_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radixgen.model.loader._config", lambda *_: families.build("llama").config)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UnsupportedModel, match="GGUF"):
        Engine(tmp_path, kv_tokens=64, tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 65}, "tensor_parallel_size"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 2, "device": "cuda:1"}, "device"),
        ({"tensor_parallel_size": 2, "dtype": "int3"}, "dtype"),
    ],
)
@pytest.mark.usefixtures("no_process")
def test_options_that_cannot_be(options: dict, field: str, llama: Path) -> None:
    with pytest.raises(InvalidRequest, match=field):
        Engine(llama, **({"kv_tokens": 64} | options))


@pytest.mark.parametrize("model", [StampModel(), families.build("llama")], ids=["Model", "transformers"])
@pytest.mark.usefixtures("no_process")
def test_a_model_in_this_process_cannot_be_sharded(model: object) -> None:
    with pytest.raises(InvalidRequest, match="model="):
        Engine(model, kv_tokens=64, tensor_parallel_size=2)


@pytest.mark.usefixtures("no_process")
def test_a_process_group_of_the_callers_is_left_alone(llama: Path, tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with pytest.raises(InvalidRequest, match="process group"):
            Engine(llama, kv_tokens=64, tensor_parallel_size=2)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


# -- what the ranks say to each other -------------------------------------------------------------------------

columns = st.sampled_from([np.int32, np.int64, np.float64]).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=5))
)


@given(st.sampled_from(RankCommand), st.lists(columns, max_size=6))
def test_frames_carry_arrays_as_they_are(kind: RankCommand, sent: list[np.ndarray]) -> None:
    got_kind, got = unpack(bytearray(pack(kind, sent)))
    assert got_kind is kind and len(got) == len(sent)
    for one, other in zip(sent, got, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes() and other.flags.aligned and other.flags.writeable


@given(st.data(), st.lists(columns, max_size=3))
def test_frames_that_were_cut_or_changed_are_refused_or_read(data: st.DataObject, sent: list[np.ndarray]) -> None:
    frame = bytearray(pack(RankCommand.RUN, sent))
    with pytest.raises(ValueError, match=r"not a frame|buffer|bytes too many"):
        unpack(frame[: data.draw(st.integers(0, len(frame) - 1))])
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(ValueError):
        unpack(frame)


class Recorder(StampModel):
    """Sends each step through the frames of the ranks, and answers what came out."""

    seen = 0

    def run(self, plan: Plan, token_ids: np.ndarray, slots: np.ndarray, logit_rows: np.ndarray) -> torch.Tensor:
        kind, sent = unpack(bytearray(pack_step(ModelInput(plan, token_ids, slots, logit_rows))))
        got = unpack_step(sent, {})
        assert kind is RankCommand.RUN
        for name in COLUMNS:
            one, other = getattr(plan, name), getattr(got.plan, name)
            assert (one.dtype, one.shape) == (other.dtype, other.shape), name
            assert np.array_equal(one, other), name
        assert replace(got.plan, nodes=plan.nodes, **{name: getattr(plan, name) for name in COLUMNS}) == replace(
            plan, _origin=None, _windowed={}
        )
        self.seen += 1
        return super().run(*got)


def test_a_step_comes_out_as_it_went_in() -> None:
    known = {*COLUMNS, "tile_rows", "age", "predicted", "window", "nodes", "_origin", "_windowed"}
    assert {field.name for field in fields(Plan)} == known, "say whether the new field travels"
    model = Recorder(vocab_size=families.VOCAB)
    with Engine(model, **TIGHT) as engine:
        engine.generate(prompts(), SamplingParams(max_tokens=12))
    assert model.seen > 10


def test_plans_have_the_same_origins_on_all_ranks() -> None:
    """As long as either side has a use for them."""
    origins, known = PlanOrigins(), WeakValueDictionary()
    built = [unpack_step(unpack(bytearray(a_step()))[1], {}).plan for _ in range(2)]

    def send(plan: Plan) -> tuple[int, Plan]:
        step, number = ModelInput(plan, *[np.empty(0, np.int64)] * 3), origins.number(plan)
        return number, unpack_step(unpack(bytearray(pack_step(step, origin=number)))[1], known).plan

    first, second = send(built[0]), send(built[1])
    later = send(built[0].advance().advance())
    assert first[0] == later[0] != second[0] and later[1].age == 2
    assert later[1].origin is first[1] is first[1].origin and second[1].origin is second[1]
    number = first[0]
    del first, later
    again = send(built[0].advance())
    assert again[0] == number and again[1].origin is again[1], "an origin that is not known is a new one"
    built.clear()
    assert not origins._numbers


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), Channel(theirs)


def test_a_channel_ends_with_its_other_end(channels: tuple[Channel, Channel]) -> None:
    ours, theirs = channels
    with pytest.raises(TimeoutError):
        ours.receive(0.01)
    theirs.send(b"")
    assert ours.receive(1.0) == b""
    theirs.socket.sendall((MAX_FRAME + 1).to_bytes(8, "little"))
    with pytest.raises(ChannelClosed, match="at most"):
        ours.receive(1.0)
    theirs.socket.sendall(b"half")
    theirs.close()
    with pytest.raises(ChannelClosed, match="gone"):
        ours.receive(1.0)
    with pytest.raises(ChannelClosed):
        ours.send(b"x")


class Failing(StampModel):
    """No memory for more than 50 slots, and raises in its first step."""

    def allocate(self, slots: int) -> None:
        if slots > 50:
            raise torch.OutOfMemoryError(f"{slots} slots")
        super().allocate(slots)

    def run(self, *_: object) -> torch.Tensor:
        raise IndexError("no such slot")


def test_a_follower_answers_for_its_memory_and_ends_with_what_a_step_raises(channels: tuple[Channel, Channel]) -> None:
    ours, theirs = channels
    for slots in 100, 50:
        ours.send(pack(RankCommand.ALLOCATE, [np.array([slots])]))
    ours.send(a_step())
    with pytest.raises(IndexError, match="no such slot"):
        follow(theirs.receive, theirs, Failing())
    assert ours.receive() == b'{"refused": "OutOfMemoryError: 100 slots"}'
    assert ours.receive() == b'{"allocated": 1}'


class Company:
    """Followers that have room for `room` slots."""

    def __init__(self, room: int) -> None:
        self.room, self.asked, self.ended = room, [], threading.Event()
        self.job = SimpleNamespace(size=2)

    def send(self, frame: bytes) -> None:
        kind, sent = unpack(bytearray(frame))
        if kind is RankCommand.ALLOCATE:
            self.asked.append(int(sent[0][0]))

    def describe_exits(self) -> str:
        return ""

    def answers(self, _: float) -> list[dict]:
        return [{"allocated": 1} if self.asked[-1] <= self.room else {"refused": "OutOfMemoryError: too many"}]

    def stop(self) -> None: ...


class Runner(StampModel):
    costs = ()
    device = torch.device("cpu")
    runner_slots = 0

    def allocate(self, slots: int) -> None:
        self.runner_slots = slots
        super().allocate(slots)

    def drop_graphs(self) -> None: ...


def test_a_pool_is_as_large_as_the_least_rank_has_room_for(caplog: pytest.LogCaptureFixture) -> None:
    """By default: what one rank can't hold, no rank keeps."""
    company, runner = Company(room=300), Runner()
    model = ParallelModel(runner, company, kv_room=400 * 2 * runner.kv_bytes_per_token)
    with Engine(model) as engine:
        assert company.asked == [400, 0, 300] and runner.runner_slots == 300
        assert engine.stats().kv_tokens_total == 300
    assert "rank 1: OutOfMemoryError" in caplog.text
    with pytest.raises(InvalidRequest, match=r"kv_tokens=301.*rank 1"):
        Engine(model, kv_tokens=301)
    assert runner.runner_slots == 0


def test_what_a_device_gives_after_a_rank_has_ended_reaches_nobody() -> None:
    """Collectives that are given up leave nonsense, and raise nothing where they were captured."""
    company = Company(room=100)

    class Nonsense(Runner):
        def run(self, *step: object) -> torch.Tensor:
            company.ended.set()
            return super().run(*step)

    runner = Nonsense()
    with Engine(ParallelModel(runner, company, kv_room=100 * 2 * runner.kv_bytes_per_token)) as engine:
        engine.submit([0, 1, 2], SamplingParams(max_tokens=1))
        with pytest.raises(EngineDead, match="Timed out"):
            engine.step()


def a_job(folder: Path) -> RankJob:
    return RankJob(
        rank=0,
        size=2,
        store="",
        model=str(folder / "nothing"),
        dtype="auto",
        device="cpu",
        attention="auto",
        max_model_len=None,
        max_step_tokens=64,
        threads=1,
    )


def a_step() -> bytes:
    """The first step of some request."""
    sent: list[bytes] = []

    class Sending(StampModel):
        def run(self, *step: object) -> torch.Tensor:
            sent.append(pack_step(ModelInput(*step)))
            return super().run(*step)

    with Engine(Sending(), kv_tokens=64) as engine:
        engine.generate([0, 1, 2], SamplingParams(max_tokens=1))
    return sent[0]


def test_the_job_comes_as_it_was_sent(tmp_path: Path) -> None:
    job = replace(a_job(tmp_path), max_model_len=7)
    assert RankJob.from_bytes(bytearray(job.as_bytes())) == job


def test_the_environment_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", "/somewhere"])
    found = rank_environment(3)
    assert found["LOCAL_RANK"] == "3"
    assert found["PYTHONPATH"] == f"{Path.cwd()}{os.pathsep}/somewhere"


# -- captured steps -------------------------------------------------------------------------------------------


def test_captured_steps_of_two_ranks_equal_one_process(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Warmed up, replayed and begun ahead; then one rank can't capture a size, and both run it as it is."""
    pytest.importorskip("triton")
    options = {"kv_tokens": 64, "max_model_len": 32, "max_step_tokens": 4}
    asked, params = [[3, 4, 5], [9, 8]], SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    with Engine(llama, **options) as plain:
        expected = tokens(plain.generate(asked, params))
    with Engine(llama, **options, attention="triton", tensor_parallel_size=2, warm_up=False) as sharded:
        model = sharded._model
        for step in model.warm_up_steps(2, 2)[:3]:
            assert step().gather().shape[1] == families.VOCAB
        graphs = model.runner._graphs
        assert graphs._graphs and sharded.stats().kv_bytes_read == 0
        begun = count_calls(monkeypatch, ParallelModel, "run_ahead")
        assert tokens(sharded.generate(asked, params)) == expected
        assert begun
        sharded.check()
        sharded.reset_prefix_cache()
        model.allocate(64)  # all begin again, but now rank 0 can capture nothing
        monkeypatch.setattr(model.runner._graphs._capture, "record", no_capture)
        assert tokens(sharded.generate([[3, 4, 5]], params)) == expected[:1]
        assert not model.runner.runs_ahead and "without CUDA graphs" in caplog.text
        assert sharded.stats().failed_captures == 1


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[int]:
    calls, method = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *given: calls.append(1) or method(self, *given))
    return calls


def no_capture(_: object) -> NoReturn:
    raise RuntimeError("no capture")


@pytest.mark.parametrize(("ours", "theirs"), [(True, True), (True, False), (False, True)])
def test_ranks_agree(
    ours: bool, theirs: bool, channels: tuple[Channel, Channel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[RingReader] = []

    def start(self: Followers, _: int) -> None:
        self._channels.append(channels[0])
        readers.append(RingReader(*map(os.dup, self._ring.add_reader())))

    monkeypatch.setattr(Followers, "_start", start)
    followers = Followers(a_job(tmp_path))
    answer = ranks.in_thread(lambda: agree(channels[1], readers[0].read, theirs), "test")
    assert followers.agree(ours) is answer.result(10) is (ours and theirs)


class Unsteady:
    """A capture that some rank can't make."""

    def rehearse(self, _: object) -> None: ...

    def record(self, run: object) -> object:
        return run


def test_a_graph_that_another_rank_cannot_capture_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = StepGraphs.__new__(StepGraphs)
    graphs._capture = Unsteady()
    graph = SimpleNamespace(forward=lambda: torch.ones(1))
    assert torch.equal(graphs._first_run_together(graph, lambda fine: fine), torch.ones(1))
    with pytest.raises(NotCapturable, match="another rank"):
        graphs._first_run_together(graph, lambda _: False)
    monkeypatch.setattr(graphs._capture, "rehearse", no_capture)
    with pytest.raises(RuntimeError, match="no capture"):  # the other ranks are in the midst of the same pass
        graphs._first_run_together(graph, lambda _: pytest.fail("asked"))
