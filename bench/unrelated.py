"""Prompts that share nothing: what radixgen costs where there is nothing to gain.

`python -m bench.unrelated [--check] [--prompts N] [--new-tokens N]`

One thread, one process, SmolLM2 in float32, greedy, end-of-sequence ignored; radixgen and transformers' `generate`
take turns and the median of the ratios counts. The limit is reading the weights once a decode step, at the rate of
one matrix-vector product over them measured in the same run.

Bias: all prompts are of one length, so `generate` pads nothing.
"""

import statistics
import sys
import time
from typing import Any

import numpy as np
import torch

from bench.baseline import Generate, engine_seconds
from bench.report import Report, benchmark_options
from radixgen import Engine
from radixgen.model import smollm2

PROMPT_TOKENS = 128


def weight_seconds(model: Any) -> float:
    """The time of one pass of a single row over all matrices."""
    matrices = [p.detach() for p in model.parameters() if p.dim() == 2]
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        for matrix in matrices:
            torch.mv(matrix, torch.ones(matrix.shape[1]))
        best = min(best, time.perf_counter() - begin)
    return best


def main() -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, 40_000, (chosen.prompts, PROMPT_TOKENS)).tolist()
    path = smollm2.fetch()
    report = Report("unrelated")
    report.keep(prompts=chosen.prompts, new_tokens=chosen.new_tokens)
    baseline = Generate(path)
    report.limit("reading the weights once a step", weight_seconds(baseline.model) * chosen.new_tokens)
    ours, theirs = [], []
    with Engine(path, dtype="float32", kv_tokens=chosen.prompts * (PROMPT_TOKENS + chosen.new_tokens)) as engine:
        for repeat in range(chosen.repeats + 1):
            pair = (
                engine_seconds(engine, prompts, chosen.new_tokens),
                baseline.seconds(prompts, chosen.new_tokens),
            )
            if repeat:
                ours.append(pair[0])
                theirs.append(pair[1])
    report.contender("seconds_radixgen", "radixgen", statistics.median(ours))
    report.contender("seconds_generate", "transformers generate", statistics.median(theirs))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    report.figure("radixgen_over_generate", ratio, f"radixgen / generate: {ratio:.3f}", at_most=1.10)
    return report.finish(check=chosen.check, save=chosen.save)


if __name__ == "__main__":
    sys.exit(main())
