"""Tiny random models of the families that the engine serves, and of some that it must refuse.

Every family turns on what it has that attention can get wrong: windows of 8 to 12 keys, soft
caps, sinks, grouped and single KV heads, query-key norms, partial, scaled and absent rotary
positions, a V narrower than K, routed experts.

The engine replaces the attention of the instance that it is given, so an oracle needs one of its
own: `build` twice with one seed gives equal weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.pytorch_utils import Conv1D

VOCAB = 160
MAX_POSITIONS = 256
PAD = 0
HEADS: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class Family:
    """One configuration, over `HEADS`."""

    model_type: str
    config: dict[str, Any]


def _longrope(original: int) -> Family:
    """Phi-3 that takes its long factors in a step with any position at or past `original`."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": MAX_POSITIONS / original,
        "attention_factor": 1.2,
        "short_factor": [1.0, 1.1, 1.3, 1.6],
        "long_factor": [1.0, 2.0, 4.0, 7.0],
    }
    return Family(
        "phi3",
        {
            "num_attention_heads": 4,
            "hidden_size": 32,
            "original_max_position_embeddings": original,
            "rope_parameters": rope,
        },
    )


_FAMILIES = {
    "llama": Family("llama", {"head_dim": 12}),
    "mistral": Family("mistral", {"sliding_window": 9}),
    "mixtral": Family("mixtral", {"sliding_window": 12, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen2": Family(
        "qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": Family(
        "qwen3",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 11,
            "max_window_layers": 2,
            "attention_bias": True,
        },
    ),
    "qwen3-moe": Family(
        "qwen3_moe",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 10,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "phi3": Family("phi3", {"sliding_window": 12, "num_key_value_heads": 3}),
    "phi3-longrope": _longrope(original=4),
    "gemma": Family("gemma", {"num_key_value_heads": 1, "head_dim": 20}),
    "gemma2": Family(
        "gemma2",
        {
            "tie_word_embeddings": False,
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3": Family(
        "gemma3_text",
        {
            "tie_word_embeddings": False,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "sliding_window": 9,
            "query_pre_attn_scalar": 16,
            "layer_types": [SLIDING, SLIDING, FULL],
        },
    ),
    "olmo2": Family("olmo2", {}),
    "granite": Family(
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 0.5,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": Family(
        "smollm3",
        {
            "tie_word_embeddings": False,
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 10,
        },
    ),
    "cohere": Family("cohere", {"tie_word_embeddings": False, "logit_scale": 0.8, "use_qk_norm": True}),
    "starcoder2": Family("starcoder2", {"tie_word_embeddings": False, "num_key_value_heads": 1, "sliding_window": 11}),
    "stablelm": Family(
        "stablelm",
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "partial_rotary_factor": 0.25,
            "use_qkv_bias": True,
            "qk_layernorm": True,
            "use_parallel_residual": True,
        },
    ),
    "gpt-neox": Family("gpt_neox", {"hidden_size": 64, "num_attention_heads": 4, "partial_rotary_factor": 0.25}),
    "gpt2": Family("gpt2", {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True}),
    "opt": Family("opt", {"ffn_dim": 64}),
    "deepseek-v3": Family(
        "deepseek_v3",
        {
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 24,
            "num_mtp_layers": 0,
        },
    ),
    "glm4": Family("glm4", {"head_dim": 16}),
    "nemotron": Family("nemotron", {"head_dim": 12}),
    "exaone4": Family(
        "exaone4",
        {
            "num_hidden_layers": 4,
            "sliding_window": 8,
            "sliding_window_pattern": "LLLG",
            "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
        },
    ),
    "gpt-oss": Family(
        "gpt_oss",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "sliding_window": 9,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "truncate": False,
            },
        },
    ),
}

FAMILIES = tuple(_FAMILIES)


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The model of a family: float32, CPU, `eval`, eager attention, no stop tokens.

    Equal `name` and `seed` give bitwise equal weights. "phi3-longrope" takes its long factors for
    every sequence longer than 4 tokens, as an engine with `max_model_len` past 4 does for all.
    """
    return _build(_FAMILIES[name], seed)


def build_dynamic_rope(seed: int = 0) -> PreTrainedModel:
    """A Llama whose rotary frequencies depend on the sequence's length, from 16 tokens on."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return _build(Family("llama", {"rope_parameters": rope, "max_position_embeddings": 16}), seed)


def build_longrope(original: int, seed: int = 0) -> PreTrainedModel:
    """Phi-3: sequences of up to `original` tokens take the short factors, longer ones the long.

    transformers' `generate` changes over in mid-sequence, so oracle and engine agree on sequences
    that stay within `original`, or whose prompts exceed it.
    """
    return _build(_longrope(original), seed)


def build_unsupported() -> dict[str, Callable[[], PreTrainedModel]]:
    """Builders, by family, of models that the attention interface alone cannot serve."""
    state_space = {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2}
    return {
        "t5": lambda: _tiny("t5", AutoModelForSeq2SeqLM, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4),
        "mamba": lambda: _tiny("mamba", hidden_size=32, state_size=4, num_hidden_layers=2),
        "jamba": lambda: _tiny(
            "jamba",
            **HEADS,
            **state_space,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=2,
            num_experts_per_tok=1,
        ),
        "qwen3-next": lambda: _tiny(
            "qwen3_next",
            **HEADS,
            head_dim=8,
            layer_types=["linear_attention", FULL],
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
        "bloom": lambda: _tiny("bloom", hidden_size=32, n_head=4, n_layer=2),
    }


def _build(family: Family, seed: int) -> PreTrainedModel:
    config = {**HEADS, "max_position_embeddings": MAX_POSITIONS, **family.config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _tiny(family.model_type, **config)
        _randomise(model)
    return model


def _tiny(model_type: str, auto: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
        **options,
    )
    config.eos_token_id = None  # GLM-4 reads None as its own three
    model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.generation_config = GenerationConfig(pad_token_id=PAD)
    return model.eval()


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Draw all weights so that greedy decoding neither repeats itself nor meets near-ties.

    Matrices have standard deviation gain / sqrt(fan-in), which keeps activations near 1; embeddings
    are narrow beside what the sublayers add, or tied ones would echo their token. Norms and biases
    move by 0.3 about their initial value.
    """
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    for name, weight in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        noise = torch.randn(weight.shape)
        if weight.ndim == 1 or name.endswith("bias"):
            weight.add_(0.3 * noise)
        elif isinstance(owner, nn.Embedding):
            spread = 0.12 if tied else 0.6 / float(getattr(owner, "embed_scale", 1.0))
            weight.copy_(spread * noise)
        else:
            router = "router" in type(owner).__name__.lower()
            gain = 3.0 if router else 1.0 if owner is head else 1.75
            inward = isinstance(owner, (Conv1D, GptOssExperts))
            weight.copy_(gain / math.sqrt(weight.shape[-2 if inward else -1]) * noise)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape))
