"""Whole engines behind one interface, with the same random weights: radixgen, and vLLM where it is installed."""

import gc
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from bench.shapes import Shape, build, configuration
from bench.workloads import Answers, Ask
from radixgen import Engine, SamplingParams
from radixgen.core import Limits
from radixgen.version import VERSION


@dataclass(frozen=True, slots=True)
class Options:
    """What every engine is given."""

    shape: Shape
    kv_tokens: int
    max_seqs: int
    max_model_len: int
    step_tokens: int | None
    """Rows of a step at the most; None: the engine's own default"""
    ranks: int = 1
    warm_up: bool | None = None
    """None: the engine's own default"""
    host_kv_tokens: int = 0
    """Tokens that host memory keeps"""


class Contender(Protocol):
    """An engine that is measured."""

    about: dict[str, Any]
    """`engine`, `version`, and the `step_tokens` that it has"""

    def answer(self, ask: Ask) -> Answers:
        """Generate for all prompts together, and wait for the last token."""

    def reset(self) -> None:
        """Forget what is cached."""


def random_engine(options: Options, config: str | None = None) -> Engine:
    """An engine with random weights.

    config: a directory with a configuration, of which each rank makes them; by default they are made here.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Engine(
        config or build(options.shape, device, options.max_model_len),
        load_format="dummy" if config else "auto",
        tensor_parallel_size=options.ranks,
        warm_up=options.warm_up,
        kv_tokens=options.kv_tokens,
        host_kv_tokens=options.host_kv_tokens,
        max_model_len=options.max_model_len,
        max_step_tokens=options.step_tokens,
        limits=Limits(max_num_seqs=options.max_seqs),
    )


class Radixgen:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.about = {"engine": "radixgen", "version": VERSION, "step_tokens": engine.max_step_tokens}

    def answer(self, ask: Ask) -> Answers:
        params = SamplingParams(n=ask.n, temperature=ask.temperature, max_tokens=ask.new, ignore_eos=True)
        return [[one.token_ids for one in output.outputs] for output in self._engine.generate(ask.prompts, params)]

    def reset(self) -> None:
        self._engine.reset_prefix_cache()

    def close(self) -> None:
        """End the engine, and its other processes."""
        self._engine.close()


class Vllm:
    """In this process; with `cascade`, its cascade attention on, by the model runner before version 2."""

    def __init__(self, options: Options, *, cascade: bool = False) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if cascade:
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        import vllm

        more: dict[str, Any] = {"disable_cascade_attn": False} if cascade else {}
        if options.step_tokens:
            more["max_num_batched_tokens"] = options.step_tokens
        if options.host_kv_tokens:
            more["kv_offloading_size"] = options.host_kv_tokens * token_bytes(options.shape) / 2**30
        self._llm = vllm.LLM(
            model=saved_config(options, Path(tempfile.mkdtemp())),
            skip_tokenizer_init=True,
            load_format="dummy",
            generation_config="vllm",
            dtype="bfloat16",
            max_model_len=options.max_model_len,
            num_gpu_blocks_override=options.kv_tokens // 16,
            max_num_seqs=options.max_seqs,
            gpu_memory_utilization=0.85,
            enable_prefix_caching=True,
            seed=0,
            **more,
        )
        self._take_weights(build(options.shape, torch.device("cuda"), options.max_model_len))
        gc.collect()
        torch.cuda.empty_cache()
        steps = self._llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
        name = "vllm-cascade" if cascade else "vllm"
        self.about = {"engine": name, "version": vllm.__version__, "step_tokens": steps}

    def _take_weights(self, network: PreTrainedModel) -> None:
        self._llm.apply_model(lambda model: len(model.load_weights(iter(network.named_parameters()))))

    def answer(self, ask: Ask) -> Answers:
        from vllm import SamplingParams as Params

        params = Params(n=ask.n, temperature=ask.temperature, max_tokens=ask.new, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in ask.prompts]
        found = self._llm.generate(prompts, params, use_tqdm=False)
        return [[list(one.token_ids) for one in output.outputs] for output in found]

    def reset(self) -> None:
        assert self._llm.reset_prefix_cache(), "vLLM kept its prefix cache"


def token_bytes(shape: Shape) -> int:
    """Bytes of one token's KV in all layers, in 16 bits."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * 2


def saved_config(options: Options, folder: Path) -> str:
    """`folder`, that then holds a model's configuration: in bfloat16 on a GPU, in float32 elsewhere."""
    config = configuration(options.shape, options.max_model_len).to_dict()
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": dtype, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)
