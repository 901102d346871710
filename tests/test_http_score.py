"""`/v1/score`, and searches whose engine is behind the server."""

import math

import httpx
import pytest
from served import Served, in_process, over_socket, tiny

from radixgen import InvalidRequest, RequestFailed, SamplingParams, thoughts
from radixgen.thoughts import BreadthFirst, Choose, Propose, RemoteEngine

CONTINUATIONS = [" yes", " no", "x"]


def test_scores_are_the_engines() -> None:
    """And the prompt is computed once for all continuations."""
    with tiny() as engine:
        expected = engine.score("Is it so?", CONTINUATIONS)

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        body = {"prompt": "Is it so?", "continuations": CONTINUATIONS}
        answer = (await client.post("/v1/score", json=body)).json()
        for entry, logprobs in zip(answer["data"], expected, strict=True):
            assert entry["token_logprobs"] == pytest.approx(logprobs, abs=1e-4)
            assert entry["logprob"] == pytest.approx(math.fsum(logprobs), abs=1e-4)
        computed = (await served.engine.stats()).computed_prompt_tokens
        assert computed <= len("Is it so?") + sum(map(len, CONTINUATIONS))
        assert answer["usage"]["prompt_tokens"] >= 3 * len("Is it so?")
        for changed, field in (
            ({"continuations": []}, "len(continuations)"),
            ({"continuations": ["a"] * 129}, "len(continuations)"),
            ({"continuations": [""]}, "continuations"),
            ({"prompt": []}, "prompt"),
            ({"prompt": "a" * 300}, "len(prompt) + len(continuation)"),
            ({"model": "other"}, "model"),
        ):
            refused = await client.post("/v1/score", json=body | changed)
            assert refused.status_code in (400, 404) and refused.json()["error"]["param"] == field, refused.text

    in_process(test, tiny())


def test_a_search_over_http_is_the_same() -> None:
    """Thoughts, scores and costs, with the same seeds."""
    options = {
        "propose": Propose(n=2, params=SamplingParams(max_tokens=5, stop=["q"])),
        "evaluate": Choose(ask="\nGood?", values={" yes": 1.0, " no": 0.0}),
        "strategy": BreadthFirst(breadth=2, depth=2),
        "seed": 3,
    }
    with tiny() as engine:
        local = thoughts.search(engine, "Once", **options)  # type: ignore[arg-type]
    with over_socket(tiny(), api_keys=["key"]) as served:
        remote = thoughts.search(RemoteEngine(served.url, api_key="key"), "Once", **options)  # type: ignore[arg-type]
        with pytest.raises(RequestFailed, match="API key"):
            thoughts.search(RemoteEngine(served.url), "Once", **options)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="prompt"):
            thoughts.search(RemoteEngine(served.url, api_key="key"), "", **options)  # type: ignore[arg-type]
    assert [thought.steps for thought in remote.thoughts] == [thought.steps for thought in local.thoughts]
    for there, here in zip(remote.thoughts, local.thoughts, strict=True):
        assert (there.score is None) == (here.score is None)
        assert here.score is None or there.score == pytest.approx(here.score, abs=1e-4)
    assert remote.cost.prompt_tokens == local.cost.prompt_tokens
    assert remote.cost.generated_tokens == local.cost.generated_tokens
