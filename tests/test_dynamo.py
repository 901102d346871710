"""The engine as Dynamo's worker, on stand-ins for what Dynamo brings; `examples/cluster/dynamo.py` is the real one."""

import asyncio
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from consumer import blocks_of
from oracle import StampModel
from typer.testing import CliRunner

import radixgen.engine.engine as engine_module
from radixgen import CompletionOutput, InvalidRequest, Limits, RequestOutput, SamplingParams
from radixgen.cli import app
from radixgen.core import PromptTokens
from radixgen.serve.dynamo.requests import UsageCounter, chunks, sampling_params

VOCAB = 50


class Fault(Exception):
    pass


class InvalidArgument(Fault):
    pass


class EngineShutdown(Fault):
    pass


@pytest.fixture
def dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`radixgen.serve.dynamo.engine` on plain stand-ins, serving the stamp model."""
    names = {
        "dynamo": {},
        "dynamo.common": {},
        "dynamo.common.backend": {
            "EngineConfig": SimpleNamespace,
            "LlmRegistration": SimpleNamespace,
            "LLMEngine": object,
            "WorkerConfig": SimpleNamespace,
        },
        "dynamo.common.backend.publisher": {"ComponentSnapshot": SimpleNamespace, "ZmqSource": SimpleNamespace},
        "dynamo.common.backend.run": {"run": None},
        "dynamo.llm": {},
        "dynamo.llm.exceptions": {"InvalidArgument": InvalidArgument, "EngineShutdown": EngineShutdown},
    }
    for name, attributes in names.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "radixgen.serve.dynamo.engine", raising=False)
    plain = engine_module.Engine
    model = StampModel(VOCAB, 128)
    module = import_module("radixgen.serve.dynamo.engine")
    monkeypatch.setattr(module, "Engine", lambda name, **options: plain(model, **options, debug=True))
    monkeypatch.setattr(module, "sampling_defaults", lambda *_: {})
    yield module
    del sys.modules["radixgen.serve.dynamo.engine"]


class Context:
    def __init__(self, name: str) -> None:
        self.id = lambda: name


async def started(module: ModuleType, **options: Any) -> Any:
    launch = module.LaunchOptions("stamp", {"kv_tokens": 256}, drain_timeout=0.5, **options)
    served, _ = await module.DynamoEngine.from_args(["--block-size", "4"], launch)
    await served.start(7)
    return served


def asked(tokens: list[int], **stops: Any) -> dict[str, Any]:
    return {
        "token_ids": tokens,
        "stop_conditions": {"max_tokens": 5, "ignore_eos": True} | stops,
        "sampling_options": {"temperature": 0.0},
        "output_options": {},
    }


def test_what_is_registered(dynamo: ModuleType) -> None:
    async def main() -> None:
        launch = dynamo.LaunchOptions("stamp", {"kv_tokens": 64})
        flags = ["--served-model-name", "s", "--block-size", "4", "--discovery-backend", "file"]
        served, config = await dynamo.DynamoEngine.from_args(flags, launch)
        assert (config.model_name, config.served_model_name, config.discovery_backend) == ("stamp", "s", "file")
        await served.cleanup()  # it never started
        found = await served.start(7)
        assert (found.model, found.served_model_name) == ("stamp", "s")
        llm = found.llm
        assert (llm.context_length, llm.kv_cache_block_size, llm.total_kv_blocks) == (64, 4, 16)
        (source,) = await served.kv_event_sources()
        assert source.endpoint.startswith("tcp://127.0.0.1:")
        await served.cleanup()
        await served.cleanup()
        assert await served.kv_event_sources() == []
        with pytest.raises(EngineShutdown):
            await anext(served.generate(asked([1]), Context("late")))

    asyncio.run(main())


def test_options_of_the_command_line(dynamo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[Any] = []
    monkeypatch.setattr(dynamo, "main", lambda *arguments: found.extend(arguments))
    flags = ["--max-num-seqs", "7", "--max-num-batched-tokens", "64", "--seed", "3", "--tensor-parallel-size", "2"]
    flags += ["--profile", str(tmp_path), "--profile-steps", "5", "--kv-offloading-size", "0.5", "--no-warm-up"]
    flags += ["--kv-dir", "kept", "--kv-dir-size", "0.5", "--kv-cache-dtype", "int8", "--drain-timeout", "3"]
    command = ["worker", "--backend", "dynamo", "--model", "stamp", "--block-size", "4", "--enforce-eager", *flags]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    launch, rest = found
    assert dynamo._parser().parse_args(rest).block_size == 4
    assert launch == dynamo.LaunchOptions("stamp", launch.engine, 3.0, tmp_path, 5)
    assert launch.engine == {
        "load_format": "auto",
        "dtype": "auto",
        "quantization": None,
        "kv_dtype": "int8",
        "device": "auto",
        "tensor_parallel_size": 2,
        "max_model_len": None,
        "max_step_tokens": 64,
        "kv_tokens": None,
        "kv_offloading_size": 0.5,
        "kv_dir": Path("kept"),
        "kv_dir_bytes": 2**29,
        "enforce_eager": True,
        "warm_up": False,
        "seed": 3,
        "limits": Limits(max_num_seqs=7),
    }


def test_a_request_is_streamed_with_its_usage_and_its_blocks_are_told(dynamo: ModuleType) -> None:
    async def main() -> None:
        served = await started(dynamo)
        prompt = [*range(1, 10)]
        for cached in (0, 9):
            told = [chunk async for chunk in served.generate(asked(prompt), Context("one"))]
            assert sum(len(chunk["token_ids"]) for chunk in told) == 5
            assert all("finish_reason" not in chunk and chunk["index"] == 0 for chunk in told[:-1])
            assert told[-1]["finish_reason"] == "length"
            assert told[-1]["completion_usage"] == {
                "prompt_tokens": 9,
                "completion_tokens": 5,
                "total_tokens": 14,
                "prompt_tokens_details": {"cached_tokens": cached},
            }
        assert not served._open
        tree = served._engine._engine._core.tree
        await served._engine.check()
        assert len(blocks_of(tree, 4)) == 3
        while served._events.stats().blocks != 3:
            await asyncio.sleep(0.01)
        await served.cleanup()

    asyncio.run(main())


def test_steps_are_profiled(dynamo: ModuleType, tmp_path: Path) -> None:
    async def main() -> None:
        served = await started(dynamo, profile=tmp_path, profile_steps=3)
        assert [chunk async for chunk in served.generate(asked([1, 2]), Context("one"))]
        await served.cleanup()

    asyncio.run(main())
    (path,) = tmp_path.iterdir()
    assert '"step 3"' in path.read_text()


def test_several_sequences_and_logprobs(dynamo: ModuleType) -> None:
    async def main() -> None:
        served = await started(dynamo)
        request = asked([1, 2, 3])
        request["sampling_options"] |= {"n": 2, "temperature": 1.0, "seed": 5}
        request["output_options"] = {"logprobs": 2}
        told = [chunk async for chunk in served.generate(request, Context("two"))]
        for index in (0, 1):
            own = [chunk for chunk in told if chunk["index"] == index]
            assert sum(len(chunk["token_ids"]) for chunk in own) == 5
            assert [chunk["finish_reason"] for chunk in own if "finish_reason" in chunk] == ["length"]
            for chunk in own:
                assert len(chunk["log_probs"]) == len(chunk["token_ids"]) == len(chunk["top_logprobs"])
                assert chunk["top_logprobs"][0][0]["token_id"] == chunk["token_ids"][0]
                assert chunk["top_logprobs"][0][0]["logprob"] == chunk["log_probs"][0]
        assert [c["completion_usage"]["completion_tokens"] for c in told if "completion_usage" in c] == [10]
        await served.cleanup()

    asyncio.run(main())


def test_an_abort_ends_what_has_the_name_and_nobody_else(dynamo: ModuleType) -> None:
    """Clients may choose Dynamo's request ids: two live requests had one name."""

    async def main() -> None:
        served = await started(dynamo)
        ends: dict[str, list[str]] = {}

        async def ask(name: str, first: int, tokens: int) -> None:
            told = [c async for c in served.generate(asked([first, 2, 3], max_tokens=tokens), Context(name))]
            ends.setdefault(name, []).extend(c["finish_reason"] for c in told if "finish_reason" in c)

        tasks = [asyncio.create_task(ask(*one)) for one in (("a", 1, 100), ("a", 2, 100), ("b", 3, 20))]
        while len(served._open.get("a", ())) < 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        await served.abort(Context("a"))
        await served.abort(Context("nobody"))
        await asyncio.gather(*tasks)
        assert ends == {"a": ["cancelled"] * 2, "b": ["length"]}
        await served._engine.check()
        await served.cleanup()

    asyncio.run(main())


def test_a_reader_that_leaves_frees_its_request(dynamo: ModuleType) -> None:
    async def main() -> None:
        served = await started(dynamo)
        outputs = served.generate(asked([1, 2], max_tokens=100), Context("gone"))
        await anext(outputs)
        await outputs.aclose()
        assert not served._open
        while (await served._engine.stats()).num_running:
            await asyncio.sleep(0.01)
        await served.cleanup()

    asyncio.run(main())


def test_cleanup_waits_for_open_requests_then_ends_them(dynamo: ModuleType) -> None:
    async def main() -> None:
        served = await started(dynamo)
        inner = served._engine._engine
        step = inner.step
        inner.step = lambda: time.sleep(0.02) or step()
        short = asyncio.create_task(_last(served.generate(asked([1, 2]), Context("short"))))
        held = served.generate(asked([5, 6], max_tokens=100), Context("nobody reads"))
        await anext(held)
        await asyncio.sleep(0)
        await served.cleanup()
        assert (await short)["finish_reason"] == "length"
        with pytest.raises(EngineShutdown):
            async for _ in held:
                pass

    asyncio.run(main())


async def _last(outputs: Any) -> Any:
    return [chunk async for chunk in outputs][-1]


def test_bad_requests_are_the_callers(dynamo: ModuleType) -> None:
    async def main() -> None:
        served = await started(dynamo)
        for bad in (
            asked([]),
            asked([VOCAB]),
            asked([1] * 128),
            asked([1], max_tokens=0),
            asked([1]) | {"sampling_options": {"temperature": -1.0}},
            asked([1]) | {"sampling_options": {"use_beam_search": True}},
            asked([1]) | {"sampling_options": []},
            asked([1]) | {"output_options": {"prompt_logprobs": 1}},
        ):
            with pytest.raises(InvalidArgument):
                await anext(served.generate(bad, Context("bad")))
        assert not served._open
        assert (await _last(served.generate(asked([1]), Context("good"))))["finish_reason"] == "length"
        await served.cleanup()

    asyncio.run(main())


def test_snapshots_reach_the_publisher(dynamo: ModuleType) -> None:
    async def main() -> None:
        told: list[Any] = []
        served = await started(dynamo)
        served.attach_snapshot_publisher(SimpleNamespace(publish=lambda rank, snapshot: told.append(snapshot)))
        assert served.component_metrics_dp_ranks() == [0]
        while not told:
            await asyncio.sleep(0.01)
        assert (told[0].kv_used_blocks, told[0].kv_total_blocks, told[0].kv_cache_hit_rate) == (0, 64, None)
        await served.cleanup()

    asyncio.run(main())


def test_params_of_a_request_as_dynamo_sends_it() -> None:
    request = {
        "stop_conditions": {"max_tokens": None, "stop": ["\n"], "stop_token_ids_hidden": [0, 2, 2], "min_tokens": None},
        "sampling_options": {
            "n": 2, "best_of": 2, "temperature": 0.5, "top_k": -1, "seed": 3, "use_beam_search": None,
            "logit_bias": {"7": 1.5}, "guided_decoding": {"json": None, "choice": ["a", "b"]},
        },
        "output_options": {"logprobs": 3, "skip_special_tokens": True},
    }  # fmt: skip
    assert sampling_params(request, 40) == SamplingParams(
        n=2, temperature=0.5, top_k=-1, seed=3, logit_bias={7: 1.5}, choice=["a", "b"], logprobs=3,
        max_tokens=40, stop_token_ids=(0, 2),
    )  # fmt: skip
    assert sampling_params({}, 40) == SamplingParams(max_tokens=40)
    defaults = {"temperature": 0.5, "top_k": 7, "max_tokens": 9}
    assert sampling_params({}, 40, defaults) == SamplingParams(temperature=0.5, top_k=7, max_tokens=9)
    set_ones = {"sampling_options": {"temperature": 0.0, "top_k": None}, "stop_conditions": {"max_tokens": 20}}
    assert sampling_params(set_ones, 40, defaults) == SamplingParams(temperature=0.0, top_k=7, max_tokens=9)
    assert sampling_params({"stop_conditions": {"max_tokens": 50}}, 40).max_tokens == 40
    ignoring = {"stop_conditions": {"ignore_eos": True, "stop_token_ids_hidden": [2]}}
    assert sampling_params(ignoring, 9) == SamplingParams(max_tokens=9, ignore_eos=True)
    for bad in ({"logit_bias": {"x": 1}}, {"logit_bias": 3}):
        with pytest.raises(InvalidRequest, match="logit_bias"):
            sampling_params({"sampling_options": bad}, 9)


def test_an_error_is_told_as_one() -> None:
    failed = RequestOutput("r", PromptTokens([1]), [CompletionOutput(0, "", [], "error", "boom")], finished=True)
    (chunk,) = chunks(failed, UsageCounter(1), str)
    assert chunk["finish_reason"] == "error: boom" and chunk["completion_usage"]["completion_tokens"] == 0
