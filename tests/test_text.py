"""Text into and out of every face: special tokens, ends of chats, halves of characters, ids without text."""

import asyncio
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fake_front import ADD, ERROR, LENGTH, encode
from served import Served, in_process
from serving import serving
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bench.null import NullModel
from radixgen import (
    AsyncClient,
    AsyncEngine,
    BeamSearchParams,
    Client,
    Engine,
    InvalidRequest,
    Limits,
    RequestOutput,
    SamplingParams,
)
from radixgen.explain import PromptText, explain
from radixgen.kernels.drawable_tokens import DrawableTokens
from radixgen.model.loader import load_tokenizer
from radixgen.sampling.sampler import draw
from radixgen.serve.http.auth import Caller, Keys
from radixgen.serve.zmq import wire, wire_params
from radixgen.serve.zmq.service import Service

HALF = "Hi \ud83d"
FEW = SamplingParams(temperature=0.0, max_tokens=2)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    found: PreTrainedTokenizerFast = load_tokenizer("smollm2")
    return found


def ids(text: str) -> list[int]:
    found: list[int] = tokenizer()(text)["input_ids"]
    return found


START, END = 1, 2
"""`<|im_start|>` and `<|im_end|>`, which SmolLM2 leaves out of texts"""


class Says(NullModel):
    """The token that comes after position `p` is `said[p - first]`, the likeliest by far; then a space."""

    def __init__(self, said: list[int], *, first: int = 0, ends: frozenset[int] = frozenset(), size: int = 49_152):
        super().__init__(size, 2_048, rows=1)
        self.eos_token_ids = ends
        self._said = said
        self._first = first

    def run(self, plan: Any, token_ids: Any, slots: Any, logit_rows: Any) -> torch.Tensor:
        logits = torch.zeros(len(logit_rows), self.vocab_size)
        for row, position in enumerate((plan.row_positions[logit_rows] - self._first).tolist()):
            token = self._said[position] if 0 <= position < len(self._said) else ids(" ")[0]
            logits[row, token] = 30.0
        return logits


def says(said: list[int], **options: Any) -> Engine:
    return Engine(Says(said, **options), tokenizer=tokenizer(), kv_tokens=4_096)


# -- special tokens ---------------------------------------------------------------------------------------

SAID = [*ids("A b"), END, START, *ids("C")]


def params(**own: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": len(SAID)} | own))


@pytest.mark.parametrize(
    ("own", "text", "stop_reason"),
    [
        ({}, "A bC", None),
        ({"stop": "<|im_end|>"}, "A b", "<|im_end|>"),
        ({"stop": ["x", "<|im_end|><|im_start|>"]}, "A b", "<|im_end|><|im_start|>"),
        ({"stop": "<|im_end|>", "min_tokens": 4}, "A bC", None),
        ({"stop": "<|im_end|>", "include_stop_str_in_output": True}, "A b<|im_end|>", "<|im_end|>"),
        ({"skip_special_tokens": False}, "A b<|im_end|><|im_start|>C", None),
        ({"skip_special_tokens": False, "stop": "<|im_start|>"}, "A b<|im_end|>", "<|im_start|>"),
        ({"skip_special_tokens": False, "stop": "<|im_end|><|im_start|>C"}, "A b", "<|im_end|><|im_start|>C"),
    ],
)
def test_special_tokens_in_texts_and_stop_strings(own: dict[str, Any], text: str, stop_reason: str | None) -> None:
    with says(SAID) as engine:
        (whole,) = engine.generate("Hi", params(**own))
        assert (whole.outputs[0].text, whole.outputs[0].stop_reason) == (text, stop_reason)
        assert whole.outputs[0].finish_reason == ("stop" if stop_reason else "length")
        streamed = [delta.outputs[0].text for delta in engine.stream("Hi", params(**own))]
        assert "".join(streamed) == text
        engine.check()


def test_a_stop_string_of_special_tokens_is_none_of_a_turn() -> None:
    with says([*ids("A"), START, *ids("B")], first=ids_of_first_turn() - 1) as engine:
        talk = engine.conversation(params=params(stop="<|im_start|>"))
        assert talk.say("Hi").outputs[0].text == "A"
        assert START not in talk.token_ids[-1:] and not talk.breaks
        talk.say("Hi")
        assert not talk.breaks


def ids_of_first_turn() -> int:
    with says([]) as engine:
        return len(engine.chat_tokens([{"role": "user", "content": "Hi"}]))


# -- how chats end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [frozenset(), frozenset({0})])
def test_chats_end_at_the_tokenizers_end_and_plain_prompts_at_the_models(own: frozenset[int]) -> None:
    """As transformers' `generate`, which knows no template."""
    messages = [{"role": "user", "content": "Hi"}]
    first = ids_of_first_turn() - 1
    with says([*ids("A"), END, *ids("B"), 0, *ids("C")], first=first, ends=own) as engine:
        prompt = engine.chat_tokens(messages)
        (chat,) = engine.chat(messages, params())
        assert (chat.outputs[0].text, chat.outputs[0].finish_reason, chat.outputs[0].stop_reason) == ("A", "stop", None)
        (plain,) = engine.generate(prompt, params(max_tokens=5))
        assert plain.outputs[0].text == ("AB" if own else "ABC")
        (as_chat,) = engine.generate(prompt, engine.inputs.for_chat(params()))
        assert as_chat.outputs == chat.outputs
        assert engine.conversation(params=params()).say("Hi").outputs[0].text == "A"
        (ignored,) = engine.chat(messages, params(ignore_eos=True, max_tokens=5))
        assert ignored.outputs[0].text == "ABC"
        beams = engine.chat(messages, BeamSearchParams(beam_width=2, max_tokens=5))[0].outputs
        assert beams[0].finish_reason == "stop" and beams[0].token_ids == [*ids("A"), END]


def test_end_tokens_of_a_request_go_over_the_wire() -> None:
    sent = wire_params.from_params(SamplingParams(end_token_ids=(7, 9)), [5, 7])
    assert (sent.eos_token_id, sent.stop_token_ids) == (5, [7, 9])
    assert wire_params.from_params(SamplingParams(end_token_ids=(7,)), []).eos_token_id == 7
    assert wire_params.from_params(SamplingParams(end_token_ids=(7,), ignore_eos=True), []).eos_token_id is None


# -- two tokens for the beginning ---------------------------------------------------------------------------


def with_bos() -> PreTrainedTokenizerFast:
    """It begins every text with `<s>`."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "Hi": 1, "you": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="?")
    made.chat_template = "<s>{% for m in messages %} {{ m.content }}{% endfor %}"
    return made


def test_a_doubled_beginning_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with Engine(NullModel(4), tokenizer=with_bos(), kv_tokens=256) as engine:
        for prompt in ("Hi", [0, 1]):
            engine.generate(prompt, FEW)
        engine.chat([{"role": "user", "content": "Hi"}], FEW)
        assert "twice" not in caplog.text
        for _ in range(2):
            engine.generate("<s> Hi", FEW)
        assert caplog.text.count("prompt begins with <s> twice") == 1


def test_a_doubled_beginning_is_told_over_http() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        for prompt, warned in (("Hi", False), ("<s> Hi", True), (["Hi", "<s> Hi"], True), ([0, 0, 1], True)):
            answer = await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
            assert answer.status_code == 200 and ("twice" in answer.headers.get("warning", "")) == warned
        body = {"messages": [{"role": "user", "content": "<s> Hi"}], "max_tokens": 1}
        answer = await client.post("/v1/chat/completions", json=body)
        assert "messages begins with <s> twice" in answer.headers["warning"]

    in_process(test, Engine(NullModel(4), tokenizer=with_bos(), kv_tokens=256))


# -- halves of surrogate pairs ------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Engine], object]] = {
    "prompt": lambda engine: engine.generate(HALF, FEW),
    "one of many": lambda engine: engine.generate(["Hi", HALF], FEW),
    "submit": lambda engine: engine.submit(HALF, FEW),
    "stream": lambda engine: engine.stream(HALF, FEW),
    "beams": lambda engine: engine.beam_search(HALF, BeamSearchParams(beam_width=2)),
    "tokenize": lambda engine: engine.tokenize(HALF),
    "score": lambda engine: engine.score(HALF, [" a"]),
    "continuation": lambda engine: engine.score("Hi", [HALF]),
    "pin": lambda engine: engine.pin(HALF),
    "preload": lambda engine: engine.preload(HALF),
    "request_id": lambda engine: engine.submit("Hi", FEW, request_id=HALF),
    "namespace": lambda engine: engine.submit("Hi", FEW, namespace=HALF),
    "namespace of a pin": lambda engine: engine.pin("Hi", namespace=HALF),
    "content": lambda engine: engine.chat([{"role": "user", "content": HALF}], FEW),
    "part": lambda engine: engine.chat([{"role": "user", "content": [{"type": "text", "text": HALF}]}], FEW),
    "role": lambda engine: engine.chat([{"role": HALF, "content": "Hi"}], FEW),
    "name": lambda engine: engine.chat([{"role": "user", "content": "Hi", "name": HALF}], FEW),
    "key": lambda engine: engine.chat([{"role": "user", "content": "Hi", HALF: 1}], FEW),
    "tool": lambda engine: engine.chat_tokens([{"role": "user", "content": "Hi"}], [{"name": HALF}]),
    "system": lambda engine: engine.conversation(HALF),
    "turn": lambda engine: engine.conversation(params=FEW).say(HALF),
    "added": lambda engine: engine.conversation(params=FEW).add({"role": "tool", "content": HALF}),
    "tools of a conversation": lambda engine: engine.conversation(tools=[{"name": HALF}]),
    "namespace of a conversation": lambda engine: engine.conversation(namespace=HALF),
    "stop": lambda engine: engine.generate("Hi", SamplingParams(stop=HALF)),
    "stops": lambda engine: engine.generate("Hi", SamplingParams(stop=["a", HALF])),
    "choice": lambda engine: engine.generate("Hi", SamplingParams(choice=["a", HALF])),
    "regex": lambda engine: engine.generate("Hi", SamplingParams(regex=HALF)),
    "grammar": lambda engine: engine.generate("Hi", SamplingParams(grammar=f'start: "{HALF}"')),
    "schema": lambda engine: engine.generate("Hi", SamplingParams(json_schema={"const": HALF})),
    "schema's key": lambda engine: engine.generate("Hi", SamplingParams(json_schema={"properties": {HALF: {}}})),
    "schema as text": lambda engine: engine.generate("Hi", SamplingParams(json_schema=f'{{"const": "{HALF}"}}')),
    "escaped": lambda engine: engine.generate("Hi", SamplingParams(json_schema='{"const": "\\ud83d"}')),
    "format": lambda engine: engine.generate("Hi", SamplingParams(response_format=response_format(HALF, {}))),
    "format's schema": lambda engine: engine.generate(
        "Hi", SamplingParams(response_format=response_format("a", {"const": HALF}))
    ),
}


def response_format(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


def test_half_of_a_surrogate_pair_is_refused_by_every_call() -> None:
    with says([]) as engine:
        for name, call in CALLS.items():
            with pytest.raises(InvalidRequest) as caught:
                call(engine)
            assert str(caught.value).isascii() or HALF not in str(caught.value), name
            str(caught.value).encode()
        assert not engine.has_unfinished
        engine.check()


def test_half_of_a_surrogate_pair_does_not_come_back_from_a_file() -> None:
    with says([]) as engine:
        saved = json.loads(engine.conversation("Hi").save())
        saved["turns"][0]["messages"][0]["content"] = HALF
        for text in (json.dumps(saved), json.dumps(saved, ensure_ascii=False)):
            with pytest.raises(InvalidRequest, match="surrogate"):
                type(engine.conversation()).load(engine, text)


def test_wires_and_salts_refuse_half_of_a_surrogate_pair() -> None:
    for own in (SamplingParams(regex=HALF), SamplingParams(json_schema={HALF: 1}), SamplingParams(choice=[HALF])):
        with pytest.raises(InvalidRequest, match="surrogate"):
            wire_params.from_params(own, [])
    with pytest.raises(InvalidRequest, match="surrogate"):
        wire.encode([HALF])
    with pytest.raises(InvalidRequest, match="cache_salt"):
        Keys([]).namespace(Caller(""), HALF, Limits())
    with says([]) as engine, pytest.raises(InvalidRequest, match="cache_salt"):
        Service(engine, b"key").namespace(HALF)
    with pytest.raises(InvalidRequest, match="surrogate"):
        explain([PromptText(HALF)], tokenizer())


BODIES = [
    b'{"prompt": "Hi \\ud83d"}',
    b'{"prompt": ["a", "\\ud83d x"]}',
    b'{"prompt": "a", "user": "\\udc00"}',
    b'{"prompt": "a", "stop": ["\\ud83d"]}',
    b'{"prompt": "a", "cache_salt": "\\ud83d\\ud83d"}',
    b'{"prompt": "a", "metadata": {"\\ud83d": 1}}',
    b'{"prompt": "a", "\\ud83d": 1}',
    b'{"unknown": 1, "prompt": "\\ud83d"}',
    b'{"use_beam_search": false, "prompt": "\\ud83d"}',
    b'{"prompt": "a", "structured_outputs": {"json": "{\\"const\\": \\"\\\\ud83d\\"}"}}',
    b'{"prompt": "a", "structured_outputs": {"choice": ["\\ud83d"]}}',
    b'{"prompt": "a\xed\xa0\xbd"}',
]


def test_half_of_a_surrogate_pair_is_a_400_over_http() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        headers = {"content-type": "application/json"}
        for body in BODIES:
            answer = await client.post("/v1/completions", content=body, headers=headers)
            assert answer.status_code == 400, (body, answer.text)
        error = (await client.post("/v1/completions", content=BODIES[2], headers=headers)).json()["error"]
        assert error["param"] == "user" and "surrogate" in error["message"]
        chat = b'{"messages": [{"role": "user", "content": "\\ud83d"}], "session_id": "a"}'
        for path in ("/v1/chat/completions", "/tokenize"):
            answer = await client.post(path, content=chat, headers=headers)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"
        assert (await client.get("/v1/models/%ED%A0%BD")).status_code == 404

    in_process(test, says([]))


def test_a_worker_tells_that_it_cannot_read_half_of_a_surrogate_pair() -> None:
    with serving() as served:
        (front,) = served.fronts
        for name, own in {"salt": ["HALF", {}], "grammar": [None, {"structured_outputs": {"regex": "HALF"}}]}.items():
            sampling = {"temperature": 0.0, "max_tokens": 3, **own[1]}
            request = [name, [1, 2], None, sampling, None, 0.0, None, own[0], None, None, None, 0]
            front.send(ADD, encode(request).replace(b"HALF", b"\xed\xa0\xbd!"))
        front.add("well", [1, 2])
        front.ended("salt", "grammar", "well")
        assert [front.ends[name][0][0] for name in ("salt", "grammar", "well")] == [ERROR, ERROR, LENGTH]


def test_half_of_a_surrogate_pair_is_refused_by_coroutines() -> None:
    async def test() -> None:
        async with AsyncEngine(says([])) as engine:
            calls = [engine.open(HALF, FEW), engine.open("Hi", SamplingParams(stop=HALF)), engine.tokenize(HALF),
                     engine.open("Hi", FEW, namespace=HALF), engine.open("Hi", FEW, request_id=HALF),
                     engine.score("Hi", [HALF]), engine.pin(HALF), engine.preload([HALF]),
                     engine.open("Hi", SamplingParams(choice=[HALF])),
                     engine.conversation(params=FEW).say(HALF)]  # fmt: skip
            for call in calls:
                with pytest.raises(InvalidRequest, match="surrogate"):
                    await call
            assert not (await engine.stats()).num_waiting

    asyncio.run(asyncio.wait_for(test(), 60))


# -- HTTP -------------------------------------------------------------------------------------------------


def test_special_tokens_over_http() -> None:
    first = ids_of_first_turn() - 1
    messages = [{"role": "user", "content": "Hi"}]
    said = [*ids("A b"), START, *ids("C"), END, *ids("D")]

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        async def chat(**own: Any) -> Any:
            body = {"messages": messages, "max_tokens": len(said), "temperature": 0} | own
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]

        found = await chat()
        assert (found["message"]["content"], found["finish_reason"]) == ("A bC", "stop")
        found = await chat(stop=["<|im_start|>"])
        assert (found["message"]["content"], found["stop_reason"]) == ("A b", "<|im_start|>")
        for skip, text in ((True, "A bC"), (False, "A b<|im_start|>C")):
            found = await chat(skip_special_tokens=skip, logprobs=True)
            assert found["message"]["content"] == text
            told = b"".join(bytes(one["bytes"]) for one in found["logprobs"]["content"])
            assert told == (text if skip else text + "<|im_end|>").encode()
        prompt = (await client.post("/tokenize", json={"messages": messages})).json()["tokens"]
        body = {"prompt": prompt, "max_tokens": len(said), "temperature": 0}
        plain = (await client.post("/v1/completions", json=body)).json()["choices"][0]
        assert (plain["text"], plain["finish_reason"]) == ("A bCD", "length"), "no chat: the model has no end"

    in_process(test, says(said, first=first))


# -- ids that the tokenizer does not know -------------------------------------------------------------------

UNKNOWN = 49_155


def likes_the_unknown(said: list[int] | None = None, **options: Any) -> Engine:
    return says([UNKNOWN] * 8 if said is None else said, size=49_160, **options)


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"temperature": 1.0, "seed": 3, "n": 4},
        {"logit_bias": {UNKNOWN: 100.0}},
        {"temperature": 1.0, "top_k": 1},
        {"repetition_penalty": 1.3, "presence_penalty": 1.0},
        {"choice": ["ab", "abc"]},
        {"logprobs": 2},
    ],
)
def test_ids_that_the_tokenizer_does_not_know_are_never_drawn(own: dict[str, Any]) -> None:
    with likes_the_unknown() as engine:
        for prompt in ("Hi", [UNKNOWN]):
            (output,) = engine.generate(prompt, params(**own))
            for one in output.outputs:
                assert one.token_ids and max(one.token_ids) < len(tokenizer())
                assert one.finish_reason != "error"
        if "logprobs" in own:
            assert UNKNOWN in one.logprobs[0], "these are the model's own"


def test_beams_hold_no_unknown_ids() -> None:
    with likes_the_unknown() as engine:
        (output,) = engine.beam_search("Hi", BeamSearchParams(beam_width=3, max_tokens=4))
        assert max(token for one in output.outputs for token in one.token_ids) < len(tokenizer())
        assert all(np.isfinite(one.score) for one in output.outputs)


def test_an_end_token_may_be_drawn_although_it_is_unknown() -> None:
    with likes_the_unknown(ends=frozenset([UNKNOWN])) as engine:
        (output,) = engine.generate("Hi", params())
        assert output.outputs[0].finish_reason == "stop" and output.outputs[0].token_ids == [UNKNOWN]


def test_nothing_is_left_out_where_there_is_nothing_to_leave_out() -> None:
    with says([]) as engine:
        assert engine._core._drawable is None
    with Engine(Says([7], size=64), kv_tokens=64) as engine:
        assert engine._core._drawable is None and engine.generate([1], params(max_tokens=1))[0].outputs[
            0
        ].token_ids == [7]


@pytest.mark.parametrize("others", [[7], [6, 7], [0], [2, 5], [0, 3, 6, 7]])
def test_draws_are_those_of_the_tokens_that_are_left(others: list[int]) -> None:
    from test_sampling import state

    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(5))
    logits[:, others] += 20.0
    without = logits.clone()
    without[:, others] = -torch.inf
    drawable, before = DrawableTokens(np.array(others), 8), logits.clone()
    for own in (
        {"temperature": 0.0},
        {"temperature": 1.3},
        {"top_p": 0.7},
        {"min_p": 0.1, "logit_bias": {others[0]: 9.0}},
    ):
        states = [state(SamplingParams(**own), seed=seed) for seed in range(40)]
        assert draw(logits, range(40), states, drawable).wait() == draw(without, range(40), states).wait()
    assert torch.equal(logits, before)


# -- streams that are dropped -------------------------------------------------------------------------------


@contextmanager
def endless() -> Iterator[Engine]:
    with Engine(NullModel(64, 1 << 16), kv_tokens=1 << 17) as engine:
        yield engine


LONG = SamplingParams(temperature=0.0, max_tokens=60_000, ignore_eos=True)


async def idle(engine: AsyncEngine) -> None:
    gc.collect()
    while (await engine.stats()).num_running or engine._queues:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("read", [0, 1])
def test_a_dropped_stream_ends_its_request(read: int) -> None:
    async def test() -> None:
        with endless() as inner:
            async with AsyncEngine(inner) as engine:
                outputs = await engine.open([1, 2], LONG)
                for _ in range(read):
                    await anext(outputs)
                del outputs
                await idle(engine)
                trunk = await engine.open([1, 2], LONG, request_id="trunk")
                forks = await engine.fork("trunk", 2)
                await anext(trunk)
                del trunk, forks
                await idle(engine)

    asyncio.run(asyncio.wait_for(test(), 60))


def test_dropping_it_needs_no_lock() -> None:
    """The garbage collector drops some in a thread that holds the gate."""

    async def test() -> None:
        with endless() as inner:
            async with AsyncEngine(inner) as engine:
                outputs: Any = [await engine.open([1, 2], LONG)]
                with engine._thread._gate:
                    outputs.clear()
                await idle(engine)
                kept = await engine.open([1, 2], LONG)
            del kept

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_dropped_stream_of_a_client_ends_its_request() -> None:
    from test_client import lasting, workers

    def read(output: RequestOutput) -> None:
        assert not output.finished

    with Client() as client, workers(client.address) as (worker,):
        with pytest.raises(InvalidRequest, match="cache_salt"):
            client.stream([1, 2, 3], lasting(1), cache_salt=HALF)
        with pytest.raises(InvalidRequest, match="surrogate"):
            client.pin([1, 2, 3], cache_salt=HALF)
        stream = client.stream([1, 2, 3], lasting(3_000))
        read(next(stream))
        del stream
        until_idle(worker)

    async def dropped() -> None:
        async with AsyncClient() as client:
            with workers(client.address) as (worker,):
                stream = await client.open([1, 2, 3], lasting(3_000))
                read(await anext(stream))
                del stream
                await asyncio.to_thread(until_idle, worker)

    asyncio.run(asyncio.wait_for(dropped(), 60))


def until_idle(worker: Any) -> None:
    import time

    stop = time.monotonic() + 30
    while worker._thread.service.num_live:
        assert time.monotonic() < stop, "its request runs on"
        time.sleep(0.002)
