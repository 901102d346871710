"""On a GPU: the same tokens as transformers on that GPU, in float32 without TF32."""

import gc

import families
import numpy as np
import pytest
import torch
from test_exactness import NEW_TOKENS, WAYS, Oracle, greedy, prompts
from test_reading import greedy as greedy_under
from test_reading import llama
from transformers import LlamaConfig, LlamaForCausalLM

from radixgen import Engine, SamplingParams
from radixgen.core import SamplingState
from radixgen.kernels import work
from radixgen.model import graphs, tree_model
from radixgen.model.graphs import CudaCapture, _Graph
from radixgen.reading import Press
from radixgen.sampling.sampler import distribution, sample, uniform

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def small_llama(dtype: torch.dtype, **sizes: int) -> LlamaForCausalLM:
    """On the GPU, with random weights that are the same each time."""
    usual = {
        "vocab_size": 256, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**usual | sizes, dtype=dtype)).to("cuda", dtype).eval()


@pytest.mark.parametrize("name", families.FAMILIES)
def test_families(name: str) -> None:
    oracle, served = Oracle(families.build(name).to("cuda")), families.build(name).to("cuda")
    asked = prompts(families.VOCAB)
    for way in ("default", "chunks of 7", "unshared reads", "a pool that is always full"):
        with Engine(served, debug=True, warm_up=False, **({"kv_tokens": 2048} | WAYS[way])) as engine:
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
    exact = sample(logits.cpu(), range(64), states).tokens
    for row in np.flatnonzero(np.array(together) != exact):
        first, last = sorted((together[row], exact[row]))
        summed = distribution(logits[row : row + 1].cpu(), [states[row]])[0].cumsum(0)
        gaps = summed[first:last] / summed[-1] - uniform([states[row]])[0]
        assert gaps.abs().max() < 1e-6, "a draw may differ where its number lies between two tokens, and nowhere else"


def test_captures_go_on_when_the_last_graph_is_gone() -> None:
    """Pins that a pool ends with the last of its graphs, though tensors that were made in it live on."""
    capture, x, made = CudaCapture(torch.device("cuda")), torch.ones(4, device="cuda"), []

    def run() -> torch.Tensor:
        made.append(x * 2 + 1)
        return made[-1] + 1

    for _ in range(3):
        replay = capture(run)
        assert replay().tolist() == [4.0] * 4
        del replay
        gc.collect()


def test_results_of_graphs_take_no_memory_of_their_own() -> None:
    """The next capture has the memory of what the last one returned; each replay's result is right until the next."""
    capture, x = CudaCapture(torch.device("cuda")), torch.ones(1 << 22, device="cuda", dtype=torch.bfloat16)
    replays = [capture(lambda by=by: (x * by + 1) * 2) for by in range(6)]
    torch.cuda.synchronize()
    pooled = [s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
    assert sum(pooled) < 5 * 2 * x.numel() * x.element_size()
    for by in (3, 0, 5, 5, 1):
        result = replays[by]()
        assert result.dtype == x.dtype and result.shape == x.shape and torch.equal(result, (x * by + 1) * 2)


def test_no_step_after_warming_up_captures_or_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bursts of several sizes, alone and together, drawn in several ways; the tokens are those of a cold engine."""
    from triton.runtime.jit import JITFunction

    model, made = small_llama(torch.float32, max_position_embeddings=2_048), []
    rng = np.random.default_rng(0)
    bursts = [[rng.integers(3, 256, 5 + size).tolist() for size in range(count)] for count in (1, 2, 3, 17, 40)]
    ways = [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.05, "repetition_penalty": 1.1}]
    params = [SamplingParams(max_tokens=20, seed=1, ignore_eos=True, **way) for way in ways]

    def serve(engine: Engine) -> list[list[int]]:
        return [o.outputs[0].token_ids for one in params for burst in bursts for o in engine.generate(burst, one)]

    with Engine(model, kv_tokens=20_000, warm_up=False) as cold:
        expected = serve(cold)
    with Engine(model, kv_tokens=20_000) as warm:
        assert warm.stats().steps == 0 and warm._core.tree.num_nodes == 0
        record, compiled = CudaCapture.record, JITFunction._do_compile
        monkeypatch.setattr(CudaCapture, "record", lambda *a: made.append("graph") or record(*a))
        monkeypatch.setattr(JITFunction, "_do_compile", lambda *a, **o: made.append(a[0]) or compiled(*a, **o))
        assert serve(warm) == expected
        assert not made
        assert warm.stats().failed_captures == 0
        warm.check()


def test_a_capture_that_fails_leaves_nothing_behind() -> None:
    device = torch.device("cuda")
    capture, x, stream = CudaCapture(device), torch.ones(4, device="cuda"), torch.cuda.current_stream()
    torch.manual_seed(5)
    expected = torch.randn(8, device="cuda")
    torch.manual_seed(5)

    def waits() -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            x.sum().item()
        return x + 1

    with pytest.raises(RuntimeError):
        capture(waits)
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.randn(8, device="cuda"), expected)
    torch.cuda.empty_cache()
    replay = capture(lambda: x * 3)
    assert replay().tolist() == [3.0] * 4


def test_a_plan_that_outgrows_its_tables_is_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bursts on one long prefix, with tables that have no room to spare."""
    model = small_llama(torch.bfloat16, max_position_embeddings=16_384)
    captured: list[object] = []

    class Counted(_Graph):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            captured.append(arguments[3])

    monkeypatch.setattr(graphs, "_Graph", Counted)
    monkeypatch.setattr(work, "_room", lambda size, _: size)
    rng = np.random.default_rng(0)
    prefix = rng.integers(3, 256, 8_000).tolist()
    with Engine(model, kv_tokens=60_000, warm_up=False) as engine:
        for count in (40, 64):  # in a graph of 64 rows both
            burst = [prefix + rng.integers(3, 256, 16 + count).tolist() for _ in range(count)]
            outputs = engine.generate(burst, SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True))
            assert all(len(output.outputs[0].token_ids) == 64 for output in outputs)
        assert engine.stats().failed_captures == 0 and captured.count(captured[-1]) > 1
        engine.check()


def test_early_launches_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that begin while those before them end read nothing too early."""
    sizes = {"vocab_size": 512, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4}
    model = small_llama(torch.bfloat16, num_attention_heads=8, head_dim=128, max_position_embeddings=1_024, **sizes)
    rng = np.random.default_rng(0)
    batches = [[rng.integers(3, 512, 40 + row % 9).tolist() for row in range(rows)] for rows in (1, 7, 100)]
    options = tree_model.compiler_options(model.device) or {}

    def answers(options: dict[str, bool]) -> list[object]:
        monkeypatch.setattr(tree_model, "compiler_options", lambda _: options)
        torch._dynamo.reset()
        found: list[object] = []
        with Engine(model, kv_tokens=20_000, torch_compile=True) as engine:
            for batch in batches:
                for logprobs in (None, 3):
                    engine.reset_prefix_cache()
                    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=logprobs)
                    found += [
                        (one.outputs[0].token_ids, one.outputs[0].logprobs) for one in engine.generate(batch, params)
                    ]
            assert engine.stats().failed_captures == 0
        return found

    assert answers(options) == answers({name: on for name, on in options.items() if name != "triton.enable_pdl"})


def test_pressed_prompts_keep_the_same_keys_as_on_the_host() -> None:
    """Beside captured steps, in one step and in chunks; and with KV in 8 bits, alone and together alike."""
    prompts = [np.random.default_rng(seed).integers(0, 97, 150).tolist() for seed in range(4)]
    params = greedy_under(Press(ratio=0.3, window=9, sinks=2), 24)
    with Engine(llama(), kv_tokens=1_024) as engine:
        wanted = [output.outputs[0].token_ids for output in engine.generate(prompts, params)]
    for options in ({}, {"max_step_tokens": 64}, {"enforce_eager": True}):
        with Engine(llama().to("cuda"), kv_tokens=1_024, debug=True, **options) as engine:
            found = [output.outputs[0].token_ids for output in engine.generate(prompts, params)]
            assert found == wanted, options
            engine.check()
    with Engine(llama().to("cuda"), kv_tokens=1_024, kv_dtype="int8", debug=True) as engine:
        together = engine.generate(prompts, params)
        engine.reset_prefix_cache()
        for prompt, output in zip(prompts, together, strict=True):
            assert engine.generate(prompt, params)[0].outputs[0].token_ids == output.outputs[0].token_ids
