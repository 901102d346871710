"""How the server is reached: by which methods, names and pages, through proxies, and while it goes down."""

import httpx
from served import HI, Served, in_process, over_socket, tiny

BODY = {"messages": HI, "max_tokens": 1}


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
