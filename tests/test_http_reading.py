"""The field `reading` over HTTP: which policies a server allows, and what its responses say."""

from typing import Any

import httpx
import pytest
from served import HI, Served, in_process, tiny
from test_http_workers import over_workers

from radixgen import InvalidRequest, Limits, SamplingParams
from radixgen.reading import BigBird, Exact, Press, ReadingPolicy, Window, reading_to_json
from radixgen.serve.http.app import ServeOptions
from radixgen.serve.zmq import wire, wire_params

WINDOW = Window(sinks=1, window=6, block=4, prompt=True)
TEXT = "Some words that come before all others, and more of them"
PLAIN = {"prompt": TEXT, "max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
BODY = PLAIN | {"reading": reading_to_json(WINDOW)}


async def ask(client: httpx.AsyncClient, **body: Any) -> Any:
    answer = await client.post("/v1/completions", json=body)
    return answer.json()


def test_allowed_policies_are_used_and_named() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        exact, found = await ask(client, **PLAIN), await ask(client, **BODY)
        assert "exact" not in exact["usage"] and found["usage"]["exact"] is False
        params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, reading=WINDOW)
        output = [o async for o in served.engine.generate(TEXT, params, cumulative=True)][-1]
        assert found["choices"][0]["text"] == output.outputs[0].text != exact["choices"][0]["text"]
        stream = await client.post(
            "/v1/completions", json=BODY | {"stream": True, "stream_options": {"include_usage": True}}
        )
        assert '"exact":false' in stream.text
        body = {"messages": HI, "max_tokens": 2, "reading": BODY["reading"]}
        chat = await client.post("/v1/chat/completions", json=body)
        assert chat.json()["usage"]["exact"] is False
        same = await ask(client, **PLAIN, reading={"policy": "exact"})
        assert same["choices"] == exact["choices"] and "exact" not in same["usage"]

    in_process(test, tiny(), readings=["window"])


def test_other_policies_are_refused_by_name() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        for reading, message in (
            (reading_to_json(BigBird()), "reading.policy='bigbird': must be one of window on this server"),
            ({"policy": "none"}, "reading.policy='none': must be one of exact, window"),
            ({"policy": "window", "sinks": -1}, "reading.sinks=-1: must be from 0"),
        ):
            for path, body in (("completions", PLAIN), ("chat/completions", {"messages": HI})):
                answer = await client.post(f"/v1/{path}", json=body | {"reading": reading})
                assert answer.status_code == 400 and message in answer.json()["error"]["message"]

    in_process(test, tiny(), readings=["window"])


def test_no_policy_is_allowed_by_default() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        answer = await client.post("/v1/completions", json=BODY)
        assert answer.status_code == 400 and "'window': is not allowed on this server" in answer.text

    in_process(test, tiny())
    with pytest.raises(InvalidRequest, match="allow_reading='windows': must be one of exact, window"):
        ServeOptions(readings=["windows"]).check()


def test_workers_read_as_engines_do() -> None:
    async def one(client: httpx.AsyncClient, *_: Any) -> Any:
        found = await ask(client, **BODY)
        return found["choices"], found["usage"]

    assert over_workers(one, readings=["window"]) == in_process(one, tiny(), readings=["window"])


@pytest.mark.parametrize("reading", [None, Exact(), WINDOW, BigBird(seed=2**64 - 1), Press(ratio=0.1)])
def test_policies_cross_the_wire(reading: ReadingPolicy | None) -> None:
    sampling = wire_params.from_params(SamplingParams(reading=reading), ())
    sent = wire.decode(wire.encode(sampling), wire.Sampling)
    assert wire_params.to_params(sent, 16, Limits()).reading == reading


def test_policies_that_are_none_do_not_cross_the_wire() -> None:
    with pytest.raises(InvalidRequest, match="must be a policy of"):
        wire_params.from_params(SamplingParams(reading="window"), ())  # type: ignore[arg-type]
    for value, message in (({"policy": "x" * 2_000}, "must be at most 1024 bytes"), ([1], "reading=")):
        sampling = wire.Sampling(reading=wire.Raw(wire.encode(value)))
        with pytest.raises(InvalidRequest, match=message):
            wire_params.to_params(sampling, 16, Limits())
