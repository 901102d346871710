"""Models of true shapes with random weights: what a benchmark needs of a checkpoint without the checkpoint."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's dimensions."""

    layers: int
    hidden: int
    inner: int
    q_heads: int
    kv_heads: int
    vocab: int
    head_dim: int = 128

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Shape":
        """Those of a checkpoint."""
        return cls(
            config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads,
            config.num_key_value_heads, config.vocab_size, config.head_dim,
        )  # fmt: skip


SHAPES = {
    "8B": Shape(32, 4096, 14_336, 32, 8, 128_256),  # Llama-3-8B
    "70B": Shape(80, 8192, 28_672, 64, 8, 128_256),  # Llama-3-70B
    "13B": Shape(40, 5120, 13_824, 40, 40, 32_016),  # CodeLlama-13b
    "6B": Shape(32, 4096, 11_008, 32, 4, 64_000),  # Yi-6B
    "toy": Shape(2, 64, 128, 4, 2, 97, 16),
}


def configuration(shape: Shape, context: int = 32_768) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.q_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def build(shape: Shape, device: torch.device, context: int = 32_768) -> PreTrainedModel:
    """A Llama of this shape in bfloat16 on a GPU, in float32 elsewhere, its weights drawn with seed 0."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(configuration(shape, context), dtype=dtype)
    return model.eval()


def weight_bytes(model: PreTrainedModel) -> int:
    """What a step reads: every parameter once, but for the embedding's table."""
    embedding = model.get_input_embeddings().weight
    return sum(p.numel() * p.element_size() for p in model.parameters()) - embedding.numel() * embedding.element_size()
