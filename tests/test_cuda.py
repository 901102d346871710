"""On a GPU: the same tokens as transformers on that GPU, in float32 without TF32."""

import families
import numpy as np
import pytest
import torch
from test_exactness import NEW_TOKENS, WAYS, Oracle, greedy, prompts

from radixgen import Engine, SamplingParams
from radixgen.core import SamplingState
from radixgen.sampling import sample

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


@pytest.mark.parametrize("vocab", [37, 1_000, 32_000, 128_256])
def test_a_draw_is_the_same_alone_and_in_a_batch(vocab: int) -> None:
    """Pins that the order in which a GPU adds the floats of a row depends on how many rows there are."""
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(0)).to("cuda")
    params = [SamplingParams(temperature=1.5), SamplingParams(top_p=0.9), SamplingParams(top_k=50, min_p=0.01)]
    prompt = np.zeros(1, np.int32)
    states = [SamplingState(params[row % 3], row, 0, prompt, [], frozenset()) for row in range(64)]
    together = sample(logits, range(64), states).tokens
    assert together == [sample(logits, [row], [state]).tokens[0] for row, state in enumerate(states)]
    assert together == sample(logits.cpu(), range(64), states).tokens
