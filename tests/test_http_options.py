"""How the server is reached: by which methods, names and pages, through proxies, and while it goes down."""

import asyncio
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import texts
from served import HI, Served, in_process, over_socket, tiny
from typer.testing import CliRunner

from radixgen import AsyncEngine, InvalidRequest, SamplingParams
from radixgen.cli import app
from radixgen.serve.http.app import ServeOptions
from radixgen.serve.http.binding import Binding
from radixgen.serve.http.custom_template import read_template
from radixgen.serve.http.origins import OriginPolicy, parse_list
from radixgen.serve.server import HTTPServer, _held

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

    in_process(test, tiny(), origins=OriginPolicy(allowed_origins=[PAGE]), api_keys=keys)


def test_refusals_name_the_allowed_origin_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        async def status(body: object, headers: dict[str, str]) -> int:
            answer = await client.post(CHATS, json=body, headers=headers | {"Origin": PAGE})
            assert origin_of(answer) == PAGE
            return answer.status_code

        assert await status({}, KEY) == 400
        assert await status(BODY, {}) == 401
        with served.app.state.context.open_limit.enter():
            assert await status(BODY, KEY) == 429
        monkeypatch.setattr("radixgen.serve.http.chat.prepare_chat", None)
        assert await status(BODY, KEY) == 500

    in_process(test, tiny(), origins=OriginPolicy(allowed_origins=[PAGE]), api_keys=["one"], max_open=1)


@pytest.mark.parametrize(("credentials", "named"), [(False, "*"), (True, PAGE)])
def test_any_page(credentials: bool, named: str) -> None:
    """Browsers take no `*` beside credentials."""

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        preflight = await client.options(CHATS, headers=PREFLIGHT | {"Origin": PAGE})
        assert origin_of(preflight) == named
        answer = await client.post(CHATS, json=BODY, headers={"Origin": PAGE, "Cookie": "a=b"})
        assert answer.status_code == 200 and origin_of(answer) == named
        assert answer.headers.get("access-control-allow-credentials") == ("true" if credentials else None)

    in_process(test, tiny(), origins=OriginPolicy(allowed_origins=["*"], allow_credentials=credentials))


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

    origins = OriginPolicy(allowed_origins=[PAGE], allowed_methods=["POST"], allowed_headers=["X-Mine"])
    in_process(test, tiny(), origins=origins)


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

    origins = OriginPolicy(allowed_hosts=["llm.example", "*.lab.example", "[2001:db8::1]"])
    in_process(test, tiny(), origins=origins, api_keys=keys)


def test_without_allowed_hosts_every_name_is_good_beside_keys() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        assert (await client.get("/health", headers={"Host": "llm.example"})).status_code == 200

    in_process(test, tiny(), api_keys=["one"])


@pytest.mark.parametrize(
    "origin",
    ["page.example", "http://page.example/", "http://page.example/x", "HTTP://a", "", "["]
    + [
        "https://*.page.example",
        "http://me@a",
        "http://a b",
        "https://münchen.de",
        "http://a:b",
        "http://a:",
        "file://",
    ]
    + ["http://a:80", "https://[::1]:443", "http://a,http://b", "http://a\n"],
)
def test_origins_that_no_browser_sends(origin: str) -> None:
    with pytest.raises(InvalidRequest, match="allowed_origins"):
        OriginPolicy(allowed_origins=[origin]).check()


@pytest.mark.parametrize("host", ["http://a", "a:80", "A", "a/", "", "a b", "münchen", "::1", "a\n", "?"])
def test_hosts_that_are_no_names(host: str) -> None:
    with pytest.raises(InvalidRequest, match="allowed_hosts"):
        OriginPolicy(allowed_hosts=[host]).check()


def test_origins_and_hosts_that_are_good() -> None:
    origins = ["*", "null", PAGE, "tauri://localhost", "https://a:80", "http://[::1]:443", "http://10.0.0.1", "app://."]
    OriginPolicy(allowed_origins=origins, allowed_hosts=["*", "a", "*.a", "[::2]", "10.0.0.1"]).check()


def test_options_that_are_lists() -> None:
    assert parse_list("x", None) == [] and parse_list("x", ["a", '["b", "c"]', "d"]) == ["a", "b", "c", "d"]
    assert parse_list("allowed_hosts", ["[::2]"]) == ["[::2]"]
    for wrong in ('["a"', '["a", 1]'):
        with pytest.raises(InvalidRequest, match="allowed_hosts"):
            parse_list("allowed_hosts", [wrong])


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


# -- where it listens -----------------------------------------------------------------------------------------


def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with (
        over_socket(tiny(), uds=path) as served,
        httpx.Client(transport=httpx.HTTPTransport(uds=path), timeout=30) as client,
    ):
        assert client.post(f"{served.url}{CHATS}", json=BODY).status_code == 200
        assert refused(lambda: Binding(uds=path).check([])) == "uds", "it is taken"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "left"))
    Binding(uds=str(tmp_path / "left")).check([])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Files of a key and of a certificate for 127.0.0.1, signed by itself."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = str(folder / "key.pem"), str(folder / "certificate.pem")
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command = ["openssl", "req", "-x509", *curve, "-keyout", key, "-out", certificate, "-days", "2", *names]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl here")
    return key, certificate


def test_https_with_certificates_of_clients(certificate: tuple[str, str]) -> None:
    key, chain = certificate
    own, anonymous = (ssl.create_default_context(cafile=chain) for _ in range(2))
    own.load_cert_chain(chain, key)
    options = {"ssl_keyfile": key, "ssl_certfile": chain, "ssl_ca_certs": chain, "ssl_cert_reqs": 2}
    with over_socket(tiny(), **options) as served:
        assert httpx.post(f"{served.url}{CHATS}", json=BODY, verify=own, timeout=30).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{served.url}/health", verify=anonymous, timeout=30)


def test_a_connection_whose_socket_is_gone_is_let_be() -> None:
    """TLS lets go of its socket when a handshake fails; the server looks at its connections before it is told."""
    transport = SimpleNamespace(get_extra_info={"socket": None}.get, is_closing=lambda: True)
    assert _held(SimpleNamespace(transport=transport, cycle=None)) is None


def test_tls_that_cannot_be_set_up(certificate: tuple[str, str], tmp_path: Path) -> None:
    key, chain = certificate
    other = tmp_path / "other.pem"
    other.write_text("no PEM")
    good = {"ssl_keyfile": key, "ssl_certfile": chain}
    Binding(**good, ssl_ciphers="ECDHE+AESGCM").check([])  # type: ignore[arg-type]
    for wrong, field in (
        ({"ssl_certfile": str(other)}, "ssl_certfile"),
        ({"ssl_keyfile": str(other)}, "ssl_certfile"),
        ({"ssl_keyfile": None}, "ssl_certfile"),
        ({"ssl_ciphers": "none such"}, "ssl_certfile"),
        ({"ssl_ca_certs": str(other)}, "ssl_certfile"),
        ({"ssl_certfile": None}, "ssl_keyfile"),
        ({"ssl_certfile": "/no/such"}, "ssl_certfile"),
        ({"ssl_cert_reqs": 2}, "ssl_cert_reqs"),
        ({"ssl_cert_reqs": 3}, "ssl_cert_reqs"),
    ):
        assert refused(lambda: Binding(**(good | wrong)).check([])) == field, wrong  # noqa: B023


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"timeout_keep_alive": -1}, "timeout_keep_alive"),
        ({"shutdown_delay": float("nan")}, "shutdown_delay"),
        ({"ssl_cert_reqs": 1}, "ssl_cert_reqs"),
        ({"ssl_ciphers": "ALL"}, "ssl_ciphers"),
        ({"uds": ""}, "uds"),
        ({"uds": "/tmp/" + "x" * 103}, "uds"),
        ({"uds": "/no/such/folder/socket"}, "uds"),
        ({"uds": __file__}, "uds"),
    ],
)
def test_bindings_that_cannot_be(options: dict[str, Any], field: str) -> None:
    assert refused(lambda: Binding(**options).check([])) == field


def test_a_unix_socket_is_no_address_that_others_reach(tmp_path: Path) -> None:
    Binding(uds=str(tmp_path / "socket"), host="0.0.0.0").check([])


def refused(call: Callable[[], object]) -> str:
    """The field that is called wrong."""
    with pytest.raises(InvalidRequest) as caught:
        call()
    return caught.value.field


# -- chat templates -------------------------------------------------------------------------------------------


def test_templates_of_the_operator(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    text = "{% for m in messages %}\\n{% generation %}{{ m }}{% endgeneration %}{% break %}{% endfor %}"
    file.write_text(text)
    assert read_template(str(file)) == text
    assert read_template(r"{{ a }}\n{{ 'é' }}") == "{{ a }}\n{{ 'é' }}"


@pytest.mark.parametrize("given", ["no/such/file", "/", "", "{% if %}", "{{ x", "{{ x }}" * 200_000])
def test_what_is_no_template(given: str) -> None:
    assert "chat_template" in refused(lambda: read_template(given))


# -- the command line -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts.saved_model(tmp_path_factory.mktemp("model"))


def serve(monkeypatch: pytest.MonkeyPatch, model: Path, *flags: str) -> tuple[Any, ServeOptions, Binding]:
    """What `radixgen serve` would serve."""
    found: list[Any] = []
    monkeypatch.setattr("radixgen.serve.server.serve", lambda *parts: found.extend(parts))
    result = CliRunner().invoke(app, ["serve", str(model), "--kv-tokens", "64", *flags])
    assert result.exit_code == 0, result.output
    backend, options, binding = found
    asyncio.run(backend.close())
    return backend, options, binding


def test_options_of_the_command_line(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    flags = ["--allowed-origins", PAGE, "--allowed-origins", f'["{OTHER}"]', "--allowed-methods", "GET"]
    flags += ["--allowed-headers", '["x-a", "x-b"]', "--allow-credentials", "--allowed-hosts", "llm.example"]
    flags += ["--root-path", "/llm", "--timeout-keep-alive", "5", "--shutdown-delay", "2.5", "--uds", "/tmp/radixgen"]
    _, options, binding = serve(monkeypatch, model, *flags)
    assert options.root_path == "/llm" and options.origins == OriginPolicy(
        allowed_origins=[PAGE, OTHER],
        allowed_methods=["GET"],
        allowed_headers=["x-a", "x-b"],
        allow_credentials=True,
        allowed_hosts=["llm.example"],
    )
    assert binding == Binding(uds="/tmp/radixgen", timeout_keep_alive=5, shutdown_delay=2.5)
    _, options, binding = serve(monkeypatch, model)
    assert options.origins == OriginPolicy(
        allowed_origins=[], allowed_methods=["*"], allowed_headers=["*"], allowed_hosts=[]
    )
    assert binding == Binding()


def test_sampling_defaults_of_the_command_line(monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"top_k": 9}')
    for given, expected in ((tmp_path, {"top_k": 9}), ("vllm", {})):
        _, options, _ = serve(monkeypatch, model, "--generation-config", str(given))
        assert options.sampling_defaults == expected


def test_a_profile_of_the_command_line(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def generate(backend: AsyncEngine) -> None:
        async for _ in backend.generate([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True)):
            pass
        await backend.close()

    monkeypatch.setattr("radixgen.serve.server.serve", lambda backend, *_: asyncio.run(generate(backend)))
    flags = ["--kv-tokens", "64", "--profile", str(tmp_path), "--profile-steps", "2"]
    result = CliRunner().invoke(app, ["serve", str(model), *flags])
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.iterdir()
    assert '"step 2"' in path.read_text() and '"step 3"' not in path.read_text()


def test_a_template_of_the_command_line(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    given = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    backend, _, _ = serve(monkeypatch, model, "--chat-template", given)
    assert backend.inputs.tokenizer.chat_template == given


# -- going down -----------------------------------------------------------------------------------------------


def test_not_ready_before_the_listener_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    """From SIGTERM on; what comes meanwhile is served, and a second one ends the delay."""
    delaying, serve_on = threading.Event(), HTTPServer._serve_on

    async def seen(server: HTTPServer, seconds: float) -> None:
        delaying.set()
        await serve_on(server, seconds)

    monkeypatch.setattr(HTTPServer, "_serve_on", seen)
    with over_socket(tiny(), shutdown_delay=600.0) as served:
        assert served.server is not None and httpx.get(f"{served.url}/ready", timeout=30).status_code == 200
        served.server.handle_exit(signal.SIGTERM, None)
        assert delaying.wait(30)
        assert httpx.get(f"{served.url}/ready", timeout=30).status_code == 503
        assert httpx.get(f"{served.url}/health", timeout=30).status_code == 200
        assert httpx.post(f"{served.url}{CHATS}", json=BODY, timeout=30).status_code == 200
        served.server.handle_exit(signal.SIGTERM, None)
        wait_closed(served)


def test_an_interrupt_has_no_delay() -> None:
    with over_socket(tiny(), shutdown_delay=600.0) as served:
        assert served.server is not None
        served.server.handle_exit(signal.SIGINT, None)
        wait_closed(served)


def wait_closed(served: Served) -> None:
    end = time.monotonic() + 30
    while not served.engine.closed:
        assert time.monotonic() < end, "the server does not go down"
        time.sleep(0.01)
