"""Masks that transformers makes are read, and what is no window is refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from radixgen import Engine, SamplingParams, UnsupportedModel
from radixgen.core import Chunk, Window
from radixgen.model.masks import MaskError, read_mask

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "pad_token_id": 0,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def chunked(size: int) -> Callable[..., Tensor]:
    return chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("reach", [1, 2, 9, 300, 10_000_000])
@pytest.mark.parametrize(
    ("function", "window"),
    [
        (causal_mask_function, None),
        (sliding_window_causal_mask_function(1), 1),
        (sliding_window_causal_mask_function(8), 8),
        (sliding_window_causal_mask_function(4096), 4096),
        (chunked(5), Chunk(5)),
        (chunked(8192), Chunk(8192)),
    ],
)
def test_windows_and_chunks_are_read(function: Callable[..., Tensor], window: Window | None, reach: int) -> None:
    size = window.size if isinstance(window, Chunk) else window
    assert read_mask(function, reach, CPU) == (None if size is None or size >= reach else window)


def first_tokens_too(size: int) -> Callable[..., Tensor]:
    return or_masks(sliding_window_causal_mask_function(size), lambda b, h, q, k: (k < 4) & (k <= q))


def every_other(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & ((q - k) % 2 == 0)


def late_chunks(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Chunks that begin 3 tokens late, as those of a padded sequence do."""
    return (k <= q) & ((k - 3) // 16 == (q - 3) // 16)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (first_tokens_too(16), "neither causal"),
        (first_tokens_too(4096), "neither causal"),
        (every_other, "neither causal"),
        (late_chunks, "neither causal"),
        (bidirectional_mask_function, "neither causal"),
        (and_masks(sliding_window_causal_mask_function(9), chunked(30)), "neither causal"),
        (or_masks(causal_mask_function, blockwise_overlay(torch.zeros(1, 8))), "more than positions"),
    ],
)
def test_other_masks_are_refused(function: Callable[..., Tensor], reason: str) -> None:
    with pytest.raises(MaskError, match=reason):
        read_mask(function, 100_000, CPU)


def made(kind: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **options)).eval()


@pytest.mark.parametrize(
    ("kind", "options", "windows"),
    [
        ("llama4_text", {"num_local_experts": 2, "attention_chunk_size": 7}, {None, Chunk(7)}),
        ("phimoe", {"num_local_experts": 4, "sliding_window": 9}, {9}),
        ("afmoe", {"sliding_window": 6}, {6, None}),
    ],
)
def test_tokens_past_windows_and_chunks_are_those_of_transformers(kind: str, options: dict, windows: set) -> None:
    """Prompts that end before, on and behind an edge; with a shared prefix, in one burst."""
    prompts = [list(range(3, 3 + length)) for length in (5, 7, 14, 40)]
    model = made(kind, **options)
    own = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    expected = [model.generate(torch.tensor([one]), **own)[0, len(one) :].tolist() for one in prompts]
    with Engine(model, kv_tokens=256) as engine:
        assert set(engine._model.model.windows) == windows
        assert [output.outputs[0].token_ids for output in engine.generate(prompts, GREEDY)] == expected


def test_a_mask_that_a_layer_changes_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"doge.*changes its attention mask"):
        Engine(made("doge", keep_window_size=16), kv_tokens=64)


def test_positions_that_a_layer_counts_by_itself_are_refused() -> None:
    """Llama 4 scales queries by the row's place in the batch; below `floor_scale` that is 1."""
    options = {"num_local_experts": 2, "no_rope_layers": [1, 0, 1, 0], "attn_temperature_tuning": True}
    with pytest.raises(UnsupportedModel, match="counts positions"):
        Engine(made("llama4_text", floor_scale=16, **options), kv_tokens=64, max_step_tokens=8)
    Engine(made("llama4_text", floor_scale=16, **options), kv_tokens=64, max_model_len=15, max_step_tokens=8).close()


def test_attention_that_is_more_than_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.eager_attention_forward

    def biased(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> Any:
        return plain(module, q, k, v, mask + torch.arange(mask.shape[-1]), **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", biased)
    with pytest.raises(UnsupportedModel, match="own attention"):
        Engine(made("llama"), kv_tokens=64)
