"""Prompts that share nothing: what radixgen costs where there is nothing to gain.

`python -m bench.unrelated [--check] [--prompts N] [--new-tokens N]`

One thread, one process, SmolLM2 in float32, greedy, end-of-sequence ignored; radixgen and transformers' `generate`
take turns and the median of the ratios counts. The limit is reading the weights once a decode step, at the rate of
one matrix-vector product over them measured in the same run.

Bias: all prompts are of one length, so `generate` pads nothing.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch

from bench.baseline import Generate, engine_seconds
from bench.report import Bound, Report
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 where a bound is missed")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, 40_000, (options.prompts, PROMPT_TOKENS)).tolist()
    path = smollm2.fetch()
    report = Report("unrelated", prompts=options.prompts, new_tokens=options.new_tokens)
    baseline = Generate(path)
    report.limit("reading the weights once a step", weight_seconds(baseline.model) * options.new_tokens)
    ours, theirs = [], []
    with Engine(path, kv_tokens=options.prompts * (PROMPT_TOKENS + options.new_tokens)) as engine:
        for repeat in range(options.repeats + 1):
            pair = (
                engine_seconds(engine, prompts, options.new_tokens),
                baseline.seconds(prompts, options.new_tokens),
            )
            if repeat:
                ours.append(pair[0])
                theirs.append(pair[1])
    report.contender("radixgen", statistics.median(ours))
    report.contender("transformers generate", statistics.median(theirs))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    report.bound(Bound("radixgen / generate", ratio, at_most=1.10))
    report.finish(check=options.check)


if __name__ == "__main__":
    main()
