"""Many questions on one document: radixgen, radixgen without sharing, transformers' `generate`.

`python -m bench.prefix [--check] [--questions N] [--new-tokens N]`

One thread, one process, SmolLM2 in float32, everything greedy with end-of-sequence ignored. The limit is the time of
the matrix products of the rows that must be computed (each distinct prompt token once, one row a generated token),
at the rate of one large product measured in the same run; attention, norms and Python are not in it.

Bias: the workload is the one that sharing is made for; `generate` recomputes the document for every question because
its batch interface has no way not to.
"""

import sys
from importlib.resources import files

import torch
from transformers import AutoTokenizer

from bench.baseline import Generate, engine_seconds, layer_operations, matrix_rate
from bench.report import Report, benchmark_options
from radixgen import Engine
from radixgen.model import smollm2

DOCUMENT_TOKENS = 900


def questions(count: int) -> list[list[int]]:
    """`count` prompts that share the first 900 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2.fetch())
    text = files("radixgen.demo").joinpath("document.md").read_text(encoding="utf-8")
    document = tokenizer(text)["input_ids"][:DOCUMENT_TOKENS]
    ask = "\n\nQuestion {0}: what does the text say about matter {1}, and why is it so?\nAnswer:"
    return [document + tokenizer(ask.format(i, 7 * i))["input_ids"] for i in range(count)]


def main() -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    prompts, new_tokens = questions(chosen.questions), chosen.new_tokens
    path = smollm2.fetch()
    report = Report("prefix")
    report.keep(questions=len(prompts), new_tokens=new_tokens)

    baseline = Generate(path)
    distinct = len({tuple(p[: i + 1]) for p in prompts for i in range(len(p))})
    row, logit_row = layer_operations(baseline.model)
    generated = len(prompts) * new_tokens
    limit = (distinct + generated - len(prompts)) * row + generated * logit_row
    limit /= matrix_rate(512)
    report.limit("matrix products of the distinct rows", limit)

    slots = sum(len(p) + new_tokens for p in prompts)
    seconds = {}
    with Engine(path, dtype="float32", kv_tokens=slots) as engine:
        engine_seconds(engine, prompts[:1], 2)
        seconds["shared"] = engine_seconds(engine, prompts, new_tokens)
    report.contender("seconds_shared", "radixgen", seconds["shared"])
    with Engine(path, dtype="float32", kv_tokens=slots, share=False) as engine:
        engine_seconds(engine, prompts[:1], 2)
        seconds["unshared"] = engine_seconds(engine, prompts, new_tokens)
    report.contender("seconds_unshared", "radixgen, share=False", seconds["unshared"])
    baseline.seconds(prompts[:1], 2)
    seconds["generate"] = baseline.seconds(prompts, new_tokens)
    report.contender("seconds_generate", "transformers generate", seconds["generate"])

    gain = seconds["generate"] / seconds["shared"]
    report.figure("generate_over_shared", gain, f"against generate: {gain:.2f}×", at_least=8.0)
    gain = seconds["unshared"] / seconds["shared"]
    report.figure("unshared_over_shared", gain, f"against share=False: {gain:.2f}×", at_least=4.0)
    cost = seconds["unshared"] / seconds["generate"]
    report.figure("unshared_over_generate", cost, f"share=False / generate: {cost:.2f}", at_most=1.15)
    return report.finish(check=chosen.check, save=chosen.save)


if __name__ == "__main__":
    sys.exit(main())
