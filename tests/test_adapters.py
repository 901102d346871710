"""Nobody who asks for an adapter (LoRA) gets the base model's answer: it is refused by name, in every face."""

import asyncio
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import httpx
import msgspec
import numpy as np
import pytest
from gguf import GGUFWriter
from oracle import StampModel
from served import HI, Served, in_process, tiny

from radixgen import (
    AsyncClient,
    AsyncEngine,
    BeamSearchParams,
    Client,
    Engine,
    InvalidRequest,
    SamplingParams,
    UnsupportedModel,
)
from radixgen.core.adapters import ADAPTER_FIELDS
from radixgen.model.checkpoint import ADAPTER_FILES
from radixgen.serve.dynamo.requests import check_adapter
from radixgen.serve.zmq import wire, wire_params

LORA = SimpleNamespace(lora_name="mine", lora_int_id=1, lora_path="/loras/mine")
SHORT = SamplingParams(max_tokens=2)
BEAMS = BeamSearchParams(beam_width=2, max_tokens=2)


@pytest.fixture
def engine() -> Engine:
    return Engine(StampModel(), kv_tokens=64)


CALLS: dict[str, Callable[..., Any]] = {
    "generate": lambda engine, **names: engine.generate([1, 2], SHORT, **names),
    "submit": lambda engine, **names: engine.submit([1, 2], SHORT, **names),
    "stream": lambda engine, **names: list(engine.stream([1, 2], SHORT, **names)),
    "beam_search": lambda engine, **names: engine.beam_search([1, 2], BEAMS, **names),
    "score": lambda engine, **names: engine.score([1, 2], [[1]], **names),
    "submit_score": lambda engine, **names: engine.submit_score([1, 2], [1], **names),
    "preload": lambda engine, **names: engine.preload([[1, 2]], **names),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_the_engine(name: str, engine: Engine) -> None:
    call = CALLS[name]
    for field, value in ("lora_request", LORA), ("lora_request", [None, LORA]), ("lora_path", "x"), ("adapter_id", 3):
        with pytest.raises(InvalidRequest, match=rf"{field}=.*adapters \(LoRA\) are not served"):
            call(engine, **{field: value})
    assert not engine.has_unfinished
    for value in None, [None, None], [], "", 0:
        call(engine, lora_request=value, lora_path=value)
    with pytest.raises(TypeError, match="lora_rank"):
        call(engine, lora_rank=8)


def test_a_chat() -> None:
    with tiny() as engine, pytest.raises(InvalidRequest, match="lora_request"):
        engine.chat(HI, SHORT, lora_request=LORA)


def test_calls_of_asyncio(engine: Engine) -> None:
    async def run() -> None:
        async with AsyncEngine(engine) as served:
            for call in (
                lambda: anext(served.generate([1], SHORT, lora_request=LORA)),
                lambda: served.open([1], SHORT, lora_request=LORA),
                lambda: served.score([1], [[2]], lora_request=LORA),
                lambda: served.preload([[1]], lora_request=LORA),
                lambda: served.beam_search([1], BEAMS, lora_request=LORA),
            ):
                with pytest.raises(InvalidRequest, match="lora_request"):
                    await call()
            outputs = [one async for one in served.generate([1], SHORT, lora_request=None)]
            assert outputs[-1].finished

    asyncio.run(run())


@pytest.mark.parametrize("face", [Client, AsyncClient])
def test_calls_of_clients(face: type) -> None:
    for name in {"generate", "stream", "open", "score"} & set(vars(face)):
        with pytest.raises(InvalidRequest, match="lora_request"):
            getattr(face, name)(None, [1], lora_request=LORA)


def test_signatures_stay() -> None:
    assert list(inspect.signature(Engine.submit).parameters)[:3] == ["self", "prompt", "params"]
    assert "Raises" in (Engine.submit.__doc__ or "")


# -- HTTP -----------------------------------------------------------------------------------------------------

ASKED = {"lora_request": {"lora_name": "mine", "lora_int_id": 1}, "lora_name": "mine", "lora_path": ["mine"],
         "adapter": "mine", "adapter_id": "mine", "lora_weight": 0.5}  # fmt: skip
BODIES = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/v1/chat/completions": {"messages": HI, "max_tokens": 1},
    "/tokenize": {"prompt": "hi"},
}


@pytest.mark.parametrize("ignore", [False, True], ids=["strict", "ignore-unknown-fields"])
def test_requests_over_http(ignore: bool) -> None:
    async def run(client: httpx.AsyncClient, _: Served) -> None:
        for path, body in BODIES.items():
            for field, value in ASKED.items():
                answer = await client.post(path, json=body | {field: value})
                error = answer.json()["error"]
                assert answer.status_code == 400 and error["param"] == field, answer.text
                assert "adapters (LoRA) are not served" in error["message"]
            answer = await client.post(path, json=body | dict.fromkeys(ADAPTER_FIELDS))
            assert answer.status_code == 200 and "warning" not in answer.headers, answer.text
            answer = await client.post(path, json=body | {"model": "tiny:mine"})
            assert answer.status_code == 404 and "tiny:mine" in answer.json()["error"]["message"]
        answer = await client.post(
            "/v1/chat/completions",
            json=BODIES["/v1/chat/completions"] | {"stream_options": {"lora": "x"}, "stream": True},
        )
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "stream_options.lora"

    in_process(run, tiny(), ignore_unknown_fields=ignore)


@pytest.mark.parametrize(
    "field", ["loraPath", "LoRA", "useLoRA", "lora-name", "x_lora", "qlora_id", "adapterId", "my_adapters", "peft_id"]
)
def test_other_spellings_over_http(field: str) -> None:
    async def run(client: httpx.AsyncClient, _: Served) -> None:
        for path, body in BODIES.items():
            for name, value in (field, {field: "mine"}), ("extra_body", {"a": {field: "mine"}}):
                answer = await client.post(path, json=body | {name: value if name == "extra_body" else "mine"})
                error = answer.json()["error"]
                assert answer.status_code == 400 and error["param"].endswith(field), answer.text
                assert "adapters (LoRA) are not served" in error["message"]
        for other in {"exploration": 1}, {"extra_body": {field: None}}, {"guided_json": {"adapter": {}}}:
            assert (await client.post(path, json=body | other)).status_code == 200

    in_process(run, tiny(), ignore_unknown_fields=True)


# -- front ends -----------------------------------------------------------------------------------------------


def test_requests_over_the_wire() -> None:
    def add(lora: Any) -> wire.Add:
        request = ["a", [1, 2], None, {"max_tokens": 2}, None, 0.0, lora]
        return wire.decode(msgspec.msgpack.encode(request), wire.Add)

    for lora in ["mine", 1, "/loras/mine"], {"lora_name": "mine"}, "mine", 1:
        with pytest.raises(InvalidRequest, match=r"lora_request.*adapters"):
            wire_params.check_served(add(lora))
    wire_params.check_served(add(None))


def test_requests_of_dynamo() -> None:
    names = ("base", "/models/base")
    check_adapter({"token_ids": [1], "model": "base", "routing": {"lora_name": None, "dp_rank": 0}}, names)
    check_adapter({"token_ids": [1], "model": "/models/base", "extra_args": None, "nvext": []}, names)
    check_adapter({"token_ids": [1]}, names)
    for request, field in (
        ({"model": "base", "routing": {"lora_name": "mine"}}, "lora_name"),
        ({"model": "mine"}, "model"),
        ({"lora_name": "mine"}, "lora_name"),
        ({"extra_args": {"lora_request": {"name": "mine"}}}, "lora_request"),
        ({"sampling_options": {"lora_path": "mine"}}, "lora_path"),
    ):
        with pytest.raises(InvalidRequest, match=rf"{field}='?.*adapters"):
            check_adapter(request, names)


# -- models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ADAPTER_FILES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_with_an_adapter_beside_it(file: str, ranks: int, tmp_path: Path) -> None:
    families.build("llama").save_pretrained(tmp_path)
    (tmp_path / file).write_text("{}")
    with pytest.raises(UnsupportedModel, match=rf"{tmp_path}: it holds an adapter \({file}\)"):
        Engine(tmp_path, kv_tokens=64, tensor_parallel_size=ranks)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "some/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"adapter_config\.json.*merge them"):
        Engine(tmp_path, kv_tokens=64)


@pytest.mark.parametrize(("kind", "says"), [("adapter", "adapters"), ("mmproj", "own file")])
def test_a_gguf_file_that_is_no_model(kind: str, says: str, tmp_path: Path) -> None:
    """transformers would make a model of the architecture's default size."""
    writer = GGUFWriter(tmp_path / "it.gguf", "llama")
    writer.add_type(kind)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for path in tmp_path, tmp_path / "it.gguf":
        with pytest.raises(UnsupportedModel, match=rf"{path}: its GGUF file holds no model \({kind}\); .*{says}"):
            Engine(path, kv_tokens=64)


def test_a_model_with_adapters_in_its_layers() -> None:
    model = families.build("llama")
    layer = model.model.layers[1].mlp.up_proj
    layer.__class__ = type("Linear", (type(layer),), {"__module__": "peft.tuners.lora.layer"})
    with pytest.raises(UnsupportedModel, match="adapter in its layers"):
        Engine(model, kv_tokens=64)
