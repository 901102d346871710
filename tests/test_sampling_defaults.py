"""What a model's generation_config.json recommends is what requests have that set nothing."""

import json
from pathlib import Path
from typing import Any

import families
import httpx
import pytest
from served import HI, Served, in_process, limited, tiny

from radixgen import Engine, InvalidRequest, SamplingParams, UnsupportedModel
from radixgen.model.sampling_defaults import sampling_defaults

FILE = "generation_config.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    families.build("llama").save_pretrained(path)
    return path


def write(path: Path, **values: Any) -> Path:
    path.write_text(json.dumps(values))
    return path


def test_where_they_come_from(model: Path, tmp_path: Path) -> None:
    write(
        model / FILE, do_sample=True, temperature=0.6, top_k=50, top_p=1.0, min_p=None, max_new_tokens=7, eos_token_id=3
    )
    own = {"temperature": 0.6, "top_k": 50, "top_p": 1.0, "max_tokens": 7}
    assert sampling_defaults(model) == sampling_defaults(model, "auto") == own
    assert sampling_defaults(model, "vllm") == {}
    other = write(tmp_path / FILE, repetition_penalty=1.1)
    assert (
        sampling_defaults(model, str(tmp_path)) == sampling_defaults(model, str(other)) == {"repetition_penalty": 1.1}
    )
    named = write(tmp_path / "mine.json", min_p=0.1)
    assert sampling_defaults(model, str(named)) == {"min_p": 0.1}
    (model / FILE).unlink()
    assert sampling_defaults(model) == {}
    assert sampling_defaults("smollm2") == {}


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"temperature": -1.0}, "generation_config.temperature"),
        ({"top_k": 1.5}, "generation_config.top_k"),
        ({"top_p": "x"}, "generation_config.top_p"),
        ({"max_new_tokens": 0}, "generation_config"),
    ],
)
def test_values_that_no_request_may_have(model: Path, values: dict[str, Any], field: str) -> None:
    write(model / FILE, **values)
    with pytest.raises(InvalidRequest) as caught:
        sampling_defaults(model)
    assert caught.value.field == field


@pytest.mark.parametrize("text", ["{", "[]", "1"])
def test_a_file_that_cannot_be_read(model: Path, text: str) -> None:
    (model / FILE).write_text(text)
    with pytest.raises(InvalidRequest, match="generation_config"):
        sampling_defaults(model)


@pytest.mark.parametrize("given", ["no/such/folder", "", "AUTO"])
def test_places_without_one(model: Path, given: str) -> None:
    with pytest.raises(InvalidRequest, match="generation_config"):
        sampling_defaults(model, given)


def test_requests_have_them_unless_they_set_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.1, "max_tokens": 5}
    chats, completions = ("/v1/chat/completions", {"messages": HI}), ("/v1/completions", {"prompt": "ab"})
    unset = SamplingParams(temperature=0.5, top_k=3, top_p=0.9, repetition_penalty=1.1, max_tokens=5)
    own = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1, "max_tokens": 2}

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        seen: list[SamplingParams] = []
        opened = served.engine.open

        def spy(prompt: Any, **options: Any) -> Any:
            seen.append(options["params"])
            return opened(prompt, **options)

        monkeypatch.setattr(served.engine, "open", spy)
        for path, body in (chats, completions):
            null = dict.fromkeys(own)
            for more in ({}, null, own):
                assert (await client.post(path, json=body | more)).status_code == 200
        mine = SamplingParams(temperature=0.0, repetition_penalty=1, max_tokens=2)
        assert seen == [unset, unset, mine, unset, unset, mine]
        assert (await client.post(chats[0], json={**chats[1], "max_completion_tokens": 3})).status_code == 200
        assert seen[-1].max_tokens == 3
        for path, body in (chats, completions):
            assert (await client.post(path, json={**body, "max_tokens": 9})).status_code == 200
            assert seen[-1].max_tokens == 5, "a limit too"
        assert (await client.get("/server_info")).json()["sampling_defaults"] == defaults

    in_process(test, tiny(), sampling_defaults=defaults)


def test_a_default_of_tokens_refuses_no_log_probabilities() -> None:
    async def test(client: httpx.AsyncClient, _: Served) -> None:
        body = {"messages": HI, "logprobs": True, "top_logprobs": 4}
        for n, tokens in (1, 100), (4, 25):
            answer = await client.post("/v1/chat/completions", json={**body, "n": n})
            assert answer.json()["usage"]["completion_tokens"] == n * tokens, answer.text
        answer = await client.post("/v1/chat/completions", json={**body, "max_tokens": 101})
        assert answer.status_code == 400, "asked for"

    in_process(test, tiny(limits=limited(max_logprob_values=500)), sampling_defaults={"max_tokens": 200})


@pytest.mark.parametrize("text", ["{", "", "\ufeff{}", "[" * 100_000])
def test_a_model_is_not_loaded_without_its_own(model: Path, text: str) -> None:
    """transformers would leave out a file that it cannot read, and the end tokens in it."""
    (model / FILE).write_text(text)
    with pytest.raises(InvalidRequest, match="generation_config"):
        Engine(model, kv_tokens=64)


@pytest.mark.parametrize("eos", ["2", [2, None], [2, "3"], 1.0, [[2]], {"a": 1}])
def test_end_tokens_that_are_none(model: Path, eos: Any) -> None:
    write(model / FILE, eos_token_id=eos)
    with pytest.raises(UnsupportedModel, match="eos_token_id"):
        Engine(model, kv_tokens=64)


@pytest.mark.parametrize(("eos", "ends"), [([], set()), (-1, set()), ([3, 2, 10**9], {2, 3}), (2, {2})])
def test_end_tokens_that_are_some(model: Path, eos: Any, ends: set[int]) -> None:
    write(model / FILE, eos_token_id=eos)
    with Engine(model, kv_tokens=64) as engine:
        assert engine.inputs.eos_token_ids == ends
