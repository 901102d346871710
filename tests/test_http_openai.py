"""OpenAI's own client over a socket; clients that go away, are slow, or come too late."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from served import HI, Served, limited, over_socket, scripted, slowed, tiny

CALL = '<tool_call>{"name": "look", "arguments": {"x": 1}}</tool_call>'


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with over_socket(tiny()) as found:
        yield found


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as found:
        yield found
    served.check()


def test_chat(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="tiny", messages=HI, max_tokens=5, temperature=0)
    assert found.choices[0].message.role == "assistant" and found.usage.completion_tokens == 5
    assert found.usage.prompt_tokens_details.cached_tokens == 0
    again = client.chat.completions.create(model="tiny", messages=HI, max_tokens=5, temperature=0)
    assert again.choices[0].message.content == found.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens
    assert found._request_id and found._request_id != again._request_id


def test_streaming(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content
    with client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert "".join(one.choices[0].delta.content or "" for one in chunks[:-1]) == whole
    assert [one.choices[0].finish_reason for one in chunks[:-1]][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 8 and not chunks[-1].choices
    with client.chat.completions.stream(**options) as helper:
        deltas = [one.delta for one in helper if one.type == "content.delta"]
    assert "".join(deltas) == whole


def test_n_and_seed(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 6, "n": 4, "seed": 7}
    found = client.chat.completions.create(**options)
    texts = [one.message.content for one in found.choices]
    assert [one.index for one in found.choices] == [0, 1, 2, 3] and len(set(texts)) > 1
    parts = dict.fromkeys(range(4), "")
    for chunk in client.chat.completions.create(**options, stream=True):
        for one in chunk.choices:
            parts[one.index] += one.delta.content or ""
    assert list(parts.values()) == texts
    assert found.usage.completion_tokens == 24


def test_logprobs(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    content = found.choices[0].logprobs.content
    assert len(content) == 3 and all(one.top_logprobs[0].logprob == one.logprob < 0 for one in content)
    legacy = client.completions.create(model="tiny", prompt="abc", max_tokens=3, logprobs=2)
    assert len(legacy.choices[0].logprobs.token_logprobs) == 3
    scored = client.completions.create(model="tiny", prompt="abc", max_tokens=0, echo=True, logprobs=1).choices[0]
    assert scored.text == "abc" and len(scored.logprobs.token_logprobs) == 3


def test_json_schema(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"sunny": {"type": "boolean"}},
        "required": ["sunny"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    kind = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}}
    found = client.chat.completions.create(model="tiny", messages=HI, max_tokens=60, response_format=kind, n=4)
    for choice in found.choices:
        assert json.loads(choice.message.content)["sunny"] in (True, False) and choice.finish_reason == "stop"


def test_extensions(client: openai.OpenAI) -> None:
    extra = {"top_k": 1, "min_p": 0.0, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True}
    extra |= {"stop_token_ids": [3], "return_token_ids": True, "priority": -1, "cache_salt": "s"}
    found = client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=4, extra_body=extra)
    assert found.choices[0].model_extra["prompt_token_ids"] == [5, 6, 7]
    assert 2 <= len(found.choices[0].model_extra["token_ids"]) <= 4


def test_errors(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HI, temperature=-1)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    assert caught.value.body["value"] == "-1.0" and caught.value.body["limit"].startswith("must be")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a" * 300)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=HI)
    assert missing.value.code == "model_not_found"
    served.app.state.context.open_limit.take(1024)
    with pytest.raises(openai.RateLimitError) as full:
        client.chat.completions.create(model="tiny", messages=HI)
    served.app.state.context.open_limit.leave(1024, seconds=1.0)
    assert full.value.response.headers["retry-after"] == "1"


def test_models(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["tiny"] and client.models.retrieve(
        "tiny"
    ).owned_by == "radixgen"


def test_tools() -> None:
    def script(before: str, line: str) -> dict[str, float]:
        return {f"a:{CALL}": 1.0}

    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    options: dict[str, Any] = {"model": "tiny", "messages": HI, "tools": tools, "max_tokens": 100, "stop": "\n"}
    with over_socket(scripted(script)) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="any") as client:
        (choice,) = client.chat.completions.create(**options).choices
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        assert json.loads(choice.message.tool_calls[0].function.arguments) == {"x": 1}
        with client.chat.completions.stream(**options) as stream:
            message = stream.get_final_completion().choices[0].message
        assert message.tool_calls[0].function.name == "look"


def test_keys() -> None:
    with over_socket(tiny(), api_keys=["right"]) as served:
        for key, fine in (("right", True), ("wrong", False)):
            with openai.OpenAI(base_url=f"{served.url}/v1", api_key=key) as client:
                if fine:
                    assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices
                else:
                    with pytest.raises(openai.AuthenticationError):
                        client.completions.create(model="tiny", prompt="a", max_tokens=1)


# -- clients that go away -------------------------------------------------------------------------------------

LONG = {"prompt": "abc", "max_tokens": 200, "ignore_eos": True, "temperature": 0}


def raw(served: Served, body: dict[str, Any], *, receive_buffer: int | None = None) -> socket.socket:
    """A connection over which a completion was asked for."""
    found = socket.socket()
    if receive_buffer:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    host, _, port = served.url.removeprefix("http://").partition(":")
    found.connect((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    found.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return found


def wait_until(true: Any) -> None:
    stop = time.monotonic() + 30
    while not true():
        assert time.monotonic() < stop
        time.sleep(0.002)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["abc", ["abc", "abd", "xyz"]], ids=["one", "several"])
def test_a_client_that_closes_cancels(served: Served, stream: bool, prompt: Any) -> None:
    before = served.engine.progress[0]
    connection = raw(served, {**LONG, "prompt": prompt, "stream": stream, "n": 2})
    wait_until(lambda: served.engine.progress[0] > before + 2)
    connection.close()
    served.check()
    assert served.engine.progress[0] < before + 200, "the engine went on to the end"


def test_half_a_request_disturbs_nobody(served: Served) -> None:
    connection = socket.socket()
    host, _, port = served.url.removeprefix("http://").partition(":")
    connection.connect((host, int(port)))
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n")
    connection.sendall(b"Content-Length: 1000\r\n\r\n{")
    assert httpx.get(f"{served.url}/health").status_code == 200
    connection.close()
    served.check()


def test_a_client_that_takes_nothing_is_let_go_of() -> None:
    """It holds its place no longer than `send_timeout` once its connection is full, and the engine never waits."""
    with over_socket(tiny(), send_timeout=0.3) as served:
        body = {**LONG, "n": 64, "stream": True, "logprobs": 20, "return_token_ids": True}
        connection = raw(served, body, receive_buffer=4096)
        wait_until(lambda: served.app.state.context.open_limit.open == 64)
        served.wait_idle()
        connection.close()


def test_connections_that_do_nothing_are_closed() -> None:
    """Silent ones, half a request, and who takes nothing of an answer; not who takes it slowly."""
    body = {**LONG, "n": 32, "logprobs": 20, "return_token_ids": True}
    with over_socket(tiny(), timeout_keep_alive=2) as served:
        assert served.server is not None
        address = httpx.URL(served.url)
        silent, half = (socket.create_connection((address.host, address.port or 0)) for _ in range(2))
        half.sendall(b"GET /health HTTP/1.1\r\nHost: 127")
        deaf, slow = (raw(served, body, receive_buffer=4096) for _ in range(2))
        head, _, answer = slow.recv(1 << 14).partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        while len(answer) < length:
            time.sleep(0.005)
            received = slow.recv(1 << 14)
            assert received, "it was closed while it was being read"
            answer += received
        assert len(json.loads(answer)["choices"]) == 32
        wait_until(lambda: not served.server.server_state.connections)
        for connection in (silent, half, deaf, slow):
            connection.close()


def test_a_slow_reader_gets_every_token(served: Served) -> None:
    """What it has not taken is merged."""
    options: dict[str, Any] = {"prompt": "abc", "max_tokens": 60, "temperature": 0, "extra_body": {"ignore_eos": True}}
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any") as client:
        whole = client.completions.create(model="tiny", **options)
        text = ""
        for chunk in client.completions.create(model="tiny", **options, stream=True):
            text += chunk.choices[0].text
            time.sleep(0.003)
    assert text == whole.choices[0].text


# -- the end --------------------------------------------------------------------------------------------------


def test_requests_end_before_the_server_does() -> None:
    found: list[httpx.Response] = []
    with over_socket(tiny(), drain_timeout=30.0) as served:
        asked = threading.Thread(
            target=lambda: found.append(httpx.post(f"{served.url}/v1/completions", json=LONG, timeout=60))
        )
        asked.start()
        wait_until(lambda: served.engine.progress[1])
    asked.join()
    assert found[0].status_code == 200 and found[0].json()["usage"]["completion_tokens"] == 200


def test_one_who_reads_nothing_does_not_hold_up_the_end() -> None:
    """Pins that a server waited for ever for a client that takes none of its answers."""
    with socket.socket() as deaf, over_socket(tiny(), drain_timeout=0.2) as served:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        deaf.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
        deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" * 200)
        time.sleep(0.5)


def test_what_does_not_end_in_time_is_told_so() -> None:
    """One terminal event each: an error, and the end of the stream."""
    found: list[str] = []

    def ask(url: str) -> None:
        with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as answer:
            found.append("".join(answer.iter_text()))

    engine = slowed(tiny(), 0.02)
    with over_socket(engine, drain_timeout=0.2) as served:
        asked = threading.Thread(target=ask, args=[served.url])
        asked.start()
        wait_until(lambda: served.engine.progress[0] > 5)
        served.check = lambda: None  # type: ignore[method-assign]
    asked.join()
    events = found[0].strip().split("\n\n")
    assert events[-1] == "data: [DONE]" and len(events) > 3
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "engine_closed"


def test_a_deadline_ends_a_request() -> None:
    engine = slowed(tiny(), 0.01)
    with over_socket(engine, request_timeout=0.2) as served:
        answer = httpx.post(f"{served.url}/v1/completions", json=LONG, timeout=60).json()
        (choice,) = answer["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("abort", "deadline")
        assert 0 < answer["usage"]["completion_tokens"] < 200


def test_the_time_of_a_body_counts() -> None:
    """Whose body comes for longer than a request may take has no time left for tokens."""

    def slow() -> Iterator[bytes]:
        body = json.dumps(LONG).encode()
        yield body[:5]
        time.sleep(0.5)
        yield body[5:]

    with over_socket(tiny(), request_timeout=0.4) as served:
        headers = {"content-type": "application/json"}
        answer = httpx.post(f"{served.url}/v1/completions", content=slow(), headers=headers, timeout=60).json()
        (choice,) = answer["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("abort", "deadline")
        assert answer["usage"]["completion_tokens"] < 10


def test_limits_reach_the_engine() -> None:
    assert limited(max_n=2).max_n == 2
    with over_socket(tiny(limits=limited(max_n=2))) as served:
        answer = httpx.post(f"{served.url}/v1/completions", json={"prompt": "a", "n": 3})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "n"
