"""How the server is reached: by which methods, names and pages, through proxies, and while it goes down."""

import httpx
import pytest
from served import HI, Served, in_process, over_socket, tiny

from radixgen import InvalidRequest
from radixgen.serve.http.app import ServeOptions
from radixgen.serve.http.sites import Sites, listed

PAGE, OTHER = "http://page.example:3000", "http://other.example"
BODY = {"messages": HI, "max_tokens": 1}
CHATS = "/v1/chat/completions"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-api-key"}
KEY = {"Authorization": "Bearer one"}


def origin_of(answer: httpx.Response) -> str | None:
    return answer.headers.get("access-control-allow-origin")


@pytest.mark.parametrize("keys", [(), ("one",)])
def test_pages_of_allowed_origins(keys: tuple[str, ...]) -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        preflight = await client.options(CHATS, headers=PREFLIGHT | {"Origin": PAGE})
        assert preflight.status_code == 200 and origin_of(preflight) == PAGE
        assert preflight.headers["access-control-allow-headers"] == "authorization,x-api-key"
        answer = await client.post(CHATS, json=BODY, headers=KEY | {"Origin": PAGE})
        assert answer.status_code == 200 and origin_of(answer) == PAGE
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        stream = await client.post(CHATS, json=BODY | {"stream": True}, headers=KEY | {"Origin": PAGE})
        assert stream.text.endswith("[DONE]\n\n") and origin_of(stream) == PAGE
        preflight = await client.options(CHATS, headers=PREFLIGHT | {"Origin": OTHER})
        answer = await client.post(CHATS, json=BODY, headers=KEY | {"Origin": OTHER})
        assert preflight.status_code == 400 and answer.status_code == (200 if keys else 403)
        assert origin_of(preflight) is origin_of(answer) is None

    in_process(test, tiny(), sites=Sites(allowed_origins=[PAGE]), api_keys=keys)


def test_refusals_name_the_allowed_origin_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        async def status(body: object, headers: dict[str, str]) -> int:
            answer = await client.post(CHATS, json=body, headers=headers | {"Origin": PAGE})
            assert origin_of(answer) == PAGE
            return answer.status_code

        assert await status({}, KEY) == 400
        assert await status(BODY, {}) == 401
        with served.app.state.context.admission.enter():
            assert await status(BODY, KEY) == 429
        monkeypatch.setattr("radixgen.serve.http.chat._prepare", None)
        assert await status(BODY, KEY) == 500

    in_process(test, tiny(), sites=Sites(allowed_origins=[PAGE]), api_keys=["one"], max_open=1)


@pytest.mark.parametrize(("credentials", "named"), [(False, "*"), (True, PAGE)])
def test_any_page(credentials: bool, named: str) -> None:
    """Browsers take no `*` beside credentials."""

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        preflight = await client.options(CHATS, headers=PREFLIGHT | {"Origin": PAGE})
        assert origin_of(preflight) == named
        answer = await client.post(CHATS, json=BODY, headers={"Origin": PAGE, "Cookie": "a=b"})
        assert answer.status_code == 200 and origin_of(answer) == named
        assert answer.headers.get("access-control-allow-credentials") == ("true" if credentials else None)

    in_process(test, tiny(), sites=Sites(allowed_origins=["*"], allow_credentials=credentials))


def test_methods_and_headers_of_pages() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        for method, header, status in (
            ("POST", "X-Mine", 200),
            ("POST", "Content-Type", 200),
            ("GET", "X-Mine", 400),
            ("POST", "Authorization", 400),
        ):
            asks = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": header}
            assert (await client.options(CHATS, headers=asks | {"Origin": PAGE})).status_code == status, asks

    sites = Sites(allowed_origins=[PAGE], allowed_methods=["POST"], allowed_headers=["X-Mine"])
    in_process(test, tiny(), sites=sites)


def test_without_allowed_origins_no_preflight_is_answered() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        preflight = await client.options(CHATS, headers=PREFLIGHT | {"Origin": PAGE})
        assert preflight.status_code == 405 and origin_of(preflight) is None

    in_process(test, tiny(), api_keys=["one"])


@pytest.mark.parametrize("keys", [(), ("one",)])
def test_allowed_hosts(keys: tuple[str, ...]) -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        for host, status in (
            ("llm.example", 200),
            ("LLM.example.:8000", 200),
            ("a.lab.example:8000", 200),
            ("[2001:db8::1]:8000", 200),
            ("127.0.0.1", 200),
            ("lab.example", 403),
            ("llm.example.evil", 403),
            ("", 403),
        ):
            assert (await client.get("/health", headers={"Host": host})).status_code == status, host

    sites = Sites(allowed_hosts=["llm.example", "*.lab.example", "[2001:db8::1]"])
    in_process(test, tiny(), sites=sites, api_keys=keys)


def test_without_allowed_hosts_every_name_is_good_beside_keys() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        assert (await client.get("/health", headers={"Host": "llm.example"})).status_code == 200

    in_process(test, tiny(), api_keys=["one"])


@pytest.mark.parametrize(
    "origin", ["page.example", "http://page.example/", "http://page.example/x", "HTTP://a", "", "["]
)
def test_origins_that_no_browser_sends(origin: str) -> None:
    with pytest.raises(InvalidRequest, match="allowed_origins"):
        Sites(allowed_origins=[origin]).check()


@pytest.mark.parametrize("host", ["http://a", "a:80", "A", "a/", ""])
def test_hosts_that_are_no_names(host: str) -> None:
    with pytest.raises(InvalidRequest, match="allowed_hosts"):
        Sites(allowed_hosts=[host]).check()


def test_origins_and_hosts_that_are_good() -> None:
    Sites(allowed_origins=["*", "null", PAGE, "tauri://localhost"], allowed_hosts=["*", "a", "*.a", "[::2]"]).check()


def test_options_that_are_lists() -> None:
    assert listed("x", None) == [] and listed("x", ["a", '["b", "c"]', "d"]) == ["a", "b", "c", "d"]
    assert listed("allowed_hosts", ["[::2]"]) == ["[::2]"]
    for wrong in ('["a"', '["a", 1]'):
        with pytest.raises(InvalidRequest, match="allowed_hosts"):
            listed("allowed_hosts", [wrong])


def test_a_path_in_front() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        for path in ("/v1/models", "/llm/v1/models"):
            assert (await client.get(path)).status_code == 200
        assert (await client.get("/llm/openapi.json")).json()["servers"] == [{"url": "/llm"}]

    in_process(test, tiny(), root_path="/llm")


@pytest.mark.parametrize("path", ["llm", "/llm/", "/"])
def test_paths_that_are_no_prefix(path: str) -> None:
    with pytest.raises(InvalidRequest, match="root_path"):
        ServeOptions(root_path=path).check()


def test_an_api_key_in_its_own_header() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        for headers, status in (
            ({"X-API-Key": "one"}, 200),
            ({"X-API-Key": "two"}, 401),
            ({"X-API-Key": ""}, 401),
            ({"X-API-Key": "one", "Authorization": "Bearer one"}, 200),
            ({"X-API-Key": "one", "Authorization": "Bearer two"}, 401),
            ({"X-API-Key": "one", "Authorization": "Basic Zm9vOmJhcg=="}, 200),
            ({}, 401),
        ):
            assert (await client.get("/v1/models", headers=headers)).status_code == status, headers

    in_process(test, tiny(), api_keys=["one"])


def test_head_has_the_status_and_headers_of_get() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        for path in (
            "/health",
            "/ready",
            "/v1/models",
            "/v1/models/tiny",
            "/v1/models/none",
            "/openapi.json",
            "/nowhere",
        ):
            got, head = await client.get(path), await client.head(path)
            assert head.status_code == got.status_code and head.content == b""
            assert head.headers["content-length"] == str(len(got.content))
            assert head.headers["content-type"] == got.headers["content-type"]
        assert (await client.head("/v1/completions")).status_code == 405

    in_process(test, tiny())


def test_a_slash_behind_models() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        assert (await client.get("/v1/models/")).json() == (await client.get("/v1/models")).json()

    in_process(test, tiny())


def test_a_head_of_an_endless_answer_ends() -> None:
    with over_socket(tiny()) as served:
        assert httpx.head(f"{served.url}/tree/events", timeout=30).status_code == 200
