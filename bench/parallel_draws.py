"""Draws of a model over several GPUs: from each rank's logits, or from the logits of all ranks, gathered in every step.

    python -m bench.parallel_draws [--ranks 2] [--times 3] [--save]

Prints a line for each kind of draw: milliseconds of a decoding step either way, and their ratio. A Llama of 8B shape in
bfloat16 with random weights generates 128 tokens each for 256 requests on one prefix of 16,256 tokens, and for one
request alone. All prompts are cached before they are timed, and the time of a single token is subtracted. The two ways
alternate on one engine, after one round that is not counted; figures are medians. top-p without top-k gathers either
way: it shows the noise.

Bias. A workload whose step is short, so that draws weigh more than in most. Without a GPU all sizes are toys.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.contenders import Options, random_engine, saved_config
from bench.report import Report
from bench.shapes import SHAPES
from bench.workloads import FULL, TOY, Ask, Workloads
from radixgen import Engine, SamplingParams
from radixgen.model.parallel import ParallelModel

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("prefix", {"temperature": 0.0}),
    "temperature 1": ("prefix", {}),
    "top-k 50, top-p 0.9": ("prefix", {"top_k": 50, "top_p": 0.9}),
    "top-p 0.9": ("prefix", {"top_p": 0.9}),
    "one request, greedy": ("latency", {"temperature": 0.0}),
    "one request, temperature 1": ("latency", {}),
}
"""Workload of `bench.workloads`, and sampling parameters."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="GPUs, or processes where there are none")
    parser.add_argument("--times", type=int, default=3, help="timed rounds of each kind")
    parser.add_argument("--save", action="store_true", help="keep the JSON line under bench/results/")
    options = parser.parse_args(arguments)
    report = Report("parallel_draws")
    cuda = torch.cuda.is_available()
    shape = SHAPES["8B" if cuda else "toy"]
    sizes = Options(
        shape,
        kv_tokens=200_000 if cuda else 20_000,
        max_seqs=1024,
        max_model_len=32_768 if cuda else 512,
        step_tokens=None,
        ranks=options.ranks,
        warm_up=False,
    )
    workloads = Workloads(FULL if cuda else replace(TOY, requests=4, new=8), shape.vocab)
    with tempfile.TemporaryDirectory() as folder, random_engine(sizes, saved_config(sizes, Path(folder))) as engine:
        model = engine._model
        assert isinstance(model, ParallelModel)
        for name, (workload, params) in KINDS.items():
            found: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(1 + options.times):
                for gather, times in found.items():
                    model.gather_logits = gather
                    times.append(_step_ms(engine, [*workloads.start(workload)][-1], params))
            ours, gathered = (median(times[1:]) for times in found.values())
            report.keep(**{name: {"ms": ours, "gathered_ms": gathered, "all_ms": [*found.values()]}})
            ratio = f"{gathered / ours:.3f}×"
            report.say(f"{name}: {ours:.3f} ms a step; {gathered:.3f} ms with all logits gathered: {ratio}")
    report.keep(ranks=options.ranks)
    return report.finish(check=False, save=options.save)


def _step_ms(engine: Engine, ask: Ask, params: dict[str, Any]) -> float:
    """Milliseconds of a decoding step of requests whose prompts are cached."""
    engine.reset_prefix_cache()
    engine.generate(ask.prompts[:1], SamplingParams(max_tokens=1))
    seconds = []
    for count in (1, 1, ask.new):
        begin = time.perf_counter()
        engine.generate(ask.prompts, SamplingParams(max_tokens=count, ignore_eos=True, seed=0, **params))
        seconds.append(time.perf_counter() - begin)
    return 1e3 * (seconds[2] - seconds[1]) / (ask.new - 1)


if __name__ == "__main__":
    sys.exit(main())
