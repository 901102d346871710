"""The application itself: what it answers, what it refuses and how, who may what, and that nothing is left behind."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import families
import httpx
import pytest
import texts
from fastapi.routing import APIRoute
from prometheus_client.parser import text_string_to_metric_families
from served import HI, Served, in_process, limited, scripted, slowed, tiny

from radixgen import AsyncEngine, Engine, InvalidRequest, RequestOutput, SamplingParams
from radixgen.serve.http.app import ServeOptions, create_app
from radixgen.serve.http.auth import Access, Gate, Keys, access_of, is_loopback
from radixgen.serve.http.binding import Binding
from radixgen.serve.http.body import decode
from radixgen.serve.http.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

GREEDY = {"temperature": 0, "max_tokens": 4}


async def post(client: httpx.AsyncClient, path: str, body: Any = None, **headers: str) -> httpx.Response:
    return await client.post(path, json=body, headers=headers)


async def complete(client: httpx.AsyncClient, **body: Any) -> Any:
    answer = await post(client, "/v1/completions", {**GREEDY, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def chat(client: httpx.AsyncClient, **body: Any) -> Any:
    answer = await post(client, "/v1/chat/completions", {**GREEDY, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def events(client: httpx.AsyncClient, path: str, body: Any) -> list[Any]:
    answer = await post(client, path, {**GREEDY, **body, "stream": True})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def figures(text: str) -> dict[str, float]:
    return {
        sample.name + "".join(f",{value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# -- answers --------------------------------------------------------------------------------------------------


def test_completions_are_the_engines() -> None:
    """Text, tokens and counts, of one prompt and of several, in one answer and in a stream."""
    params = SamplingParams(temperature=0.0, max_tokens=4)
    with tiny() as engine:
        expected = [output.outputs[0] for output in engine.generate(["abc", "abd"], params)]

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        found = await complete(client, prompt=["abc", "abd"], return_token_ids=True)
        assert [one["text"] for one in found["choices"]] == [one.text for one in expected]
        assert [one["token_ids"] for one in found["choices"]] == [one.token_ids for one in expected]
        assert [one["index"] for one in found["choices"]] == [0, 1]
        assert found["object"] == "text_completion" and found["model"] == "tiny"
        usage = found["usage"]
        assert usage["prompt_tokens"] == 6 and usage["completion_tokens"] == 8 and usage["total_tokens"] == 14
        assert usage["prompt_tokens_details"]["cached_tokens"] in (0, 2), "the second may come as late as that"
        ids = found["choices"][0]["prompt_token_ids"]
        again = await complete(client, prompt=ids)
        assert again["choices"][0]["text"] == expected[0].text
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
        both = await complete(client, prompt=[ids, ids])
        assert [one["text"] for one in both["choices"]] == [expected[0].text] * 2
        streamed = await events(client, "/v1/completions", {"prompt": ["abc", "abd"]})
        for index in (0, 1):
            own = [c for chunk in streamed for c in chunk["choices"] if c["index"] == index]
            assert "".join(one["text"] for one in own) == expected[index].text
            assert [one["finish_reason"] for one in own if one["finish_reason"]] == ["length"]

    in_process(test, tiny())


def test_a_chat_is_the_engines() -> None:
    with tiny() as engine:
        (expected,) = engine.chat(HI, SamplingParams(temperature=0.0, max_tokens=4))

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        found = await chat(client, messages=HI, return_token_ids=True)
        assert found["prompt_token_ids"] == expected.prompt_token_ids
        (choice,) = found["choices"]
        assert choice["message"] == {"role": "assistant", "content": expected.outputs[0].text, "refusal": None}
        assert choice["token_ids"] == expected.outputs[0].token_ids and choice["finish_reason"] == "length"
        chunks = await events(
            client, "/v1/chat/completions", {"messages": HI, "stream_options": {"include_usage": True}}
        )
        deltas = [one["choices"][0]["delta"] for one in chunks[:-1]]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(one.get("content", "") for one in deltas) == expected.outputs[0].text
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == {
            **found["usage"],
            "prompt_tokens_details": {"cached_tokens": len(expected.prompt_token_ids)},
        }

    in_process(test, tiny())


def test_max_tokens_is_what_is_left() -> None:
    """Of the context, or of the pool where that is smaller."""

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        body = {"messages": HI, "ignore_eos": True, "temperature": 0}
        answer = (await post(client, "/v1/chat/completions", body)).json()
        assert answer["usage"]["total_tokens"] == 101 and answer["choices"][0]["finish_reason"] == "length"
        answer = (await post(client, "/v1/chat/completions", {**body, "max_completion_tokens": 3})).json()
        assert answer["usage"]["completion_tokens"] == 3
        for most in (100, 5_000):
            answer = (await post(client, "/v1/chat/completions", {**body, "max_tokens": most})).json()
            assert answer["usage"]["total_tokens"] == 101
            found = await complete(client, prompt=["abc", "a" * 50], max_tokens=most, ignore_eos=True)
            assert found["usage"]["completion_tokens"] == 2 * 51, "what the longer one leaves"

    in_process(test, tiny(kv_tokens=100))


def test_logprobs() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        found = (await complete(client, prompt="abc", logprobs=3))["choices"][0]
        told = found["logprobs"]
        assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"]) == 4
        for top, own in zip(told["top_logprobs"], told["token_logprobs"], strict=True):
            assert len(top) <= 3 and max(top.values()) == own
        lively = (await complete(client, prompt="abc", logprobs=2, temperature=2.0, seed=1, max_tokens=40))["choices"][
            0
        ]
        tops, tokens = lively["logprobs"]["top_logprobs"], lively["logprobs"]["tokens"]
        assert all(token in top for token, top in zip(tokens, tops, strict=True)), "the token that was drawn is told"
        assert any(len(top) == 3 for top in tops)
        parts = await events(client, "/v1/completions", {"prompt": "abc", "logprobs": 3})
        joined = [one for part in parts for one in part["choices"][0]["logprobs"]["token_logprobs"]]
        assert joined == pytest.approx(told["token_logprobs"], abs=1e-5)
        offsets = [one for part in parts for one in part["choices"][0]["logprobs"]["text_offset"]]
        assert offsets == told["text_offset"]
        none = (await complete(client, prompt="abc", logprobs=0))["choices"][0]["logprobs"]
        assert [list(top.values()) for top in none["top_logprobs"]] == [[own] for own in none["token_logprobs"]]
        content = (await chat(client, messages=HI, logprobs=True, top_logprobs=2))["choices"][0]["logprobs"]["content"]
        assert len(content) == 4
        for one in content:
            assert len(one["top_logprobs"]) == 2 and one["top_logprobs"][0]["logprob"] == one["logprob"]
            assert one["bytes"] is None or bytes(one["bytes"]).decode() == one["token"]

    in_process(test, tiny())


def test_prompts_of_one_request_run_together() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        before = (await served.engine.stats()).steps
        found = await complete(client, prompt=[f"{number:02}" for number in range(64)])
        assert len(found["choices"]) == 64
        assert (await served.engine.stats()).steps - before < 32, "they don't wait for a step each"

    engine = slowed(tiny(), 0.03)
    in_process(test, engine)


def test_usage_in_each_chunk() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        for path, body in (("completions", {"prompt": "abc"}), ("chat/completions", {"messages": HI})):
            options = {"include_usage": True, "continuous_usage_stats": True}
            asked = {**body, "stream_options": options, "skip_special_tokens": True, "ignore_eos": True}
            chunks = await events(client, f"/v1/{path}", asked)
            counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if "usage" in chunk]
            assert counts == sorted(counts) and counts[-2:] == [4, 4] and len(counts) == len(chunks)

    in_process(test, tiny())


def test_no_seed_is_minus_one_too() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        asked = {"prompt": "abc", "max_tokens": 12, "temperature": 2.0}
        drawn = {(await complete(client, **asked, seed=-1))["choices"][0]["text"] for _ in range(3)}
        fixed = {(await complete(client, **asked, seed=-2))["choices"][0]["text"] for _ in range(3)}
        assert len(drawn) == 3 and len(fixed) == 1

    in_process(test, tiny())


@pytest.mark.parametrize("reads", [512, 2])
def test_echo(reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt before each choice, with its log-probabilities where they are asked for, as evaluations need it. With
    few that are read in a step, all choices but the first have tokens before them.
    """
    monkeypatch.setattr("radixgen.scheduler.scheduler._MAX_SCORED", reads)
    prompts, params = ["abca", "bd"], SamplingParams(temperature=0.0, max_tokens=4, logprobs=2, prompt_logprobs=2)
    with tiny() as engine:
        expected = engine.generate(prompts, params)

    def check(choice: Any, output: RequestOutput, generated: int) -> None:
        told, one = choice["logprobs"], output.outputs[0]
        prompt = prompts[choice["index"] // 2]
        assert choice["text"] == prompt + one.text * bool(generated)
        assert [len(told[name]) for name in told] == [len(prompt) + generated] * 4
        assert told["tokens"][: len(prompt)] == list(prompt)
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        own = [next(iter(found.values())) for found in [*output.prompt_logprobs[1:], *one.logprobs[:generated]]]
        assert told["token_logprobs"][1:] == pytest.approx(own, abs=1e-5)
        assert all(1 <= len(found) <= 3 for found in told["top_logprobs"][1:])
        assert told["text_offset"][: len(prompt) + 1] == list(range(len(prompt) + bool(generated)))

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        asked = {"prompt": prompts, "echo": True, "logprobs": 2, "n": 2}
        for generated in (4, 0):
            found = await complete(client, **asked | {"max_tokens": generated})
            assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
            for choice in found["choices"]:
                assert choice["finish_reason"] == "length"
                check(choice, expected[choice["index"] // 2], generated)
            assert found["usage"]["completion_tokens"] == 4 * generated
            assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + 4 * generated
        whole = await complete(client, **asked)
        streamed: dict[int, list[Any]] = {}
        for part in await events(client, "/v1/completions", asked):
            for choice in part["choices"]:
                streamed.setdefault(choice["index"], []).append(choice)
        for choice in whole["choices"]:
            parts = streamed[choice["index"]]
            assert "".join(part["text"] for part in parts) == choice["text"]
            offsets = [place for part in parts if part["logprobs"] for place in part["logprobs"]["text_offset"]]
            assert offsets == choice["logprobs"]["text_offset"]
        ids = expected[0].prompt_token_ids
        plain = (await complete(client, prompt=ids, echo=True))["choices"][0]
        assert plain["logprobs"] is None and plain["text"] == "abca" + expected[0].outputs[0].text

    in_process(test, tiny())


def test_a_stop_string_and_stop_reason() -> None:
    def script(before: str, line: str) -> dict[str, float]:
        return {"a:one two three": 1.0}

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        found = await chat(client, messages=HI, max_tokens=40, stop=["\n", " three"])
        (choice,) = found["choices"]
        assert choice["message"]["content"] == "one two" and choice["finish_reason"] == "stop"
        assert choice["stop_reason"] == " three"

    in_process(test, scripted(script))


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


def test_tools() -> None:
    """The template sees them, and calls come out of the text; streamed too."""
    template = "{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}" + (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.x }}{% endfor %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )

    def script(before: str, line: str) -> dict[str, float]:
        if not before.startswith("look\n"):
            return {"a:no tools": 1.0}
        if "t:found" in before:
            return {"a:it is found": 1.0}
        return {'a:Well. <tool_call>{"name": "look", "arguments": {"x": 1}}</tool_call>': 1.0}

    asked = {"messages": HI, "tools": TOOLS, "max_tokens": 100, "stop": "\n"}

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        (choice,) = (await chat(client, **asked))["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Well."
        assert call["function"] == {"name": "look", "arguments": '{"x": 1}'} and call["type"] == "function"
        chunks = await events(client, "/v1/chat/completions", asked)
        deltas = [one["choices"][0]["delta"] for one in chunks]
        assert "".join(one.get("content", "") for one in deltas) == "Well. "
        first, *more = [one for delta in deltas for one in delta.get("tool_calls", [])]
        assert first["function"] == {"name": "look", "arguments": ""} and first["id"] and first["index"] == 0
        assert "".join(one["function"]["arguments"] for one in more) == call["function"]["arguments"]
        assert not any(one["choices"][0]["finish_reason"] for one in chunks[:-1])
        assert deltas[-1] == {} and chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        (plain,) = (await chat(client, **{**asked, "tool_choice": "none"}))["choices"]
        assert plain["message"]["content"] == "no tools" and "tool_calls" not in plain["message"]
        messages = [*HI, choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "found"}]
        (after,) = (await chat(client, **{**asked, "messages": messages}))["choices"]
        assert after["message"]["content"] == "it is found" and after["finish_reason"] == "stop"

    in_process(test, scripted(script, template))


def test_tools_by_grammar() -> None:
    pytest.importorskip("llguidance")
    parameters = {
        "type": "object",
        "properties": {"x": {"enum": [1, 2]}},
        "required": ["x"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    tools = [{"type": "function", "function": {"name": "look", "parameters": parameters}}]
    asked = {"messages": HI, "tools": tools, "max_tokens": 150, "temperature": 1, "seed": 3}
    named = {"type": "function", "function": {"name": "look"}}

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        for choice, reason in (("required", "tool_calls"), (named, "stop")):
            (one,) = (await chat(client, **asked, tool_choice=choice))["choices"]
            (call,) = one["message"]["tool_calls"]
            assert call["function"]["name"] == "look" and json.loads(call["function"]["arguments"])["x"] in (1, 2)
            assert one["finish_reason"] == reason and one["message"]["content"] is None
            chunks = await events(client, "/v1/chat/completions", {**asked, "tool_choice": choice})
            calls = [c for chunk in chunks for c in chunk["choices"][0]["delta"].get("tool_calls", [])]
            assert "".join(c["function"]["arguments"] for c in calls) == call["function"]["arguments"]
            assert [c["function"]["name"] for c in calls if "name" in c["function"]] == ["look"]
        both = {**asked, "tool_choice": "required", "response_format": {"type": "json_object"}}
        assert (await chat(client, **both))["choices"][0]["message"]["tool_calls"]
        cut = (await chat(client, **{**asked, "tool_choice": "required", "max_tokens": 5}))["choices"][0]
        assert cut["finish_reason"] == "length" and not cut["message"]["content"]
        both = {**asked, "tool_choice": "required", "structured_outputs": {"json_object": True}}
        answer = await post(client, "/v1/chat/completions", both)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "structured_outputs"

    in_process(test, tiny())


def test_what_no_grammar_holds_is_left_out_with_a_warning() -> None:
    """Where OpenAI accepts it: not where `strict` is to be kept."""
    lists = {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "maxItems": 2}
    dependent = {"properties": {"uniqueItems": lists}, "dependentRequired": {"a": ["b"]}}
    schema = {"type": "object", "additionalProperties": False, "required": ["uniqueItems"], **dependent}
    text = {"messages": HI, "max_tokens": 200, "temperature": 1, "seed": 3}

    def bodies(strict: bool | None) -> list[dict[str, Any]]:
        tools = [{"type": "function", "function": {"name": "look", "parameters": schema, "strict": strict}}]
        shape = {"type": "json_schema", "json_schema": {"name": "r", "schema": schema, "strict": strict}}
        return [
            {**text, "tools": tools, "tool_choice": "required"},
            {**text, "tools": tools, "tool_choice": {"type": "function", "function": {"name": "look"}}},
            {**text, "response_format": shape},
        ]

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        for strict in (None, False):
            for body in bodies(strict):
                answer = await post(client, "/v1/chat/completions", body)
                assert answer.status_code == 200, answer.text
                assert answer.headers["warning"].endswith(': dependentRequired, uniqueItems"')
        for body, field in zip(bodies(True), ("tools", "tools", "response_format"), strict=True):
            answer = await post(client, "/v1/chat/completions", body)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == field, answer.text
            assert "warning" not in answer.headers
        answer = await post(client, "/v1/chat/completions", {**text, "response_format": {"type": "json_object"}})
        assert answer.status_code == 200 and "warning" not in answer.headers

    in_process(test, tiny())


def test_structured_outputs() -> None:
    pytest.importorskip("llguidance")

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        options = {"messages": HI, "max_tokens": 100, "temperature": 1}
        for asked, fits in (
            ({"regex": "[xy]{4}"}, "[xy]{4}"),
            ({"choice": ["yes", "no"]}, "yes|no"),
            ({"grammar": 'start: "ab" | "c"'}, "ab|c"),
            ({"json": {"enum": [1, 2]}}, "[12]"),
        ):
            found = await chat(client, **options, structured_outputs=asked)
            assert re.fullmatch(fits, found["choices"][0]["message"]["content"])
        refused = await post(client, "/v1/chat/completions", {**options, "structured_outputs": {"regex": "("}})
        assert refused.status_code == 400 and "llguidance says" in refused.json()["error"]["message"]

    in_process(test, tiny())


# -- sessions -------------------------------------------------------------------------------------------------


def test_a_session_keeps_tokens() -> None:
    """A tokenizer need not give a generated text its tokens back; a session does."""
    parted = texts.tokenizer()
    ids = {}

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        options = {"temperature": 1, "seed": 2, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
        for session in ({"session_id": "s"}, {}):
            first = await chat(client, messages=HI, **options, **session)
            (choice,) = first["choices"]
            messages = [*HI, choice["message"], {"role": "user", "content": "more"}]
            second = await chat(client, messages=messages, **options, **session)
            ids[bool(session)] = first["prompt_token_ids"] + choice["token_ids"], second["prompt_token_ids"]
            if session:
                again = await chat(client, messages=messages, **options, **session)
                assert again["prompt_token_ids"] == second["prompt_token_ids"]
                third = [*messages, again["choices"][0]["message"], {"role": "user", "content": "x"}]
                found = await chat(client, messages=third, **options, **session)
                known = again["prompt_token_ids"] + again["choices"][0]["token_ids"]
                assert found["prompt_token_ids"][: len(known)] == known
                assert found["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(known) - 1
                other = [{"role": "user", "content": "no"}, *messages[1:]]
                rewritten = await chat(client, messages=other, **options, **session)
                assert rewritten["prompt_token_ids"][:4] == parted("u:no")["input_ids"]

    in_process(test, Engine(families.build("llama"), tokenizer=parted, kv_tokens=2048, debug=True))
    said, then = ids[True]
    assert then[: len(said)] == said


def test_what_no_template_can_follow_is_refused() -> None:
    """Arguments nested deeper than a template goes; how deep that is depends on Python's version."""
    template = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{% endfor %}a:"

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        for depth in (10, 900, 50_000):
            function = {"name": "look", "arguments": "[" * depth + "]" * depth}
            messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}]
            answer = await post(client, "/v1/chat/completions", {"messages": messages, "max_tokens": 1})
            assert answer.status_code == 200 or (depth > 10 and answer.status_code == 400), answer.text

    in_process(test, scripted(lambda *_: {"a:b": 1.0}, template))


# -- refusals -------------------------------------------------------------------------------------------------


REFUSED: list[tuple[str, Any, int, str | None]] = [
    ("completions", {}, 400, "prompt"),
    ("completions", {"prompt": "a", "max_token": 1}, 400, "max_token"),
    ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ("completions", {"prompt": "a", "max_tokens": "5"}, 400, "max_tokens"),
    ("completions", {"prompt": "a", "n": 129}, 400, "n"),
    ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
    ("completions", {"prompt": "a", "top_p": 0}, 400, "top_p"),
    ("completions", {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
    ("completions", {"prompt": "a", "logprobs": 21, "echo": True}, 400, "logprobs"),
    ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
    ("completions", {"prompt": "a", "logit_bias": {"9999": 1}}, 400, "logit_bias"),
    ("completions", {"prompt": "a", "stop": ["x"] * 17}, 400, "len(stop)"),
    ("completions", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
    ("completions", {"prompt": "a", "best_of": 2}, 400, "best_of"),
    ("completions", {"prompt": "a", "skip_special_tokens": "no"}, 400, "skip_special_tokens"),
    ("completions", {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options"),
    ("completions", {"prompt": ""}, 400, "prompt"),
    ("completions", {"prompt": []}, 400, "prompt"),
    ("completions", {"prompt": ["a", 1]}, 400, "prompt"),
    ("completions", {"prompt": [[1], "a"]}, 400, "prompt"),
    ("completions", {"prompt": [160]}, 400, "prompt[0]"),
    ("completions", {"prompt": [1, "a", [1.5]]}, 400, "prompt[2][0]"),
    ("completions", {"prompt": ["a"] * 129}, 400, "len(prompt)"),
    ("completions", {"prompt": "a" * 256}, 400, "len(prompt)"),
    ("completions", {"prompt": "a", "model": "gpt-9"}, 404, "model"),
    ("completions", {"prompt": "a", "priority": 2**40}, 400, "priority"),
    ("completions", {"prompt": "a", "cache_salt": "x" * 5000}, 400, "len(cache_salt)"),
    ("completions", {"prompt": "a", "seed": 1.5}, 400, "seed"),
    ("completions", {"prompt": "a", "response_format": {"type": "xml"}}, 400, "response_format"),
    ("completions", [1], 400, "body"),
    ("chat/completions", {}, 400, "messages"),
    ("chat/completions", {"messages": []}, 400, "messages"),
    ("chat/completions", {"messages": "hi"}, 400, "messages"),
    ("chat/completions", {"messages": [{"role": 5}]}, 400, "messages"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages[0].content[0]",
    ),
    ("chat/completions", {"messages": HI, "tool_choice": "auto"}, 400, "tool_choice"),
    ("chat/completions", {"messages": HI, "tools": [{"type": "function"}]}, 400, "tools[0].function"),
    ("chat/completions", {"messages": HI, "top_logprobs": 2}, 400, "top_logprobs"),
    ("chat/completions", {"messages": HI, "modalities": ["audio"]}, 400, "modalities"),
    ("chat/completions", {"messages": HI, "functions": [{"name": "look"}]}, 400, "functions"),
    ("chat/completions", {"messages": HI, "use_beam_search": True}, 400, "use_beam_search"),
    ("chat/completions", {"messages": HI, "temprature": None}, 400, "temprature"),
    ("chat/completions", {"messages": HI, "max_tokens": 0}, 400, "max_tokens"),
    ("chat/completions", {"messages": HI, "max_completion_tokens": 0}, 400, "max_completion_tokens"),
    ("chat/completions", {"messages": HI, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a" * 256}]}, 400, "len(messages)"),
    ("chat/completions", {"messages": [*HI, {"role": "wizard", "content": "a"}]}, 400, "messages[1].role"),
    ("chat/completions", {"messages": HI, "structured_outputs": {"regex": "("}}, 400, "structured_outputs.regex"),
    ("chat/completions", {"messages": HI, "structured_outputs": {"regexp": "a"}}, 400, "structured_outputs.regexp"),
    (
        "chat/completions",
        {
            "messages": HI,
            "tools": [{"function": {"name": "f", "parameters": {"type": "odd"}}}],
            "tool_choice": "required",
        },
        400,
        "tools",
    ),
    ("chat/completions", {"messages": HI, "chat_template_kwargs": {"tools": 1}}, 400, "chat_template_kwargs.tools"),
    ("chat/completions", {"messages": HI, "session_id": "x" * 300}, 400, "session_id"),
]


def test_what_is_refused_is_named() -> None:
    """Each in OpenAI's shape, by field, and the engine never hears of it."""

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        before = (await served.engine.stats()).prompt_tokens
        for path, body, status, field in REFUSED:
            answer = await post(client, f"/v1/{path}", body)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (status, field), (path, body, error)
            assert error["message"] and error["type"] == "invalid_request_error" and error["value"] is not None
            assert error["limit"] and error["limit"] in error["message"], error
        assert (await served.engine.stats()).prompt_tokens == before

    in_process(test, tiny())


def test_every_field_of_openai_may_be_null() -> None:
    """Those of the openai package that is installed."""
    from openai.types import completion_create_params as completions
    from openai.types.chat import completion_create_params as chats

    for kind, params, least in (
        (ChatRequest, chats.CompletionCreateParamsBase, {"messages": HI}),
        (CompletionRequest, completions.CompletionCreateParamsBase, {"prompt": "a"}),
    ):
        names = params.__annotations__
        assert len(names) > 15
        decode(json.dumps(dict.fromkeys(names) | least).encode(), kind)


def test_what_changes_nothing_is_taken() -> None:
    """At the top and further in; not what does."""
    odd = {"messages": HI, "use_beam_search": False, "length_penalty": 1.0, "bad_words": [], "guided_json": None}
    tool = {"type": "function", "function": {"name": "f", "defer_loading": None}, "defer_loading": False}
    odd |= {"tools": [tool, tool], "structured_outputs": {"disable_any_whitespace": False}, "logit_bias": {"1": 2}}
    found = decode(json.dumps(odd).encode(), ChatRequest)
    assert found.tools is not None and [one.function.name for one in found.tools] == ["f", "f"]
    assert found.logit_bias == {1: 2.0}
    for wrong in ({"length_penalty": 2.0}, {"use_beam_search": 0}, {"audio": {}}, {"echo": True}, {"bad_words": ["a"]}):
        (name,) = wrong
        with pytest.raises(InvalidRequest, match="is not supported") as caught:
            decode(json.dumps(odd | wrong).encode(), ChatRequest)
        assert caught.value.field == name
    with pytest.raises(InvalidRequest, match=r"n=True: expected `int"):
        decode(json.dumps(odd | {"n": True}).encode(), ChatRequest)
    with pytest.raises(InvalidRequest, match=r"structured_outputs\.regexp"):
        decode(json.dumps(odd | {"structured_outputs": {"regexp": None}}).encode(), ChatRequest)


def test_unknown_fields_are_ignored_on_request() -> None:
    """With a warning for each, wherever it is; a field that is known and wrong is still refused."""
    tool = {"type": "function", "function": {"name": "f", "colour": 1}}
    body = {**GREEDY, "messages": HI, "temprature": 1, "audio": {"voice": "x"}, "tools": [tool], 'a"\n': 1}

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        answer = await post(client, "/v1/chat/completions", body)
        assert answer.status_code == 200, answer.text
        warnings = [one.removeprefix("299 radixgen ") for one in answer.headers.get_list("warning")]
        named = {one.strip('"').removeprefix("ignored: ") for one in warnings}
        assert named == {"temprature", "audio", "tools[0].function.colour", "a'/n"}
        answer = await post(client, "/v1/chat/completions", body | {"n": "x"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "n"
        answer = await post(client, "/v1/chat/completions", {**GREEDY, "messages": HI, "stream": True, "colour": 1})
        assert answer.status_code == 200 and answer.headers["warning"] == '299 radixgen "ignored: colour"'
        assert "warning" not in (await post(client, "/tokenize", {"prompt": "a"})).headers

    in_process(test, tiny(), ignore_unknown_fields=True)


def test_a_near_name_is_suggested() -> None:
    with pytest.raises(InvalidRequest, match="did you mean max_tokens"):
        decode(b'{"prompt": "a", "max_token": 1}', CompletionRequest)
    with pytest.raises(InvalidRequest, match=r"messages=.*expected `array`"):
        decode(b'{"messages": 5}', ChatRequest)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"metadata": ' + b'{"a":' * 100_000,
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "n": 99999999999999999999999}',
        b'{"prompt": [99999999999999999999999]}',
        b'{"prompt": "a", "seed": null, "n": true}',
    ],
    ids=range(13),
)
def test_no_bytes_are_too_odd(data: bytes) -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        answer = await client.post("/v1/completions", content=data, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["param"]

    in_process(test, tiny())


def test_bodies_are_bounded() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        async def drip() -> Any:
            for _ in range(100):
                yield b" " * 100

        kind = {"content-type": "application/json"}
        known = await client.post("/v1/completions", content=b" " * 2000, headers=kind)
        unknown = await client.post("/v1/completions", content=drip(), headers=kind)
        for answer in (known, unknown):
            assert answer.status_code == 413 and answer.json()["error"]["limit"] == "at most 1000 bytes"
        answer = await client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
        assert answer.status_code == 415 and answer.json()["error"]["param"] == "content-type"

    in_process(test, tiny(limits=limited(max_body_bytes=1000)))


def test_other_paths_and_methods() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        for answer, status in ((await client.get("/v2"), 404), (await client.get("/v1/completions"), 405)):
            assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"

    in_process(test, tiny())


def test_beyond_what_is_open_is_refused_before_the_body_is_read() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        open_limit = served.app.state.context.open_limit
        answer = await post(client, "/v1/completions", {"prompt": "a", "n": 5})
        assert answer.status_code == 400 and "4 sequences" in answer.json()["error"]["message"]
        open_limit.take(4)
        answer = await client.post("/v1/completions", content=b"not read")
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "overloaded"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        open_limit.leave(4, seconds=7.5)
        open_limit.take(3)
        answer = await post(client, "/v1/completions", {"prompt": "a", "n": 2})
        assert answer.status_code == 429 and answer.headers["retry-after"] == "8"
        assert (await complete(client, prompt="a"))["choices"]
        open_limit.leave(3, seconds=0.0)

    in_process(test, tiny(), max_open=4)


def test_who_tokenizes_counts_apart() -> None:
    """Tokenizing takes no place of those that generate, nor they of its."""

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        context = served.app.state.context
        context.open_limit.take(1)
        assert (await post(client, "/tokenize", {"prompt": "a"})).status_code == 200
        context.open_limit.leave(1)
        context.tokenizing.take(1)
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            answer = await post(client, path, body)
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert (await complete(client, prompt="a"))["choices"]
        context.tokenizing.leave(1)
        assert (await post(client, "/tokenize", {})).status_code == 400
        assert context.tokenizing.open == context.open_limit.open == 0

    in_process(test, tiny(), max_open=1)


def test_the_engines_own_queue_is_full() -> None:
    """Of several prompts none stays where one is refused."""

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        answer = await post(client, "/v1/completions", {"prompt": ["abc"] * 128, "max_tokens": 100})
        assert answer.status_code == 429 and answer.json()["error"]["param"] == "waiting"

    in_process(test, tiny(limits=limited(max_waiting=1, max_num_seqs=1)))


# -- who may what ---------------------------------------------------------------------------------------------

OPEN = {"/health", "/ready", "/version", "/metrics", "/openapi.json"}
OPERATORS = {"/server_info", "/reset_prefix_cache"}


def routes(served: Served) -> list[APIRoute]:
    """Of the application, through whatever its routers are wrapped in."""
    found: list[APIRoute] = []
    todo = list(served.app.router.routes)
    while todo:
        route = todo.pop()
        if isinstance(route, APIRoute):
            found.append(route)
        else:
            todo += route.original_router.routes
    return found


def test_every_route_asks_for_what_it_declares() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        found = routes(served)
        assert {route.path.replace(":path", "") for route in found} == set(served.app.openapi()["paths"]) | {
            "/openapi.json"
        }
        for route in found:
            access = access_of(route)
            path, method = route.path.replace("{name:path}", "x"), next(iter(route.methods))
            expected = Access.OPEN if path in OPEN else Access.OPERATOR if path in OPERATORS else Access.CALLER
            assert access is expected, path
            statuses = []
            for key in (None, "wrong", "caller", "operator"):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                answer = await client.request(method, path, headers=headers)
                statuses.append(answer.status_code if answer.status_code in (401, 403) else 0)
            assert (
                statuses
                == {
                    Access.OPEN: [0, 0, 0, 0],
                    Access.CALLER: [401, 401, 0, 0],
                    Access.OPERATOR: [401, 401, 403, 0],
                }[access]
            ), path

    in_process(test, tiny(), api_keys=["caller", "another"], operator_keys=["operator"])


def test_operators_without_keys_of_their_own() -> None:
    """The only caller is one; of several nobody is."""
    for keys, status in ((["a"], 200), (["a", "b"], 403)):

        async def test(client: httpx.AsyncClient, served: Served, status: int = status) -> None:
            answer = await client.get("/server_info", headers={"authorization": "Bearer a"})
            assert answer.status_code == status

        in_process(test, tiny(), api_keys=keys)


def test_a_route_without_access_is_no_route() -> None:
    from fastapi import APIRouter

    from radixgen.serve.http.auth import check_routes

    router = APIRouter()
    router.add_api_route("/x", lambda: None)
    with pytest.raises(AssertionError, match="/x declares 0"):
        check_routes(router)
    gate = Gate(Keys())
    double = APIRouter()
    double.add_api_route("/y", lambda: None, dependencies=[gate.open, gate.caller])
    with pytest.raises(AssertionError, match="/y declares 2"):
        check_routes(double)


def test_further_routes_declare_access_too() -> None:
    from fastapi import APIRouter

    def more(gate: Gate) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/more", lambda: {"ok": True}, dependencies=[gate.operator])
        return router

    def careless(gate: Gate) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/less", lambda: {"ok": True})
        return router

    served = AsyncEngine(tiny())
    with pytest.raises(AssertionError, match="/less declares 0"):
        create_app(served, None, careless)

    async def test() -> None:
        app = create_app(served, ServeOptions(api_keys=["a"], operator_keys=["b"]), more)
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as client:
            for key, status in (("a", 403), ("b", 200)):
                answer = await client.get("http://127.0.0.1/more", headers={"authorization": f"Bearer {key}"})
                assert answer.status_code == status

    asyncio.run(test())


def test_namespaces_are_the_servers() -> None:
    """Callers share with themselves alone, and a salt parts them further; it never joins two of them."""

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        async def cached(key: str, salt: str | None) -> int:
            body = {**GREEDY, "prompt": "abcdefgh", "cache_salt": salt}
            answer = await post(client, "/v1/completions", body, authorization=f"Bearer {key}")
            return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        pairs = [("a", None), ("a", "s"), ("b", None), ("b", "s")]
        assert [await cached(*pair) for pair in pairs] == [0, 0, 0, 0]
        assert [await cached(*pair) for pair in pairs] == [8, 8, 8, 8]

    in_process(test, tiny(), api_keys=["a", "b"])
    limits = limited()
    keys = Keys(["a", "b"])
    one, other = (keys.check(Access.CALLER, f"Bearer {key}") for key in "ab")
    assert keys.namespace(one, None, limits) not in ("", keys.namespace(other, None, limits))
    assert Keys().namespace(Keys().check(Access.CALLER, ""), None, limits) == ""
    assert Keys(["a"]).namespace(one, None, limits) != keys.namespace(one, None, limits), (
        "secrets are each server's own"
    )


def test_keys() -> None:
    for wrong in ("", " a", "a b\n", "ü", "x" * 513):
        with pytest.raises(InvalidRequest, match="api_key"):
            Keys([wrong])
    keys = Keys(["k"])
    for header in ("", "Bearer", "Bearer ", "bearer  k x", "Basic k", "k", "Bearer \ud800"):
        with pytest.raises(Exception, match="no valid API key"):
            keys.check(Access.CALLER, header)
    assert keys.check(Access.CALLER, "bearer k").key_id
    assert "a long secret" not in str(vars(Keys(["a long secret"])))


def test_pages_of_other_sites_are_refused_where_there_is_no_key() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        for headers, status in (
            ({"host": "evil.example"}, 403),
            ({"host": ""}, 403),
            ({"host": "[x"}, 403),
            ({"host": "localhost:8000", "origin": "http://["}, 403),
            ({"host": "localhost:8000", "origin": "http://evil.example"}, 403),
            ({"host": "localhost:8000", "origin": "null"}, 403),
            ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
            ({"host": "[::1]:8000"}, 200),
            ({"host": "127.0.0.1"}, 200),
        ):
            assert (await client.get("/version", headers=headers)).status_code == status, headers

    in_process(test, tiny())


def test_addresses() -> None:
    for host in ("127.0.0.1", "127.8.0.1", "localhost", "::1", "[::1]"):
        assert is_loopback(host)
        Binding(host=host).check([])
    for host in ("0.0.0.0", "::", "", "192.168.0.1", "example.org", "localhost.example.org"):
        assert not is_loopback(host)
        with pytest.raises(InvalidRequest, match="API key"):
            Binding(host=host).check([])
        Binding(host=host).check(["key"])


# -- around it ------------------------------------------------------------------------------------------------


def test_request_ids(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "radixgen.access")

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        for given, kept in (("mine-1", True), ("x" * 129, False), ("a b", False), ("", False)):
            answer = await client.get("/version", headers={"x-request-id": given})
            found = answer.headers["x-request-id"]
            assert (found == given) is kept and (kept or re.fullmatch("[0-9a-f]{32}", found))
            assert f"{found} GET /version 200" in caplog.messages[-1]
        await client.get("/%0Aforged")
        assert "\n" not in caplog.messages[-1] and "/\\nforged 404" in caplog.messages[-1]

    in_process(test, tiny())


def test_models_tokens_and_versions() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        models = (await client.get("/v1/models")).json()
        assert [one["id"] for one in models["data"]] == ["tiny", "org/tiny"] and models["data"][0][
            "max_model_len"
        ] == 256
        assert (await client.get("/v1/models/org/tiny")).json()["id"] == "org/tiny"
        assert (await client.get("/v1/models/other")).status_code == 404
        assert (await complete(client, prompt="a", model="org/tiny"))["model"] == "tiny"
        tokens = (await post(client, "/tokenize", {"prompt": "abc", "return_token_strs": True})).json()
        assert tokens["count"] == 3 and tokens["token_strs"] == ["a", "b", "c"]
        text = (await post(client, "/detokenize", {"tokens": tokens["tokens"]})).json()
        assert text == {"prompt": "abc"}
        of_chat = (await post(client, "/tokenize", {"messages": HI})).json()
        assert of_chat["tokens"] == (await chat(client, messages=HI, return_token_ids=True))["prompt_token_ids"]
        for path, body in (
            ("/tokenize", {}),
            ("/tokenize", {"prompt": "a", "messages": HI}),
            ("/detokenize", {"tokens": [999]}),
            ("/detokenize", {"tokens": [1] * 300}),
        ):
            assert (await post(client, path, body)).status_code == 400
        assert set((await client.get("/version")).json()) == {"version"}
        info = (await client.get("/server_info")).json()
        assert info["kv_tokens"] == 2048 and info["limits"]["max_n"] == 128 and info["stats"]["steps"]

    in_process(test, tiny(), names=["tiny", "org/tiny"])


def test_the_cache_is_reset() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        await complete(client, prompt="abcdefgh")
        await post(client, "/reset_prefix_cache")
        found = await complete(client, prompt="abcdefgh")
        assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 0

    in_process(test, tiny())


def test_metrics() -> None:
    """The counts are those of the answers and of the engine, under both names."""

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        before = figures((await client.get("/metrics")).text)
        used = [(await complete(client, prompt="abcdef", n=2, seed=1, temperature=1))["usage"] for _ in range(2)]
        await events(client, "/v1/completions", {"prompt": "abcxyz"})
        await post(client, "/v1/completions", {})
        found = figures((await client.get("/metrics")).text)
        stats = await served.engine.stats()

        def grown(name: str) -> float:
            return found[name] - before[name]

        assert grown("radixgen:prompt_tokens_total") == 18
        assert grown("radixgen:cached_prompt_tokens_total") == 6 + 3
        assert used[1]["prompt_tokens_details"]["cached_tokens"] == 6
        assert found["radixgen:prompt_tokens_total"] == found["vllm:prompt_tokens_total,tiny"] == stats.prompt_tokens
        assert found["radixgen:tree_nodes"] == stats.num_nodes > 0
        assert found["radixgen:saved_prompt_rows_total"] == stats.prompt_tokens - stats.computed_prompt_tokens > 0
        assert found["radixgen:kv_bytes_saved_total"] == stats.kv_bytes_unshared - stats.kv_bytes_read
        assert grown("radixgen:sharing_ended_total,diverged") == 1 and grown("radixgen:sharing_ended_total,cold") == 1
        for prefix, label in (("radixgen:", ""), ("vllm:", ",tiny")):
            assert found[f"{prefix}time_to_first_token_seconds_count{label}"] == 3
            assert found[f"{prefix}e2e_request_latency_seconds_count{label}"] == 3
            assert found[f"{prefix}request_queue_time_seconds_count{label}"] == 3
            assert found[f"{prefix}request_generation_tokens_sum{label}"] == 8 + 8 + 4
        assert found["radixgen:request_success_total,length"] == 5
        assert found["radixgen:http_errors_total,400"] == 1 and found["radixgen:http_open_requests"] == 1

    in_process(test, tiny(), metrics_compat="vllm")


class _Stuck:
    """An engine that has work and does nothing."""

    closed = False
    progress = (5, True)


def test_health_fails_when_nothing_moves() -> None:
    from radixgen.serve.http.health import Health

    async def test() -> None:
        engine = _Stuck()
        health = Health(engine, 0.05, lambda _: False)  # type: ignore[arg-type]
        assert health.fault() is None and health.unready() == "the model is warming up"
        await asyncio.sleep(0.1)
        assert "no progress" in health.fault()
        engine.progress = (6, True)
        assert health.fault() is None
        await asyncio.sleep(0.1)
        engine.progress = (6, False)
        assert health.fault() is None, "there is nothing to do"
        health.warm = True
        assert health.unready() is None
        health.draining = True
        assert "shutting down" in health.unready()
        engine.closed = True
        assert health.fault() == "the engine is closed"

    asyncio.run(test())


def test_a_failing_engine_is_told_as_such() -> None:
    """And of our insides nothing is told."""

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        await served.engine.close()
        answer = await post(client, "/v1/completions", {"prompt": "a"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_closed"
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/ready")).status_code == 503

    async def whole() -> None:
        served = AsyncEngine(tiny())
        app = create_app(served)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://[::1]") as client,
        ):
            await test(client, Served("", app, served))

    asyncio.run(whole())


def test_a_bug_of_ours_tells_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("secret")

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        monkeypatch.setattr("radixgen.serve.http.completions._prepare", broken)
        answer = await post(client, "/v1/completions", {"prompt": "a"}, **{"x-request-id": "mine"})
        assert answer.status_code == 500 and "secret" not in answer.text
        assert answer.headers["x-request-id"] == "mine" and answer.json()["error"]["type"] == "server_error"
        assert "request mine failed" in caplog.text and "secret" in caplog.text

    in_process(test, tiny())


def test_the_page_names_every_field_and_metric() -> None:
    page = (Path(__file__).parent.parent / "docs" / "http.md").read_text(encoding="utf-8")
    for kind in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest):
        for name in kind.__struct_fields__:
            assert f"`{name}`" in page or f"`{name}." in page, name

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        text = (await client.get("/metrics")).text
        for family in text_string_to_metric_families(text):
            name = family.name.removeprefix("radixgen:").removeprefix("vllm:")
            assert name.startswith("process_") or f"`{name}`" in page or f"`{name}_total`" in page, name

    in_process(test, tiny(), metrics_compat="vllm")


def test_options_are_checked() -> None:
    for options, field in (
        (ServeOptions(max_open=0), "max_open"),
        (ServeOptions(stall_timeout=0), "stall_timeout"),
        (ServeOptions(request_timeout=float("nan")), "request_timeout"),
        (ServeOptions(metrics_compat="x"), "metrics_compat"),
        (ServeOptions(names=[""]), "served_model_name"),
        (ServeOptions(api_keys=[""]), "api_key"),
    ):
        with pytest.raises(InvalidRequest, match=field):
            options.check()
    for binding in (Binding(port=70000), Binding(log_level="loud"), Binding(drain_timeout=-1)):
        with pytest.raises(InvalidRequest):
            binding.check([])
