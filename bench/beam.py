"""Beam search: what a step of beams costs where they are cursors of one tree.

`python -m bench.beam [--check] [--widths W …] [--prompt-tokens N] [--new-tokens N]`

One thread, one process, SmolLM2 in float32, one prompt of random tokens, end-of-sequence ignored; radixgen and
transformers' `generate(num_beams=width)` take turns, both search the same, and the median of the ratios counts. The
limit is reading the weights once a step, at the rate of one matrix-vector product over them measured in the same run.

Bias: random tokens let beams part early, and after a prompt of words they share more. `generate` computes the prompt
once a beam; with `--prompt-tokens 8` that hardly counts.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.baseline import Generate
from bench.report import Report, benchmark_options
from bench.unrelated import weight_seconds
from radixgen import BeamSearchParams, Engine
from radixgen.model import smollm2

Found = tuple[float, list[list[int]]]
"""Seconds, and the hypotheses, best first."""


def searched(engine: Engine, prompt: list[int], width: int, new_tokens: int) -> Found:
    """By radixgen, from an empty cache."""
    engine.reset_prefix_cache()
    params = BeamSearchParams(beam_width=width, max_tokens=new_tokens, ignore_eos=True)
    begin = time.perf_counter()
    output = engine.beam_search(prompt, params)[0]
    return time.perf_counter() - begin, [one.token_ids for one in output.outputs]


def generated(model: Any, prompt: list[int], width: int, new_tokens: int) -> Found:
    """By transformers."""
    ids = torch.tensor([prompt])
    options = {"num_beams": width, "num_return_sequences": width, "do_sample": False, "max_new_tokens": new_tokens}
    begin = time.perf_counter()
    with torch.inference_mode():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, pad_token_id=0, **options)
    return time.perf_counter() - begin, found[:, len(prompt) :].tolist()


def measure(report: Report, engine: Engine, model: Any, prompt: list[int], width: int, chosen: Any) -> None:
    """One width: the first turn of each is not counted."""
    ours: list[float] = []
    theirs: list[float] = []
    same = rows = 0
    for repeat in range(chosen.repeats + 1):
        before = engine.stats().computed_rows
        own, found = searched(engine, prompt, width, chosen.new_tokens)
        rows = engine.stats().computed_rows - before
        other, wanted = generated(model, prompt, width, chosen.new_tokens)
        same = sum(a == b for a, b in zip(found, wanted, strict=True))
        if repeat:
            ours.append(own)
            theirs.append(other)
    report.contender(f"seconds_{width}_radixgen", f"width {width}: radixgen", statistics.median(ours))
    report.contender(f"seconds_{width}_generate", f"width {width}: generate", statistics.median(theirs))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    report.figure(f"ratio_{width}", ratio, f"width {width}: radixgen / generate: {ratio:.3f}", at_most=1.1)
    least = len(prompt) + width * (chosen.new_tokens - 1)
    report.figure(f"rows_{width}", rows, f"width {width}: {rows:,} rows of {least:,} that are distinct", at_most=least)
    report.figure(f"same_{width}", same, f"width {width}: {same} of {width} hypotheses are the same", at_least=width)


def main(arguments: Sequence[str] | None = None, path: Path | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    prompt = np.random.default_rng(0).integers(3, 150 if path else 40_000, chosen.prompt_tokens).tolist()
    path = path or smollm2.fetch()
    report = Report("beam")
    report.keep(prompt_tokens=chosen.prompt_tokens, new_tokens=chosen.new_tokens)
    model = Generate(path).model
    model.generation_config.eos_token_id = None
    report.limit("reading the weights once a step", weight_seconds(model) * chosen.new_tokens)
    with Engine(
        path, dtype="float32", kv_tokens=chosen.prompt_tokens + 2 * max(chosen.widths) * chosen.new_tokens
    ) as engine:
        for width in chosen.widths:
            measure(report, engine, model, prompt, width, chosen)
    return report.finish(check=chosen.check, save=chosen.save)


if __name__ == "__main__":
    sys.exit(main())
