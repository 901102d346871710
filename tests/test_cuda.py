"""On a GPU: the same tokens as transformers on that GPU, in float32 without TF32."""

import families
import pytest
import torch
from test_exactness import NEW_TOKENS, WAYS, Oracle, greedy, prompts

from radixgen import Engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", families.FAMILIES)
def test_families(name: str) -> None:
    oracle, served = Oracle(families.build(name).to("cuda")), families.build(name).to("cuda")
    asked = prompts(families.VOCAB)
    for way in ("default", "chunks of 7", "unshared reads", "a pool that is always full"):
        with Engine(served, debug=True, **({"kv_tokens": 2048} | WAYS[way])) as engine:
            for prompt, output in zip(asked, engine.generate(asked, greedy(NEW_TOKENS)), strict=True):
                oracle.expect(engine, prompt, output.outputs[0].token_ids, NEW_TOKENS)
            engine.check()
    oracle.settle()


def test_the_pool_leaves_memory_free() -> None:
    with Engine(families.build("llama").to("cuda"), max_model_len=64) as engine:
        assert engine.stats().kv_tokens_total > 0
        engine.generate([5, 6, 7])
