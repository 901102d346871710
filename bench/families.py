"""Decoding of models of other shapes than a grouped Llama's, whole engine steps, against the chip's limit.

    python -m bench.families [--only NAME ...] [--check] [--save]

Mixtures of many small and of few large experts, large heads with windows (12 layers), latent attention in its expanded
form (6 layers): each decodes 1 and 64 sequences of 1,000 tokens that share nothing. A 13B with as many KV heads as
query heads, whole, decodes 256 sequences on one prefix. A step's limit is reading the weights that it touches and each
distinct key that a layer sees, or multiplying by dense weights where that takes longer; of experts it touches as many
as rows choose at random.

Bias. Weights are random: true routers prefer some experts, and then touch fewer of them. Steps are the median, on the
wall clock, of those in which all sequences decode, after an untimed pass over the same prompts; greedy. The pool holds
twice as many tokens as are asked for.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bench.device import Ceilings, Timer
from bench.report import Report, benchmark_options, track
from radixgen import Engine, Limits, SamplingParams
from radixgen.model.experts import expert_layers

KEYS, NEW = 1_000, 60
OWN = 16
"""Tokens of a prompt behind a shared prefix"""
NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@dataclass(frozen=True, slots=True)
class Family:
    """A model, how many sequences it decodes, and the bounds on steps, as multiples of the limit."""

    model_type: str
    sizes: dict[str, Any]
    rows: tuple[int, ...] = (1, 64)
    prefix: int = 0
    """Tokens that all sequences share; without any, each has KEYS of its own"""
    bounds: dict[int, float] = field(default_factory=dict)


FAMILIES = {
    "qwen3-moe": Family(  # Qwen3-30B-A3B
        "qwen3_moe",
        {"num_hidden_layers": 12, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4,
         "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
         "vocab_size": 151_936, "norm_topk_prob": True, "tie_word_embeddings": False},
        bounds={1: 1.5, 64: 1.5},
    ),
    "gpt-oss": Family(  # gpt-oss-20b, in bfloat16
        "gpt_oss",
        {"num_hidden_layers": 12, "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
         "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
         "sliding_window": 128, "vocab_size": 201_088},
        bounds={1: 1.5, 64: 1.5},
    ),
    "gemma3": Family(  # gemma-3-4b
        "gemma3_text",
        {"num_hidden_layers": 12, "hidden_size": 2560, "intermediate_size": 10_240, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 1024,
         "vocab_size": 262_208},
        bounds={1: 1.4, 64: 1.4},
    ),
    "deepseek-v2": Family(  # DeepSeek-V2-Lite
        "deepseek_v2",
        {"num_hidden_layers": 6, "hidden_size": 2048, "intermediate_size": 10_944, "num_attention_heads": 16,
         "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
         "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2,
         "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "vocab_size": 102_400,
         "max_position_embeddings": 32_768},
    ),
    "13B": Family(  # Llama-2-13b
        "llama",
        {"num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 13_824, "num_attention_heads": 40,
         "num_key_value_heads": 40, "vocab_size": 32_000, "max_position_embeddings": 32_768},
        rows=(256,),
        prefix=16_256,
        bounds={256: 1.6},
    ),
}  # fmt: skip
TOY = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 16, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "kv_lora_rank": 16, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "vocab_size": 97, "sliding_window": 8,
}  # fmt: skip


def build(family: Family, device: torch.device) -> PreTrainedModel:
    """Random weights, drawn with seed 0: in bfloat16 on a GPU, elsewhere of toy size in float32."""
    cuda = device.type == "cuda"
    toy = {} if cuda else {name: TOY[name] for name in family.sizes if name in TOY}
    config = AutoConfig.for_model(family.model_type, **family.sizes | toy, **NO_ENDS)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)
    return model.eval()


class Decoding:
    """An engine of one family, and the prompts that it decodes."""

    def __init__(self, family: Family, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.network = build(family, device)
        self.rows = family.rows if self.cuda else (1, 3)
        self.prefix, self.new = (family.prefix, NEW) if self.cuda else (min(family.prefix, 20), 9)
        self.own = (OWN if self.prefix else KEYS) if self.cuda else 4
        longest = self.prefix + self.own + self.new + 1
        self.engine = Engine(
            self.network,
            kv_tokens=2 * (self.prefix + max(self.rows) * (self.own + self.new)),
            max_model_len=longest,
            max_step_tokens=8_192 if self.cuda else 64,
            limits=Limits(max_num_seqs=max(self.rows)),
            seed=0,
        )

    def submit(self, rows: int) -> None:
        """From an empty cache, but for the prefix."""
        vocab = self.network.config.vocab_size
        self.engine.reset_prefix_cache()
        shared = np.random.default_rng(0).integers(3, vocab, self.prefix)
        if self.prefix:
            self.engine.generate([shared], SamplingParams(max_tokens=1, ignore_eos=True))
        params = SamplingParams(temperature=0.0, max_tokens=self.new, ignore_eos=True)
        for row in range(rows):
            own = np.random.default_rng(1 + row).integers(3, vocab, self.own)
            self.engine.submit(np.concatenate([shared, own]), params, output_kind="final")

    def step_ms(self, rows: int) -> float:
        """The median step that gives each of `rows` sequences a token."""
        self.submit(rows)
        taken = []
        while self.engine.has_unfinished:
            before, begin = self.engine.stats().generated_tokens, time.perf_counter()
            self.engine.step()
            seconds = time.perf_counter() - begin
            if self.engine.stats().generated_tokens - before == rows:
                taken.append(1e3 * seconds)
        return float(np.median(taken[1:]))

    def limit_ms(self, rows: int, ceilings: Ceilings) -> float:
        """Of the weights that a step of `rows` touches, and of the keys that its layers see."""
        network, model = self.network, self.engine._model.model
        layers = expert_layers(network)
        routed = sum(_bytes(weight) for layer in layers for weight in layer.parameters())
        tied = network.get_output_embeddings().weight is network.get_input_embeddings().weight
        dense = sum(map(_bytes, network.parameters())) - routed
        dense -= 0 if tied else _bytes(network.get_input_embeddings().weight)
        if layers:
            text = network.config
            missed = (1 - text.num_experts_per_tok / layers[0].num_experts) ** rows
            routed *= 1 - missed
        length = self.own + self.new // 2
        keys = 0
        for window, shape in zip(model.windows, model.layer_shapes, strict=True):
            seen = self.prefix + rows * length if self.prefix else rows * min(window or length, length)
            keys += shape.bytes_per_token * seen
        multiplied = rows * dense / ceilings.matrix  # two operations for each number, of two bytes
        return 1e3 * (max(dense / ceilings.read, multiplied) + (routed + keys) / ceilings.read)


def _bytes(weight: torch.Tensor) -> int:
    return weight.numel() * weight.element_size()


def report_family(report: Report, name: str, decoding: Decoding, ceilings: Ceilings) -> None:
    """A figure for each number of rows, after an untimed pass over all."""
    for rows in decoding.rows:
        decoding.step_ms(rows)
    for rows in decoding.rows:
        taken, limit = decoding.step_ms(rows), decoding.limit_ms(rows, ceilings)
        report.figure(
            f"{name}_{rows}", taken / limit,
            f"{name}, {rows:3d} rows: {taken:6.2f} ms, limit {limit:6.2f}, {taken / limit:.2f} x; "
            f"{1e3 * rows / taken:,.0f} tokens/s",
            at_most=FAMILIES[name].bounds.get(rows),
        )  # fmt: skip
        report.keep(**{f"{name}_{rows}_ms": taken, f"{name}_{rows}_limit_ms": limit})
    report.keep(**{f"{name}_failed_captures": decoding.engine.stats().failed_captures})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    options = parser.parse_args(arguments)
    report = Report("families")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    ceilings = Timer(device).ceilings() if cuda else Ceilings(1e12, 1e12, 1e14)
    report.say(f"limit: {torch.cuda.get_device_name() if cuda else 'none, toy sizes'}: {ceilings.describe()}")
    report.keep(ceilings=asdict(ceilings))
    for name in track(options.only, "running"):
        decoding = Decoding(FAMILIES[name], device)
        report_family(report, name, decoding, ceilings)
        decoding.engine.close()
        del decoding
        torch.cuda.empty_cache()
    return report.finish(check=options.check and cuda, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
