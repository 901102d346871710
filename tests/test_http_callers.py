"""One caller of the HTTP server and the others: what each may take, and what none may read of another."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import pytest
from served import HI, Served, in_process, limited, tiny
from starlette.requests import Request

from radixgen import InvalidRequest, Limits, PromptTooLong, SamplingParams, Stats
from radixgen.core import CompletionOutput, EngineClosed
from radixgen.serve.http.app import ServeOptions, create_app
from radixgen.serve.http.auth import Access, Gate, Keys
from radixgen.serve.http.health import Health
from radixgen.serve.http.latest_stats import LatestStats
from radixgen.serve.http.open_limit import OpenLimit, Quota
from radixgen.serve.http.request_preparer import RequestPreparer
from radixgen.serve.http.session_sizes import bytes_of
from radixgen.serve.http.sessions import SessionKey, Sessions
from radixgen.text.chat_template import ChatTemplate

SECONDS = 30.0
KEYS = ["one", "two"]


async def ask(client: httpx.AsyncClient, key: str, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    body = {"max_tokens": 1} | body if path.startswith("/v1") else body
    return await client.post(path, json=body, headers={"authorization": f"Bearer {key}"})


# -- places ---------------------------------------------------------------------------------------------------


def test_bodies_that_do_not_come_take_no_places_of_others() -> None:
    """Whoever is still being read counts, as a body has up to 32 MiB: against its own key alone."""

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        begun, let_go = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            begun.set()
            yield b"{"
            await let_go.wait()
            yield b"}"

        context = served.app.state.context
        kind = {"content-type": "application/json", "authorization": "Bearer one"}
        first = asyncio.create_task(client.post("/v1/completions", content=slow(), headers=kind))
        await begun.wait()
        while not context.preparer.reading.open:
            await asyncio.sleep(0)
        assert context.open_limit.open == 0
        assert (await ask(client, "one", prompt="a")).status_code == 429
        assert (await ask(client, "one", "/tokenize", prompt="a")).status_code == 429
        assert (await ask(client, "two", prompt="a")).status_code == 200
        let_go.set()
        assert (await first).status_code == 400
        assert (await ask(client, "one", prompt="a")).status_code == 200
        assert context.preparer.reading.open == 0

    in_process(test, tiny(), max_open=2, api_keys=KEYS)


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_a_place_is_taken_when_the_body_is_there(path: str) -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        context = served.app.state.context
        open_limit = context.open_limit if path.startswith("/v1") else context.tokenizing
        open_before: list[int] = []

        async def body() -> AsyncIterator[bytes]:
            open_before.append(open_limit.open)
            yield b'{"prompt": "a"}'

        answer = await client.post(path, content=body(), headers={"content-type": "application/json"})
        assert answer.status_code == 200 and open_before == [0]
        assert open_limit.open == 0

    in_process(test, tiny())


def test_no_key_takes_every_place() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        open_limit = served.app.state.context.open_limit
        assert (open_limit.max_open, open_limit.max_open_per_key) == (8, 3)
        assert (await ask(client, "one", prompt="a", n=3)).status_code == 200
        assert (await ask(client, "one", prompt="a", n=4)).status_code == 400, "never"
        key_id = served.app.state.context.keys.check(Access.CALLER, "Bearer one").key_id
        open_limit.take(2, key_id)
        refused = await ask(client, "one", prompt="a", n=2)
        assert refused.status_code == 429 and "per API key" in refused.json()["error"]["message"]
        assert (await ask(client, "two", prompt="a", n=3)).status_code == 200
        open_limit.leave(2, key_id)

    in_process(test, tiny(), max_open=8, max_concurrency_per_key=3, api_keys=KEYS)


def test_when_to_come_again_is_told_by_the_own_requests() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        context = served.app.state.context
        one, two = (context.keys.check(Access.CALLER, f"Bearer {key}").key_id for key in KEYS)
        open_limit = context.open_limit
        for _ in range(32):
            open_limit.take(1, one)
            open_limit.leave(1, one, 9.5)
        for key_id in one, two:
            open_limit.take(1, key_id)
        for key, seconds in ("one", "10"), ("two", "1"):
            refused = await ask(client, key, prompt="a")
            assert refused.status_code == 429 and refused.headers["retry-after"] == seconds
        for key_id in one, two:
            open_limit.leave(1, key_id)

    in_process(test, tiny(), max_open=2, api_keys=KEYS)


def test_no_key_takes_all_that_may_wait() -> None:
    """Long prompts of one key, and a short one of another."""

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        prompts = [[1 + place] * 200 for place in range(40)]
        asking = [asyncio.create_task(ask(client, "one", prompt=one, max_tokens=20)) for one in prompts]
        while (waiting := served.app.state.context.waiting._of_key).total() < 800:
            await asyncio.sleep(0)
        assert (await ask(client, "two", prompt=[5, 6, 7])).status_code == 200
        answers = await asyncio.gather(*asking)
        assert {answer.status_code for answer in answers} == {200, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert "at most 1000 prompt tokens per API key" in refused.json()["error"]["message"]
        assert not waiting

    engine = tiny(limits=Limits(max_waiting_tokens=2_000, max_num_seqs=2))
    in_process(test, engine, api_keys=KEYS, max_open=128)


def test_no_key_takes_all_bytes_that_are_read() -> None:
    """A body counts with what has come of it, until it is decoded."""

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        let_go = asyncio.Event()

        async def body(size: int) -> AsyncIterator[bytes]:
            yield b"{" + b" " * size
            await let_go.wait()
            yield b"}"

        async def send(key: str, size: int) -> httpx.Response:
            headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
            return await client.post("/v1/completions", content=body(size), headers=headers)

        bodies = served.app.state.context.preparer._bodies
        held = [asyncio.create_task(send("one", 900)) for _ in range(2)]
        while bodies.total < 1_800:
            await asyncio.sleep(0)
        refused = await send("one", 900)
        assert refused.status_code == 429 and refused.headers["retry-after"]
        assert "at most 2000 bytes" in refused.json()["error"]["message"]
        held.append(asyncio.create_task(send("two", 1_900)))
        while bodies.total < 3_700:
            await asyncio.sleep(0)
        assert "at most 4000 bytes" in (await send("three", 500)).json()["error"]["message"], "of all"
        let_go.set()
        assert [(await one).status_code for one in held] == [400] * 3, "no prompt"
        assert bodies.total == 0 and not bodies._of_key

    in_process(test, tiny(limits=limited(max_reading_bytes=4_000, max_body_bytes=2_000)), api_keys=[*KEYS, "three"])


def test_of_several_keys_only_an_operator_s_goes_ahead_of_others() -> None:
    async def test(client: httpx.AsyncClient, _: Served) -> None:
        for key, priority, status in ("one", -1, 400), ("one", 0, 200), ("one", 5, 200), ("all", -1, 200):
            for path, body in ("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": HI}):
                answer = await ask(client, key, path, **body, priority=priority)
                assert answer.status_code == status, answer.text
                assert status == 200 or answer.json()["error"]["param"] == "priority"

    in_process(test, tiny(), api_keys=KEYS, operator_keys=["all"])


def test_a_share_for_each_of_several_keys() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        for callers, operators, most in (([], [], 7), (["one"], [], 7), (KEYS, [], 4), (["one"], ["all"], 4)):
            app = create_app(served.engine, ServeOptions(max_open=7, api_keys=callers, operator_keys=operators))
            context = app.state.context
            places = context.open_limit, context.tokenizing, context.preparer.reading
            assert {one.max_open_per_key for one in places} == {most}

    in_process(test, tiny())


def test_the_share_of_a_key_is_checked() -> None:
    with pytest.raises(InvalidRequest, match="max_concurrency_per_key=0"):
        ServeOptions(max_concurrency_per_key=0).check()


# -- threads --------------------------------------------------------------------------------------------------


class Asking:
    """A request of a caller that has read a body of so many bytes."""

    def __init__(self, key_id: str, size: int) -> None:
        class State:
            caller = type("Caller", (), {"key_id": key_id})
            body_size = size

        self.state = State()

    async def receive(self) -> dict[str, str]:
        await asyncio.Event().wait()
        return {}


def with_preparer(test: Callable[[RequestPreparer, Callable[[str, int], Any]], Any]) -> None:
    """Give `test` a preparer, and what has a caller's work of a size held in a thread until it is let go."""

    async def whole() -> None:
        with tiny() as engine:
            preparer, let_go = RequestPreparer(engine.inputs, OpenLimit(64), Quota("bytes", "bytes")), threading.Event()

            async def hold(key_id: str, size: int) -> bool:
                return await preparer.run(Asking(key_id, size), lambda: let_go.wait(SECONDS))  # type: ignore[arg-type]

            held: list[asyncio.Task[bool]] = []
            try:
                await test(preparer, lambda key_id, size: held.append(asyncio.create_task(hold(key_id, size))))
            finally:
                let_go.set()
                await asyncio.gather(*held, return_exceptions=True)
                preparer.close()

    asyncio.run(asyncio.wait_for(whole(), SECONDS))


async def once(preparer: RequestPreparer, key_id: str, size: int) -> int:
    return await preparer.run(Asking(key_id, size), lambda: 1)  # type: ignore[arg-type]


def test_long_texts_hold_up_no_short_ones_and_no_other_caller() -> None:
    async def test(preparer: RequestPreparer, hold: Callable[[str, int], None]) -> None:
        for _ in range(32):
            hold("one", 1 << 20)
        await asyncio.sleep(0)
        assert await once(preparer, "one", 100) == 1
        assert await once(preparer, "two", 1 << 20) == 1
        for _ in range(32):
            hold("one", 100)
        await asyncio.sleep(0)
        assert await once(preparer, "two", 100) == 1

    with_preparer(test)


def test_health_notices_threads_that_get_nowhere() -> None:
    async def test(preparer: RequestPreparer, hold: Callable[[str, int], None]) -> None:
        health = Health(Idle(), 0.01, preparer.stalled)  # type: ignore[arg-type]
        assert health.fault() is None
        for _ in range(8):
            hold("one", 100)
        while health.fault() is None:
            await asyncio.sleep(0.001)
        assert health.fault() == "requests wait for threads that make no progress"

    with_preparer(test)


def test_what_waits_for_a_thread_ends_with_the_server() -> None:
    async def test(preparer: RequestPreparer, hold: Callable[[str, int], None]) -> None:
        for _ in range(8):
            hold("one", 100)
        await asyncio.sleep(0)
        waiting = asyncio.create_task(once(preparer, "one", 100))
        await asyncio.sleep(0)
        preparer.close()
        for work in (waiting, once(preparer, "two", 100)):
            with pytest.raises(EngineClosed):
                await work

    with_preparer(test)


LONG = [
    ("/v1/completions", {"prompt": "a" * 2_000}),
    ("/v1/completions", {"prompt": ["a", "a" * 2_000]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 2_000}]}),
    ("/v1/chat/completions", {"messages": HI * 1_000}),
    ("/v1/chat/completions", {"messages": HI * 1_000, "session_id": "s"}),
    ("/tokenize", {"prompt": "a" * 2_000}),
    ("/tokenize", {"messages": [{"role": "user", "content": "a" * 2_000}]}),
]


def test_a_text_that_no_context_holds_is_not_tokenized() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        inputs = served.app.state.context.engine.inputs
        assert inputs.max_text_chars < 2_000 and inputs.max_text_chars % inputs.max_model_len == 0
        lengths = counted(inputs.tokenizer)
        for path, body in LONG:
            answer = await client.post(path, json=body)
            error = answer.json()["error"]
            assert answer.status_code == 400 and error["code"] == "context_length_exceeded", answer.text
            assert error["limit"].startswith(f"at most {inputs.max_text_chars} characters")
        assert max(lengths) <= inputs.max_text_chars

    in_process(test, tiny())


def counted(tokenizer: Any) -> list[int]:
    """How long the texts are that `tokenizer` is given from now on."""
    lengths: list[int] = []

    class Counting(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: str, **options: Any) -> Any:
            lengths.append(len(text))
            return super().__call__(text, **options)

    tokenizer.__class__ = Counting
    return lengths


def test_no_process_begins_before_a_chat_is_rendered() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        renderer = served.app.state.context.renderer
        for path, body in (("/v1/completions", {"prompt": "a", "max_tokens": 1}), ("/tokenize", {"prompt": "a"})):
            assert (await client.post(path, json=body)).status_code == 200
        assert renderer._process is None
        assert (await client.post("/tokenize", json={"messages": HI})).status_code == 200
        assert renderer._process is not None

    in_process(test, tiny())


# -- what is told ---------------------------------------------------------------------------------------------


def test_metrics_tell_callers_nothing_of_each_other() -> None:
    """One asks for what another has asked for, under a salt that parts them, and for something else as long: what it
    can read changes alike. An operator reads everything.
    """

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        async def text(key: str) -> str:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            return (await client.get("/metrics", headers=headers)).text

        await ask(client, "one", prompt="abcdefgh")
        names = set()
        for prompt, salt in (("abcdef", "a"), ("uvwxyz", "b")):
            before = await text("two")
            assert (await ask(client, "two", prompt=prompt, cache_salt=salt)).status_code == 200
            assert await text("two") == before == await text("")
            names = {line.split("{")[0].split(" ")[0] for line in before.splitlines() if line[0] != "#"}
        load = ("num_requests_running", "num_requests_waiting")
        assert names == {"radixgen:http_open_requests", *(p + n for p in ("radixgen:", "vllm:") for n in load)}
        assert 'radixgen:sharing_ended_total{reason="namespace"}' in await text("all")

    in_process(test, tiny(), metrics_compat="vllm", api_keys=KEYS, operator_keys=["all"])


@pytest.mark.parametrize(
    ("callers", "operators", "asks", "everything"),
    [
        ([], [], "", True),
        (["one"], [], "one", True),
        (["one"], [], "", False),
        (KEYS, [], "one", False),
        (["one"], ["all"], "one", False),
        (["one"], ["all"], "all", True),
    ],
)
def test_who_reads_all_metrics(callers: list[str], operators: list[str], asks: str, everything: bool) -> None:
    headers = [(b"authorization", b"Bearer " + asks.encode())] if asks else []
    request = Request({"type": "http", "headers": headers})
    assert Gate(Keys(callers, operators)).is_operator(request) is everything


class Idle:
    """An engine without work."""

    closed = False
    progress = 0, False


class Stepping:
    """An engine in the middle of a step."""

    progress = 1, True

    def __init__(self) -> None:
        self.asked = 0
        self.done = asyncio.Event()

    async def stats(self) -> str:
        self.asked += 1
        await self.done.wait()
        return f"after {self.asked}"


def test_stats_do_not_wait_for_a_step() -> None:
    """They are the last that came, and asked for once; the next are there after the step."""

    async def test() -> None:
        engine: Any = Stepping()
        stats = LatestStats(engine)
        for _ in range(2):
            assert await stats.get() is None
        engine.done.set()
        assert await stats.get() == "after 1"
        engine.done.clear()
        assert await stats.get() == "after 1"
        engine.done.set()
        assert await stats.get() == "after 2"
        assert engine.asked == 2

    asyncio.run(asyncio.wait_for(test(), SECONDS))


def test_stats_of_an_engine_that_is_closed() -> None:
    async def test() -> None:
        class Closed(Idle):
            async def stats(self) -> Stats:
                raise EngineClosed("the engine is closed")

        assert await LatestStats(Closed()).get() is None  # type: ignore[arg-type]

    asyncio.run(asyncio.wait_for(test(), SECONDS))


# -- sessions -------------------------------------------------------------------------------------------------


def test_sessions_are_bounded_and_a_callers_own() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        sessions = served.app.state.context.sessions
        for name in "abc":
            for key in KEYS:
                answer = await ask(client, key, "/v1/chat/completions", messages=HI, session_id=name)
                assert answer.status_code == 200
        held = list(sessions._sessions)
        assert len(sessions) == 4 and len({key.key_id for key in held}) == len({key.namespace for key in held}) == 2
        assert sessions.num_bytes == sum(sessions._sessions.get(key).num_bytes for key in held) > 0
        refused = await ask(client, "one", "/v1/chat/completions", messages=HI, session_id="a", n=2)
        assert refused.json()["error"]["param"] == "n"

    in_process(test, tiny(limits=limited(max_sessions=4)), api_keys=KEYS)


class Talks:
    """Sessions within bounds, of one token a character."""

    def __init__(self, **limits: int) -> None:
        with tiny() as engine:
            self.template = ChatTemplate(engine.inputs.tokenizer)
        self.sessions = Sessions(Limits(**limits), frozenset())

    def say(self, key_id: str, name: str, *said: str) -> None:
        """Add turns to a session."""
        messages: list[dict[str, str]] = []
        for text in said:
            messages.append({"role": "user", "content": text})
            turn = self.sessions.begin(SessionKey(key_id, key_id, name), self.template, tuple(messages))
            told = {"role": "assistant", "content": "ok"}
            output = CompletionOutput(0, "ok", list(self.template.tokenize("ok")), "length")
            self.sessions.end(turn, output, told, SamplingParams())
            messages.append(told)

    def names(self, key_id: str) -> list[str]:
        return [key.session_id for key in self.sessions._sessions if key.key_id == key_id]


def test_a_callers_many_sessions_cost_its_own() -> None:
    talks = Talks(max_sessions=4)
    talks.say("two", "kept", "hi")
    for name in "abcdef":
        talks.say("one", name, "hi")
    assert talks.names("two") == ["kept"] and talks.names("one") == ["d", "e", "f"]


def test_a_callers_long_sessions_cost_its_own() -> None:
    talks = Talks(max_session_bytes=1 << 18)
    talks.say("two", "kept", "hi", "and")
    for name in "abcdef":
        talks.say("one", name, name * 2_000)
    assert talks.names("two") == ["kept"]
    assert 0 < len(talks.names("one")) < 6 and talks.names("one")[-1] == "f"
    assert talks.sessions.num_bytes <= 1 << 18
    talks.say("one", "g", "g" * 8_000)
    assert talks.names("two") == ["kept"] and "g" not in talks.names("one"), "larger than all of it"


def test_bytes_of_a_session_are_those_of_its_turns() -> None:
    """What turns share counts once; a turn that is taken back no longer counts."""
    talks = Talks()
    talks.say("one", "a", "x" * 1_000)
    first = talks.sessions.num_bytes
    assert 1_000 * 36 < first < 1_000 * 36 + 8_000, "a reference and an integer a token, and texts"
    talks.say("one", "a", "x" * 1_000, "y" * 1_000)
    second = talks.sessions.num_bytes
    assert 1.9 * first < second < 2.1 * first
    talks.say("one", "a", "x" * 1_000, "z" * 1_000)
    assert talks.sessions.num_bytes == second


def test_bytes_of_values() -> None:
    assert bytes_of("a" * 1_000) > 1_000
    assert bytes_of({"a": ["b" * 1_000] * 3, "c": None}) > 3_000


# -- log-probabilities ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(n=10, max_tokens=50, logprobs=1), "n × max_tokens × logprobs=1000"),
        (SamplingParams(max_tokens=100, logprobs=9), "n × max_tokens × logprobs=1000"),
        (SamplingParams(prompt_logprobs=9), "len(prompt) × prompt_logprobs=1000"),
    ],
)
def test_log_probabilities_are_bounded(params: SamplingParams, field: str) -> None:
    prompt = np.ones(100, np.int32)
    with tiny(limits=Limits(max_logprob_values=999)) as engine, pytest.raises(InvalidRequest) as caught:
        engine.submit(prompt, params)
    assert str(caught.value).startswith(f"{field}: at most 999 log-probabilities")
    with tiny(limits=Limits(max_logprob_values=1_000)) as engine:
        engine.inputs.check(prompt, params)


def test_log_probabilities_of_tokens_that_cannot_come_do_not_count() -> None:
    with tiny(limits=Limits(max_logprob_values=1_000)) as engine:
        engine.inputs.check(np.ones(200, np.int32), SamplingParams(max_tokens=10_000, logprobs=9))


def test_log_probabilities_of_a_request_are_bounded() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        body = {"messages": HI, "logprobs": True, "top_logprobs": 4}
        answer = await client.post("/v1/chat/completions", json={**body, "n": 2, "max_tokens": 100})
        assert answer.json()["error"]["param"] == "n × max_tokens × top_logprobs", answer.text
        answer = await client.post("/v1/chat/completions", json={**body, "n": 2})
        assert answer.json()["usage"]["completion_tokens"] <= 2 * (500 // 10), "as many as there may be"
        body = {"prompt": ["abc"] * 20, "logprobs": 4, "max_tokens": 4}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        answer = await client.post("/v1/completions", json={**body, "max_tokens": 6})
        assert answer.json()["error"]["param"] == "n × max_tokens × logprobs"
        answer = await client.post("/v1/completions", json={**body, "prompt": ["abcdefgh"] * 20, "echo": True})
        assert answer.json()["error"]["param"] == "len(prompt) × logprobs"
        body = {"prompt": "a" * 20, "logprobs": 4, "max_tokens": 0, "echo": True}
        assert (await client.post("/v1/completions", json={**body, "n": 5})).status_code == 200
        answer = await client.post("/v1/completions", json={**body, "n": 6})
        assert answer.json()["error"]["param"] == "n × len(prompt) × logprobs", "each choice has them"

    in_process(test, tiny(limits=limited(max_logprob_values=500)))


def test_a_text_as_long_as_a_context_may_hold() -> None:
    """The longest token, as often as the context holds it, is looked at, and then too long by a token."""
    with tiny() as engine:
        inputs = engine.inputs
        longest = max(inputs.tokenizer.get_vocab(), key=len)
        assert inputs.max_text_chars == len(longest) * inputs.max_model_len
        with pytest.raises(PromptTooLong, match=f"at most {inputs.max_text_chars} characters"):
            inputs.tokenize("a" * (inputs.max_text_chars + 1))
        assert inputs.tokenize("a" * inputs.max_model_len).size == inputs.max_model_len
