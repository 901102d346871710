"""transformers' `generate`, run as fairly as it can be: SDPA, inference mode, one left-padded batch."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.device import Ceilings
from bench.report import time_each
from radixgen import Engine, SamplingParams
from radixgen.model.quiet import quiet_transformers


class Generate:
    """A model of its own with transformers' attention."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        with quiet_transformers():
            self.model: Any = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").eval()

    def seconds(self, prompts: Sequence[list[int]], new_tokens: int) -> float:
        """Time of exactly `new_tokens` greedy tokens a prompt, end-of-sequence ignored."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        begin = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
        return time.perf_counter() - begin


def engine_seconds(engine: Engine, prompts: Sequence[list[int]], new_tokens: int) -> float:
    """Time of exactly `new_tokens` greedy tokens a prompt from an empty cache."""
    engine.reset_prefix_cache()
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    begin = time.perf_counter()
    engine.generate(list(prompts), params)
    return time.perf_counter() - begin


def matrix_rate(rows: int, width: int = 576, height: int = 1536, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of `[rows, width] @ [width, height]`, the best of several."""
    a, b = torch.randn(rows, width, dtype=dtype), torch.randn(width, height, dtype=dtype)
    return 2.0 * rows * width * height / min(time_each(lambda: torch.matmul(a, b), times=20))


def cpu_ceilings(dtype: torch.dtype) -> Ceilings:
    """What this machine does with torch's threads: it reads a large float32 matrix, copies it, and multiplies in
    `dtype`. The best of several.
    """
    matrix, vector = torch.ones(8192, 16_384), torch.ones(16_384)
    target = torch.empty_like(matrix)
    size = matrix.numel() * matrix.itemsize
    read = min(time_each(lambda: torch.mv(matrix, vector), times=5))
    copy = min(time_each(lambda: target.copy_(matrix), times=5))
    return Ceilings(size / read, 2 * size / copy, matrix_rate(512, dtype=dtype))


def layer_operations(model: Any) -> tuple[float, float]:
    """Operations of one row in the layers, and of one row of logits; attention left out."""
    head = model.get_output_embeddings().weight.numel()
    weights = sum(p.numel() for p in model.model.layers.parameters())
    return 2.0 * weights, 2.0 * head
