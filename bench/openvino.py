"""OpenVINO GenAI as an engine to compare with: continuous batching with a prefix cache, on a GGUF file in F16.

`pip install openvino-genai`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from bench.workloads import Answers, Ask, Tokens
from radixgen.chat.history import num_common

STEP_TOKENS = 2048
KV_CACHE_GB = 1


class OpenVino:
    """One pipeline. What all prompts begin with is computed by a request of its own first, because requests that start
    together do not share what is not cached yet.
    """

    def __init__(self, model: Path, *, sequences: int, threads: int) -> None:
        """sequences: how many run at a time."""
        import openvino_genai

        self._genai: Any = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.cache_size = KV_CACHE_GB
        scheduler.max_num_batched_tokens, scheduler.max_num_seqs = STEP_TOKENS, sequences
        properties = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", properties)
        self._shared: Tokens = []
        version = openvino_genai.__version__.split("-")[0]
        self.about = {"engine": "OpenVINO", "version": version, "step_tokens": STEP_TOKENS}

    def reset(self) -> None:
        """The prefix cache can't be dropped: every run has to ask for other prompts."""
        self._shared = []

    def answer(self, ask: Ask) -> Answers:
        first, *others = ask.prompts
        shared = first[: min((num_common(first[:-1], other) for other in others), default=0)]
        if shared and num_common(self._shared, shared) < len(shared):
            self._generate(Ask([shared], 1))
            self._shared = shared
        return self._generate(ask)

    def _generate(self, ask: Ask) -> Answers:
        import openvino

        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = ask.new, True
        config.do_sample, config.num_return_sequences = ask.temperature > 0, ask.n
        if config.do_sample:
            config.temperature = ask.temperature
        prompts = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in ask.prompts]
        results = self._pipeline.generate(prompts, [config] * len(prompts))
        return [[list(answer) for answer in result.m_generation_ids] for result in results]
